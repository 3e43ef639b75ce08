"""Text <-> token ids: what every tokenizer can do, and our own: bytes, characters, byte-pair encoding run by tiktoken.

    tokenizer = train_bpe(["to be or not to be"], vocab_size=300)
    tokenizer.encode("to be")            -> [258, 264], say; never a special token, whatever the text spells
    tokenizer.encode_array("to be")      -> the same ids as a NumPy array, and faster: for corpora
    tokenizer.decode([258, 264])         -> "to be"
    tokenizer.special["<|endoftext|>"]   -> 295, an id that no text encodes to

Every tokenizer that is made here reserves the same five special tokens, so that fine-tuning never changes the vocabulary. That of
a released model (papagaio/released_tokenizer.py) keeps its own. papagaio/tokenizer_files.py saves and loads them all.
"""

import base64
import binascii
import hashlib
import re
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from papagaio.errors import MachineError, UserError
from papagaio.files import to_json

END_OF_TEXT, SYSTEM, USER, ASSISTANT, END = SPECIAL_TOKENS = (
    "<|endoftext|>",  # begins every document and every conversation
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",  # ends a message
)
# The chat template of our own models: what stands between two contents, by the roles before and after ("": the end of the text).
OWN_TEMPLATE = {
    **{f">{role}": f"{END_OF_TEXT}<|{role}|>" for role in ("system", "user", "assistant")},
    **{f"{role}>{after}": f"{END}<|{after}|>" for role in ("system", "user", "assistant") for after in ("user", "assistant")},
    **{f"{role}>": END for role in ("system", "user", "assistant")},
}

# Byte-pair merges stay inside the words that these match: GPT-2's pattern (openai/gpt-2, src/encoder.py), and GPT-4's, which
# groups digits by one to three (tiktoken's cl100k_base).
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
GPT4_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
)
# A long text may be cut without changing its tokens after a letter that is followed by whitespace or punctuation: both patterns
# above end a word there. A chunk ends at the first such place after 2,048 characters, and in any case after 65,536.
_CHUNK = re.compile(r"(?s).{2048}(?:.{0,63487}?[^\W\d_](?=[ \t\r\n.,;:!?()])|.{63488})|.+")
NO_TEMPLATE = "this model's chat template could not be taken over: complete texts with sample.py instead"
GPT2_RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"  # of _format_ranks(), 50,256 lines


