"""Tokenizers of released models: taken over from Hugging Face's tokenizer.json or from GGUF, and ours given to them.

A pre-tokenizer cuts a text into words; merges stay inside them. llama.cpp knows pre-tokenizers by name alone. PRE_TOKENIZERS has
those that can be taken over and given, as the regular expressions of the `tokenizers` library.
"""

import itertools
import json
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

from papagaio.batches.conversations import Message, render
from papagaio.errors import UserError
from papagaio.formats.template import compose, derive, plain_template
from papagaio.released_tokenizer import BYTE_OF, ReleasedTokenizer
from papagaio.tokenizer import GPT2_PATTERN, GPT4_PATTERN, SPECIAL_TOKENS, BPETokenizer, CharTokenizer, Tokenizer

CHARACTER_OF = {byte: character for character, byte in BYTE_OF.items()}
_BYTES: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_WORDS = _BYTES | {"use_regex": True}  # cut by GPT-2's regular expression first
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Ours ends a run of blanks at the end of a text as one word; Llama 3's ends it after its last line break.
_GPT4 = GPT4_PATTERN.replace("{1,3}+", "{1,3}")  # Oniguruma would repeat it
# By llama.cpp's name (tokenizer.ggml.pre): the regular expression before ByteLevel, or "digits", or "" for GPT-2's in it.
PRE_TOKENIZERS = {
    "gpt-2": "",
    "smollm": "digits",
    "llama-bpe": _LLAMA3,
    "qwen2": _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),
}
ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "starcoder": "smollm"}


def released(
    text: str, vocab_size: int, start: int | None, ends: Iterable[int], jinja: str | None, variables: dict[str, str]
) -> ReleasedTokenizer:
    """A tokenizer with its chat template. `start` is the token that the model expects at the beginning, None if unknown.
    A template that cannot be taken over is reported, and left out.

    Raises UserError if the `tokenizers` library does not accept `text`, or if the vocabulary is not the table's.
    """
    try:
        bare = ReleasedTokenizer(text, vocab_size, 0, ends)
    except UserError:
        raise
    except Exception as error:  # the library raises nothing more special
        raise UserError(f"the tokenizers library does not accept it: {error}") from None
    tokens, special = bare.backend.get_vocab_size(), bare.special
    if vocab_size - tokens > 1024:
        raise UserError(f"the tokenizer has {tokens:,} tokens and the model's table {vocab_size:,} rows: of another model?")
    if vocab_size > tokens:
        print(f"the table has {vocab_size - tokens:,} rows more than the {tokens:,} tokens: they stay unused", file=sys.stderr)
    names = {token: name for name, token in special.items()}
    ends = [token for token in ends if token in names]
    start = (
        special.get("<|endoftext|>", special.get(variables.get("bos_token", ""), next(iter(ends), None)))
        if start is None
        else start
    )
    if start not in names or not ends:
        raise UserError("the tokenizer has no special token that begins a document, or none that ends an answer")
    chat = plain_template(names[start], names[ends[0]])
    if jinja:
        try:
            chat = derive(jinja, variables)
            _check_ids(found := ReleasedTokenizer(text, vocab_size, start, ends, chat))
        except UserError as error:
            print(f"warning: without its chat template: {error}", file=sys.stderr)
            return ReleasedTokenizer(text, vocab_size, start, ends, None)
        return ReleasedTokenizer(text, vocab_size, start, {*ends, found.answer_end}, chat)
    chat["jinja"] = jinja_of(chat["joints"])
    return ReleasedTokenizer(text, vocab_size, start, ends, chat)


def _check_ids(tokenizer: ReleasedTokenizer) -> None:
    """Raises UserError unless conversations get the ids of their rendered text as a whole, as in transformers."""
    for turns in (
        [("user", "a b"), ("assistant", "c. d")],
        [("user", "Hi!"), ("assistant", "1 2"), ("user", " x"), ("assistant", "y")],
    ):
        tokenizer.backend.encode_special_tokens = False
        wanted = tokenizer.backend.encode(compose(tokenizer.chat, turns), add_special_tokens=False).ids
        tokenizer.backend.encode_special_tokens = True
        if render(tokenizer, [Message(role=role, content=content) for role, content in turns]).ids != wanted:
            raise UserError("the ids of its pieces are not those of the whole text")


