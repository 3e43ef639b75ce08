"""Optimizers: AdamW, and Muon for the hidden matrices; and the learning rate over time."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from papagaio.runtime import computes_bfloat16
from papagaio.training.options import RunOptions

# Each step's polynomial is the best there is for the singular values that the one before leaves (Polar Express, Amsel et al.
# 2025, arXiv:2505.16932), here for three steps and values from 0.01 on, which end between 0.72 and 1.27. As published, with a
# margin of 1 % for rounding. Three of these do as well as five of what is usual, Newton-Schulz (LOG.md).
POLAR_EXPRESS = ((8.0132, -22.9258, 16.5994), (3.6006, -2.6419, 0.5105), (2.6613, -1.9772, 0.4526))


def orthogonalize(matrices: Tensor) -> Tensor:
    """Bring the singular values of matrices (N, rows, columns) near 1, keeping the singular vectors: U S V' -> about U V'.

    A few matrix products, for all N at once; in bfloat16 where the hardware computes it, which loses nothing and saves time.
    """
    x = matrices.bfloat16() if computes_bfloat16(matrices.device.type) else matrices.float()
    wide = x.size(-2) <= x.size(-1)
    x = x if wide else x.mT
    x = x / (1.01 * x.norm(dim=(-2, -1), keepdim=True) + 1e-6)  # a little below 1, so that rounding leads nowhere beyond
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)  # a x + (b gram + c gram gram) x
    return (x if wide else x.mT).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, for the matrices inside the blocks (Keller Jordan et al. 2024).

    Every direction of a matrix then learns at the same speed. The update is scaled by sqrt(max(1, rows / columns)), so that
    one learning rate serves all shapes. Matrices of equal shape, or of the same one turned, are updated together, in few
    large operations; their momenta stand stacked, as the state of the first of them.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.9, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        shapes = sorted({tuple(sorted(p.shape)) for p in params})
        self.stacks = [[p for p in params if tuple(sorted(p.shape)) == shape] for shape in shapes]

    @torch.no_grad()
    def step(self) -> None:
        group = self.param_groups[0]
        for params in self.stacks:
            tall = [p.size(0) > p.size(1) for p in params]
            grads = torch.stack([p.grad.mT if t else p.grad for p, t in zip(params, tall, strict=True)])  # (N, rows, columns)
            state = self.state[params[0]]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(grads)
            momentum = state["momentum"].lerp_(grads, 1 - group["momentum"])
            update = orthogonalize(grads.lerp_(momentum, group["momentum"]))  # Nesterov's look ahead
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            for p, u, t in zip(params, update.unbind(), tall, strict=True):
                p.add_(u.mT if t else u, alpha=-group["lr"] * math.sqrt(p.size(0) / p.size(1) if t else 1))


def expected_state(optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, dict[str, Tensor]]:
    """What one of these optimizers keeps of each parameter once it has made a step, on the meta device."""
    if isinstance(optimizer, Muon):
        stacks = optimizer.stacks
        return {p[0]: {"momentum": torch.empty(len(p), *sorted(p[0].shape), device="meta")} for p in stacks}
    moments = ("exp_avg", "exp_avg_sq")
    return {
        p: {"step": torch.empty((), device="meta")} | {name: torch.empty(p.shape, device="meta") for name in moments}
        for group in optimizer.param_groups
        for p in group["params"]
    }


def make_optimizers(model: nn.Module, config: RunOptions) -> list[torch.optim.Optimizer]:
    """The optimizers of a model's parameters by what they are: look-up tables, the head, hidden matrices, scalars.

    Muon's rate serves every width and depth. Those of the tables and the head, which AdamW trains, are meant for 384 channels
    and fall with 1 / sqrt(n_embd) (LOG.md). Weight decay is on matrices only: not on tables with rates of their own, norms
    or biases.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    hidden = [name for name in named if name.startswith("blocks.") and name.endswith(".weight") and named[name].ndim == 2]
    tables = [name for name in named if "embed" in name and named[name].ndim == 2]
    head = [name for name in named if name == "head.weight"]
    gates = [name for name in named if "_gate" in name or "_scale" in name]
    vectors = [name for name in named if name not in {*hidden, *tables, *head, *gates}]
    betas = (config.beta1, config.beta2)
    fused = all(p.device.type in ("cpu", "cuda", "mps") for p in named.values())

    def group(names: list[str], rate: float, weight_decay: float = 0.0) -> dict[str, Any]:
        return {"params": [named[name] for name in names], "lr": rate, "weight_decay": weight_decay}

    def adamw(groups: list[dict[str, Any]], eps: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW([g for g in groups if g["params"]], betas=betas, eps=eps, fused=fused)

    if config.optimizer == "adamw":
        rate = config.learning_rate
        groups = [group(hidden + tables + head, rate, config.weight_decay), group(vectors + gates, rate)]
        optimizers = [adamw(groups, eps=1e-8)]
    else:
        narrow = math.sqrt(384 / model.config.n_embd)
        table_rate, head_rate = config.embedding_learning_rate * narrow, config.head_learning_rate * narrow
        groups = [  # a tied table is the head as well, and as a head it wants the smaller steps
            group([name for name in tables if name in ("embed.weight", "pos_embed.weight")], table_rate if head else head_rate),
            group([name for name in tables if name.startswith("value_embeds.")], 0.5 * table_rate),
            group([name for name in tables if name == "bigram_embed.weight"], 0.3 * table_rate),
            group(head, head_rate),
            group(vectors, head_rate),
            group(gates, config.embedding_learning_rate),
        ]
        optimizers = [adamw(groups, eps=1e-10)] if any(g["params"] for g in groups) else []
        if hidden:  # unless frozen
            muon = Muon([named[name] for name in hidden], config.learning_rate, config.muon_momentum, config.weight_decay)
            optimizers.append(muon)
    for optimizer in optimizers:
        for each in optimizer.param_groups:
            each["peak_lr"] = each["lr"]
    return optimizers


def moment_bytes(optimizers: list[torch.optim.Optimizer]) -> int:
    """Bytes of the moments that optimizers keep once they have made a step."""
    return sum(
        p.nbytes * (1 if isinstance(optimizer, Muon) else 2)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    )


def schedule(step: int, config: RunOptions) -> float:
    """Learning rate of a step as a part of its peak, in [0, 1].

    Rises linearly over warmup_steps, then falls to min_learning_rate: along a cosine, or constant and then straight.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    floor = config.min_learning_rate / config.learning_rate if config.learning_rate else 0.0
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)  # 0 to 1
    if config.schedule == "cosine":
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    left = min(1.0, (1 - progress) / config.decay_fraction) if config.decay_fraction else 1.0
    return floor + (1 - floor) * left


def set_learning_rate(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Set every group's learning rate to a part of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak_lr"]
