"""Optimizers: AdamW, and Muon for the hidden matrices; and the learning rate over time."""

import math

import torch
from torch import Tensor, nn

from papagaio.config import RunOptions
from papagaio.runtime import computes_bfloat16

# Newton-Schulz coefficients that grow small singular values fastest (Keller Jordan, https://kellerjordan.github.io/posts/muon/)
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Bring the singular values of matrices (N, rows, columns) near 1, keeping the singular vectors: U S V' -> about U V'.

    A few matrix products, for all N at once; in bfloat16 where the hardware computes it, which loses nothing and saves time.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16() if computes_bfloat16(matrices.device.type) else matrices.float()
    wide = x.size(-2) <= x.size(-1)
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)  # a x + (b gram + c gram gram) x
    return (x if wide else x.mT).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, for the matrices inside the blocks (Keller Jordan et al. 2024).

    Every direction of a matrix then learns at the same speed. Matrices of equal shape are updated together. The update is
    scaled by sqrt(max(1, rows / columns)), so that one learning rate serves all shapes.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        shapes = sorted({tuple(p.shape) for p in params})
        self.by_shape = [[p for p in params if tuple(p.shape) == shape] for shape in shapes]

    @torch.no_grad()
    def step(self) -> None:
        group = self.param_groups[0]
        for same in self.by_shape:
            params = [p for p in same if p.grad is not None]
            if not params:
                continue
            for p in params:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            grads, momenta = [p.grad for p in params], [self.state[p]["momentum"] for p in params]
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            nesterov = torch.stack(torch._foreach_lerp(grads, momenta, group["momentum"]))  # (N, rows, columns)
            update = orthogonalize(nesterov)
            rows, columns = params[0].shape
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, list(update.unbind()), alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))


def make_optimizers(model: nn.Module, config: RunOptions) -> list[torch.optim.Optimizer]:
    """The optimizers of a model's parameters by what they are: look-up tables, the head, hidden matrices, vectors.

    Weight decay is on matrices only: not on tables with learning rates of their own, norms or biases.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hidden = [p for name, p in named if p.ndim == 2 and name.startswith("blocks.")]
    tables = [p for name, p in named if p.ndim == 2 and not name.startswith("blocks.") and name != "head.weight"]
    head = [p for name, p in named if name == "head.weight"]
    vectors = [p for _, p in named if p.ndim < 2]
    betas = (config.beta1, config.beta2)
    fused = all(p.device.type in ("cpu", "cuda", "mps") for _, p in named)

    def adamw(groups: list[dict], eps: float) -> torch.optim.Optimizer:
        groups = [group for group in groups if group["params"]]
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=eps, weight_decay=0.0, fused=fused)

    if config.optimizer == "adamw":
        matrices = {"params": hidden + tables + head, "weight_decay": config.weight_decay}
        optimizers = [adamw([matrices, {"params": vectors}], eps=1e-8)]
    else:
        # A tied table is the head as well, and as a head it wants the smaller steps.
        table_rate = config.embedding_learning_rate if head else config.head_learning_rate
        groups = [
            {"params": tables, "lr": table_rate},
            {"params": head, "lr": config.head_learning_rate},
            {"params": vectors, "lr": config.head_learning_rate},
        ]
        optimizers = [adamw(groups, eps=1e-10), Muon(hidden, config.learning_rate, weight_decay=config.weight_decay)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


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