def jinja_of(joints: dict[str, str]) -> str:
    """A chat template in Jinja that writes these pieces between the contents."""
    return (
        f"{{%- set pieces = {json.dumps(joints, ensure_ascii=False)} -%}}{{%- set seen = namespace(role='') -%}}"
        "{%- for message in messages -%}{{- pieces[seen.role + '>' + message['role']] + message['content'] -}}"
        "{%- set seen.role = message['role'] -%}{%- endfor -%}"
        "{{- pieces[seen.role + '>' + ('assistant' if add_generation_prompt else '')] -}}"
    )


class Vocabulary(NamedTuple):
    """A byte-pair vocabulary as GGUF keeps it: all tokens in order, their types, merges, and the name of the pre-tokenizer."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    pre: str


NO_MERGE = f"{SPECIAL_TOKENS[0]} {SPECIAL_TOKENS[0]}"  # never happens; llama.cpp refuses a vocabulary without merges
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's types of tokens


def huggingface_json(vocabulary: Vocabulary) -> str:
    """tokenizer.json for a vocabulary of GGUF. Raises UserError if its pre-tokenizer cannot be taken over."""
    pre = ALIASES.get(vocabulary.pre, vocabulary.pre)
    if pre not in PRE_TOKENIZERS:
        raise UserError(
            f"tokenizer.ggml.pre is {pre!r}; {', '.join(PRE_TOKENIZERS)} can be taken over: use the Hugging Face directory"
        )
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    added = [(i, token) for token, i in ids.items() if vocabulary.types[i] in (CONTROL, USER_DEFINED)]
    special = {i for i, _ in added if vocabulary.types[i] == CONTROL}
    merges = [merge.split(" ") for merge in vocabulary.merges if merge != NO_MERGE]
    return _json(ids, merges, PRE_TOKENIZERS[pre], added, special, ignore_merges=pre == "llama-bpe")


def _json(
    ids: dict[str, int], merges: list[list[str]], pre: str, added: list[tuple[int, str]], special: set[int], ignore_merges: bool
) -> str:
    split = {"type": "Split", "pattern": {"Regex": pre}, "behavior": "Isolated", "invert": False}
    before = {"": [], "digits": [{"type": "Digits", "individual_digits": True}]}.get(pre, [split])
    steps = [*before, _BYTES if pre not in ("", "digits") else _WORDS]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **flags, "special": i in special} for i, token in added],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps} if len(steps) > 1 else steps[0],
        "post_processor": None,
        "decoder": _BYTES | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": ids,
            "merges": merges,
        },
    }
    return json.dumps(whole, ensure_ascii=False)


def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """A tokenizer's vocabulary for GGUF. Raises UserError if llama.cpp has no pre-tokenizer that cuts texts as this one does."""
    if not isinstance(tokenizer, ReleasedTokenizer):
        tokens = list(_spelled(tokenizer))
        types = [CONTROL if token in SPECIAL_TOKENS else NORMAL for token in tokens]
        merges = [" ".join(merge) for merge in _merges(tokenizer)]
        return Vocabulary(tokens, types, merges or [NO_MERGE], _pre(tokenizer))
    whole = json.loads(tokenizer.text)
    if whole["model"].get("type") != "BPE" or '"ByteLevel"' not in tokenizer.text:
        raise UserError("this tokenizer is not byte-level BPE: llama.cpp's converter takes the original model instead")
    ids = tokenizer.backend.get_vocab()
    missing = {i: f"[PAD{i}]" for i in range(tokenizer.vocab_size)}
    tokens = list((missing | {i: token for token, i in ids.items()}).values())
    control, added = set(tokenizer.special.values()), {*tokenizer.backend.get_added_tokens_decoder()}
    known = {*ids.values()}
    types = [
        CONTROL if i in control else USER_DEFINED if i in added else NORMAL if i in known else UNUSED for i in range(len(tokens))
    ]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in whole["model"]["merges"]]
    return Vocabulary(tokens, types, merges, _pre_of_json(whole["pre_tokenizer"]))