class Tokenizer(ABC):
    """Base class. Ids 0 to n - 1 are ordinary tokens; `special` maps the special tokens to the ids that follow.

    `vocab_size` counts all of them. `pattern` is the regular expression of words, None if there is none. `start` is the token
    that begins a document, `ends` are those at which a completion ends.
    """

    kind: str
    pattern: str | None = None
    template: dict[str, str] | None = OWN_TEMPLATE  # None: the model is not for conversations
    trims: Sequence[str] = ()  # roles whose contents lose the blanks around them in the chat template

    def __init__(self, n_ordinary: int) -> None:
        self.special = {name: n_ordinary + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.vocab_size = n_ordinary + len(SPECIAL_TOKENS)
        self.start, self.ends = self.special[END_OF_TEXT], {self.special[END_OF_TEXT], self.special[END]}

    def joint(self, before: str, after: str) -> list[str | int]:
        """What the chat template puts between the contents of two roles: ids of special tokens, and ordinary text. "" stands for
        the beginning and the end of a conversation. Raises UserError if the template knows no such place."""
        text = (self.template or {}).get(f"{before}>{after}")
        if text is None:
            place = f"{after} after {before or 'nothing'}" if after else f"the end after {before}"
            raise UserError(f"this model's chat template does not provide for {place}" if self.template else NO_TEMPLATE)
        names = "|".join(map(re.escape, sorted(self.special, key=len, reverse=True)))
        return [self.special.get(part, part) for part in re.split(f"({names})", text) if part]

    @property
    def answer_end(self) -> int:
        """The special token that ends an answer."""
        return next(piece for piece in self.joint("assistant", "") if isinstance(piece, int))

    @property
    def template_tokens(self) -> list[int]:
        """The special tokens of the chat template, but for the one that begins a document."""
        pairs = (key.split(">") for key in self.template or {})
        return sorted({piece for pair in pairs for piece in self.joint(*pair) if isinstance(piece, int)} - {self.start})

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text: "<|end|>" becomes the ids of these seven characters. Raises UserError if a character has none."""

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """The bytes of an ordinary token, which need not be whole UTF-8 characters."""

    def describe(self) -> dict[str, Any]:
        """The content of tokenizer.json."""
        return {"kind": self.kind, "pattern": self.pattern, "special_tokens": self.special}

    def encode_array(self, text: str) -> NDArray[np.integer]:
        """The ids of `encode` as an array."""
        return np.array(self.encode(text), np.uint32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        names = {token: name.encode() for name, token in self.special.items()}
        return b"".join(names[token] if token in names else self.token_bytes(token) for token in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. Special tokens are spelled out, bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @cached_property
    def byte_lengths(self) -> list[int]:
        """UTF-8 bytes of each token, 0 for special tokens: what bits per byte are computed from."""
        special = set(self.special.values())
        return [0 if token in special else len(self.token_bytes(token)) for token in range(self.vocab_size)]

    @cached_property
    def sha256(self) -> str:
        """Identity: two tokenizers with equal sha256 give equal ids."""
        return hashlib.sha256(to_json(self.describe()).encode()).hexdigest()


class ByteTokenizer(Tokenizer):
    """One token per byte of UTF-8."""

    kind = "byte"

    def __init__(self) -> None:
        super().__init__(256)

    def encode(self, text: str) -> list[int]:
        return list(utf8(text))

    def encode_array(self, text: str) -> NDArray[np.integer]:
        return np.frombuffer(utf8(text), np.uint8)

    def token_bytes(self, token: int) -> bytes:
        return bytes([token])


class CharTokenizer(Tokenizer):
    """One token per character of the corpus, in the order of code points."""

    kind = "char"

    def __init__(self, characters: Iterable[str]) -> None:
        self.characters = sorted(set(characters))
        self.ids = {character: i for i, character in enumerate(self.characters)}
        super().__init__(len(self.ids))

    def encode(self, text: str) -> list[int]:
        try:
            return [self.ids[character] for character in text]
        except KeyError as error:
            position = text.index(error.args[0])
            raise UserError(
                f"character {error.args[0]!r} (position {position} of {text[:20]!r}...) is not among the {len(self.ids)} "
                "that this char tokenizer was made from; use one of those, or prepare the data with --tokenizer byte or bpe"
            ) from None

    def token_bytes(self, token: int) -> bytes:
        return self.characters[token].encode("utf-8")

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"characters": "".join(self.characters)}


class BPETokenizer(Tokenizer):
    """Byte-pair encoding: `ranks` maps byte strings to ids 0 to n - 1 in the order of merging; tiktoken applies the merges.

    `ranks_text` are the ranks in tiktoken's text format, if the caller has them.
    """

    def __init__(self, kind: str, ranks: dict[bytes, int], pattern: str, ranks_text: bytes | None = None) -> None:
        import tiktoken

        super().__init__(len(ranks))
        self.kind, self.ranks, self.pattern = kind, ranks, pattern
        self.ranks_text = ranks_text or _format_ranks(ranks)
        # Without special tokens, so that tiktoken cannot find them in a text.
        self.encoding = tiktoken.Encoding(kind, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        known = pattern in (GPT2_PATTERN, GPT4_PATTERN)
        self._words = _WordCache(pattern, self.encoding.encode_ordinary) if known else None

    def encode(self, text: str) -> list[int]:
        return self.encode_array(text).tolist()  # in chunks as files are: tiktoken panics at a million blanks

    def encode_array(self, text: str) -> NDArray[np.integer]:
        utf8(text)
        words, tiktoken = self._words, self.encoding.encode_to_numpy
        parts = [tiktoken(part) if words is None or not part.isascii() else words.encode(part) for part in text_chunks(text)]
        return np.concatenate(parts) if parts else np.array([], np.uint32)

    def token_bytes(self, token: int) -> bytes:
        return self.encoding.decode_single_token_bytes(token)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"ranks_sha256": hashlib.sha256(self.ranks_text).hexdigest()}


class _WordCache(dict[str, bytes]):
    """The ids of words, as the bytes of an uint32 array: most words of a corpus have been seen before.

    A lookup takes half the time of merging. Only for ASCII text, on which Python's `re` and the pattern's own \\p{L}, \\p{N} and
    \\s agree.
    """

    LARGEST = 2**18  # words, about 50 MB; a full cache is emptied

    def __init__(self, pattern: str, encode_word: Callable[[str], list[int]]) -> None:
        classes = {r"\p{L}": "A-Za-z", r"\p{N}": "0-9", r"\s": r"\t-\r ", r"\S": r"^\t-\r "}
        parts = re.split(r"(\[[^]]*\])", pattern)  # odd ones are in brackets; the others need brackets around the class
        for name, characters in classes.items():
            parts = [part.replace(name, characters if i % 2 else f"[{characters}]") for i, part in enumerate(parts)]
        self.find = re.compile("".join(parts)).findall
        self.encode_word = encode_word

    def encode(self, text: str) -> NDArray[np.uint32]:
        if len(self) > self.LARGEST:
            self.clear()
        return np.frombuffer(b"".join(map(self.__getitem__, self.find(text))), np.uint32)

    def __missing__(self, word: str) -> bytes:
        ids = array("I", self.encode_word(word)).tobytes()
        if len(word) <= 64:
            self[word] = ids
        return ids


def text_chunks(text: str) -> list[str]:
    """Cut a text into chunks of some thousand characters; the concatenated tokens of the chunks are those of the text.

    The last chunk may be short. A run of 65,536 characters without a place to cut is cut all the same, which may change tokens.
    """
    return _CHUNK.findall(text)


def train_bpe(texts: Iterable[str], vocab_size: int, pattern: str = GPT4_PATTERN) -> BPETokenizer:
    """Learn byte-pair merges from texts until there are `vocab_size` tokens, with the five special ones.

    There are fewer if a small corpus has no more pairs to merge. Raises UserError for vocab_size < 261.
    """
    import rustbpe

    if vocab_size < 256 + len(SPECIAL_TOKENS):
        raise UserError(f"--vocab_size={vocab_size}: must be at least 261 (256 bytes and the special tokens)")
    trainer = rustbpe.Tokenizer()
    # It counts the words of some texts at a time, on all cores; a larger buffer would only take more memory.
    trainer.train_from_iterator(iter(texts), vocab_size - len(SPECIAL_TOKENS), buffer_size=1024, pattern=pattern)
    return BPETokenizer("bpe", {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}, pattern)


def gpt2_tokenizer(ranks_file: Path | None = None) -> BPETokenizer:
    """GPT-2's vocabulary, from a file in tiktoken's format or else from tiktoken's cache or download.

    Raises UserError if the file is another one, MachineError if tiktoken can neither find nor download the vocabulary.
    """
    if ranks_file is not None:
        ranks, text = read_ranks(ranks_file)
        if hashlib.sha256(text).hexdigest() != GPT2_RANKS_SHA256:
            raise UserError(f"{ranks_file}: not GPT-2's vocabulary (50,256 ranks with a known sha256)")
        return BPETokenizer("gpt2", ranks, GPT2_PATTERN, text)
    import requests
    import tiktoken

    try:
        return BPETokenizer("gpt2", tiktoken.get_encoding("gpt2")._mergeable_ranks, GPT2_PATTERN)
    except (requests.RequestException, OSError) as error:
        raise MachineError(
            f"GPT-2's vocabulary is not in tiktoken's cache and cannot be downloaded ({type(error).__name__}); "
            "give a file in tiktoken's format with --ranks, or set TIKTOKEN_CACHE_DIR to a filled cache"
        ) from None


def utf8(text: str) -> bytes:
    """The bytes of a text. Raises UserError for half a surrogate pair, which has none."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"the text holds half a surrogate pair, {text[error.start]!r}, at character {error.start}") from None


def _format_ranks(ranks: dict[bytes, int]) -> bytes:
    """Ranks in tiktoken's text format: on each line a token in base64, a space, its rank."""
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in sorted(ranks.items(), key=lambda item: item[1]))


def read_ranks(path: Path) -> tuple[dict[bytes, int], bytes]:
    """The ranks in a file of tiktoken's text format, and its content. Raises UserError if it is missing or damaged."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected byte-pair ranks in tiktoken's format") from None
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[binascii.a2b_base64(token, strict_mode=True)] = int(rank)
        except ValueError:
            rank = b""
        if rank != b"%d" % (number - 1) or len(ranks) != number:
            raise UserError(f"{path}:{number}: not tiktoken's format: base64, a space, and the rank {number - 1}")
    if not all(bytes([byte]) in ranks for byte in range(256)):
        raise UserError(f"{path}: {len(ranks)} ranks, which lack some of the 256 bytes")
    return ranks, text
