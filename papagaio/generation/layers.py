"""Linear layers for decoding. With one row or a few, a product takes the time in which its weights are read from memory.

On a CPU torch's default product of one row reads them at half of the memory's bandwidth or less. Which other product is faster
depends on the type of the weights (LOG.md, 2026-11-24). Weights of 8 bits are a quarter of float32's bytes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from papagaio.runtime import computes_bfloat16

MOST_ROWS = 16  # up to this many rows a float32 product is faster in parts


class RowLinear(nn.Module):
    """nn.Linear(x) for inference: x (..., K) -> (..., N)."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias  # (N, K), (N,)
        # torch spreads the products of a batch over its threads, but not the rows of one product.
        self.parts = next(n for n in (8, 4, 2, 1) if len(weight) % n == 0)
        self.calls_onednn = _takes_native_gemv(weight)

    def forward(self, x: Tensor) -> Tensor:
        w, b = self.weight, self.bias
        rows = x.numel() // w.size(1)
        if rows == 1 and w.is_cpu and torch.compiler.is_compiling():
            y = row_product(w, x).to(w.dtype)
            return (y if b is None else (y + b).to(w.dtype)).view(*x.shape[:-1], -1)
        if rows > 1 and self.calls_onednn:
            return torch.ops.mkldnn._linear_pointwise(x.to(w.dtype), w, b, "none", [], "")
        if w.is_cpu and w.dtype == torch.float32 and rows <= MOST_ROWS and not torch.compiler.is_compiling():
            # x stands on the left: with w on the left torch takes ten times as long.
            parts = w.view(self.parts, -1, w.size(1)).mT  # (parts, K, N / parts)
            y = torch.bmm(x.reshape(1, rows, -1).expand(self.parts, -1, -1), parts)
            y = y.transpose(0, 1).reshape(*x.shape[:-1], -1)
            return y if b is None else y + b
        return F.linear(x, w, b)


class Int8Linear(nn.Module):
    """nn.Linear with weights rounded to 255 steps from -s to s, where s is the largest absolute value of each of the N rows.

    For a CPU: Engine.open refuses it elsewhere.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        scale = weight.float().abs().amax(1).clamp_min(1e-12) / 127
        self.register_buffer("weight", (weight.float() / scale[:, None]).round().to(torch.int8))  # (N, K)
        self.register_buffer("scale", scale)  # (N,)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        if torch.compiler.is_compiling() and x.numel() == w.size(1):
            y = (row_product(w, x) * self.scale).view(*x.shape[:-1], -1)
        elif not torch.compiler.is_compiling():
            rows = x.reshape(-1, w.size(1)).bfloat16()
            y = torch._weight_int8pack_mm(rows, w, self.scale.bfloat16()).view(*x.shape[:-1], -1)
        else:
            y = F.linear(x, w.to(x.dtype)) * self.scale
        y = y if self.bias is None else y + self.bias
        return y.to(x.dtype)


def row_product(w: Tensor, x: Tensor) -> Tensor:
    """w (N, K) times the only row of x, (N,), in a form that the compiler turns into one loop over the weights.

    as_strided makes it finish x first; otherwise it would compute the norm or GELU that x comes from once for each of N rows.
    """
    row = torch.as_strided(x.float().contiguous(), (x.numel(),), (1,))
    return (w.float() * row).sum(-1)


def _takes_native_gemv(weight: Tensor) -> bool:
    """Whether products of one row with this weight are faster in torch's own code than in oneDNN (mkldnn), its default."""
    onednn = torch.backends.mkldnn.is_available() and computes_bfloat16("cpu")
    return weight.is_cpu and weight.dtype == torch.bfloat16 and onednn


def prepare(model: nn.Module, quantize: str = "none") -> None:
    """Replace the linear layers of a GPT, its head included, by those for decoding. It cannot be trained any more.

    For bfloat16 on a CPU, oneDNN is switched off for the whole process, once: torch's own product of one row then takes less
    than half the time, and RowLinear calls oneDNN itself for the other products. A process that also trains on the CPU should
    set torch.backends.mkldnn.enabled again, which makes decoding slower but changes nothing else.
    """
    kind = Int8Linear if quantize == "int8" else RowLinear
    model.requires_grad_(False)
    for module in list(model.modules()):
        for name, layer in module.named_children():
            if type(layer) is nn.Linear:
                setattr(module, name, kind(layer.weight, layer.bias))
    if model.head is None:  # tied: the embedding itself stays as it is
        model.head = kind(model.embed.weight, None)
    if kind is RowLinear and _takes_native_gemv(model.embed.weight):
        torch.backends.mkldnn.enabled = False
        for module in model.modules():  # back to torch's fused attention, if papagaio/kernels.py has replaced it for training
            vars(module).pop("attention", None)
