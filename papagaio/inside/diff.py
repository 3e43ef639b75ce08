"""What training changed from one checkpoint to another: the weights, by layer, and the answers to questions."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from papagaio.batches.conversations import Conversation
from papagaio.batches.questions import read_conversations
from papagaio.errors import UserError
from papagaio.evaluation import answer_nats, question_ids
from papagaio.generation.engine import Engine
from papagaio.inside import drawing
from papagaio.inside.opening import make_engine
from papagaio.inside.options import DiffOptions
from papagaio.inside.page import Found
from papagaio.runs.checkpoint import MakeModel
from papagaio.runs.directory import open_checkpoint


def look(config: DiffOptions, make: MakeModel) -> Found:
    """How far the weights moved, and how probable the right answers were and are."""
    opened, names = [open_checkpoint(path) for path in config.source], list(map(str, config.source))
    parts, matrix, others = by_layer(changes(*(one.tensors() for one in opened)))
    found = Found(["change, relative to the norm of the weights:"])
    found.lines += [f"  layer {i}: {sum(row) / len(row):.4f}" for i, row in enumerate(matrix, 1)]
    found.lines += [f"  {name}: {value:.4f}" for name, value in others.items()]
    found.pictures["diff"] = draw_changes(parts, matrix, others, f"from {names[0]} to {names[1]}")
    if config.questions:
        rows = read_conversations(config.questions)
        asked = rows[: config.limit or None]
        p = torch.stack([probabilities(make_engine(one, make, config.device), asked) for one in opened])  # (2, N)
        means, rose, missing = p.nanmean(1).tolist(), int((p[1] > p[0]).sum()), int(p.isnan().any(0).sum())
        note = f", {missing} do not fit the context" if missing else ""
        found.lines.append(f"{len(asked):,} of {len(rows):,} questions{note}: mean probability of the right answer "
                           f"{means[0]:.4f} before, {means[1]:.4f} after; {rose:,} rose")  # fmt: skip
        found.pictures["diff_questions"] = draw_questions(p, [row.kind for row in asked], names)
    return found


def changes(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, float]:
    """By tensor ||B - A|| / ||A|| (Frobenius norms; of the larger of both if A is 0). Raises UserError for other shapes."""
    one, other = ({name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (before, after))
    for name in [*one, *other]:
        if (a := one.get(name, "missing")) != (b := other.get(name, "missing")):
            raise UserError(f"{name} is {a} in the one and {b} in the other: two checkpoints of one shape are needed")
    found = {}
    for name, a in before.items():
        a, b = a.float(), after[name].float()
        size = float(a.norm()) or float(b.norm()) or 1.0
        found[name] = float((b - a).norm()) / size
    return found


def by_layer(found: Mapping[str, float]) -> tuple[list[str], list[list[float]], dict[str, float]]:
    """The parts of a block, their changes (layers, parts; 0 where a layer has none), and the changes of all other tensors."""
    inside = {name: match for name in found if (match := re.fullmatch(r"blocks\.(\d+)\.(.+)", name))}
    parts = list(dict.fromkeys(match[2] for match in inside.values()))
    count = 1 + max(int(match[1]) for match in inside.values())
    matrix = [[found.get(f"blocks.{i}.{part}", 0.0) for part in parts] for i in range(count)]
    return parts, matrix, {name: value for name, value in found.items() if name not in inside}


def probabilities(engine: Engine, questions: list[Conversation]) -> Tensor:
    """Of the right answers (N,); NaN for a question that does not fit the context. A chat model is asked in its chat template, a
    base model is given the question as a line of text."""
    shots = None if engine.is_chat else []
    asked = [question_ids(engine.tokenizer, row, shots, engine.block_size, 0) for row in questions]
    return (-answer_nats(engine, asked)).exp()


def draw_changes(parts: Sequence[str], matrix: Sequence[Sequence[float]], others: Mapping[str, float], title: str) -> Any:
    """Relative changes by layer and part, and of the rest."""
    L = len(matrix)
    picture = drawing.figure(max(6.5, 0.85 * len(parts) + 4.6), max(3.2, 0.32 * L + 2.0))
    left, right = picture.subplots(1, 2, width_ratios=(max(4, len(parts)), 3))
    texts = [[f"{value:.3f}" for value in row] for row in matrix]
    names = [part.removesuffix(".weight") for part in parts]
    drawing.heatmap(left, matrix, [f"layer {i + 1}" for i in range(L)], names, texts=texts, size=7)
    left.set_title("change of each part, relative to its norm")
    right.barh(range(len(others)), list(others.values()), color=drawing.COLOURS[0])
    right.set_yticks(range(len(others)), [name.removesuffix(".weight") for name in others])
    right.invert_yaxis()
    right.set_title("outside the blocks")
    picture.suptitle(drawing.literal(title))
    return picture


def draw_questions(p: Tensor, kinds: Sequence[str], names: Sequence[str]) -> Any:
    """Each question a point: the probability of its right answer before and after (2, N), coloured by its kind."""
    picture = drawing.figure(6.6, 5.8)
    axes = picture.subplots()
    for number, kind in enumerate(sorted(set(kinds))):
        own = [i for i, other in enumerate(kinds) if other == kind]
        colour, marker = drawing.style(number)
        axes.scatter(*p[:, own].clamp_min(1e-12), s=14, alpha=0.7, label=kind, c=colour, marker=marker)
    lowest = max(1e-12, float(p[0].nan_to_num(1.0).min()))
    even = torch.logspace(math.log10(lowest), 0, 200)
    axes.plot(even, even, color="grey", linewidth=0.8, label="unchanged")
    before, after = (drawing.literal(drawing.clip_left(name, 40)) for name in names)
    axes.set(xscale="log", ylim=(-0.03, 1.03), xlabel=f"before: {before}", ylabel=f"after: {after}")
    axes.set_title("probability of the right answer")
    axes.grid()
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return picture
