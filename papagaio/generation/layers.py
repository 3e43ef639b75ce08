"""Linear layers for decoding, where a product has one row, or few: reading the weights is what takes the time.

torch's own product of one row reads them at half a CPU's memory bandwidth or less; which of its others does better depends on
their type (LOG.md, 2026-11-24). Weights of 8 bits are a quarter of what there is to read.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from papagaio.runtime import why_not_compiled

MOST_ROWS = 16  # up to which a product in float32 is faster in parts


class RowLinear(nn.Module):
    """nn.Linear(x), for inference: x (..., K) -> (..., N)."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias  # (N, K), (N,)
        # Products of a batch are spread over the threads, the rows of a single one are not.
        self.parts = next(n for n in (8, 4, 2, 1) if len(weight) % n == 0)

    def forward(self, x: Tensor) -> Tensor:
        w, b = self.weight, self.bias
        rows = x.numel() // w.size(1)
        if not w.is_cpu or rows > MOST_ROWS:
            return F.linear(x, w, b)
        if torch.compiler.is_compiling():
            if rows > 1:
                return F.linear(x, w, b)
            y = row_product(w, x).to(w.dtype)
            return (y if b is None else (y + b).to(w.dtype)).view(*x.shape[:-1], -1)
        if w.dtype == torch.float32:
            # x stands on the left: the other way round torch takes ten times as long.
            parts = w.view(self.parts, -1, w.size(1)).mT  # (parts, K, N / parts)
            y = torch.bmm(x.reshape(1, rows, -1).expand(self.parts, -1, -1), parts)
            y = y.transpose(0, 1).reshape(*x.shape[:-1], -1)
            return y if b is None else y + b
        if rows > 1:
            return F.linear(x, w, b)
        enabled, torch.backends.mkldnn.enabled = torch.backends.mkldnn.enabled, False
        try:
            return F.linear(x, w, b)
        finally:
            torch.backends.mkldnn.enabled = enabled


class Int8Linear(nn.Module):
    """The same with weights rounded to 255 steps, from -s to s, s being the largest of each of the N rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        scale = weight.float().abs().amax(1).clamp_min(1e-12) / 127
        self.register_buffer("weight", (weight.float() / scale[:, None]).round().to(torch.int8))  # (N, K)
        self.register_buffer("scale", scale)  # (N,)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        if w.is_cpu and torch.compiler.is_compiling() and x.numel() == w.size(1):
            y = (row_product(w, x) * self.scale).view(*x.shape[:-1], -1)
        elif w.is_cpu and not torch.compiler.is_compiling():
            rows = x.reshape(-1, w.size(1)).bfloat16()
            y = torch._weight_int8pack_mm(rows, w, self.scale.bfloat16()).view(*x.shape[:-1], -1)
        else:
            y = F.linear(x, w.to(x.dtype)) * self.scale
        y = y if self.bias is None else y + self.bias
        return y.to(x.dtype)


def row_product(w: Tensor, x: Tensor) -> Tensor:
    """w (N, K) times the one row of x, (N,), for the compiler, which makes one loop over the weights of it.

    as_strided has it finish x before: it would compute the norm or the GELU that x comes from again for each of the N rows.
    """
    row = torch.as_strided(x.float().contiguous(), (x.numel(),), (1,))
    return (w.float() * row).sum(-1)


def prepare(model: nn.Module, quantize: str = "none") -> None:
    """Replace the linear layers of a GPT by ones for decoding, the head included. It cannot be trained any more."""
    kind = Int8Linear if quantize == "int8" else RowLinear
    model.requires_grad_(False)
    for module in list(model.modules()):
        for name, layer in module.named_children():
            if type(layer) is nn.Linear:
                setattr(module, name, kind(layer.weight, layer.bias))
    if model.head is None:  # tied: the embedding stays as it is
        model.head = kind(model.embed.weight, None)


def can_compile(device: torch.device) -> bool:
    """Whether torch's compiler works here; says so where it does not."""
    if reason := why_not_compiled(device):
        print(f"not compiled, it goes on without: {reason}", file=sys.stderr)
    return not reason
