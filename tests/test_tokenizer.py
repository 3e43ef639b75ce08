"""papagaio/tokenizer.py: round trips, tiktoken's ids, special tokens that no text can spell."""

import functools
import itertools
import json
from pathlib import Path

import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st

from papagaio.errors import MachineError, UserError
from papagaio.tokenizer import (
    GPT2_PATTERN,
    GPT4_PATTERN,
    SPECIAL_TOKENS,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    gpt2_tokenizer,
    text_chunks,
    train_bpe,
)
from papagaio.tokenizer_files import load_tokenizer, save_tokenizer

RANKS = Path(__file__).parents[1].parent / "shared" / "data" / "gpt2.tiktoken"
CORPUS = [
    "The parrot repeats what it was told, and sometimes more. " * 5,
    "O papagaio repete: 123, 4567! Ünïcödé — 日本 🦜\n\n\tend",
]
BPE = train_bpe(CORPUS, 320)
needs_ranks = pytest.mark.skipif(not RANKS.exists(), reason="GPT-2's ranks are not beside this checkout")


@pytest.fixture(scope="module")
def gpt2() -> BPETokenizer:
    return gpt2_tokenizer(RANKS)


@given(st.text())
def test_bytes_and_bpe_round_trip_any_text(text: str) -> None:
    for tokenizer in (ByteTokenizer(), BPE):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(tokenizer.special.values())
        assert sum(tokenizer.byte_lengths[token] for token in ids) == len(text.encode())


@given(st.text(min_size=1))
def test_char_round_trips_its_own_alphabet(text: str) -> None:
    tokenizer = CharTokenizer(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(text)) == len(text)


PIECES = st.sampled_from([*SPECIAL_TOKENS, "<|", "|>", "<|endof", "text|>", "end", "<", "|", " ", "\n", "a"])


@settings(max_examples=300)
@given(st.lists(PIECES, max_size=8).map("".join))
def test_spelled_out_special_tokens_stay_text(text: str) -> None:
    for tokenizer in (ByteTokenizer(), BPE, CharTokenizer(text + "a")):
        ids = tokenizer.encode(text)
        assert not set(ids) & set(tokenizer.special.values())
        assert tokenizer.decode(ids) == text


@needs_ranks
@settings(deadline=None)
@given(st.text())
def test_gpt2_ids_are_tiktokens(gpt2: BPETokenizer, text: str) -> None:
    theirs = tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=gpt2.ranks, special_tokens={"<|endoftext|>": 50256})
    assert gpt2.encode(text) == theirs.encode(text, disallowed_special=())
    assert gpt2.decode(gpt2.encode(text)) == text


@needs_ranks
def test_gpt2_ids_are_the_published_ones(gpt2: BPETokenizer) -> None:
    assert gpt2.encode("Hello world! I'm 2026 years old.\n\n  ok") == (
        [15496, 995, 0, 314, 1101, 1160, 2075, 812, 1468, 13, 628, 220, 12876]
    )
    assert [gpt2.special[name] for name in SPECIAL_TOKENS] == [50256, 50257, 50258, 50259, 50260]
    assert gpt2.vocab_size == 50261


