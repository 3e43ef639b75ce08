"""Optimizers: AdamW, and Muon for the hidden matrices; and the learning rate over time."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from papagaio.runtime import computes_bfloat16
from papagaio.training.options import RunOptions

# The polynomial of each step is the best one for the singular values that the step before leaves (Polar Express, Amsel et al.
# 2025, arXiv:2505.16932), here for three steps and singular values from 0.01, which end between 0.72 and 1.27. As published, with
# a margin of 1 % for rounding. Three of these steps do as well as five of the usual Newton-Schulz (LOG.md, 2026-11-23).
POLAR_EXPRESS = ((8.0132, -22.9258, 16.5994), (3.6006, -2.6419, 0.5105), (2.6613, -1.9772, 0.4526))
MOMENTUM = 0.9  # of Muon (LOG.md, 2026-11-23)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Bring the singular values of matrices (N, rows, columns) near 1 and keep the singular vectors: U S V' -> about U V'.

    A few matrix products for all N at once, in bfloat16 if the hardware computes it: as good, and faster.
    """
    x = matrices.bfloat16() if computes_bfloat16(matrices.device.type) else matrices.float()
    wide = x.size(-2) <= x.size(-1)
    x = x if wide else x.mT
    x = x / (1.01 * x.norm(dim=(-2, -1), keepdim=True) + 1e-6)  # largest singular value below 1, in spite of rounding
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)  # a x + (b gram + c gram gram) x
    return (x if wide else x.mT).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum with an orthogonalised update, for the matrices inside the blocks (Keller Jordan et al. 2024).

    All directions of a matrix then learn at the same speed. The update is scaled by sqrt(max(1, rows / columns)), so that one
    learning rate fits all shapes. Matrices of the same shape, or of the transposed one, are updated together in few large
    operations; their momenta are stacked and stored as the state of the first of them.
    """

    def __init__(
        self, params: list[nn.Parameter] | list[dict[str, Any]], lr: float, momentum: float = MOMENTUM, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        (params,) = (group["params"] for group in self.param_groups)
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
            update = orthogonalize(grads.lerp_(momentum, group["momentum"]))  # Nesterov's variant
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            for p, u, t in zip(params, update.unbind(), tall, strict=True):
                p.add_(u.mT if t else u, alpha=-group["lr"] * math.sqrt(p.size(0) / p.size(1) if t else 1))


def expected_state(optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, dict[str, Tensor]]:
    """The state of one of these optimizers after its first step, by parameter, on the meta device."""
    empty = partial(torch.empty, device="meta")
    if isinstance(optimizer, Muon):
        return {p[0]: {"momentum": empty((len(p), *sorted(p[0].shape)))} for p in optimizer.stacks}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return {p: {"step": empty(()), "exp_avg": empty(p.shape), "exp_avg_sq": empty(p.shape)} for p in params}


def make_optimizers(model: nn.Module, config: RunOptions) -> list[torch.optim.Optimizer]:
    """The optimizers of a model's trained parameters, by the roles that `model.parameter_roles()` gives them.

    Muon's rate fits every width and depth. The rates of the tables and the head, which AdamW trains, are given for 384 channels
    and fall with 1 / sqrt(n_embd) (LOG.md). Weight decay is for matrices only: not for tables with rates of their own, norms or
    biases.
    """
    roles = model.parameter_roles()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    fused = all(p.device.type in ("cpu", "cuda", "mps") for p in trained.values())

    def group(roles_inside: tuple[str, ...], rate: float, weight_decay: float = 0.0) -> dict[str, Any]:
        params = [p for name, p in trained.items() if roles[name] in roles_inside]
        return {"params": params, "lr": rate, "weight_decay": weight_decay, "peak_lr": rate}

    matrices = group(("matrix",), config.learning_rate, config.weight_decay)
    if config.optimizer == "adamw":
        tables = ("matrix", "head", "table", "value_table", "bigram_table")
        groups = [group(tables, config.learning_rate, config.weight_decay), group(("vector", "gate"), config.learning_rate)]
    else:
        narrow = math.sqrt(384 / model.config.n_embd)
        table_rate, head_rate = config.embedding_learning_rate * narrow, config.head_learning_rate * narrow
        groups = [  # a tied table is the head as well, and needs the head's smaller steps
            group(("table",), table_rate if "head" in roles.values() else head_rate),
            group(("value_table",), 0.5 * table_rate),
            group(("bigram_table",), 0.3 * table_rate),
            group(("head", "vector"), head_rate),
            group(("gate",), config.embedding_learning_rate),
        ]
    optimizers: list[torch.optim.Optimizer] = []
    if groups := [each for each in groups if each["params"]]:  # none if they are frozen
        eps = 1e-8 if config.optimizer == "adamw" else 1e-10
        optimizers.append(torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=eps, fused=fused))
    if config.optimizer == "muon" and matrices["params"]:
        optimizers.append(Muon([matrices], config.learning_rate))
    return optimizers


def moment_bytes(optimizers: list[torch.optim.Optimizer]) -> int:
    """Bytes of the optimizers' state after their first step."""
    states = (state for optimizer in optimizers for state in expected_state(optimizer).values())
    return sum(tensor.nbytes for state in states for tensor in state.values())


def schedule(step: int, config: RunOptions) -> float:
    """The learning rate of a step as a fraction of its peak, in [0, 1].

    It rises linearly over warmup_steps, then falls to min_learning_rate.
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
    """Set every group's learning rate to a fraction of its peak."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = factor * group["peak_lr"]
