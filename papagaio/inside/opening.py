"""What every command begins with: the model, the text as ids, and tokens as people read them."""

import torch

from papagaio import runtime
from papagaio.batches.conversations import Message, render_prompt
from papagaio.errors import UserError
from papagaio.generation.engine import Engine
from papagaio.inside.options import LookOptions, TextOptions
from papagaio.runs.checkpoint import Checkpoint, MakeModel
from papagaio.runs.directory import open_checkpoint


def make_engine(checkpoint: Checkpoint, make: MakeModel, device: str) -> Engine:
    """The model of a checkpoint in float32, with model.py's own operations; adapters are added to its weights."""
    model = checkpoint.build(make, runtime.pick_device(device), torch.float32).requires_grad_(False)
    return Engine(model, checkpoint.tokenizer, is_chat=checkpoint.is_chat)


def open_engine(config: LookOptions, make: MakeModel) -> Engine:
    """The model of --checkpoint. Raises UserError."""
    return make_engine(open_checkpoint(config.checkpoint, config.base), make, config.device)


def open_text(config: TextOptions, make: MakeModel) -> tuple[Engine, list[int], list[str]]:
    """The model, the ids of the text or question, and their spellings. Raises UserError."""
    engine = open_engine(config, make)
    ids = prompt_ids(engine, config.text, config.question)
    return engine, ids, [spell(engine, token) for token in ids]


def prompt_ids(engine: Engine, text: str | None, question: str | None, more: int = 0) -> list[int]:
    """Ids of a text as the beginning of a document, or of a question in the chat template. Raises UserError if they, with `more`
    tokens behind, do not fit into the context."""
    ids = engine.encode(text) if text else render_prompt(engine.tokenizer, [Message(role="user", content=question or "")])
    if len(ids) + more > engine.block_size:
        raise UserError(
            f"the text has {len(ids) + more} tokens, the model's context only {engine.block_size}: give a shorter one"
        )
    return ids


def check_layer(layer: int, count: int, option: str = "--layer") -> None:
    """Raises UserError unless the model, which has `count` of them, has this layer (or head, counted from 1)."""
    if not 0 <= layer <= count:
        raise UserError(f"{option}={layer}: this model has {count}")


def spell(engine: Engine, token: int) -> str:
    """A token for people: blanks as ·, line breaks as ↵."""
    return engine.tokenizer.decode([token]).replace(" ", "·").replace("\n", "↵").replace("\t", "⇥")


def span(engine: Engine, ids: list[int], part: str, behind: str = "") -> slice:
    """The tokens of ids that spell the last occurrence of `part`, whole or in part, before the text `behind`, with which ids end.
    Raises UserError if there is none."""
    pieces = [engine.tokenizer.decode_bytes([token]) for token in ids]
    text = b"".join(pieces)
    begin = text.rfind(part.encode(), 0, len(text) - len(behind.encode()))
    if begin < 0:
        raise UserError(f"{part!r} does not occur in the text")
    ends = [sum(map(len, pieces[: i + 1])) for i in range(len(pieces))]
    inside = [i for i, end in enumerate(ends) if end > begin and end - len(pieces[i]) < begin + len(part.encode())]
    return slice(inside[0], inside[-1] + 1)
