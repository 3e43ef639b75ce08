"""Released models in, our models out: beside transformers, PEFT and the gguf package, on small random models."""

import dataclasses
import hashlib
import http.server
import json
import os
import random
import shutil
import string
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from conftest import Script
from test_model import TINY

from export import load
from model import GPT, PRESETS, GPTConfig
from papagaio.batches.conversations import Message, render, render_prompt
from papagaio.formats import vocabulary
from papagaio.generation.engine import Engine
from papagaio.released_tokenizer import ReleasedTokenizer
from papagaio.runs.checkpoint import contents, write_checkpoint
from papagaio.runs.directory import open_checkpoint
from papagaio.tokenizer import GPT2_PATTERN, SPECIAL_TOKENS, BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer, train_bpe
from papagaio.training.lora import add_adapters

transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

TEXT = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16, "rope_theta": 1000.0}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "max_position_embeddings": 256}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", dict(n_embd=32, n_layer=2, n_head=4, n_positions=256)),
    "llama": ("Llama", SMALL | {"rms_norm_eps": 1e-5}),
    "llama tied": ("Llama", SMALL | {"tie_word_embeddings": True, "num_key_value_heads": 4, "rope_theta": 500.0}),
    "llama 3.1": ("Llama", SMALL | {"rope_parameters": LLAMA3}),
    "llama head_dim": ("Llama", SMALL | {"head_dim": 12}),
    "mistral": ("Mistral", SMALL | {"sliding_window": None, "head_dim": 8}),
    "qwen2": ("Qwen2", SMALL),
    "qwen3": ("Qwen3", SMALL | {"head_dim": 16}),
    "nanochat": ("NanoChat", SMALL),
}


@pytest.fixture(scope="session")
def bpe() -> BPETokenizer:
    return train_bpe([TEXT], 400)


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory, bpe: BPETokenizer) -> Callable[[str], tuple[Path, Any]]:
    """`released(name)` is a directory with one of MODELS and random weights, and transformers' model."""
    home, made = tmp_path_factory.mktemp("released"), {}

    def make(name: str) -> tuple[Path, Any]:
        if name not in made:
            kind, options = MODELS[name]
            torch.manual_seed(0)
            ids = {"vocab_size": bpe.vocab_size, "bos_token_id": 395, "eos_token_id": 395, "pad_token_id": None}
            config = getattr(transformers, f"{kind}Config")(**options, **ids)
            model = transformers.AutoModelForCausalLM.from_config(config).eval()
            with torch.no_grad():
                for p in model.parameters():
                    p.normal_(std=0.3)
            directory = home / name.replace(" ", "_")
            model.save_pretrained(directory, max_shard_size="40KB" if name == "llama" else "1GB")
            (directory / "tokenizer.json").write_text(vocabulary.own_json(bpe))
            made[name] = directory, model
        return made[name]

    return make


@pytest.fixture
def export(script: Script) -> Callable[..., str]:
    def run(*words: object, status: int = 0) -> str:
        done = script("export.py", *words)
        assert done.returncode == status, done.stderr
        assert status == 0 or (done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr), done.stderr
        return done.stderr

    return run