def _pre_of_json(pre_tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name of a pre-tokenizer of the `tokenizers` library."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [step["type"] for step in steps]
    expression = None
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        expression = ""
    elif kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1].get("use_regex", True):
        expression = "digits"
    elif kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        expression = steps[0]["pattern"].get("Regex")
    if any(step.get("add_prefix_space") for step in steps):
        expression = None
    for name, known in (*PRE_TOKENIZERS.items(), ("llama-bpe", _GPT4)):
        if expression == known:
            return name
    raise UserError(f"llama.cpp has no pre-tokenizer that cuts texts as this tokenizer does ({' + '.join(kinds)})")


def _pre(tokenizer: Tokenizer) -> str:
    if isinstance(tokenizer, CharTokenizer) and not all(character.isascii() for character in tokenizer.characters):
        raise UserError("llama.cpp has no tokenizer of characters beyond ASCII: prepare the data with --tokenizer byte or bpe")
    if tokenizer.pattern == GPT4_PATTERN:
        print(
            "llama.cpp cuts blanks at the very end of a text after their last line break: such texts get other tokens",
            file=sys.stderr,
        )
        return "llama-bpe"
    if tokenizer.pattern in (GPT2_PATTERN, None):  # without merges, any cut is right
        return "gpt-2"
    raise UserError(f"llama.cpp has no pre-tokenizer for the pattern {tokenizer.pattern}")


def _spelled(tokenizer: Tokenizer) -> dict[str, int]:
    """The tokens of one of our own tokenizers in the printable characters of byte-level files, in order, and their ids. Raises
    UserError if an ordinary token spells a special one: other tools tell them apart by their spelling alone."""
    names = {i: name for name, i in tokenizer.special.items()}
    found: dict[str, int] = {}
    for token in range(tokenizer.vocab_size):
        spelled = names.get(token) or "".join(CHARACTER_OF[byte] for byte in tokenizer.token_bytes(token))
        if found.setdefault(spelled, token) != token:
            raise UserError(f"the ordinary token {found[spelled]} spells {spelled}, as a special token does: no export")
    return found


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """The merges of byte-pair ranks: each token of several bytes is the pair that remains if only earlier tokens may merge."""
    if not isinstance(tokenizer, BPETokenizer):
        return []
    found = []
    for token, rank in tokenizer.ranks.items():
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            ranks = [tokenizer.ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            first = min(range(len(ranks)), key=ranks.__getitem__)
            if ranks[first] >= rank:
                break
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        if len(parts) == 2:
            found.append(tuple("".join(CHARACTER_OF[byte] for byte in part) for part in parts))
    return found


def own_json(tokenizer: Tokenizer) -> str:
    """tokenizer.json of one of our own tokenizers."""
    ids = _spelled(tokenizer)
    added = [(i, name) for name, i in tokenizer.special.items()]
    if isinstance(tokenizer, CharTokenizer):
        return _characters_json(tokenizer, added)
    pre = {GPT2_PATTERN: "", GPT4_PATTERN: _GPT4, None: ""}.get(tokenizer.pattern, tokenizer.pattern)
    text = _json(ids, [list(merge) for merge in _merges(tokenizer)], pre, added, {i for i, _ in added}, ignore_merges=False)
    return _with_start(text, tokenizer)


def _characters_json(tokenizer: CharTokenizer, added: list[tuple[int, str]]) -> str:
    whole = json.loads(_json(tokenizer.ids | tokenizer.special, [], "", added, {i for i, _ in added}, ignore_merges=False))
    whole |= {"pre_tokenizer": None, "decoder": {"type": "Fuse"}}
    return _with_start(json.dumps(whole, ensure_ascii=False), tokenizer)


def _with_start(text: str, tokenizer: Tokenizer) -> str:
    """With the token that begins a document before every text, as in training."""
    name = next(name for name, i in tokenizer.special.items() if i == tokenizer.start)
    token, first, second = (
        {"SpecialToken": {"id": name, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"Sequence": {"id": "B", "type_id": 0}},
    )
    special = {name: {"id": name, "ids": [tokenizer.start], "tokens": [name]}}
    processor = {
        "type": "TemplateProcessing",
        "single": [token, first],
        "pair": [token, first, second],
        "special_tokens": special,
    }
    return json.dumps(json.loads(text) | {"post_processor": processor}, ensure_ascii=False)
