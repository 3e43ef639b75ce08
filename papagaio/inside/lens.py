"""The logit lens (nostalgebraist 2020): what a model would say next if it stopped after each layer, and how sure it is."""

import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from papagaio.generation.engine import Engine
from papagaio.inside import drawing, page
from papagaio.inside.hooks import observe
from papagaio.inside.opening import open_text, spell
from papagaio.inside.options import LensOptions
from papagaio.runs.checkpoint import MakeModel

LISTED = 5  # of the most probable tokens


def look(config: LensOptions, make: MakeModel) -> page.Found:
    """What comes next after each layer, and from which layer on the answer wins."""
    engine, ids, labels = open_text(config, make)
    answer, *rest = engine.tokenizer.encode(config.answer) if config.answer else [None]
    found = view(engine, ids, answer)
    name = "" if answer is None else spell(engine, answer)
    if rest:
        print(f"the answer has {1 + len(rest)} tokens: the first one, {name}, is looked for", file=sys.stderr)
    lines = ["what comes next, after each layer:", *table(engine, found, answer)]
    if answer is not None:
        first = first_win(found, answer)
        won = "never wins" if first is None else f"wins from layer {first} on" if first else "wins from the embedding on"
        lines.append(f"the right answer, {name}, {won}")
    following = [*labels[1:], name] if name else labels[1:]
    pictures = {
        "lens": draw(found, labels, following, drawing.clip(config.text or config.question or "", 90)),
        "lens_distribution": draw_distribution(found, answer, name),
    }
    best = found.probabilities.topk(min(10, found.probabilities.size(-1)))  # (L + 1, T, 10)
    details = [
        [
            ", ".join(f"{spell(engine, t)} {p:.3f}" for t, p in zip(*cell, strict=True)) + f"; entropy {entropy:.2f} bits"
            for *cell, entropy in zip(*row, strict=True)
        ]
        for row in zip(best.indices.tolist(), best.values.tolist(), found.entropy.tolist(), strict=True)
    ]
    return page.Found(lines, pictures, [page.grid(drawing.layers(len(best.values)), labels, found.chance, found.best, details)])


class Views(NamedTuple):
    """What the model says next after 0 to L blocks."""

    probabilities: Tensor  # (L + 1, T, V)
    entropy: Tensor  # (L + 1, T), in bits
    best: list[list[str]]  # the most probable token after each layer and place
    chance: Tensor  # (L + 1, T), the probability of that token
    right: Tensor  # (L + 1, T), the probability of the token that does come next; NaN at the last place if none is known


@torch.no_grad()
def view(engine: Engine, ids: list[int], answer: int | None = None) -> Views:
    """The final norm and the head, applied to the residual stream after each layer; `answer` is the token after ids (T,)."""
    model = engine.model
    hidden = observe(model, torch.tensor([ids], device=engine.device)).hidden
    p = torch.stack([model.logits(model.norm(x[0])).float().softmax(-1) for x in hidden]).cpu()  # (L + 1, T, V)
    chance, best = p.max(-1)
    entropy = -(p * p.clamp_min(1e-45).log2()).sum(-1)
    following = [*ids[1:], answer or 0]
    right = p[:, torch.arange(len(ids)), torch.tensor(following)]  # (L + 1, T)
    if answer is None:
        right[:, -1] = math.nan
    return Views(p, entropy, [[spell(engine, token) for token in row] for row in best.tolist()], chance, right)


def first_win(views: Views, answer: int) -> int | None:
    """The layer from which on the answer is the most probable token after the last place, to the end; None if it never wins."""
    wins = (views.probabilities[:, -1].argmax(-1) == answer).tolist()
    losses = [i for i, wins_here in enumerate(wins) if not wins_here]
    first = losses[-1] + 1 if losses else 0
    return first if first < len(wins) else None


