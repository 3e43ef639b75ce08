"""Released models become runs, and checkpoints become models for other tools.

    python export.py from-hf DIR_OR_NAME --out_dir out/smol        Hugging Face transformers: GPT-2, Llama, Qwen, NanoChat
    python export.py from-gguf FILE --out_dir out/smol             llama.cpp's format
    python export.py to-hf out/chat --out out/hf                   a directory for transformers, vLLM, PEFT
    python export.py to-gguf out/chat --out out/chat.gguf --type q8_0

A run made by from-hf or from-gguf is like any other: sample.py, chat.py, finetune.py, evaluate.py and train.py --init_from take
it. `export.py COMMAND --help` lists the options of a command.
"""

import shlex
import sys

from papagaio.errors import run
from papagaio.formats.options import COMMANDS, FromGgufOptions, FromHfOptions, ToGgufOptions, ToHfOptions
from papagaio.options import Options, parse_command

if __name__ == "__main__":  # a wrong option is refused before torch is imported, which takes a second or two
    OPTIONS = parse_command(COMMANDS, sys.argv[1:], __doc__)

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from model import GPT, GPTConfig
from papagaio import files
from papagaio.formats import adapter, configs, gguf, huggingface
from papagaio.formats.names import Names
from papagaio.formats.release import names_of, write_run
from papagaio.formats.tensors import TensorFiles
from papagaio.inside.report import facts
from papagaio.runs.checkpoint import Checkpoint, model_maker
from papagaio.runs.directory import open_checkpoint
from papagaio.tokenizer import Tokenizer

MAKE_MODEL = model_maker(GPT, GPTConfig)


def load(run: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[GPT, Tokenizer]:
    """The model of a run or checkpoint, ready for use, and its tokenizer: for notebooks. Raises UserError.

    model, tokenizer = load("out/run")
    ids = torch.tensor([[tokenizer.start, *tokenizer.encode("Once upon")]])
    logits, hidden = model(ids), model.hidden(ids)                                  # (1, T, V), (1, T, C)
    """
    checkpoint = open_checkpoint(Path(run))
    return checkpoint.build(MAKE_MODEL, torch.device(device), dtype).requires_grad_(False), checkpoint.tokenizer


def main(config: Options) -> None:
    match config:
        case FromHfOptions():
            directory = huggingface.find(config.source)
            with TensorFiles(directory) as tensors:
                write_run(config.out_dir, huggingface.open_release(directory, tensors), MAKE_MODEL)
        case FromGgufOptions():
            write_run(config.out_dir, gguf.open_release(config.source), MAKE_MODEL)
        case ToHfOptions():
            to_huggingface(config, open_checkpoint(config.source, config.base))
        case ToGgufOptions():
            to_gguf(config, open_checkpoint(config.source, config.base))


def opened(checkpoint: Checkpoint) -> tuple[GPT, Callable[[str], Tensor]]:
    """The model without weights, and its weights by name, adapters added in."""
    model = checkpoint.outline(MAKE_MODEL)
    return model, checkpoint.tensors().__getitem__


def to_huggingface(config: ToHfOptions, checkpoint: Checkpoint) -> None:
    model, read = opened(checkpoint)
    fields = vars(model.config)
    hidden = model.blocks[0].mlp.fc.weight.size(0)
    described = configs.to_huggingface(fields, hidden)  # refuses what has no counterpart
    names = names_of(model, "huggingface", configs.family_of(fields))
    with files.whole(config.out) as directory:
        directory.mkdir()
        if config.adapter:
            adapter.write(directory, checkpoint, names)
        else:
            shapes, theirs = {name: names.shape(name) for name in names.parts}, partial(names.to_theirs, ours=read)
            dtype = huggingface.smallest_dtype(names.shapes, read) if config.dtype == "auto" else getattr(torch, config.dtype)
            huggingface.write_weights(directory, shapes, theirs, dtype, config.shard_bytes)
            ids = huggingface.write_tokenizer(directory, checkpoint.tokenizer, checkpoint.is_chat, model.config.block_size)
            described |= ids | {"dtype": str(dtype).removeprefix("torch."), "use_cache": True}
            (directory / "config.json").write_text(files.to_json(described), encoding="utf-8")
        parameters = sum(p.numel() for p in model.parameters())
        known = facts(fields, checkpoint.state, parameters)
        card = huggingface.model_card(fields, checkpoint.state, known, parameters, described["architectures"][0])
        (directory / "README.md").write_text(card, encoding="utf-8")
    print(f"{config.out}: {described['architectures'][0]}, {parameters:,} parameters", file=sys.stderr)


def to_gguf(config: ToGgufOptions, checkpoint: Checkpoint) -> None:
    model, read = opened(checkpoint)
    tokenizer, fields = checkpoint.tokenizer, vars(model.config)

    def make_names(family: str, interleaved: bool) -> Names:
        return names_of(model, "gguf", family, interleaved)

    with files.whole(config.out) as path:
        gguf.write_gguf(path, make_names, read, fields, tokenizer, checkpoint.is_chat, config.type)
    recipe = config.out.with_suffix(".Modelfile")
    files.write_whole(recipe, gguf.modelfile(config.out.name, tokenizer, checkpoint.is_chat, model.config.block_size))
    print(f"{config.out}: {config.type}, {config.out.stat().st_size / 2**20:,.1f} MiB", file=sys.stderr)
    name, whole, recipe = (shlex.quote(str(word)) for word in (config.out.stem, config.out, recipe))
    print(f"next: llama-cli -m {whole}\n  or: ollama create {name} -f {recipe} && ollama run {name}", file=sys.stderr)


if __name__ == "__main__":
    run(main, OPTIONS)