def weights(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for path in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    pairs = ((one[name], other[name]) for name in one)
    return one.keys() == other.keys() and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def random_run(directory: Path, tokenizer: Tokenizer, lora: bool = False, **options: Any) -> Path:
    """A checkpoint of a random model whose padded rows are zero, as those of released models are."""
    torch.manual_seed(1)
    gpt = GPT(GPTConfig(**TINY | {"vocab_size": tokenizer.vocab_size, "block_size": 64} | options))
    if lora:
        add_adapters(gpt, ["q", "k", "proj", "head"], 2, 4.0)
    with torch.no_grad():
        for name, p in gpt.named_parameters():
            if p.requires_grad:
                p.normal_(std=0.3)
            if name in ("embed.weight", "head.weight"):
                p[tokenizer.vocab_size :] = 0
    write_checkpoint(directory, contents(gpt, [], {"step": 3, "stage": "finetune"}), tokenizer)
    return directory


@pytest.mark.parametrize("name", MODELS)
def test_a_released_model_has_transformers_logits_and_comes_back_bit_by_bit(
    name: str, released: Callable, export: Callable, tmp_path: Path
) -> None:
    directory, theirs = released(name)
    export("from-hf", directory, "--out_dir", tmp_path / "run")
    ours, tokenizer = load(tmp_path / "run")
    ids = torch.randint(0, 390, (2, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids).logits
        assert expected.std() > 0.2, "logits so flat that the comparison would prove nothing"
        assert (ours(ids) - expected).abs().max() < 1e-4
    prompts = [row[: 3 + i].tolist() for i, row in enumerate(ids)]
    for prompt, found in zip(prompts, Engine(ours, tokenizer).greedy(prompts, 40, -1), strict=True):
        settings = transformers.GenerationConfig(max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert theirs.generate(torch.tensor([prompt]), settings)[0, len(prompt) :].tolist() == found

    export("to-hf", tmp_path / "run", "--out", tmp_path / "hf", "--shard_bytes", 50_000)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    assert same(weights(directory), weights(tmp_path / "hf"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto").eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, expected)
    export("from-hf", tmp_path / "hf", "--out_dir", tmp_path / "again")
    assert same(weights(tmp_path / "again/checkpoints/step-0"), weights(tmp_path / "run/checkpoints/step-0"))


@pytest.mark.parametrize("preset", ["gpt2", "modern", "llama"])
def test_our_models_come_back_bit_by_bit(preset: str, export: Callable, bpe: Tokenizer, tmp_path: Path) -> None:
    random_run(tmp_path / "mine", bpe, **PRESETS[preset] | ({} if preset == "gpt2" else {"n_kv_head": 2}))
    export("to-hf", tmp_path / "mine", "--out", tmp_path / "hf")
    export("from-hf", tmp_path / "hf", "--out_dir", tmp_path / "run")
    assert same(weights(tmp_path / "mine"), weights(tmp_path / "run/checkpoints/step-0"))
    theirs, ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval(), load(tmp_path / "mine")[0]
    ids = torch.randint(0, 390, (2, 64))
    with torch.no_grad():
        assert (theirs(ids).logits - ours(ids)).abs().max() < 1e-4
    card = (tmp_path / "hf/README.md").read_text()
    assert "| stage | finetune |" in card
    assert type(theirs).__name__ in card


def test_a_model_card_names_the_license_of_the_base(released: Callable, export: Callable, tmp_path: Path) -> None:
    shutil.copytree(released("llama")[0], tmp_path / "theirs")
    (tmp_path / "theirs/README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# A model\nlicense: other\n")
    export("from-hf", tmp_path / "theirs", "--out_dir", tmp_path / "run")
    export("to-hf", tmp_path / "run", "--out", tmp_path / "hf")
    assert (tmp_path / "hf/README.md").read_text().startswith("---\nlicense: apache-2.0\nlibrary_name: transformers\n")
    assert open_checkpoint(tmp_path / "run").origin["base_license"] == "apache-2.0"


def test_weights_keep_the_smallest_type_that_holds_them(released: Callable, export: Callable, tmp_path: Path) -> None:
    directory, theirs = released("llama tied")
    theirs.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    theirs.float()
    shutil.copy(directory / "tokenizer.json", tmp_path / "half")
    export("from-hf", tmp_path / "half", "--out_dir", tmp_path / "run")
    export("to-hf", tmp_path / "run", "--out", tmp_path / "hf")
    assert same(weights(tmp_path / "half"), weights(tmp_path / "hf"))
    assert json.loads((tmp_path / "hf/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("nanochat", "mistral")])
def test_gguf_comes_back_bit_by_bit(name: str, released: Callable, export: Callable, tmp_path: Path) -> None:
    export("from-hf", released(name)[0], "--out_dir", tmp_path / "run")
    before = weights(tmp_path / "run/checkpoints/step-0")
    for kind, most in (("f32", 0.0), ("f16", 1e-3), ("bf16", 8e-3), ("q8_0", 2e-2))[: 4 if name == "llama" else 1]:
        export("to-gguf", tmp_path / "run", "--out", tmp_path / f"{kind}.gguf", "--type", kind)
        said = export("from-gguf", tmp_path / f"{kind}.gguf", "--out_dir", tmp_path / kind)
        assert ("quantised weights (Q8_0)" in said) == (kind == "q8_0")
        after = weights(tmp_path / kind / "checkpoints/step-0")
        assert after.keys() == before.keys()
        assert all((after[each] - before[each]).abs().max() <= most for each in before)
        fields = [json.loads((tmp_path / run / "checkpoints/step-0/model.json").read_text()) for run in ("run", kind)]
        assert fields[0] == fields[1]


def test_gguf_without_optional_keys_has_the_usual_sizes(released: Callable, export: Callable, tmp_path: Path) -> None:
    """As SmolLM2's file, whose converter did not write attention.key_length."""
    export("from-hf", released("llama")[0], "--out_dir", tmp_path / "run")
    export("to-gguf", tmp_path / "run", "--out", tmp_path / "m.gguf", "--type", "f32")
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data.replace(b"llama.attention.key_length", b"llama.attention.key_unread"))
    export("from-gguf", tmp_path / "m.gguf", "--out_dir", tmp_path / "again")
    fields, again = [(tmp_path / run / "checkpoints/step-0/model.json").read_text() for run in ("run", "again")]
    assert fields == again
    assert json.loads(fields)["head_dim"] is None


def test_rotary_pairs_are_neighbours_in_gguf_as_in_llama_cpps_converter(
    released: Callable, export: Callable, tmp_path: Path
) -> None:
    directory, _ = released("llama")
    export("from-hf", directory, "--out_dir", tmp_path / "run")
    export("to-gguf", tmp_path / "run", "--out", tmp_path / "m.gguf", "--type", "f32")
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    theirs = weights(directory)
    for ours, name, heads in (("attn_q", "q_proj", 4), ("attn_k", "k_proj", 2)):
        weight = theirs[f"model.layers.1.self_attn.{name}.weight"]
        # LlamaModel.permute in llama.cpp's convert_hf_to_gguf.py
        permuted = weight.reshape(heads, 2, len(weight) // heads // 2, 32).swapaxes(1, 2).reshape(weight.shape)
        assert torch.equal(tensors[f"blk.1.{ours}.weight"], permuted)
    assert torch.equal(tensors["blk.1.attn_v.weight"], theirs["model.layers.1.self_attn.v_proj.weight"])


def fuzzed(count: int) -> list[str]:
    """Texts of words, blanks, digits, contractions, many scripts, and special tokens as text."""
    rng = random.Random(0)
    pieces = [*TEXT.split(" "), *SPECIAL_TOKENS, *["'s", "'LL", "I'm", "don't", "½", "Ⅷ", "٣٤", "é", "中文", "😀", "สวัสดี"]]
    blanks = [" ", "  ", "\n", "\n\n", " \n ", "\t", "\r\n", "\u3000", "\xa0", "    "]

    def piece() -> str:
        kind = rng.randrange(5)
        if kind == 0:
            return rng.choice(blanks)
        if kind == 1:
            return str(rng.randrange(10 ** rng.randrange(1, 8)))
        if kind == 2:
            return "".join(chr(rng.choice([rng.randrange(32, 127), rng.randrange(0xA0, 0x700)])) for _ in range(5))
        return " ".join(rng.choices(pieces, k=rng.randrange(1, 6)))

    return ["".join(piece() for _ in range(rng.randrange(1, 7))) for _ in range(count)]


def tokenizers() -> dict[str, Tokenizer]:
    gpt2 = train_bpe([TEXT], 400, GPT2_PATTERN)
    return {"byte": ByteTokenizer(), "gpt4": train_bpe([TEXT], 400), "gpt2": gpt2, "char": CharTokenizer(string.printable)}


@pytest.mark.parametrize("kind", ["byte", "gpt4", "gpt2", "char"])
def test_exported_tokenizers_give_the_same_ids_and_the_same_conversations(kind: str, export: Callable, tmp_path: Path) -> None:
    ours = tokenizers()[kind]
    random_run(tmp_path / "mine", ours, **PRESETS["llama"])
    export("to-hf", tmp_path / "mine", "--out", tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    texts = [text for text in fuzzed(1000) if kind != "char" or set(text) <= set(string.printable)]
    assert len(texts) > 100
    for text in texts:
        ids = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False, split_special_tokens=True) == ids, text
        assert theirs.decode(ids) == text
    assert theirs.encode("") == [ours.start]
    turns = [("system", "Be kind."), ("user", "What?"), ("assistant", "2 + 2"), ("user", " And? ")]
    for messages in (turns, turns[1:], turns[:3]):
        rows = [{"role": role, "content": content} for role, content in messages]
        said = [Message(**row) for row in rows]
        assert theirs.apply_chat_template(rows)["input_ids"] == render(ours, said).ids
        if messages[-1][0] == "user":
            assert theirs.apply_chat_template(rows, add_generation_prompt=True)["input_ids"] == render_prompt(ours, said)


@pytest.mark.parametrize("kind", ["byte", "gpt4", "gpt2", "char"])
def test_a_tokenizer_in_gguf_comes_back_with_the_same_ids(kind: str, export: Callable, tmp_path: Path) -> None:
    ours = tokenizers()[kind]
    random_run(tmp_path / "mine", ours, **PRESETS["llama"])
    export("to-gguf", tmp_path / "mine", "--out", tmp_path / "m.gguf")
    export("from-gguf", tmp_path / "m.gguf", "--out_dir", tmp_path / "run")
    again = load(tmp_path / "run")[1]
    assert isinstance(again, ReleasedTokenizer)
    assert again.special == ours.special
    assert again.byte_lengths == ours.byte_lengths
    for text in fuzzed(1000):
        text = text.rstrip()  # llama.cpp cuts blanks at the very end otherwise
        if kind == "char" and not set(text) <= set(string.printable):
            continue
        ids = ours.encode(text)
        assert again.encode(text) == ids
        assert again.encode_array(text).tolist() == ids
        assert again.decode(ids) == text
        assert not set(ids) & set(again.special.values())
    said = [
        Message(role="user", content="Hi <|end|>"),
        Message(role="assistant", content="a b"),
        Message(role="user", content="c"),
    ]
    assert render(again, said[:2]) == render(ours, said[:2])
    assert render_prompt(again, said) == render_prompt(ours, said)


def test_adapters_run_in_peft(export: Callable, bpe: Tokenizer, tmp_path: Path) -> None:
    from peft import PeftModel

    gpt = dict(PRESETS["llama"], n_kv_head=2)
    torch.manual_seed(2)
    run = random_run(tmp_path / "lora/checkpoints/step-3", bpe, lora=True, **gpt)
    base = GPT(GPTConfig(**TINY | {"vocab_size": bpe.vocab_size, "block_size": 64} | gpt))
    write_checkpoint(tmp_path / "base", contents(base, [], {"step": 1}), bpe)
    state = json.loads((run / "state.json").read_text()) | {
        "base_sha256": json.loads((tmp_path / "base/manifest.json").read_text())["files"]["model.safetensors"]
    }
    adapters = GPT(base.config)
    adapters.load_state_dict(base.state_dict())
    add_adapters(adapters, ["q", "k", "proj", "head"], 2, 4.0)
    for p in adapters.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.3)
    write_checkpoint(run, contents(adapters, [], state), bpe)
    (tmp_path / "lora/config.toml").write_text(f'init_from = "{tmp_path / "base"}"\n')
    export("to-hf", tmp_path / "base", "--out", tmp_path / "hf")
    export("to-hf", run, "--out", tmp_path / "peft", "--adapter")
    export("to-hf", run, "--out", tmp_path / "merged")
    ids = torch.randint(0, 390, (2, 40))
    with torch.no_grad():
        expected = adapters.eval()(ids)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
        assert (theirs(ids).logits - expected).abs().max() > 0.1
        found = PeftModel.from_pretrained(theirs, tmp_path / "peft").eval()(ids).logits
        assert (found - expected).abs().max() < 1e-4
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        assert (merged(ids).logits - expected).abs().max() < 1e-4


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), "config.json: No such file"),
    "architecture": (
        lambda d: edit(d / "config.json", architectures=["BertModel"]),
        "the architecture BertModel has no counterpart",
    ),
    "activation": (lambda d: edit(d / "config.json", hidden_act="gelu"), "hidden_act is 'gelu'"),
    "rope": (lambda d: edit(d / "config.json", rope_parameters={"rope_type": "yarn"}), "type yarn has no counterpart"),
    "lacking key": (lambda d: edit(d / "config.json", hidden_size=None), "lacks hidden_size"),
    "blocks": (lambda d: edit(d / "config.json", num_hidden_layers=10**9), "1,000,000,000 blocks"),
    "missing tensors": (lambda d: edit(d / "config.json", num_hidden_layers=3), "lacks the tensor model.layers.2."),
    "more tensors": (lambda d: edit(d / "config.json", num_hidden_layers=1), "tensors that config.json does not call for"),
    "shape": (lambda d: edit(d / "config.json", intermediate_size=50), "has the shape [48, 32]"),
    "type": (lambda d: edit(d / "config.json", num_attention_heads="four"), "num_attention_heads must be of the type int"),
    "rope number": (lambda d: edit(d / "config.json", rope_parameters={"rope_theta": "ten"}), "rope_theta must be a number"),
    "heads": (lambda d: edit(d / "config.json", num_attention_heads=0), "n_head must not be 0"),
    "tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "save_pretrained(DIR) of transformers writes it"),
    "vocabulary": (lambda d: edit(d / "config.json", vocab_size=390), "the tokenizer has the id 399"),
    "larger table": (lambda d: edit(d / "config.json", vocab_size=9000), "of another model?"),
    "not a tokenizer": (lambda d: (d / "tokenizer.json").write_text('{"a": 1}'), "tokenizer.json: "),
    "cut short": (lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:9000]), "not a whole"),
    "pickle": (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "save_pretrained(NEW)"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "no model.safetensors"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_directories_are_refused_in_one_line(case: str, released: Callable, export: Callable, tmp_path: Path) -> None:
    shutil.copytree(released("qwen2")[0], tmp_path / "bad")
    spoil, message = BAD[case]
    spoil(tmp_path / "bad")
    said = export("from-hf", tmp_path / "bad", "--out_dir", tmp_path / "run", status=2)
    assert message in said.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad"]


def test_bad_gguf_files_are_refused_in_one_line(released: Callable, export: Callable, tmp_path: Path) -> None:
    export("from-hf", released("llama")[0], "--out_dir", tmp_path / "run")
    export("to-gguf", tmp_path / "run", "--out", tmp_path / "good.gguf")
    data = (tmp_path / "good.gguf").read_bytes()
    (tmp_path / "good.gguf").unlink()
    (tmp_path / "good.Modelfile").unlink()
    absurd = data[:8] + b"\xff" * 8 + data[16:]  # the number of tensors
    for content in (b"", b"GGUF", b"nothing of the kind", data[:3000], data[: len(data) // 2], data[:-100], absurd):
        (tmp_path / "bad.gguf").write_bytes(content)
        assert "not a whole GGUF file" in export("from-gguf", tmp_path / "bad.gguf", "--out_dir", tmp_path / "x", status=2)
    (tmp_path / "bad.gguf").write_bytes(
        data.replace(
            b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0llama", b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0lloma"
        )
    )
    assert "lloma has no counterpart" in export("from-gguf", tmp_path / "bad.gguf", "--out_dir", tmp_path / "x", status=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.gguf", "run"]


def test_what_has_no_counterpart_is_refused_by_name(export: Callable, bpe: Tokenizer, tmp_path: Path) -> None:
    random_run(tmp_path / "frontier", bpe, **PRESETS["frontier"])
    random_run(tmp_path / "modern", bpe)
    random_run(tmp_path / "accents", CharTokenizer("abcé"), **PRESETS["llama"])
    for words, message in (
        (("to-hf", "frontier"), "smear True"),
        (("to-gguf", "frontier"), "smear True"),
        (("to-gguf", "modern"), "llama.cpp does not run the preset modern"),
        (("to-gguf", "accents"), "no tokenizer of characters beyond ASCII"),
        (("to-hf", "modern", "--adapter"), "no adapters"),
        (("to-hf", "nowhere"), "no such run or checkpoint"),
    ):
        said = export(words[0], tmp_path / words[1], "--out", tmp_path / "out", *words[2:], status=2)
        assert message in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["accents", "frontier", "modern"]
    (tmp_path / "out").mkdir()
    for command in (("to-hf", "--out"), ("to-gguf", "--out"), ("from-hf", "--out_dir")):
        assert "is there already" in export(command[0], tmp_path / "modern", command[1], tmp_path / "out", status=2)
    assert "must be one of from-hf" in export("from-onnx", status=2)


def test_fields_of_old_checkpoints_mean_what_they_meant() -> None:
    new = {"head_dim": None, "rope_scaling": 1.0, "norm_eps": 1e-6, "qk_norm_affine": False, "qkv_bias": False}
    assert {field.name: field.default for field in dataclasses.fields(GPTConfig)}.items() >= new.items()


def test_pretraining_goes_on_from_a_run(world: Path, script: Script, tmp_path: Path) -> None:
    """With new data steps and schedule; with the optimizer's state only if asked; its evaluation at step 0 is the run's last."""

    def last_line(run: Path, which: int) -> dict[str, Any]:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if "val_loss" in line][which]

    options = ["--data", world / "data", "--max_steps=2", "--batch_size=16", "--dtype=float32", "--sample_tokens=0"]
    for name, more in (("fresh", []), ("moments", ["--init_optimizer"])):
        done = script("train.py", "--init_from", world / "base", "--out_dir", tmp_path / name, *options, *more)
        assert done.returncode == 0, done.stderr
        assert last_line(tmp_path / name, 0)["val_loss"] == pytest.approx(last_line(world / "base", -1)["val_loss"], rel=1e-5)
    states = [weights(tmp_path / name / "checkpoints/step-2") for name in ("fresh", "moments")]
    assert not same(*states)
    assert json.loads((tmp_path / "fresh/checkpoints/step-2/model.json").read_text())["n_embd"] == 64
    for more, message in (
        (["--n_layer=3"], "brings its own model: n_layer cannot be chosen"),
        (["--optimizer=adamw", "--init_optimizer"], "made with another optimizer?"),
        (["--block_size=128"], "the model has a context of 64 tokens"),
    ):
        done = script("train.py", "--init_from", world / "base", "--out_dir", tmp_path / "no", *options, *more)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
    done = script("train.py", "--init_optimizer", "--out_dir", tmp_path / "no", *options)
    assert "init_optimizer needs a checkpoint" in done.stderr


def test_a_corpus_is_encoded_with_a_released_models_tokenizer(
    released: Callable, export: Callable, script: Script, tmp_path: Path
) -> None:
    export("from-hf", released("qwen2")[0], "--out_dir", tmp_path / "run")
    (tmp_path / "text.txt").write_text(TEXT * 3)
    done = script(
        *("data/prepare.py", "--input", tmp_path / "text.txt", "--out", tmp_path / "data", "--tokenizer", tmp_path / "run")
    )
    assert done.returncode == 0, done.stderr
    done = script(
        *("train.py", "--data", tmp_path / "data", "--init_from", tmp_path / "run", "--out_dir", tmp_path / "more"),
        *("--max_steps=3", "--batch_size=4", "--block_size=64", "--sample_tokens=4", "--learning_rate=0.003"),
    )
    assert done.returncode == 0, done.stderr
    done = script("sample.py", "--checkpoint", tmp_path / "more", "--prompt", "A <|end|>", "--max_new_tokens=5")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("A <|end|>")
    export("to-hf", tmp_path / "more", "--out", tmp_path / "hf")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(again).__name__ == "Qwen2ForCausalLM"


def test_load_works_from_any_folder(world: Path, tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    code = """
import torch
from export import load
from papagaio.generation.engine import Engine
model, tokenizer = load(RUN)
ids = torch.tensor([[tokenizer.start, *tokenizer.encode("The flag")]])
logits, hidden = model(ids), model.hidden(ids)
answer = tokenizer.decode(Engine(model, tokenizer).greedy(ids.tolist(), 5, tokenizer.start)[0])
print(tuple(logits.shape), tuple(hidden.shape), len(answer) > 0)
"""
    code = code.replace("RUN", repr(str(world / "base")))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    length = len(load(world / "base")[1].encode("The flag")) + 1
    assert done.stdout.strip() == f"(1, {length}, 300) (1, {length}, 64) True"


COMMIT = "b" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """One model, someone/model: what huggingface_hub asks for. `files` are its files; `asked` the paths that were fetched."""

    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        headers: dict[str, str] = {"X-Repo-Commit": COMMIT}
        status, data = 404, b""
        if path.startswith("/api/models/someone/model/tree/"):
            listed = [{"type": "file", "oid": COMMIT, "size": len(each), "path": name} for name, each in self.files.items()]
            status, data = 200, json.dumps(listed).encode()
        elif path.startswith("/api/models/someone/model"):
            siblings = [{"rfilename": name} for name in self.files]
            status, data = 200, json.dumps({"id": "someone/model", "sha": COMMIT, "siblings": siblings}).encode()
        elif path.startswith("/someone/model/resolve/") and (name := path.split("/", 5)[5]) in self.files:
            status, data = 200, self.files[name]
            headers["ETag"] = f'"{hashlib.sha1(data).hexdigest()}"'
            self.asked.append(name)
        else:
            headers["X-Error-Code"] = "RepoNotFound"
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(data)), "Content-Type": "application/json"}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


def test_a_name_is_downloaded_from_the_hub(released: Callable, script: Script, tmp_path: Path) -> None:
    directory, _ = released("llama")
    Hub.files = {path.name: path.read_bytes() for path in directory.iterdir()} | {"pytorch_model.bin": b"not wanted"}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1"}

    def run(name: str) -> subprocess.CompletedProcess:
        return script("export.py", "from-hf", name, "--out_dir", tmp_path / "run", env=environment)

    done = run("someone/model")
    assert done.returncode == 0, done.stderr
    ours = load(tmp_path / "run")[0]
    assert torch.equal(ours.norm.weight, weights(directory)["model.norm.weight"])
    assert "pytorch_model.bin" not in Hub.asked
    shutil.rmtree(tmp_path / "run")
    shutil.rmtree(tmp_path / "cache")

    done = run("someone/other")
    assert done.returncode == 2
    assert "the hub has no such model" in done.stderr.splitlines()[-1]
    Hub.files["config.json"], Hub.asked[:] = b'{"architectures": ["BertModel"]}', []
    done = run("someone/model")
    assert done.returncode == 2
    assert "BertModel has no counterpart" in done.stderr.splitlines()[-1]
    assert not [name for name in Hub.asked if name.endswith(".safetensors")], "refused before the weights are fetched"
    server.shutdown()
    server.server_close()
    done = run("someone/third")
    assert done.returncode == 1
    assert "the hub cannot be reached" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()