def table(engine: Engine, views: Views, answer: int | None) -> list[str]:
    """For each layer the entropy and the most probable tokens after the last place."""
    lines = []
    for layer, p in enumerate(views.probabilities[:, -1]):
        best = p.topk(min(LISTED, p.numel()))
        named = "  ".join(f"{spell(engine, t)} {q:.3f}" for t, q in zip(best.indices.tolist(), best.values.tolist(), strict=True))
        right = "" if answer is None else f"  answer {float(p[answer]):.3f}"
        lines.append(f"{layer:>5}  {float(views.entropy[layer, -1]):>5.2f} bits{right}  {named}")
    return lines


def draw(views: Views, labels: Sequence[str], following: Sequence[str], title: str) -> Any:
    """The most probable token after each layer and place; bold where it is the one that follows."""
    L, T = views.chance.shape
    picture = drawing.figure(min(22.0, max(6.0, 0.72 * T + 1.8)), 0.33 * L + 2.0)
    axes = picture.subplots()
    texts = [[drawing.literal(drawing.clip(token, 8)) for token in row] for row in views.best]
    columns = [drawing.literal(drawing.clip(label, 12)) for label in labels]
    drawing.heatmap(axes, views.chance, drawing.layers(L), columns, limit=1.0, texts=texts, bar="its probability", size=7)
    for cell, text in enumerate(axes.texts):
        i, j = divmod(cell, T)
        if j < len(following) and views.best[i][j] == following[j]:
            text.set_fontweight("bold")
            text.set_bbox({"boxstyle": "round,pad=0.15", "facecolor": "none", "edgecolor": text.get_color(), "linewidth": 0.8})
    axes.invert_yaxis()
    axes.set_title(f"{drawing.literal(title)}\nmost probable next token after each layer (framed: the token that follows)")
    return picture


def draw_distribution(views: Views, answer: int | None, name: str) -> Any:
    """The probability of every possible token after the last place, sorted, for some layers; and entropy by layer."""
    picture = drawing.figure(11, 4.2)
    left, right = picture.subplots(1, 2)
    L, last = len(views.probabilities) - 1, views.probabilities[:, -1]
    shown = sorted({0, L // 3, 2 * L // 3, L})
    for number, layer in enumerate(shown):
        p = last[layer].sort(descending=True).values
        label = "embedding" if layer == 0 else f"layer {layer}" + (" (the model)" if layer == L else "")
        left.plot(range(1, len(p) + 1), p, color=drawing.COLOURS[number], label=label, linewidth=1.4)
        if answer is not None:
            rank = int((last[layer] > last[layer, answer]).sum()) + 1
            left.plot([rank], [float(last[layer, answer])], drawing.MARKERS[number], color=drawing.COLOURS[number], markersize=8)
    marks = "" if answer is None else f" (markers: {drawing.literal(name)})"
    left.set(xscale="log", yscale="log", ylim=(1e-9, 1.5), ylabel="probability", title=f"a probability for every token{marks}")
    left.set_xlabel(f"all {last.size(1):,} tokens, the most probable first")
    left.legend(loc="lower left")
    left.grid()
    right.plot(range(L + 1), views.entropy[:, -1], "o-", color=drawing.COLOURS[0], label="entropy, bits")
    most = math.log2(last.size(1))
    right.axhline(most, color="grey", linestyle=":", linewidth=1)
    right.text(0, most * 0.99, "all tokens equally probable", fontsize=7, va="top")
    right.set(ylim=(0, most * 1.05), xlabel="layer", ylabel="entropy (bits)", title="how sure the model is after each layer")
    right.xaxis.get_major_locator().set_params(integer=True)
    right.grid()
    if answer is not None:
        other = right.twinx()
        label = f"probability of {drawing.literal(name)}"
        other.plot(range(L + 1), last[:, answer], "s--", color=drawing.COLOURS[3], label=label)
        other.set(ylim=(0, 1.05), ylabel="probability")
        handles = [*right.get_legend_handles_labels()[0], *other.get_legend_handles_labels()[0]]
        right.legend(handles=handles, loc="center left")
    return picture
