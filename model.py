"""GPT: a decoder-only Transformer in one file. It needs torch alone; copy it wherever you like.

    config = GPTConfig(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768)
    model = GPT(config)                     # the preset `modern`; GPT-2 itself is GPTConfig(..., **PRESETS["gpt2"])
    logits = model(ids)                     # ids (B, T) int64 -> logits (B, T, V)
    loss = model(ids, targets)              # targets (B, T), -100 where nothing is to be predicted -> mean loss in nats

Shapes are written as letters: B batch, T time (tokens), C channels (n_embd), H heads, K key-value heads, D head size
(C / H), V vocabulary.
"""

import functools
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class GPTConfig:
    """Shape and options of a GPT. The defaults are the preset `modern`. Raises ValueError where values do not fit together."""

    vocab_size: int  # ids 0 to vocab_size - 1; the tables are padded inside, see padded_vocab_size
    block_size: int = 1024  # longest context, in tokens
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int | None = None  # grouped-query attention (arXiv:2305.13245); None: n_head
    n_embd: int = 768  # channels
    position: str = "rope"  # rope (arXiv:2104.09864) | learned | sinusoidal (arXiv:1706.03762, section 3.5)
    rope_theta: float = 10000.0  # base of the rotary wavelengths
    norm: str = "rmsnorm"  # rmsnorm (arXiv:1910.07467) | layernorm
    norm_affine: bool = False  # norms have weights (and biases, with `bias`)
    embed_norm: bool = True  # norm right after the embedding
    mlp: str = "relu2"  # relu2 (squared ReLU, arXiv:2109.08668) | gelu (tanh form) | swiglu (arXiv:2002.05202)
    mlp_hidden: int | None = None  # width inside the MLP; None: 4 C, and for swiglu 8/3 C, so that the parameters are as many
    qk_norm: bool = True  # RMS-normalise queries and keys (arXiv:2302.05442), after the rotation
    bias: bool = False  # in linear layers and norms
    tie_embeddings: bool = False  # the head shares the embedding's table
    logit_softcap: float = 15.0  # logits -> cap * tanh(logits / cap) (arXiv:2408.00118); 0: off
    dropout: float = 0.0
    window_pattern: str = "L"  # repeated over the layers: L sees the whole context, S the last window_size tokens
    window_size: int = 0  # tokens; 0: a quarter of block_size
    attention_scale: float = 1.0  # on queries and keys after their normalisation: above 1 attention can be sharper
    smear: bool = False  # each token's embedding takes in some of the one before it (modded-nanogpt, nanochat)
    bigram_rows: int = 0  # rows of the table of bigram embeddings, found by a hash of two ids (DeepSeek's Engram); 0: none
    value_embed_interval: int = 0  # every n-th block from the last adds an embedding of the token to its values; 0: none
    zero_init: bool = True  # output projections start at zero, so that every block starts as the identity (arXiv:2203.03466)

    def __post_init__(self) -> None:
        for field in fields(self):  # which may come from a file
            value, kind = getattr(self, field.name), field.type
            if isinstance(value, bool) != (kind is bool) or not isinstance(value, kind | int if kind is float else kind):
                raise ValueError(f"{field.name} must be {getattr(kind, '__name__', kind)}, not {value!r}")
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        choices = {
            "position": ("rope", "learned", "sinusoidal"),
            "norm": ("rmsnorm", "layernorm"),
            "mlp": ("relu2", "gelu", "swiglu"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        kv, pattern = self.kv_heads, self.window_pattern
        for holds, message in (
            (self.n_embd % self.n_head == 0, f"n_embd {self.n_embd} must be divisible by n_head {self.n_head}"),
            (kv > 0 and self.n_head % kv == 0, f"n_head {self.n_head} must be divisible by n_kv_head {kv}"),
            (
                self.position != "rope" or self.head_size % 2 == 0,
                f"rotary positions need an even head size, not {self.head_size}",
            ),
            (
                self.position != "sinusoidal" or self.n_embd % 2 == 0,
                f"sinusoidal positions need an even n_embd, not {self.n_embd}",
            ),
            (self.mlp_hidden is None or self.mlp_hidden > 0, f"mlp_hidden must be positive, not {self.mlp_hidden}"),
            (self.window_size >= 0, f"window_size must be positive, or 0 for a quarter of block_size, not {self.window_size}"),
            (0 <= self.dropout < 1, f"dropout must be at least 0 and below 1, not {self.dropout}"),
            (self.logit_softcap >= 0, f"logit_softcap must be positive, or 0 for none, not {self.logit_softcap}"),
            (
                bool(pattern) and not set(pattern) - set("LS"),
                f"window_pattern must be made of the letters L and S, not {pattern!r}",
            ),
        ):
            if not holds:
                raise ValueError(message)

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def hidden_size(self) -> int:
        """Width inside the MLP; for swiglu rounded up to a multiple of 32."""
        if self.mlp_hidden:
            return self.mlp_hidden
        return math.ceil(8 * self.n_embd / 3 / 32) * 32 if self.mlp == "swiglu" else 4 * self.n_embd

    @property
    def bigram_table(self) -> int:
        """Rows that the table of bigrams has: no more than there are pairs of a token and the one before it, or none."""
        return min(self.bigram_rows, self.vocab_size * (self.vocab_size + 1))

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and the head: matrix products are faster at multiples of 64. Their logits never leave GPT."""
        return math.ceil(self.vocab_size / 64) * 64


PRESETS: dict[str, dict] = {
    # The architecture that Hugging Face transformers calls NanoChat; these are GPTConfig's defaults.
    "modern": {},
    # GPT-2 (Radford et al. 2019), exactly.
    "gpt2": {
        "position": "learned",
        "norm": "layernorm",
        "norm_affine": True,
        "embed_norm": False,
        "mlp": "gelu",
        "qk_norm": False,
        "bias": True,
        "tie_embeddings": True,
        "logit_softcap": 0.0,
        "zero_init": False,
    },
    # modern, and what pays beyond it for models of this size (LOG.md, 2026-11-23); has no counterpart in Hugging Face.
    "frontier": {
        "attention_scale": 1.2,
        "smear": True,
        "bigram_rows": 16384,
        "value_embed_interval": 2,
        "window_pattern": "SL",
    },
}


GATE_CHANNELS = 12  # of a token's C, those that a gate looks at


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dimension, with or without weights."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.kind = config.norm
        self.shape = (config.n_embd,)
        self.weight = nn.Parameter(torch.ones(self.shape)) if config.norm_affine else None
        has_bias = config.norm_affine and config.bias and config.norm == "layernorm"
        self.bias = nn.Parameter(torch.zeros(self.shape)) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "layernorm":
            return F.layer_norm(x, self.shape, self.weight, self.bias, eps=1e-5)
        return rms_norm(x) if self.weight is None else F.rms_norm(x, self.shape, self.weight, eps=1e-6)


def rms_norm(x: Tensor) -> Tensor:
    """x (..., D) divided by the root of its mean square over the last dimension."""
    return RMSNorm.apply(x) if x.is_cpu else F.rms_norm(x, x.shape[-1:], eps=1e-6)


class RMSNorm(torch.autograd.Function):
    """On a CPU F.rms_norm is a chain of small operations, and so is its gradient: this one takes a quarter of the time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.size(-1)).add_(1e-6).rsqrt_()
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        y, scale = ctx.saved_tensors
        return torch.addcmul(grad, y, (grad * y).mean(-1, keepdim=True), value=-1).mul_(scale)


class SquaredReLU(torch.autograd.Function):
    """relu(x) ** 2 with a gradient of two operations, 2 relu(x); autograd's own takes four times as long on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = F.relu(x)
        ctx.save_for_backward(y)
        return y * y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return (grad * y).mul_(2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: turn each pair (a, b) = (x[i], x[i + D/2]) of x (B, T, H, D) by an angle that grows with its position.

    cos and sin (T, 1, D), or (B, T, 1, D) where rows stand at other positions, hold (cos, cos) and (sin, -sin), so that the
    result is (a cos + b sin, b cos - a sin). The angle between a query and a key then tells their distance, wherever they stand.
    """
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, dims=-1), sin)


