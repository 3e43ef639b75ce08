"""What training changed from one checkpoint to another: the weights, by layer, and the answers to questions."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from papagaio.batches.conversations import Conversation
from papagaio.errors import UserError
from papagaio.evaluation import answer_nats, question_ids
from papagaio.generation.engine import Engine
from papagaio.inside import drawing


def changes(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, float]:
    """By tensor ||B - A|| / ||A|| (Frobenius norms; of the larger of both if A is 0). Raises UserError for other shapes."""
    shapes = [{name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (before, after)]
    if shapes[0] != shapes[1]:
        name = next(name for name in [*shapes[0], *shapes[1]] if shapes[0].get(name) != shapes[1].get(name))
        raise UserError(f"{name} is {shapes[0].get(name)} in the one and {shapes[1].get(name)} in the other: two checkpoints of "
                        "one shape are needed")  # fmt: skip
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


class Asked(NamedTuple):
    """Questions with the probability of the right answer in each model; NaN for a question that does not fit the context."""

    questions: list[Conversation]
    probabilities: Tensor  # (2, N)


def ask(engines: Sequence[Engine], questions: list[Conversation]) -> Asked:
    """A chat model is asked in its chat template, a base model is given the question as a line of text."""
    found = []
    for engine in engines:
        shots = None if engine.is_chat else []
        asked = [question_ids(engine.tokenizer, row, shots, engine.block_size, 0) for row in questions]
        found.append((-answer_nats(engine, asked)).exp())
    return Asked(questions, torch.stack(found))


def draw_changes(parts: Sequence[str], matrix: Sequence[Sequence[float]], others: Mapping[str, float], title: str) -> Any:
    """Relative changes by layer and part, and of the rest."""
    L = len(matrix)
    picture = drawing.figure(max(6.5, 0.85 * len(parts) + 4.6), max(3.2, 0.32 * L + 2.0))
    left, right = picture.subplots(1, 2, width_ratios=(max(4, len(parts)), 3))
    texts = [[f"{value:.3f}" for value in row] for row in matrix]
    names = [part.removesuffix(".weight") for part in parts]
    drawing.heatmap(left, matrix, [f"layer {i + 1}" for i in range(L)], names, texts=texts, size=7)
    left.set_title("change of each part, relative to its norm", fontsize=9)
    right.barh(range(len(others)), list(others.values()), color=drawing.COLOURS[0])
    right.set_yticks(range(len(others)), [name.removesuffix(".weight") for name in others], fontsize=7)
    right.invert_yaxis()
    right.set_title("outside the blocks", fontsize=9)
    picture.suptitle(drawing.literal(title), fontsize=10)
    return picture


def draw_questions(asked: Asked, names: Sequence[str]) -> Any:
    """Each question a point: the probability of its right answer before and after."""
    picture = drawing.figure(6.6, 5.8)
    axes = picture.subplots()
    kinds = sorted({row.kind for row in asked.questions})
    for number, kind in enumerate(kinds):
        own = [i for i, row in enumerate(asked.questions) if row.kind == kind]
        style = {"marker": drawing.MARKERS[(number + number // 7) % 7], "c": drawing.COLOURS[number % 7]}
        axes.scatter(*asked.probabilities[:, own].clamp_min(1e-12), s=14, alpha=0.7, label=kind or "questions", **style)
    lowest = max(1e-12, float(asked.probabilities[0].nan_to_num(1.0).min()))
    even = torch.logspace(math.log10(lowest), 0, 200)
    axes.plot(even, even, color="grey", linewidth=0.8, label="unchanged")
    axes.set_xscale("log")
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel(f"before: {drawing.clip_left(names[0], 40)}")
    axes.set_ylabel(f"after: {drawing.clip_left(names[1], 40)}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.set_title("probability of the right answer", fontsize=10)
    return picture
