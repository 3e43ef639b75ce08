"""A released model's own tokenizer, run by Hugging Face's `tokenizers`, with its own special tokens and chat template."""

import hashlib
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from papagaio.errors import UserError
from papagaio.tokenizer import Tokenizer, text_chunks, utf8


class ReleasedTokenizer(Tokenizer):
    """A released model's own tokenizer, run by Hugging Face's `tokenizers`; `text` is that library's tokenizer.json.

    `vocab_size` is the number of rows of the model's table, which may have more of them than there are tokens. `chat` has the
    chat template: `joints` as OWN_TEMPLATE, `trims`, and `jinja`, from which they were derived (papagaio/formats/template.py).
    """

    kind = "huggingface"

    def __init__(self, text: str, vocab_size: int, start: int, ends: Iterable[int], chat: dict[str, Any] | None = None) -> None:
        import tokenizers

        self.text, self.vocab_size, self.start, self.ends, self.chat = text, vocab_size, start, {*ends}, chat
        self.template, self.trims = (chat["joints"], chat["trims"]) if chat else (None, ())
        self.backend = tokenizers.Tokenizer.from_str(text)
        self.backend.encode_special_tokens = True  # as text, which they are not outside of templates
        self.backend.no_truncation()
        self.backend.no_padding()
        added = self.backend.get_added_tokens_decoder()
        self.special = {token.content: i for i, token in sorted(added.items()) if token.special}
        self._tokens = {i: token for token, i in self.backend.get_vocab().items()}
        self._literal = {i: token.content.encode() for i, token in added.items()}  # stand for their own spelling
        self._bytewise = '"ByteLevel"' in text
        if max(self._tokens, default=0) >= vocab_size:
            raise UserError(f"the tokenizer has the id {max(self._tokens)}, the model's table only {vocab_size:,} rows")

    def encode(self, text: str) -> list[int]:
        utf8(text)
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_array(self, text: str) -> NDArray[np.integer]:
        """The ids of a part of a corpus. Raises UserError if the tokenizer would put a blank before each part."""
        if not self._bytewise:
            raise UserError(
                "this tokenizer puts a blank before every text; a corpus, which is cut into parts, would get more of them"
            )
        return np.concatenate([np.array(self.encode(part), np.uint32) for part in text_chunks(text) or [""]])

    def token_bytes(self, token: int) -> bytes:
        if token in self._literal or token not in self._tokens:
            return self._literal.get(token, b"")
        spelled = self._tokens[token]
        if self._bytewise:
            return bytes(BYTE_OF[character] for character in spelled)
        if match := re.fullmatch(r"<0x([0-9A-F]{2})>", spelled):
            return bytes.fromhex(match[1])
        return spelled.replace("\u2581", " ").encode()

    def describe(self) -> dict[str, Any]:
        shape = {"vocab_size": self.vocab_size, "start": self.start, "ends": sorted(self.ends)}
        text = {"huggingface_sha256": hashlib.sha256(self.text.encode()).hexdigest()}
        return super().describe() | shape | text | {"chat_template": self.chat}


def _byte_characters() -> dict[str, int]:
    """The printable character that stands for each byte in the files of byte-level tokenizers (openai/gpt-2, src/encoder.py)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_characters()
