"""Optimizers: AdamW, and Muon for the hidden matrices; and the learning rate over time."""

import math
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from papagaio.runtime import computes_bfloat16
from papagaio.training.options import RunOptions
from papagaio.training.parallel import ALONE, World
from papagaio.training.sharding import divided, is_divided, local, part_for, whole

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
    operations. With several processes, each orthogonalises every size-th matrix and keeps its momentum; the state of the others
    is a placeholder on the meta device. If the model is divided, few matrices at a time are whole.
    """

    def __init__(
        self,
        params: list[nn.Parameter] | list[dict[str, Any]],
        lr: float,
        momentum: float = MOMENTUM,
        weight_decay: float = 0.0,
        world: World = ALONE,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        (params,) = (group["params"] for group in self.param_groups)
        self.world, shapes = world, sorted({tuple(sorted(p.shape)) for p in params})
        stacks = [[p for p in params if tuple(sorted(p.shape)) == shape] for shape in shapes]
        length = world.size if any(is_divided(p) for p in params) else max(1, len(params))
        self.stacks = [stack[i : i + length] for stack in stacks for i in range(0, len(stack), length)]
        self.momenta: dict[int, Tensor] = {}  # of each stack, this rank's (n, rows, columns): the state of a matrix is a view

    def has(self, p: nn.Parameter) -> bool:
        """Whether this rank has the momentum of a matrix."""
        return any(p is own for stack in self.stacks for own in stack[self.world.rank :: self.world.size])

    @torch.no_grad()
    def step(self) -> None:
        group = self.param_groups[0]
        for number, params in enumerate(self.stacks):
            own = [upright(whole(p.grad), p) for p in params][self.world.rank :: self.world.size]
            grads = torch.stack(own) if own else None  # (n, rows, columns)
            if number not in self.momenta:
                self._begin(number, grads)
            updates: list[Tensor] = []
            if grads is not None:
                momentum = self.momenta[number].lerp_(grads, 1 - group["momentum"])
                updates = list(orthogonalize(grads.lerp_(momentum, group["momentum"])))  # Nesterov's variant
            updates = self._everyones(updates, params)
            if group["weight_decay"]:
                torch._foreach_mul_([local(p) for p in params], 1 - group["lr"] * group["weight_decay"])
            for p, update in zip(params, updates, strict=True):
                scale = math.sqrt(max(1, p.size(0) / p.size(1)))
                local(p).add_(part_for(upright(update, p), p), alpha=-group["lr"] * scale)

    def _begin(self, number: int, grads: Tensor | None) -> None:
        """Stack the momenta of a stack that have been loaded, or begin with zeros."""
        params = self.stacks[number]
        own = params[self.world.rank :: self.world.size]
        loaded = [upright(self.state[p]["momentum"], p) for p in own if "momentum" in self.state[p]]
        self.momenta[number] = torch.stack(loaded) if loaded else torch.empty(0) if grads is None else torch.zeros_like(grads)
        views = dict(zip(own, self.momenta[number], strict=False))
        for p in params:
            self.state[p]["momentum"] = upright(views[p], p) if p in views else torch.empty(p.shape, dtype=p.dtype, device="meta")

    def _everyones(self, own: list[Tensor], params: list[nn.Parameter]) -> list[Tensor]:
        """The updates of all matrices of a stack, given those that this rank has computed."""
        size = self.world.size
        if size == 1:
            return own
        shape, most = sorted(params[0].shape), -(-len(params) // size)
        mine = torch.zeros(most, *shape, dtype=params[0].dtype, device=params[0].device)
        for i, update in enumerate(own):
            mine[i] = update
        every = [torch.empty_like(mine) for _ in range(size)]
        dist.all_gather(every, mine)
        return [every[i % size][i // size] for i in range(len(params))]


def upright(matrix: Tensor, p: nn.Parameter) -> Tensor:
    """A matrix for a parameter p, between the parameter's own shape and the one that is not taller than wide."""
    return matrix.mT if p.size(0) > p.size(1) else matrix


def expected_state(optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, dict[str, Tensor]]:
    """The state of one of these optimizers after its first step, by parameter, on the meta device."""
    empty = partial(torch.empty, device="meta")
    if isinstance(optimizer, Muon):
        return {p: {"momentum": empty(p.shape)} for stack in optimizer.stacks for p in stack}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return {p: {"step": empty(()), "exp_avg": empty(p.shape), "exp_avg_sq": empty(p.shape)} for p in params}


def own_state(optimizer: torch.optim.Optimizer, p: nn.Parameter, saved: Tensor) -> Tensor:
    """What this rank keeps of a saved tensor of a parameter's state."""
    if isinstance(optimizer, Muon):
        return saved.to(p.device if optimizer.has(p) else "meta")
    return divided(saved, p) if is_divided(p) and saved.ndim else saved.to(p.device)


def parameter_roles(model: nn.Module) -> dict[str, str]:
    """The role of each parameter of a GPT: matrix, table, value_table, bigram_table, head, gate or vector (norms and biases)."""
    known = dict(_gate="gate", _scale="gate", value_="value_table", bigram_="bigram_table", embed="table", head="head")
    roles = {}
    for name, p in model.named_parameters():
        role = next((role for part, role in known.items() if part in name), "matrix")
        roles[name] = role if p.ndim == 2 or role == "gate" else "vector"
    return roles


def make_optimizers(model: nn.Module, config: RunOptions, world: World = ALONE) -> list[torch.optim.Optimizer]:
    """The optimizers of a model's trained parameters, by their roles.

    Muon's rate fits every width and depth. The rates of the tables and the head, which AdamW trains, are given for 384 channels
    and fall with 1 / sqrt(n_embd) (LOG.md). Weight decay is for matrices only: not for tables with rates of their own, norms or
    biases.
    """
    roles = parameter_roles(model)
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
        optimizers.append(Muon([matrices], config.learning_rate, world=world))
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
