"""Tokenizers as directories: tokenizer.json, and beside it ranks.tiktoken or a released model's own file, huggingface.json."""

import hashlib
from pathlib import Path
from typing import Any

from papagaio.errors import UserError
from papagaio.files import read_object, read_text, to_json
from papagaio.released_tokenizer import ReleasedTokenizer
from papagaio.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer, read_ranks


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write tokenizer.json and, for byte-pair encoding, ranks.tiktoken into a directory, which is made if missing."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(to_json(tokenizer.describe()), encoding="utf-8")
    if isinstance(tokenizer, BPETokenizer):
        (directory / "ranks.tiktoken").write_bytes(tokenizer.ranks_text)
    if isinstance(tokenizer, ReleasedTokenizer):
        (directory / "huggingface.json").write_text(tokenizer.text, encoding="utf-8", newline="")


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer saved in a directory. Raises UserError if it is missing or damaged."""
    path = directory / "tokenizer.json"
    cure = "a tokenizer directory holds a tokenizer.json, as data/prepare.py writes it"
    found = read_object(path, cure)
    kind, pattern = found.get("kind"), found.get("pattern")
    if kind == "byte":
        tokenizer: Tokenizer = ByteTokenizer()
    elif kind == "char" and isinstance(found.get("characters"), str):
        tokenizer = CharTokenizer(found["characters"])
    elif kind in ("bpe", "gpt2") and isinstance(pattern, str):
        ranks, text = read_ranks(directory / "ranks.tiktoken")
        try:
            tokenizer = BPETokenizer(kind, ranks, pattern, text)
        except ValueError as error:
            raise UserError(f"{path}: tiktoken does not accept this pattern: {error}") from None
        if found.get("ranks_sha256") != hashlib.sha256(text).hexdigest():
            raise UserError(f"{directory / 'ranks.tiktoken'}: damaged: its sha256 is not the one in tokenizer.json")
    elif kind == "huggingface":
        tokenizer = _read_released(directory / "huggingface.json", found)
    else:
        raise UserError(f"{path}: kind {kind!r} is not a whole tokenizer of kind byte, char, bpe, gpt2 or huggingface")
    if to_json(tokenizer.describe()) != read_text(path, cure):  # byte for byte
        raise UserError(f"{path}: does not describe the tokenizer beside it: damaged, or changed by hand")
    return tokenizer


def _read_released(path: Path, found: dict[str, Any]) -> ReleasedTokenizer:
    """The tokenizer in a file of the `tokenizers` library, with the rest of our tokenizer.json. Raises UserError."""
    try:
        text = path.read_bytes().decode()
        if found.get("huggingface_sha256") != hashlib.sha256(text.encode()).hexdigest():
            raise UserError(f"{path}: damaged: its sha256 is not the one in tokenizer.json")
        return ReleasedTokenizer(text, *(found[key] for key in ("vocab_size", "start", "ends", "chat_template")))
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; this tokenizer needs it") from None
    except Exception as error:  # the library raises nothing more special
        raise UserError(f"{path}: the tokenizers library does not accept it: {error}") from None
