"""Attention: where each head looks, in words that are computed, and what it costs to take a head out.

Layers and heads are counted from 1 in what people read.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from papagaio.batches.windows import Batch, ValidationWindows
from papagaio.corpus.dataset import Dataset
from papagaio.errors import UserError
from papagaio.evaluation import evaluate_loss
from papagaio.generation.engine import Engine
from papagaio.inside import drawing, page
from papagaio.inside.hooks import observe, without, without_head
from papagaio.inside.opening import check_layer, open_text
from papagaio.inside.options import AttentionOptions
from papagaio.runs.checkpoint import MakeModel
from papagaio.terminal import progress

HABITS = ("previous token", "first token", "itself", "same token before", "induction")
LEAST = 0.3  # share of a head's attention from which a habit is named
PERIOD = 24  # random tokens, seen twice, on which induction is measured


def look(config: AttentionOptions, make: MakeModel) -> page.Found:
    """What each head does on the text, and what it costs to take it out."""
    engine, ids, labels = open_text(config, make)
    c = engine.model.config
    L, H = c.n_layer, c.n_head
    check_layer(config.layer or 0, L)
    check_layer(config.head or 0, H, "--head")
    if len(ids) < 3:
        raise UserError("attention needs a text of at least two tokens")
    row = torch.tensor([ids], device=engine.device)
    weights = torch.stack(observe(engine.model, row).attention)[:, 0].cpu()  # (L, H, T, T)
    scores = torch.cat((habits(weights, row[0].cpu()), induction(engine)[..., None]), dim=-1)
    words = summary(scores)
    found = costs(engine, batches(engine, config.data, config.windows, row))
    lines = ["layer.head  does                       " + "  ".join(f"{habit:>17}" for habit in HABITS) + "  cost (nats)"]
    for i in range(L):
        for head in range(H):
            shares = "  ".join(f"{share:>17.2f}" for share in scores[i, head].tolist())
            lines.append(f"{i + 1:>5}.{head + 1:<4}  {words[i][head]:<25}  {shares}  {found.heads[i, head]:+.4f}")
    positive = found.heads.clamp_min(0).flatten()
    share, worst = float(positive.max() / positive.sum().clamp_min(1e-9)), int(positive.argmax())
    measured = f"{config.data}'s validation split" if config.data else "the text itself"
    lines += [
        f"loss {found.whole:.4f} nats per token, on {measured}",
        f"the costliest head: {worst // H + 1}.{worst % H + 1}, "
        f"{share:.0%} of what all heads cost one by one ({1 / positive.numel():.1%} if all did the same)",
        *(f"layer {i + 1} without attention: {cost:+.4f}" for i, cost in enumerate(found.layers.tolist())),
    ]
    best = int(scores[..., [0, 3, 4]].amax(-1).flatten().argmax())
    layer, head = (config.layer or best // H + 1), (config.head or best % H + 1)
    title = f"layer {layer}, head {head}: {words[layer - 1][head - 1]}"
    shown = [drawing.literal(drawing.clip(label, 14)) for label in labels]
    pictures = {
        "attention": draw_maps(weights, shown, words),
        "attention_head": draw_head(weights[layer - 1, head - 1], shown, title),
        "attention_costs": draw_costs(found, words),
    }
    return page.Found(lines, pictures, [page.attention(labels, weights, words)])


def batches(engine: Engine, data: Path | None, windows: int, row: Tensor) -> list[Batch]:
    """On what the cost of a head is measured: the validation split of `data`, or the text itself (1, T). Raises UserError."""
    if data is None:
        return [Batch(row[:, :-1], row[:, 1:], torch.ones(1, row.size(1) - 1))]  # without padding
    dataset = Dataset(data)
    if dataset.tokenizer.sha256 != engine.tokenizer.sha256:
        raise UserError(f"{data}: prepared with another tokenizer than the model's")
    return list(ValidationWindows(dataset, engine.block_size, 16, windows * engine.block_size))


def habits(attention: Tensor, ids: Tensor) -> Tensor:
    """How much of its attention (L, H, T, T) each head spends per query on each of HABITS but the last: (L, H, 4). A query
    counts for a habit if it has the token in question, and others to choose from."""
    T = ids.size(0)
    i, j = torch.arange(T)[:, None], torch.arange(T)
    same = (ids[:, None] == ids) & (j < i) & (j > 0)
    places = [(j == i - 1) & (i > 1), (j == 0) & (i > 1), (j == i) & (i > 1), same]
    found = []
    for place in places:
        queries = place.any(1)  # (T,)
        weights = (attention * place).sum(-1)[..., queries]  # (L, H, queries)
        found.append(weights.mean(-1) if queries.any() else torch.zeros(attention.shape[:2]))
    return torch.stack(found, dim=-1)


def induction(engine: Engine) -> Tensor:
    """How much each head (L, H) attends to the token after the earlier occurrence of the same token, in random tokens that are
    repeated: [A B C ... A B C ...] (Olsson et al., arXiv:2209.11895)."""
    period = min(PERIOD, (engine.block_size - 1) // 2)
    special = set(engine.tokenizer.special.values())
    ordinary = torch.tensor([token for token in range(engine.model.config.vocab_size) if token not in special])
    draws = torch.Generator().manual_seed(1337)
    drawn = ordinary[torch.randperm(len(ordinary), generator=draws)[:period]]
    period = len(drawn)
    ids = torch.cat((torch.tensor([engine.tokenizer.start]), drawn, drawn))[None].to(engine.device)
    queries = torch.arange(period + 1, 2 * period)  # the second occurrences, whose next token is known
    attention = torch.stack(observe(engine.model, ids).attention)[:, 0]  # (L, H, T, T)
    return attention[:, :, queries, queries - period + 1].mean(-1).cpu()


def summary(scores: Tensor) -> list[list[str]]:
    """`previous token 0.81` for each head of scores (L, H, 5): what it does most, or `spread`."""

    def words(head: Sequence[float]) -> str:
        best = max(range(len(HABITS)), key=head.__getitem__)
        return f"{HABITS[best]} {head[best]:.2f}" if head[best] >= LEAST else "spread"

    return [[words(head) for head in layer] for layer in scores.tolist()]


class Costs(NamedTuple):
    """What taking parts out adds to the loss, in nats per token."""

    whole: float  # the loss itself
    heads: Tensor  # (L, H), one head at a time
    layers: Tensor  # (L,), all heads of a layer


def costs(engine: Engine, batches: Sequence[Batch]) -> Costs:
    """Measure the loss with each head taken out, and with each attention layer."""
    model, c = engine.model, engine.model.config
    parts = progress(range(c.n_layer * (c.n_head + 1) + 1), "parts taken out")

    def measure() -> float:
        next(parts)
        return evaluate_loss(model, batches, engine.tokenizer, engine.dtype)["val_loss"]

    whole, heads, layers = measure(), torch.zeros(c.n_layer, c.n_head), torch.zeros(c.n_layer)
    for i, block in enumerate(model.blocks):
        for head in range(c.n_head):
            with without_head(block.attn, head):
                heads[i, head] = measure() - whole
        with without(block.attn):
            layers[i] = measure() - whole
    return Costs(whole, heads, layers)


def draw_maps(attention: Tensor, labels: Sequence[str], words: Sequence[Sequence[str]]) -> Any:
    """Every head's map of attention (L, H, T, T), with what it does above; many heads have no room for words."""
    L, H = attention.shape[:2]
    few = L * H <= 36
    named = few and len(labels) <= 32
    side = 2.6 if few else 0.75
    picture = drawing.figure(side * H + 0.9, (side + (0.35 if few else 0.0)) * L + 0.9)
    grid = picture.subplots(L, H, squeeze=False)
    size = max(3.5, min(7.0, 110 / len(labels)))
    for i in range(L):
        for head in range(H):
            axes = grid[i, head]
            left = labels if named and head == 0 else ()
            below = labels if named and i == L - 1 else ()
            drawing.heatmap(axes, attention[i, head], left, below, limit=1.0, size=size)
            if not left:
                axes.set_yticks([])
            if not below:
                axes.set_xticks([])
            if few:
                axes.set_title(f"{i + 1}.{head + 1}  {words[i][head]}")
            if head == 0:
                axes.set_ylabel(f"layer {i + 1}" if few else str(i + 1), fontsize=8, rotation=90 if few else 0, labelpad=8)
            if i == L - 1 and not few:
                axes.set_xlabel(str(head + 1), fontsize=8)
    picture.suptitle("attention: row = token that looks, column = token looked at; layers down, heads across")
    return picture