Rope = tuple[Tensor, Tensor]  # cos and sin, as `rotate` wants them
Past = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # keeps a block's keys and values, and gives those of the context


def rope_table(angles: Tensor) -> Rope:
    """cos and sin of angles (..., D / 2), as `rotate` wants them: (..., D)."""
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((sin, -sin), -1)


class Attention(nn.Module):
    """Causal multi-head self-attention: every token gathers values from the tokens up to itself, weighted by how well its
    query matches their keys. `value_embed` (B, T, K D), where there is one, is added to the values, a gate for each head."""

    def __init__(self, config: GPTConfig, value_embed: bool = False) -> None:
        super().__init__()
        self.config = config
        kv_size = config.kv_heads * config.head_size
        self.q = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.k = nn.Linear(config.n_embd, kv_size, bias=config.bias)
        self.v = nn.Linear(config.n_embd, kv_size, bias=config.bias)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        if value_embed:
            self.value_gate = nn.Parameter(torch.empty(config.kv_heads, GATE_CHANNELS))

    def forward(
        self, x: Tensor, rope: Rope | None, mask: Any, value_embed: Tensor | None = None, past: Past | None = None
    ) -> Tensor:
        B, T, C = x.shape
        c, H, K = self.config, self.config.n_head, self.config.kv_heads
        qkv = linear(x, self.q, self.k, self.v).view(B, T, H + 2 * K, c.head_size)  # one product instead of three
        qk, v = qkv.split((H + K, K), dim=2)  # (B, T, H + K, D), (B, T, K, D)
        if value_embed is not None:
            gate = 2 * torch.sigmoid(F.linear(x[..., :GATE_CHANNELS], self.value_gate))  # (B, T, K), 1 where x says nothing
            v = v + gate[..., None] * value_embed.view(B, T, K, c.head_size).to(v.dtype)
        if rope is not None:
            qk = rotate(qk, *rope)
        if c.qk_norm:
            qk = rms_norm(qk)
        if c.attention_scale != 1:
            qk = qk * c.attention_scale
        q, k = qk.split((H, K), dim=2)  # (B, T, H, D), (B, T, K, D)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D), (B, K, T, D)
        if past is not None:
            k, v = past(k, v)  # (B, K, S, D), those before them as well
        dropout = c.dropout if self.training else 0.0
        y = attend(q, k, v, mask, dropout)  # (B, H, T, D)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


