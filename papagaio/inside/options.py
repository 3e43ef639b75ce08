"""The options of look.py, by command."""

from functools import partial
from pathlib import Path
from typing import Literal, Self

from pydantic import FilePath, model_validator

from papagaio.options import Options, option

_model, _what, _output = (partial(option, group=group) for group in ("Model", "What to look at", "Output"))


class OutputOptions(Options):
    out: Path = _output(Path("out/look"), "directory for the pictures (PNG)")
    html: bool = _output(False, "also write a page on which one can point and click; it needs no network")

    @model_validator(mode="after")
    def _check_out(self) -> Self:
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"{self.out}: a file is there; name a directory")
        return self


class DeviceOptions(OutputOptions):
    device: str = _model("cpu", "auto, cpu, cuda, cuda:N or mps", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")


class LookOptions(DeviceOptions):
    checkpoint: Path = _model(..., "a run, or a checkpoint directory")
    base: Path | None = _model(None, "the checkpoint that adapters (LoRA) were trained for, if it has moved since")


class TextOptions(LookOptions):
    text: str | None = _what(None, "a text, as the beginning of a document")
    question: str | None = _what(None, "a question, asked in the chat template")

    @model_validator(mode="after")
    def _check_text(self) -> Self:
        if bool(self.text) == bool(self.question):
            raise ValueError("give a --text, or a --question, one of them")
        return self


class TokensOptions(LookOptions):
    """look.py tokens: how a text is cut into tokens, and how a token becomes a vector."""

    text: str = _what(..., "text to cut", min_length=1)
    beside: tuple[Path, ...] = _what((), "runs, datasets or tokenizer directories whose tokenizers cut the same text")


class EmbeddingsOptions(LookOptions):
    """look.py embeddings: neighbours, analogies and a map of words, and how near words of a group are."""

    word: tuple[str, ...] = _what((), "words whose nearest neighbours are shown")
    analogy: tuple[str, ...] = _what((), "A B C: the words nearest to A - B + C, as in rei homem mulher")
    analogies: FilePath | None = _what(
        None, "file of pairs A B, or of analogies A B C D: a line each (tabs if words hold blanks), ': NAME'"
    )
    groups: FilePath | None = _what(
        None, "TOML with groups of words, name = [words] (default: weekdays, months and others, by Babel)"
    )
    language: str = _what("en", "of the default groups: en, pt, ...", pattern=r"^[a-zA-Z_]{2,10}$")
    clusters: int = _what(
        0, "instead of groups: this many clusters of the vocabulary's most frequent words (k-means)", ge=0, le=20
    )
    layer: int | None = _what(
        None, "mean hidden state of a word after N blocks, for words of several tokens (default: the table of embeddings)", ge=0
    )
    pool: Literal["mean", "last"] = _what(
        "mean", "hidden state of a word: the mean over its tokens, or that of the last token of --around"
    )
    around: str = _what("{}", "text in which a word stands when its hidden state is taken: '{} is'")
    training: bool = _what(False, "measure the groups at random weights and at every checkpoint of the run")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.analogy and len(self.analogy) != 3:
            raise ValueError(f"analogy needs three words, as in rei homem mulher, not {len(self.analogy)}")
        if self.around.count("{}") != 1:
            raise ValueError(f"around must hold {{}} once, where the word stands, not {self.around!r}")
        if self.layer is None and (self.around, self.pool) != ("{}", "mean"):
            raise ValueError("around and pool are for hidden states: add --layer=N")
        if self.groups and self.clusters:
            raise ValueError("groups and clusters exclude each other")
        return self


class AttentionOptions(TextOptions):
    """look.py attention: where each head looks, in words and pictures, and what it costs to take it out."""

    data: Path | None = _what(None, "dataset whose validation split measures the cost of each head (default: the text itself)")
    windows: int = _what(24, "windows of the validation split that are measured (0: all)", ge=0)
    layer: int | None = _what(
        None, "layer of the large map, from 1 (default: that of the head which looks most at one place)", ge=1
    )
    head: int | None = _what(None, "head of the large map, from 1", ge=1)


class PositionsOptions(LookOptions):
    """look.py positions: what the positional encoding does, and what the order of words is worth."""

    beside: tuple[Path, ...] = _what((), "runs with other positional encodings, to measure as well")
    data: Path | None = _what(None, "dataset whose validation split is measured: in order, and with its words shuffled")
    windows: int = _what(64, "windows of the validation split that are measured (0: all)", ge=0)


class LensOptions(TextOptions):
    """look.py lens: what the model would say next after each layer, and how sure it is."""

    answer: str | None = _what(None, "the right continuation: where its first token wins", min_length=1)


class KnowledgeOptions(TextOptions):
    """look.py knowledge: where the answer to a text or question comes from."""

    answer: str = _what(..., "the right answer, which follows", min_length=1)
    subject: str | None = _what(None, "part of the text that the answer is about: Brazil")
    other: str | None = _what(None, "what to put in its place, from where states are patched: Japan")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.subject) != bool(self.other):
            raise ValueError("subject and other go together")
        if self.subject and self.subject not in (self.text or self.question or ""):
            raise ValueError(f"subject {self.subject!r} does not occur in the text")
        return self


class DiffOptions(DeviceOptions):
    """look.py diff RUN_A RUN_B: what training from A to B changed, by layer and on questions."""

    source: tuple[Path, ...] = _model(..., "two runs or checkpoint directories of the same shape", min_length=2, max_length=2)
    questions: FilePath | None = _what(None, "questions with answers: the probability of the right answer before and after")
    limit: int = _what(500, "questions that are asked (0: all)", ge=0)


class RunsOptions(OutputOptions):
    """look.py runs RUN...: learning curves of several runs in one picture, and the options in which they differ."""

    source: tuple[Path, ...] = _model(..., "runs", min_length=1)


class ReportOptions(OutputOptions):
    """look.py report RUN: one page about a run: data, options, curves, samples, figures."""

    source: tuple[Path, ...] = _model(..., "a run", min_length=1, max_length=1)
    prompt: tuple[str, ...] = _what(("",), "beginnings of the samples")
    max_new_tokens: int = _what(60, "longest sample, in tokens (0: no samples)", ge=0)


COMMANDS: dict[str, type[Options]] = {
    "tokens": TokensOptions,
    "embeddings": EmbeddingsOptions,
    "attention": AttentionOptions,
    "positions": PositionsOptions,
    "lens": LensOptions,
    "knowledge": KnowledgeOptions,
    "diff": DiffOptions,
    "runs": RunsOptions,
    "report": ReportOptions,
}
