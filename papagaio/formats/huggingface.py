"""Directories of Hugging Face transformers: config.json, safetensors files, tokenizer.json and what belongs to it."""

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from papagaio import files
from papagaio.errors import MachineError, UserError
from papagaio.files import read_object, to_json
from papagaio.formats.configs import from_huggingface
from papagaio.formats.release import Release
from papagaio.formats.tensors import INDEX, TensorFiles
from papagaio.formats.vocabulary import jinja_of, own_json, released
from papagaio.released_tokenizer import ReleasedTokenizer
from papagaio.runs.tensors import write_tensors
from papagaio.tokenizer import Tokenizer

CURE = "a directory as save_pretrained of transformers writes it is needed"
BUFFERS = re.compile(r"\.(attn\.bias|attn\.masked_bias|rotary_emb\.inv_freq)$")  # constants that old versions saved


def find(name: str) -> Path:
    """The directory with this path, or that of a model with this name on the Hugging Face hub, downloaded into its cache.

    The small files come first, so that an unknown architecture is refused before gigabytes are fetched. Raises UserError if there
    is neither, MachineError if the hub cannot be reached.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise UserError(f"{name}: no such directory, and not the name of a model on the hub (OWNER/NAME)")
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(f"{name}: downloading from the hub needs its library: pip install huggingface_hub") from None
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        fetch = partial(huggingface_hub.snapshot_download, name)
        directory = Path(fetch(allow_patterns=["*.json", "*.jinja"]))
        from_huggingface(read_object(directory / "config.json", CURE), f"{name}: config.json")
        return Path(fetch(allow_patterns=["*.json", "*.jinja", "model*.safetensors"]))
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(f"{name}: the hub has no such model, or only for those who are logged in (hf auth login)") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, httpx.TransportError, ConnectionError) as error:
        raise MachineError(f"{name}: the hub cannot be reached ({type(error).__name__}); is there a network?") from None


def open_release(directory: Path, tensors: TensorFiles) -> Release:
    """A model's directory. Raises UserError, which names the file and what is wrong there."""
    place = directory / "config.json"
    config = read_object(place, CURE)
    family, fields, unread = from_huggingface(config, str(place))
    if unread:
        print(f"{place}: {len(unread)} keys are not read: {', '.join(unread)}", file=sys.stderr)
    prefix = "" if family != "gpt2" or any(name.startswith("transformer.") for name in tensors.places) else "transformer."
    named = {name if name == "lm_head.weight" else prefix + name: name for name in tensors.places if not BUFFERS.search(name)}
    if dropped := len(tensors.places) - len(named):
        print(f"{directory}: {dropped} constants that follow from config.json are not read", file=sys.stderr)
    if fields["tie_embeddings"] and "lm_head.weight" in named:  # saved twice
        table = next(name for ours, name in named.items() if ours.endswith(("embed_tokens.weight", "wte.weight")))
        if not torch.equal(tensors.read("lm_head.weight"), tensors.read(table)):
            raise UserError(f"{place}: tie_word_embeddings is true, but lm_head.weight is not {table}")
        del named["lm_head.weight"]
    tokenizer = read_tokenizer(directory, config, fields["vocab_size"])
    return Release(
        *(place, "huggingface", family, False, fields, tokenizer),
        answers=bool(tokenizer.chat) and _chat_template(directory) is not None,
        tensors=named,
        shape=lambda name: tensors.shape(named[name]),
        read=lambda name: tensors.read(named[name]),
        state={"architecture": config["architectures"][0], "base_license": _license(directory / "README.md")},
    )