def linear(x: Tensor, *layers: nn.Linear) -> Tensor:
    """The outputs of several linear layers for the same x (..., C), side by side."""
    if any(type(layer) is not nn.Linear for layer in layers):  # one with an adapter, say, has more to it than its weight
        return torch.cat([layer(x) for layer in layers], dim=-1)
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    return F.linear(x, torch.cat([layer.weight for layer in layers]), bias)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Any, dropout: float) -> Tensor:
    """Attention of q (B, H, T, D) over k, v (B, K, T, D): causal, or as `attention_mask` says."""
    grouped = k.size(1) != q.size(1)
    if mask is not None and not isinstance(mask, Tensor):
        return compiled_flex_attention()(q, k, v, block_mask=mask, enable_gqa=grouped)
    if q.is_cpu and q.dtype == torch.bfloat16 and 1 < q.size(2) == k.size(2) <= 512 and not grouped:
        return plain_attention(q, k, v, mask, dropout)
    causal = mask is None and q.size(2) > 1  # a single token sees all that there is
    options = {"attn_mask": mask, "is_causal": causal, "dropout_p": dropout, "enable_gqa": grouped}
    return F.scaled_dot_product_attention(q, k, v, **options)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """The formula itself: softmax(q k' / sqrt(D)) v. All T x T probabilities stand in memory, but in bfloat16 on a CPU the
    gradient of torch's fused attention takes 2 to 10 times as long up to T = 512 (LOG.md, 2026-11-23)."""
    B, H, T, D = q.shape
    if mask is None:
        mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, -math.inf)
    if bias.ndim == 4:
        bias = bias.expand(B, H, T, T).reshape(B * H, T, T)
    q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
    probabilities = torch.baddbmm(bias, q, k.mT, alpha=D**-0.5).softmax(-1)  # (B H, T, T)
    return (F.dropout(probabilities, dropout) @ v).view(B, H, T, D)