@needs_ranks
def test_gpt2_ids_are_hugging_faces(gpt2: BPETokenizer) -> None:
    """The tokenizers library, which splits and merges with code of its own, agrees on real text."""
    from tokenizers import Tokenizer as HuggingFace
    from tokenizers import decoders, models, pre_tokenizers

    # GPT-2's printable stand-ins for bytes
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    stand_in = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    spell = lambda token: "".join(stand_in[b] for b in token)  # noqa: E731
    vocabulary = {spell(token): rank for token, rank in gpt2.ranks.items()}
    merges = []
    for token, rank in sorted(gpt2.ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:  # the last merge that makes the token joins its two parts of lower rank
            parts = [bytes([b]) for b in token]
            while len(parts) > 2:
                pairs = [(gpt2.ranks.get(a + b, rank), i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
                best, i = min(pairs)
                assert best < rank
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            merges.append((spell(parts[0]), spell(parts[1])))
    theirs = HuggingFace(models.BPE(vocab=vocabulary, merges=merges))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = decoders.ByteLevel()
    text = Path(__file__).read_text() + " naïve façade 日本語 🦜🦜 \t\r\n x"
    assert gpt2.encode(text) == theirs.encode(text).ids


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharTokenizer("abc\n日"), BPE], ids=lambda t: t.kind)
def test_saved_tokenizers_come_back_equal(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.sha256 == tokenizer.sha256
    assert again.encode("abc") == tokenizer.encode("abc")
    described = json.loads((tmp_path / "tokenizer.json").read_text())
    assert described["special_tokens"] == tokenizer.special
    assert "pattern" in described


def test_the_byte_tokenizer_is_the_documented_one() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("aé") == [97, 195, 169]
    assert [tokenizer.special[name] for name in SPECIAL_TOKENS] == [256, 257, 258, 259, 260]


def test_bpe_is_deterministic_counts_its_vocabulary_and_compresses() -> None:
    again = train_bpe(CORPUS, 320)
    assert again.sha256 == BPE.sha256
    assert BPE.vocab_size == 320
    assert list(BPE.special.values()) == [315, 316, 317, 318, 319]
    assert len(BPE.encode(CORPUS[0])) < len(CORPUS[0]) / 3
    assert train_bpe(["ab"], 1000).vocab_size == 262  # one pair to merge, and no more
    with pytest.raises(UserError, match="at least 261"):
        train_bpe(CORPUS, 260)


def test_batches_equal_single_texts() -> None:
    assert [BPE.encode_array(text).tolist() for text in CORPUS] == [BPE.encode(text) for text in CORPUS]


def test_char_names_the_unknown_character() -> None:
    with pytest.raises(UserError, match=r"'z' \(position 2"):
        CharTokenizer("abc").encode("abz")


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=lambda t: t.kind)
def test_lone_surrogates_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="surrogate"):
        tokenizer.encode("a\ud800")


def test_damaged_tokenizers_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    save_tokenizer(BPE, tmp_path)
    ranks = tmp_path / "ranks.tiktoken"
    whole = ranks.read_bytes()
    ranks.write_bytes(b"\n".join(whole.splitlines()[:-1]) + b"\n")
    with pytest.raises(UserError, match="damaged"):
        load_tokenizer(tmp_path)
    ranks.write_bytes(whole.replace(b"\n", b" x\n", 1))
    with pytest.raises(UserError, match=r"ranks\.tiktoken:1"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"kind": "morse"}')
    with pytest.raises(UserError, match="morse"):
        load_tokenizer(tmp_path)


def test_gpt2_from_a_wrong_file_is_refused(tmp_path: Path) -> None:
    save_tokenizer(BPE, tmp_path)
    with pytest.raises(UserError, match="not GPT-2's vocabulary"):
        gpt2_tokenizer(tmp_path / "ranks.tiktoken")


def test_gpt2_offline_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import requests

    def offline(*_: object, **__: object) -> None:
        raise requests.ConnectionError

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(requests, "get", offline)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    with pytest.raises(MachineError, match="--ranks"):
        gpt2_tokenizer()


@needs_ranks
def test_gpt2_comes_out_of_tiktokens_own_cache(gpt2: BPETokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: {"gpt2": gpt2.encoding}[name])
    assert gpt2_tokenizer().sha256 == gpt2.sha256


pieces_of_text = st.lists(
    st.sampled_from(
        [
            " ",
            "\n",
            "  ",
            "\t",
            "\r\n",
            "parrot",
            " word",
            "naïve",
            "🦜",
            "日本",
            "'s",
            "'LL",
            "123456",
            ".",
            "...",
            "(",
            "é",
            "\x0b",
            "\x1c",
            "\x85",
            "²",
        ]
    )
    | st.text(max_size=3),
    max_size=60,
).map(lambda parts: "".join(c for c in "".join(parts) if not "\ud800" <= c <= "\udfff"))