def read_tokenizer(directory: Path, config: dict[str, Any], vocab_size: int) -> ReleasedTokenizer:
    """The tokenizer of a model's directory. Raises UserError."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        cure = "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) of transformers writes it"
        raise UserError(f"{path}: no such file; {cure}")
    options = _optional(directory / "tokenizer_config.json")
    variables = {}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = options.get(key)
        variables[key] = value["content"] if isinstance(value, dict) else value or ""
    ends = _optional(directory / "generation_config.json").get("eos_token_id", config.get("eos_token_id"))
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    try:
        text = path.read_bytes().decode()
        start = _start(text)
        return released(text, vocab_size, start, ends, _chat_template(directory), variables)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; {CURE}") from None


def _start(text: str) -> int | None:
    """The special token that a tokenizer.json puts before every text, if there is one."""
    post = (json.loads(text) or {}).get("post_processor") or {}
    for step in post.get("processors", [post]):
        for piece in step.get("single", []) if step.get("type") == "TemplateProcessing" else []:
            name = piece.get("SpecialToken", {}).get("id")
            return step["special_tokens"][name]["ids"][0] if name else None
    return None


def _optional(path: Path) -> dict[str, Any]:
    return read_object(path, CURE) if path.is_file() else {}


def _chat_template(directory: Path) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return files.read_text(path, CURE)
    found = _optional(directory / "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):  # several by name
        found = next((each.get("template") for each in found if each.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def _license(card: Path) -> str | None:
    """The license that a model card names in its first lines."""
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    found = re.match(r"---\n(?:.*\n)*?license: *([\w.-]+)", text)
    return found[1] if found else None


def smallest_dtype(shapes: dict[str, Any], read: Callable[[str], Tensor]) -> torch.dtype:
    """bfloat16 or float16 if all these tensors are exact in it, else float32."""
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal((tensor := read(name)).to(dtype).to(tensor.dtype), tensor) for name in shapes):
            return dtype
    return torch.float32


def write_weights(
    directory: Path, shapes: dict[str, tuple[int, ...]], read: Callable[[str], Tensor], dtype: torch.dtype, shard_bytes: int
) -> None:
    """model.safetensors, or shards of at most shard_bytes (a larger tensor is alone in its shard) with their index."""
    shards: list[dict[str, tuple[tuple[int, ...], torch.dtype]]] = [{}]
    size = total = 0
    for name, shape in shapes.items():
        n_bytes = torch.Size(shape).numel() * dtype.itemsize
        if shards[-1] and size + n_bytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = (shape, dtype)
        size, total = size + n_bytes, total + n_bytes
    if len(shards) == 1:
        write_tensors(directory / "model.safetensors", shards[0], read, {"format": "pt"})
        return
    places = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_tensors(directory / file, shard, read, {"format": "pt"})
        places |= dict.fromkeys(shard, file)
    (directory / INDEX).write_text(to_json({"metadata": {"total_size": total}, "weight_map": places}))


def write_tokenizer(directory: Path, tokenizer: Tokenizer, answers: bool, context: int) -> dict[str, Any]:
    """The tokenizer's files and generation_config.json; returns the token ids that config.json names too."""
    taken = isinstance(tokenizer, ReleasedTokenizer)
    (directory / "tokenizer.json").write_text(tokenizer.text if taken else own_json(tokenizer), encoding="utf-8", newline="")
    names = {token: name for name, token in tokenizer.special.items()}
    end = tokenizer.start
    if answers:
        end = tokenizer.answer_end
    elif taken and tokenizer.start not in tokenizer.ends:
        end = min(tokenizer.ends)
    ids = {"bos_token_id": tokenizer.start, "eos_token_id": end}
    options = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "bos_token": names[tokenizer.start],
        "eos_token": names[end],
        "pad_token": names[end],
        "additional_special_tokens": [
            name for name in tokenizer.special if tokenizer.special[name] not in (tokenizer.start, end)
        ],
    }
    jinja = tokenizer.chat["jinja"] if taken and tokenizer.chat else jinja_of(tokenizer.template) if tokenizer.template else None
    if jinja:
        (directory / "chat_template.jinja").write_text(jinja, encoding="utf-8", newline="")
    (directory / "tokenizer_config.json").write_text(to_json(options), encoding="utf-8")
    generation = ids | {"eos_token_id": sorted({end, *tokenizer.ends}), "pad_token_id": end}
    (directory / "generation_config.json").write_text(to_json(generation), encoding="utf-8")
    return ids


def model_card(fields: dict[str, Any], state: dict[str, Any], described: str, parameters: int, architecture: str) -> str:
    """README.md of an exported model: what it is, its shape and training as `described`, and how to run it."""
    license_ = f"license: {state['base_license']}\n" if state.get("base_license") else ""
    return f"""---
{license_}library_name: transformers
pipeline_tag: text-generation
---

# A model made with papagaio

{architecture}, {parameters:,} parameters, {fields["n_layer"]} blocks, {fields["n_embd"]} channels, a context of
{fields["block_size"]:,} tokens, {fields["vocab_size"]:,} tokens in the vocabulary. If it was made from a released model, the
license of that model holds for it too.

```python
from transformers import pipeline

print(pipeline("text-generation", model=".")("Once upon"))
```

{described}
"""