def draw_head(attention: Tensor, labels: Sequence[str], title: str) -> Any:
    """One head's map (T, T), large."""
    side = min(14.0, max(5.0, 0.28 * len(labels) + 2))
    picture = drawing.figure(side + 1, side)
    axes = picture.subplots()
    drawing.heatmap(axes, attention, labels, labels, limit=1.0, bar="attention", size=max(4.5, min(8.5, 300 / len(labels))))
    axes.set_title(title)
    return picture


def draw_costs(found: Costs, words: Sequence[Sequence[str]]) -> Any:
    """What each head costs, with what it does; and each layer."""
    L, H = found.heads.shape
    few = H <= 8 and L <= 12
    picture = drawing.figure((1.5 if few else 0.62) * H + 3.6, max(3.4, (0.75 if few else 0.3) * L + 1.6))
    left, right = picture.subplots(1, 2, width_ratios=(max(3, H), 2))
    rows = [str(i + 1) for i in range(L)]
    texts = [[f"{cost:+.3f}" for cost in row] for row in found.heads.tolist()]
    if few:
        wrapped = [[word.replace(" ", "\n", 1) if len(word) > 16 else word for word in row] for row in words]
        texts = [[f"{cost}\n{word}" for cost, word in zip(*row, strict=True)] for row in zip(texts, wrapped, strict=True)]
    columns = [str(head + 1) for head in range(H)]
    drawing.heatmap(left, found.heads, rows, columns, diverging=True, texts=texts, size=7 if few else 6)
    left.tick_params(axis="x", rotation=0)
    left.set(xlabel="head", ylabel="layer", title="one head out: nats per token more")
    right.barh(range(L), found.layers.tolist(), color=drawing.COLOURS[0], label="all heads of the layer")
    right.barh(range(L), found.heads.sum(1).tolist(), height=0.35, color=drawing.COLOURS[1], label="sum of single heads")
    right.set(ylim=(L - 0.5, -0.5), yticks=range(L), yticklabels=rows)
    right.set(xlabel="nats per token more", title="a layer's attention out")
    picture.legend(loc="outside lower right", ncols=2)
    return picture
