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
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
    window_size: int = 256  # tokens
    zero_init: bool = True  # output projections start at zero, so that every block starts as the identity (arXiv:2203.03466)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "window_size"):
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
}


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
        return F.rms_norm(x, self.shape, self.weight, eps=1e-6)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: turn each pair (i, i + D/2) of x (B, H, T, D) by an angle that grows with its position.

    cos, sin (T, D/2). The angle between a query and a key then tells their distance, wherever they stand.
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


class Attention(nn.Module):
    """Causal multi-head self-attention: every token gathers values from the tokens up to itself, weighted by how well its
    query matches their keys."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        kv_size = config.kv_heads * config.head_size
        self.q = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.k = nn.Linear(config.n_embd, kv_size, bias=config.bias)
        self.v = nn.Linear(config.n_embd, kv_size, bias=config.bias)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None, mask: Any) -> Tensor:
        B, T, C = x.shape
        c = self.config
        q = self.q(x).view(B, T, c.n_head, c.head_size).transpose(1, 2)  # (B, H, T, D)
        k = self.k(x).view(B, T, c.kv_heads, c.head_size).transpose(1, 2)  # (B, K, T, D)
        v = self.v(x).view(B, T, c.kv_heads, c.head_size).transpose(1, 2)  # (B, K, T, D)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if c.qk_norm:
            q, k = (F.rms_norm(h, (c.head_size,), eps=1e-6) for h in (q, k))
        dropout = c.dropout if self.training else 0.0
        y = attend(q, k, v, mask, dropout)  # (B, H, T, D)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Any, dropout: float) -> Tensor:
    """Attention of q (B, H, T, D) over k, v (B, K, T, D): causal, or as `attention_mask` says."""
    grouped = k.size(1) != q.size(1)
    if mask is not None and not isinstance(mask, Tensor):
        return compiled_flex_attention()(q, k, v, block_mask=mask, enable_gqa=grouped)
    options = {"attn_mask": mask, "is_causal": mask is None, "dropout_p": dropout, "enable_gqa": grouped}
    return F.scaled_dot_product_attention(q, k, v, **options)


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
        return self.proj(F.gelu(h, approximate="tanh") if self.kind == "gelu" else F.relu(h).square())


class Block(nn.Module):
    """Attention, then MLP, each added to the residual stream (pre-norm)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm_1, self.attn = Norm(config), Attention(config)
        self.norm_2, self.mlp = Norm(config), MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None, mask: Any) -> Tensor:
        x = x + self.dropout(self.attn(self.norm_1(x), rope, mask))
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
        losses = torch.empty(len(x), device=x.device)
        needs_grad = any(ctx.needs_input_grad)
        grad_x = torch.empty_like(x) if needs_grad else None
        grad_table = torch.zeros_like(table) if needs_grad else None
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
                grad_table[:vocab_size] += grad.T @ xi
        ctx.save_for_backward(grad_x, grad_table)
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses  # a product would be rounded to bfloat16 under autocast

    @staticmethod
    def backward(ctx: Any, factor: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_table = ctx.saved_tensors
        return grad_x * factor, grad_table * factor, None, None, None, None


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
        self.windows = [config.window_size if pattern[i % len(pattern)] == "S" else None for i in range(config.n_layer)]
        self.blocks = nn.ModuleList(Block(config) for _ in self.windows)
        self.norm = Norm(config)
        self.head = None if config.tie_embeddings else nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        # Tables of angles, position x frequency; not parameters, so not saved.
        size = {"rope": config.head_size, "sinusoidal": config.n_embd, "learned": 0}[config.position]
        frequencies = config.rope_theta ** -(torch.arange(0, size, 2) / max(size, 1))
        angles = torch.outer(torch.arange(config.block_size), frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initial weights. With zero_init: embedding N(0, 1), hidden matrices N(0, 1/fan_in), output projections 0, head
        N(0, 0.001). Without: GPT-2's N(0, 0.02), output projections divided by sqrt(2 n_layer)."""
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
        return HeadLoss.apply(x, self.head_weight, targets.flatten(), weights.flatten(), c.vocab_size, c.logit_softcap)

    def hidden(self, ids: Tensor, doc_ids: Tensor | None = None) -> Tensor:
        """The residual stream (B, T, C) after the last block and its norm, which the head turns into logits."""
        T, c = ids.size(1), self.config
        if c.block_size < T:
            raise ValueError(f"{T} tokens do not fit into block_size {c.block_size}")
        x = self.embed(ids)  # (B, T, C)
        rope = None
        if c.position == "rope":  # tells distances alone, which are the same wherever a document begins
            rope = self.cos[:T].to(x.dtype), self.sin[:T].to(x.dtype)
        else:
            places = slice(0, T) if doc_ids is None else positions(doc_ids)
            if self.pos_embed is not None:
                x = x + self.pos_embed.weight[places]
            else:  # scaled as in the paper (section 3.4), so that the angles do not drown the tokens
                x = x * math.sqrt(c.n_embd) + torch.cat((self.sin[places], self.cos[places]), dim=-1)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        x = self.dropout(x)
        flex = x.is_cuda and doc_ids is not None and not (c.dropout and self.training)  # it has no dropout
        masks = {window: attention_mask(T, window, doc_ids, x.device, flex) for window in set(self.windows)}
        for block, window in zip(self.blocks, self.windows, strict=True):
            x = block(x, rope, masks[window])
        return self.norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """Head: hidden states (..., C) -> logits (..., V), the padded ids cut off."""
        logits = F.linear(x, self.head_weight)[..., : self.config.vocab_size]
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