@pytest.mark.parametrize("pattern", [GPT2_PATTERN, GPT4_PATTERN, r"\p{Lu}?\p{L}+|\s+|."])
@given(pieces_of_text, st.integers(1, 40))
@settings(max_examples=150, deadline=None)
@example("a.\x1c.b\x0b 'LL don't\r\n\n  (12345)  \t x", 1)
def test_arrays_hold_the_ids_that_tiktoken_gives(pattern: str, text: str, copies: int) -> None:
    """Also where a text is cut into chunks, looked up word by word, or handed to tiktoken."""
    tokenizer = trained(pattern)
    for whole in (text, text * copies * 20, "plain words, and more. " * 100 + text + " and 12345 words\n" * 200):
        whole = whole[:20_000]
        expected = tokenizer.encoding.encode_ordinary(whole) if pattern in (GPT2_PATTERN, GPT4_PATTERN) else None
        assert "".join(text_chunks(whole)) == whole
        if expected is not None:
            assert tokenizer.encode_array(whole).tolist() == expected
        assert tokenizer.decode(tokenizer.encode_array(whole).tolist()) == whole


@pytest.mark.parametrize("pattern", [GPT2_PATTERN, GPT4_PATTERN])
@given(pieces_of_text, st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_a_prompt_has_the_ids_of_the_uncut_encoding(pattern: str, text: str, copies: int) -> None:
    tokenizer, whole = trained(pattern), (text + " and more words, " * 20) * copies
    assert tokenizer.encode(whole) == tokenizer.encoding.encode_ordinary(whole)


@pytest.mark.parametrize("character", [" ", "\n", "\t", "\u3000", "a", "7", "é", "!", "🦜"])
def test_a_million_of_one_character(character: str) -> None:
    """Which tiktoken alone does not survive if they are blanks with something behind them."""
    tokenizer, text = trained(GPT2_PATTERN), f"a{character * 1_000_000}x"
    ids = tokenizer.encode(text)
    assert tokenizer.decode_bytes(ids) == text.encode()


@functools.cache
def trained(pattern: str) -> BPETokenizer:
    return train_bpe(
        ["the parrot's words, 'LL go on...\n\n  naïve 🦜 日本 " * 20, "(word) word 123456\t\r\n.\x1c.b\x0b " * 9], 400, pattern
    )


def test_a_text_without_a_place_to_cut_is_cut_by_force() -> None:
    assert [len(part) for part in text_chunks("x" * 150_000)] == [65536, 65536, 150_000 - 2 * 65536]
    assert text_chunks("") == []
    assert text_chunks("a b. " * 1000)[0].endswith(("a", "b"))
    assert set(map(len, text_chunks("ab " * 3000)[:-1])) <= set(range(2048, 2052))


def test_the_cache_of_words_starts_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = trained(GPT4_PATTERN)
    words = type(tokenizer._words)(tokenizer.pattern, tokenizer.encoding.encode_ordinary)
    monkeypatch.setattr(type(words), "LARGEST", 5)
    for text in ("one two three four", "five six seven", "one two nine"):
        assert words.encode(text).tolist() == tokenizer.encode(text)
    assert sorted(words) == [" nine", " two", "one"]
    words.encode("x" * 65)
    assert "x" * 65 not in words


@pytest.mark.parametrize(
    "tokenizer", [ByteTokenizer(), CharTokenizer("abcdé"), trained(GPT4_PATTERN)], ids=["byte", "char", "bpe"]
)
def test_special_tokens_stand_behind_all_others(tokenizer: Tokenizer) -> None:
    """Adding one can therefore never shift the id of an ordinary token."""
    ordinary = tokenizer.vocab_size - len(tokenizer.special)
    assert sorted(tokenizer.special.values()) == list(range(ordinary, tokenizer.vocab_size))
    assert tokenizer.encode_array("abcdé").tolist() == tokenizer.encode("abcdé")
    assert max(tokenizer.encode("abcdé")) < ordinary