@functools.cache
def compiled_flex_attention() -> Callable[..., Tensor]:
    return torch.compile(importlib.import_module("torch.nn.attention.flex_attention").flex_attention)


def attention_mask(T: int, window: int | None, doc_ids: Tensor | None, device: torch.device, flex: bool) -> Any:
    """Which tokens a token may look at, of those up to itself: the last `window`, and those of its own document.

    None where that is all of them; a mask (T, T) or (B, 1, T, T), true where row i may look at column j; or, with flex,
    FlexAttention's block mask (arXiv:2412.05496), with which blocks of other documents cost nothing.
    """
    if doc_ids is None and (window is None or window >= T):
        return None

    def may_look(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        near = (i >= j) & (i - j < (window or T))
        return near if doc_ids is None else near & (doc_ids[b, i] == doc_ids[b, j])

    B = None if doc_ids is None else len(doc_ids)
    if flex:
        return importlib.import_module("torch.nn.attention.flex_attention").create_block_mask(may_look, B, None, T, T, device)
    i = torch.arange(T, device=device)
    b = torch.arange(B or 1, device=device)[:, None, None]
    mask = may_look(b, i, i[:, None], i)  # (T, T) or (B, T, T)
    return mask if B is None else mask[:, None]


class MLP(nn.Module):
    """Position by position: widen, bend, narrow."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.kind = config.mlp
        self.fc = nn.Linear(config.n_embd, config.hidden_size, bias=config.bias)
        if config.mlp == "swiglu":
            self.gate = nn.Linear(config.n_embd, config.hidden_size, bias=config.bias)
        self.proj = nn.Linear(config.hidden_size, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "swiglu":
            return self.proj(F.silu(self.gate(x)) * self.fc(x))
        h = self.fc(x)  # (B, T, 4C)
        return self.proj(F.gelu(h, approximate="tanh") if self.kind == "gelu" else SquaredReLU.apply(h))


class Block(nn.Module):
    """Attention, then MLP, each added to the residual stream (pre-norm)."""

    def __init__(self, config: GPTConfig, value_embed: bool = False) -> None:
        super().__init__()
        self.norm_1, self.attn = Norm(config), Attention(config, value_embed)
        self.norm_2, self.mlp = Norm(config), MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, rope: Rope | None, mask: Any, value_embed: Tensor | None = None, past: Past | None = None
    ) -> Tensor:
        x = x + self.dropout(self.attn(self.norm_1(x), rope, mask, value_embed, past))
        return x + self.dropout(self.mlp(self.norm_2(x)))


class HeadLoss(torch.autograd.Function):
    """Head, soft-cap and cross-entropy in one, some rows at a time, so that the logits of a batch never stand in memory.

    With a vocabulary of 50,304 they and their gradients would be most of it; and small pieces stay in a CPU's cache. The
    gradient of a weighted sum of losses needs nothing from above but a factor, so it is made along with the loss.
    """

    CHUNK = 2**19  # logits at a time: 2 MiB

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, table: Tensor, targets: Tensor, weights: Tensor, vocab_size: int, cap: float
    ) -> tuple[Tensor, Tensor]:
        """x (N, C), table (padded V, C), targets and weights (N,) -> weighted sum of the losses, and the losses (N,).

        Only the sum can be differentiated."""
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        head = table[:vocab_size].to(dtype)  # (V, C)
        largest = weights.max().clamp_min(1e-30)  # comes in at the end: a gradient of 1 / (B T) is too small for float16
        weights = weights / largest
        losses = torch.empty(len(x), device=x.device)
        needs_grad = any(ctx.needs_input_grad)
        grad_x = torch.empty_like(x) if needs_grad else None
        grad_table = torch.zeros_like(table) if ctx.needs_input_grad[1] else None  # not of a frozen head
        rows = max(1, HeadLoss.CHUNK // vocab_size)
        for part in (slice(i, i + rows) for i in range(0, len(x), rows)):
            xi, ignored = x[part].to(dtype), targets[part] == -100
            target = targets[part].clamp_min(0)[:, None]  # (n, 1)
            logits = F.linear(xi, head).float()  # (n, V)
            if cap:
                tanh = logits.div_(cap).tanh_()
                logits = tanh * cap
            total = logits.logsumexp(-1, keepdim=True)  # (n, 1)
            losses[part] = (total - logits.gather(1, target)).squeeze(1).masked_fill(ignored, 0)
            if needs_grad:
                grad = logits.sub_(total).exp_()  # probabilities, and 1 less at the target: the gradient by the logits
                grad.scatter_add_(1, target, torch.full_like(total, -1)).mul_(weights[part].masked_fill(ignored, 0)[:, None])
                if cap:
                    grad.mul_(tanh.square_().neg_().add_(1))
                grad = grad.to(dtype)
                grad_x[part] = grad @ head
                if grad_table is not None:
                    grad_table[:vocab_size] += grad.T @ xi
        ctx.save_for_backward(grad_x, grad_table, largest)
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum() * largest, losses  # a product would be rounded to bfloat16 under autocast

    @staticmethod
    def backward(ctx: Any, factor: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_table, largest = ctx.saved_tensors
        factor = factor * largest
        return grad_x * factor, None if grad_table is None else grad_table * factor, None, None, None, None


def positions(doc_ids: Tensor) -> Tensor:
    """How far each token of doc_ids (B, T) is from the beginning of its document, or of the row."""
    T = doc_ids.size(1)
    here = torch.arange(T, device=doc_ids.device).expand_as(doc_ids)
    begins = torch.ones_like(doc_ids, dtype=torch.bool)
    begins[:, 1:] = doc_ids[:, 1:] != doc_ids[:, :-1]
    return here - torch.where(begins, here, 0).cummax(1).values


class GPT(nn.Module):
    """Embedding, blocks, norm, head. See the module's docstring for use."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.pos_embed = nn.Embedding(config.block_size, config.n_embd) if config.position == "learned" else None
        self.embed_norm = Norm(config) if config.embed_norm else None
        self.dropout = nn.Dropout(config.dropout)
        pattern = config.window_pattern
        window = config.window_size or max(1, config.block_size // 4)
        self.windows = [window if pattern[i % len(pattern)] == "S" else None for i in range(config.n_layer)]
        n = config.value_embed_interval
        valued = [bool(n) and (config.n_layer - 1 - i) % n == 0 for i in range(config.n_layer)]
        self.blocks = nn.ModuleList(Block(config, value_embed) for value_embed in valued)
        kv_size = config.kv_heads * config.head_size
        tables = {str(i): nn.Embedding(config.padded_vocab_size, kv_size) for i in range(config.n_layer) if valued[i]}
        self.value_embeds = nn.ModuleDict(tables)
        self.bigram_embed = nn.Embedding(config.bigram_table, config.n_embd) if config.bigram_rows else None
        self.smear_gate = nn.Parameter(torch.empty(1, GATE_CHANNELS)) if config.smear else None
        self.smear_scale = nn.Parameter(torch.empty(1)) if config.smear else None
        self.recompute = False  # keep only what enters a block; its inside is computed again for the gradient
        self.norm = Norm(config)
        self.head = None if config.tie_embeddings else nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        # Tables of angles, position x frequency; not parameters, so not saved. A model without weights yet has them already.
        device = "cpu" if self.embed.weight.is_meta else None
        size = {"rope": config.head_size, "sinusoidal": config.n_embd, "learned": 0}[config.position]
        frequencies = config.rope_theta ** -(torch.arange(0, size, 2, device=device) / max(size, 1))
        angles = torch.outer(torch.arange(config.block_size, device=device), frequencies)
        self.register_buffer("frequencies", frequencies, persistent=False)  # radians a token
        cos, sin = rope_table(angles) if config.position == "rope" else (angles.cos(), angles.sin())
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        if not self.embed.weight.is_meta:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initial weights. With zero_init: embedding N(0, 1), hidden matrices N(0, 1/fan_in), output projections 0, head
        N(0, 0.001). Without: GPT-2's N(0, 0.02), output projections divided by sqrt(2 n_layer). What frontier adds starts
        without effect, or near it."""
        zero_init = self.config.zero_init
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_(std=1.0 if zero_init and not self.config.tie_embeddings else 0.02)
            elif isinstance(module, nn.Linear):
                std = module.in_features**-0.5 if zero_init else 0.02
                if name.endswith(".proj"):
                    std = 0.0 if zero_init else std / math.sqrt(2 * self.config.n_layer)
                elif name == "head" and zero_init:
                    std = 0.001
                module.weight.normal_(std=std) if std else module.weight.zero_()
                if module.bias is not None:
                    module.bias.zero_()
        for table in self.value_embeds.values():
            table.weight.normal_(std=self.config.n_embd**-0.5)
        if self.bigram_embed is not None:
            self.bigram_embed.weight.zero_()
        if self.smear_scale is not None:
            self.smear_scale.zero_()
        for name, parameter in self.named_parameters():
            if name.endswith("_gate"):
                parameter.uniform_(0, 0.02)

    def forward(
        self, ids: Tensor, targets: Tensor | None = None, weights: Tensor | None = None, doc_ids: Tensor | None = None
    ) -> Tensor:
        """Logits (B, T, V) of the token after each of ids (B, T); or, given targets (B, T), the loss in nats, a scalar.

        Targets of -100 are ignored. The loss is the mean over the others; given weights (B, T), it is their weighted sum, so
        that a step of several micro-batches can be normalised as a whole. Given doc_ids (B, T), the numbers of the documents
        that are packed in a row, a token sees those of its own document alone. Raises ValueError for T > block_size.
        """
        x = self.hidden(ids, doc_ids)  # (B, T, C)
        if targets is None:
            return self.logits(x)
        if weights is None:
            wanted = (targets != -100).float()
            weights = wanted / wanted.sum()
        return self._head_loss(x, targets, weights)[0]

    def losses(self, ids: Tensor, targets: Tensor, doc_ids: Tensor | None = None) -> Tensor:
        """Nats of each target (B, T), 0 where it is -100; for measuring, not for training."""
        x = self.hidden(ids, doc_ids).detach()
        return self._head_loss(x, targets, torch.ones(targets.shape, device=x.device))[1].view_as(targets)

    def _head_loss(self, x: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        c = self.config
        x = x.flatten(0, 1)  # (B T, C)
        # A head with an adapter is a wider one: its table and x have more columns (papagaio/training/lora.py).
        x, table = self.head.widen(x) if hasattr(self.head, "widen") else (x, self.head_weight)
        return HeadLoss.apply(x, table, targets.flatten(), weights.flatten(), c.vocab_size, c.logit_softcap)

    def hidden(self, ids: Tensor, doc_ids: Tensor | None = None, cache: Any = None) -> Tensor:
        """The residual stream (B, T, C) after the last block and its norm, which the head turns into logits.

        Given a cache (papagaio/generation/cache.py), ids come after what it has read; their keys and values are put into it,
        and count once its `advance` has been called.
        """
        T, c = ids.size(1), self.config
        if cache is None and c.block_size < T:
            raise ValueError(f"{T} tokens do not fit into block_size {c.block_size}")
        places: Any = slice(0, T) if doc_ids is None else None if c.position == "rope" else positions(doc_ids)
        if cache is not None:
            places = cache.positions(T)  # (B, T)
        x = self.dropout(self.embed_at(ids, places))  # (B, T, C)
        rope = None
        if c.position == "rope":  # tells distances alone, which are the same wherever a document begins
            dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
            # A cache goes on beyond block_size, where the table ends.
            cos, sin = (self.cos[:T], self.sin[:T]) if cache is None else rope_table(places[..., None] * self.frequencies)
            rope = cos.unsqueeze(-2).to(dtype), sin.unsqueeze(-2).to(dtype)  # (T, 1, D), or (B, T, 1, D)
        flex = x.is_cuda and doc_ids is not None and not (c.dropout and self.training)  # it has no dropout
        masks = {
            window: attention_mask(T, window, doc_ids, x.device, flex) if cache is None else cache.mask(T, window)
            for window in set(self.windows)
        }
        x = self.mix_in_previous(x, ids, doc_ids, cache)
        for i, (block, window) in enumerate(zip(self.blocks, self.windows, strict=True)):
            value_embed = self.value_embeds[str(i)](ids) if str(i) in self.value_embeds else None  # (B, T, K D)
            past = None if cache is None else functools.partial(cache.store, i, window)
            if self.recompute and self.training:
                x = checkpoint(block, x, rope, masks[window], value_embed, use_reentrant=False)
            else:
                x = block(x, rope, masks[window], value_embed, past)
        return self.norm(x)

    def embed_at(self, ids: Tensor, places: Any) -> Tensor:
        """Embeddings (B, T, C) of ids (B, T) that stand at these places of their documents: a slice, or (B, T)."""
        x = self.embed(ids)
        if torch.is_autocast_enabled(x.device.type):
            x = x.float()  # where the table itself is in half precision, the residual stream still is not
        if self.pos_embed is not None:
            x = x + self.pos_embed.weight[places]
        elif self.config.position == "sinusoidal":  # scaled as in the paper (section 3.4): the angles must not drown the tokens
            x = x * math.sqrt(self.config.n_embd) + torch.cat((self.sin[places], self.cos[places]), dim=-1)
        return x if self.embed_norm is None else self.embed_norm(x)

    def mix_in_previous(self, x: Tensor, ids: Tensor, doc_ids: Tensor | None, cache: Any = None) -> Tensor:
        """The embeddings x (B, T, C), each with what the token before it adds: what no attention needs to find out."""
        c = self.config
        if self.bigram_embed is None and self.smear_gate is None:
            return x
        none = c.vocab_size  # stands for "no token before"
        before = F.pad(ids[:, :-1], (1, 0), value=none)
        if cache is not None:
            before[:, 0] = cache.previous
        if doc_ids is not None:
            before[:, 1:].masked_fill_(doc_ids[:, 1:] != doc_ids[:, :-1], none)
        if self.smear_gate is not None:
            amount = self.smear_scale * torch.sigmoid(F.linear(x[..., :GATE_CHANNELS], self.smear_gate))  # (B, T, 1)
            amount = amount.masked_fill((before == none)[..., None], 0)
            shifted = F.pad(x[:, :-1], (0, 0, 1, 0))
            if cache is not None:
                shifted[:, :1] = self.embed_at(before[:, :1].clamp_max(none - 1), cache.positions(1) - 1)
            x = x + amount * shifted
        if self.bigram_embed is not None:  # all pairs have rows of their own where there are enough; else they share some
            stride = none if c.bigram_table == none * (none + 1) else 0x9E3779B1
            x = x + self.bigram_embed((before * stride + ids) % c.bigram_table)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """Head: hidden states (..., C) -> logits (..., V), the padded ids cut off."""
        logits = (F.linear(x, self.head_weight) if self.head is None else self.head(x))[..., : self.config.vocab_size]
        cap = self.config.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    @property
    def head_weight(self) -> Tensor:
        """The table (padded V, C) that turns hidden states into logits."""
        return self.embed.weight if self.head is None else self.head.weight

    def num_parameters(self) -> int:
        """All trained numbers, a tied table once, padding included."""
        return sum(p.numel() for p in self.parameters())

    def num_matrix_parameters(self) -> int:
        """Weights that multiply every token: linear layers and the head (a tied table counts as the head), no look-ups."""
        head = self.config.padded_vocab_size * self.config.n_embd
        return head + sum(p.numel() for name, p in self.blocks.named_parameters() if p.ndim == 2)

    def flops_per_token(self) -> int:
        """Floating-point operations to train on one token at full context: forward and backward, 6 per matrix weight, and
        12 n_layer C T for attention (PaLM, arXiv:2204.02311, appendix B; the causal half is not subtracted)."""
        c = self.config
        return 6 * self.num_matrix_parameters() + 12 * c.n_layer * c.n_embd * c.block_size
