"""GPT: a decoder-only Transformer in one file. It needs torch alone and can be copied into another project.

    model = GPT(GPTConfig(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768, **PRESETS["gpt2"]))
    logits = model(ids)                     # ids (B, T) int64 -> logits (B, T, V)
    loss = model(ids, targets)              # targets (B, T), -100 where nothing is predicted -> mean loss in nats

Shapes: B batch, T time (tokens), C channels (n_embd), H heads, K key-value heads, D head size, V vocabulary,
S tokens of the context (T, or more with a cache).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class GPTConfig:
    """Shape and options of a GPT. The defaults are the preset `modern`. Raises ValueError if values do not fit together."""

    vocab_size: int  # ids are 0 to vocab_size - 1; the tables are padded inside, see padded_vocab_size
    block_size: int = 1024  # longest context, in tokens
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int | None = None  # fewer than n_head: grouped-query attention (arXiv:2305.13245); None: n_head
    head_dim: int | None = None  # channels of a head; None: n_embd / n_head
    n_embd: int = 768  # channels
    position: str = "rope"  # rope (arXiv:2104.09864) | learned | sinusoidal (arXiv:1706.03762, section 3.5) | none
    rope_theta: float = 10000.0  # base of the rotary wavelengths
    rope_scaling: float = 1.0  # Llama 3.1: wavelengths above rope_context are this many times as long (arXiv:2407.21783)
    rope_context: int = 8192  # tokens
    norm: str = "rmsnorm"  # rmsnorm (arXiv:1910.07467) | layernorm
    norm_affine: bool = False  # norms have weights (and biases, with `bias`)
    norm_eps: float = 1e-6  # of RMSNorm, added to the mean square; LayerNorm has 1e-5
    embed_norm: bool = True  # norm right after the embedding
    mlp: str = "relu2"  # relu2 (squared ReLU, arXiv:2109.08668) | gelu (tanh form) | swiglu (arXiv:2002.05202)
    mlp_hidden: int | None = None  # width inside the MLP; None: 4 C, and 8/3 C for swiglu, which gives as many parameters
    qk_norm: bool = True  # RMSNorm of queries and keys (arXiv:2302.05442), after the rotation
    qk_norm_affine: bool = False  # the same before the rotation, with weights (Qwen3)
    bias: bool = False  # in linear layers and norms
    qkv_bias: bool = False  # in the projections to queries, keys and values (Qwen2)
    tie_embeddings: bool = False  # the head shares the embedding's table
    logit_softcap: float = 15.0  # logits -> cap * tanh(logits / cap) (arXiv:2408.00118); 0: off
    dropout: float = 0.0
    window_pattern: str = "L"  # repeated over the layers: L attends to the whole context, S to the last window_size tokens
    window_size: int = 0  # tokens; 0: a quarter of block_size
    attention_scale: float = 1.0  # of queries and keys after qk_norm; above 1, attention can be sharper
    smear: bool = False  # add a part of the previous token's embedding to each embedding (modded-nanogpt, nanochat)
    bigram_rows: int = 0  # rows of a table of embeddings of token pairs, chosen by a hash (DeepSeek's Engram); 0: none
    value_embed_interval: int = 0  # every n-th block, counted from the last, adds an embedding to its values; 0: none
    zero_init: bool = True  # output projections start at zero, so that each block starts as the identity (arXiv:2203.03466)

    def __post_init__(self) -> None:
        def check(holds: object, message: str) -> None:
            if not holds:
                raise ValueError(message)

        known = {"position": "rope, learned, sinusoidal, none", "norm": "rmsnorm, layernorm", "mlp": "relu2, gelu, swiglu"}
        off = {"dropout", "logit_softcap", "norm_eps", "window_size", "bigram_rows", "value_embed_interval"}  # where they are 0
        for name, value in vars(self).items():
            if name in known:
                check(value in known[name].split(", "), f"{name} must be one of {known[name]}, not {value!r}")
            elif isinstance(value, int | float) and value is not False:
                check(value > 0 or (value == 0 and name in off), f"{name} must not be {'negative' if value < 0 else value}")
        C, H, K, D, pattern = self.n_embd, self.n_head, self.kv_heads, self.head_size, self.window_pattern
        check(C % H == 0 or self.head_dim, f"n_embd {C} must be divisible by n_head {H}")
        check(H % K == 0, f"n_head {H} must be divisible by n_kv_head {K}")
        check(self.position != "rope" or D % 2 == 0, f"rotary positions need an even head size, not {D}")
        check(self.position != "sinusoidal" or C % 2 == 0, f"sinusoidal positions need an even n_embd, not {C}")
        check(self.dropout < 1, f"dropout must be at least 0 and below 1, not {self.dropout}")
        check(pattern.strip("LS") == "" != pattern, f"window_pattern must consist of the letters L and S, not {pattern!r}")

    @property
    def head_size(self) -> int:
        return self.head_dim or self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def padded_vocab_size(self) -> int:
        return math.ceil(self.vocab_size / 64) * 64  # matrix products are faster at multiples of 64

    @property
    def windows(self) -> list[int | None]:
        """For each layer how many tokens back it attends, the token itself included; None: the whole context."""
        window, pattern = self.window_size or max(1, self.block_size // 4), self.window_pattern
        return [window if pattern[i % len(pattern)] == "S" else None for i in range(self.n_layer)]


PRESETS: dict[str, dict[str, Any]] = {
    "modern": {},  # GPTConfig's defaults: the architecture that Hugging Face transformers calls NanoChat
    "gpt2": dict(  # GPT-2 (Radford et al. 2019), exactly
        **dict(position="learned", norm="layernorm", norm_affine=True, embed_norm=False, mlp="gelu", qk_norm=False, bias=True),
        **dict(tie_embeddings=True, logit_softcap=0.0, zero_init=False),
    ),
    # Llama (arXiv:2302.13971), and its family: Llama 3, SmolLM2, Qwen; the format that other tools read best
    "llama": dict(norm_affine=True, embed_norm=False, mlp="swiglu", qk_norm=False, logit_softcap=0.0, zero_init=False),
    # modern, and what pays beyond it for models of this size (LOG.md, 2026-11-23); has no counterpart in Hugging Face.
    "frontier": dict(attention_scale=1.2, smear=True, bigram_rows=16384, value_embed_interval=2, window_pattern="SL"),
}
GATE_CHANNELS = 12  # channels of a token from which its gates are computed
Maybe = Tensor | None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: turn each pair (a, b) = (x[i], x[i + D/2]) of x (B, T, H, D) by an angle proportional to its position.
    With cos (cos, cos) and sin (sin, -sin), both (T, 1, D) or (B, T, 1, D), that is (a cos + b sin, b cos - a sin). The product
    of a query and a key then depends on the distance between them alone."""
    return torch.addcmul(x * cos.to(x.dtype), x.roll(x.size(-1) // 2, dims=-1), sin.to(x.dtype))


class Module(nn.Module):
    """Base of the modules below. Its operations are the seam for faster equivalents of the same values and gradients: setting
    these attributes on every module switches them on, as papagaio/kernels.py does before the model is compiled."""

    rms_norm: Callable[..., Tensor] = staticmethod(lambda x, eps=1e-6: F.rms_norm(x, x.shape[-1:], eps=eps))
    squared_relu: Callable[..., Tensor] = staticmethod(lambda x: F.relu(x).square())
    project: Callable[..., Tensor] = staticmethod(lambda x, *layers: torch.cat([layer(x) for layer in layers], dim=-1))

    @staticmethod
    def attention_mask(T: int, window: int | None, doc_ids: Maybe, device: torch.device) -> Any:
        """True where row i may attend to column j <= i: within the last `window` tokens and the same document of doc_ids (B, T).
        (T, T), or (B, 1, T, T) with doc_ids; None if every token attends to all tokens up to itself."""
        if doc_ids is None and (window is None or window >= T):
            return None
        distance = torch.arange(T, device=device)[:, None] - torch.arange(T, device=device)  # (T, T)
        near = (distance >= 0) & (distance < (window or T))
        return near if doc_ids is None else (near & (doc_ids[:, :, None] == doc_ids[:, None, :]))[:, None]

    @staticmethod
    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Any, dropout: float) -> Tensor:
        """softmax(q k' / sqrt(D)) v for q (B, H, T, D) over k and v (B, K, S, D): causal, or as `mask` says."""
        causal = mask is None and q.size(2) > 1  # a single token, with a cache, attends to everything
        options = {"attn_mask": mask, "is_causal": causal, "dropout_p": dropout, "enable_gqa": k.size(1) != q.size(1)}
        return F.scaled_dot_product_attention(q, k, v, **options)

    @staticmethod
    def next_token_loss(model: "GPT", x: Tensor, targets: Tensor, weights: Maybe) -> Tensor:
        """Nats (B, T) of targets (B, T) after hidden states x (B, T, C), or their sum weighted by weights (B, T)."""
        logits = model.logits(x).float()  # (B, T, V)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)  # 0 at -100
        return losses if weights is None else (losses * weights).sum()


class RMSNorm(Module):
    def __init__(self, size: int, eps: float, affine: bool) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(size)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.rms_norm(x, self.eps)
        return y if self.weight is None else y * self.weight


def make_norm(c: GPTConfig) -> nn.Module:
    if c.norm == "layernorm":
        return nn.LayerNorm(c.n_embd, elementwise_affine=c.norm_affine, bias=c.bias)
    return RMSNorm(c.n_embd, c.norm_eps, c.norm_affine)


class Attention(Module):
    """Causal multi-head self-attention: each token gathers values from the tokens up to itself, weighted by how well its query
    matches their keys. `value_embed` adds an embedding of the token to its values, with a gate per head."""

    def __init__(self, c: GPTConfig, value_embed: bool) -> None:
        super().__init__()
        self.config, q_size, kv_size = c, c.n_head * c.head_size, c.kv_heads * c.head_size
        self.q, self.k, self.v = (nn.Linear(c.n_embd, n, c.bias or c.qkv_bias) for n in (q_size, kv_size, kv_size))
        self.q_norm, self.k_norm = (RMSNorm(c.head_size, c.norm_eps, True) if c.qk_norm_affine else None for _ in "qk")
        self.proj = nn.Linear(q_size, c.n_embd, c.bias)
        self.value_embed = nn.Embedding(c.padded_vocab_size, kv_size) if value_embed else None
        self.value_gate = nn.Parameter(torch.empty(c.kv_heads, GATE_CHANNELS)) if value_embed else None

    def forward(self, x: Tensor, ids: Tensor, rope: tuple[Tensor, Tensor], mask: Any, cache: Any) -> Tensor:
        c, (B, T, _), H, K, D = self.config, x.shape, self.config.n_head, self.config.kv_heads, self.config.head_size
        qkv = self.project(x, self.q, self.k, self.v).view(B, T, H + 2 * K, D)
        qk, v = qkv.split((H + K, K), dim=2)  # (B, T, H + K, D), (B, T, K, D)
        if self.value_embed is not None:
            gate = 2 * torch.sigmoid(F.linear(x[..., :GATE_CHANNELS], self.value_gate))  # (B, T, K), 1 for x = 0
            v = v + gate[..., None] * self.value_embed(ids).view(B, T, K, D).to(v.dtype)
        if self.q_norm is not None:
            qk = torch.cat((self.q_norm(qk[:, :, :H]), self.k_norm(qk[:, :, H:])), dim=2)
        if c.position == "rope":
            qk = rotate(qk, *rope)
        qk = self.rms_norm(qk, c.norm_eps) if c.qk_norm else qk
        qk = qk * c.attention_scale if c.attention_scale != 1 else qk
        q, k, v = (x.transpose(1, 2) for x in (*qk.split((H, K), dim=2), v))  # (B, H, T, D), (B, K, T, D)
        if cache is not None:
            k, v = cache.update(k, v)  # (B, K, S, D), with the tokens before
        y = self.attention(q, k, v, mask, c.dropout if self.training else 0.0)  # (B, H, T, D)
        return self.proj(y.transpose(1, 2).reshape(B, T, H * D))


class MLP(Module):
    """For each token by itself: widen, apply a non-linearity, narrow."""

    def __init__(self, c: GPTConfig) -> None:
        super().__init__()
        self.kind = c.mlp
        hidden = c.mlp_hidden or (math.ceil(8 * c.n_embd / 3 / 32) * 32 if c.mlp == "swiglu" else 4 * c.n_embd)
        self.fc = nn.Linear(c.n_embd, hidden, bias=c.bias)
        self.gate = nn.Linear(c.n_embd, hidden, bias=c.bias) if c.mlp == "swiglu" else None
        self.proj = nn.Linear(hidden, c.n_embd, bias=c.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)  # (B, T, 4 C)
        if self.gate is not None:
            return self.proj(F.silu(self.gate(x)) * h)
        return self.proj(F.gelu(h, approximate="tanh") if self.kind == "gelu" else self.squared_relu(h))


class Block(nn.Module):
    """Attention, then MLP, each on normalised input and added to the residual stream (pre-norm)."""

    def __init__(self, c: GPTConfig, value_embed: bool) -> None:
        super().__init__()
        self.norm_1, self.attn, self.norm_2, self.mlp = make_norm(c), Attention(c, value_embed), make_norm(c), MLP(c)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, ids: Tensor, rope: tuple[Tensor, Tensor], mask: Any, cache: Any) -> Tensor:
        x = x + self.dropout(self.attn(self.norm_1(x), ids, rope, mask, cache))
        return x + self.dropout(self.mlp(self.norm_2(x)))


class PreviousToken(nn.Module):
    """Add to each embedding a gated part of the previous token's (smear), and an embedding of the pair of both ids (bigram)."""

    def __init__(self, c: GPTConfig) -> None:
        super().__init__()
        self.none, pairs = c.vocab_size, c.vocab_size * (c.vocab_size + 1)  # none: the id for "no previous token"
        self.rows = min(c.bigram_rows, pairs)  # every pair has a row of its own, or a hash chooses one
        self.stride = self.none if self.rows == pairs else 0x9E3779B1
        self.smear_gate = nn.Parameter(torch.empty(1, GATE_CHANNELS)) if c.smear else None
        self.smear_scale = nn.Parameter(torch.empty(1)) if c.smear else None
        self.bigram_embed = nn.Embedding(self.rows, c.n_embd) if c.bigram_rows else None

    def forward(self, x: Tensor, ids: Tensor, doc_ids: Maybe, cache: Any, embed: Callable[..., Tensor]) -> Tensor:
        previous = F.pad(ids[:, :-1], (1, 0), value=self.none)  # (B, T)
        shifted = F.pad(x[:, :-1], (0, 0, 1, 0))  # (B, T, C)
        if cache is not None:
            previous[:, 0] = cache.previous
            shifted[:, :1] = embed(previous[:, :1].clamp_max(self.none - 1), (cache.positions(1) - 1).clamp_min(0))
        if doc_ids is not None:
            previous[:, 1:].masked_fill_(doc_ids[:, 1:] != doc_ids[:, :-1], self.none)
        if self.smear_gate is not None:
            amount = self.smear_scale * torch.sigmoid(F.linear(x[..., :GATE_CHANNELS], self.smear_gate))  # (B, T, 1)
            x = x + amount.masked_fill((previous == self.none)[..., None], 0) * shifted
        return x if self.bigram_embed is None else x + self.bigram_embed((previous * self.stride + ids) % self.rows)


class GPT(Module):
    """Embedding, blocks, norm, head. See the module's docstring for use."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = c = config
        self.embed = nn.Embedding(c.padded_vocab_size, c.n_embd)
        self.pos_embed = nn.Embedding(c.block_size, c.n_embd) if c.position == "learned" else None
        self.embed_norm, self.dropout = make_norm(c) if c.embed_norm else None, nn.Dropout(c.dropout)
        self.previous_token = PreviousToken(c) if c.smear or c.bigram_rows else None
        n, last = c.value_embed_interval, c.n_layer - 1
        self.blocks = nn.ModuleList(Block(c, n > 0 and (last - i) % n == 0) for i in range(c.n_layer))
        self.norm = make_norm(c)
        self.head = None if c.tie_embeddings else nn.Linear(c.n_embd, c.padded_vocab_size, bias=False)
        # Radians per token; not saved, so they have values on the meta device as well.
        size = {"rope": c.head_size, "sinusoidal": c.n_embd}.get(c.position, 0)
        steps = torch.arange(0, size, 2, device="cpu" if self.embed.weight.is_meta else None)
        frequencies = c.rope_theta ** -(steps / max(size, 1))
        if c.rope_scaling != 1:  # 4 turns within rope_context and more stay, 1 turn and less is stretched
            kept = ((frequencies * c.rope_context / (2 * math.pi) - 1) / 3).clamp(0, 1)
            frequencies = frequencies * (kept + (1 - kept) / c.rope_scaling)
        self.register_buffer("frequencies", frequencies, persistent=False)
        if not self.embed.weight.is_meta:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """With zero_init: embedding N(0, 1), matrices N(0, 1/fan_in), output projections 0, head N(0, 0.001^2). Without: GPT-2's
        N(0, 0.02^2), output projections divided by sqrt(2 n_layer). What `frontier` adds starts with little or no effect."""
        c, zero = self.config, self.config.zero_init
        table = 1.0 if zero and not c.tie_embeddings else 0.02
        stds = {"embed": table, "pos_embed": table, "value_embed": c.n_embd**-0.5, "bigram_embed": 0.0}
        stds |= {"head": 0.001, "proj": 0.0} if zero else {"proj": 0.02 / math.sqrt(2 * c.n_layer)}
        for name, p in self.named_parameters():
            if name.endswith("_gate"):
                p.uniform_(0, 0.02)
            elif p.ndim == 2:
                std = stds.get(name.split(".")[-2], p.size(1) ** -0.5 if zero else 0.02)
                p.normal_(std=std) if std else p.zero_()
            elif not name.endswith(".weight"):  # biases and scales; the weights of norms are 1 already
                p.zero_()

    def forward(
        self, ids: Tensor, targets: Maybe = None, weights: Maybe = None, doc_ids: Maybe = None, reduction: str = "mean"
    ) -> Tensor:
        """Logits (B, T, V) after each of ids (B, T); or, given targets (B, T), the mean loss in nats over those other than -100.

        Given weights (B, T), the loss is the sum weighted by them, so that a step of several micro-batches can be normalised as a
        whole; with reduction="none" it is (B, T). Given doc_ids (B, T), a token attends to its own document only.
        """
        x = self.hidden(ids, doc_ids)  # (B, T, C)
        if targets is None:
            return self.logits(x)
        if weights is None:
            weights = (targets != -100).float() / (targets != -100).sum()
        return self.next_token_loss(self, x, targets, None if reduction == "none" else weights)

    def hidden(self, ids: Tensor, doc_ids: Maybe = None, cache: Any = None) -> Tensor:
        """The residual stream (B, T, C) after the last block and the norm. Given a cache (papagaio/generation/cache.py), ids
        follow the tokens that it holds, and their keys and values are added to it."""
        T, c = ids.size(1), self.config
        if cache is None and c.block_size < T:
            raise ValueError(f"{T} tokens do not fit into block_size {c.block_size}")
        positions = torch.arange(T, device=ids.device) if cache is None else cache.positions(T)  # (T,) or (B, T)
        if doc_ids is not None and c.position != "rope":  # count from each document's beginning; rope needs distances alone
            begins = F.pad(doc_ids[:, 1:] != doc_ids[:, :-1], (1, 0), value=True)
            positions = positions - torch.where(begins, positions, 0).cummax(1).values
        x = self.dropout(self.embed_at(ids, positions))  # (B, T, C)
        if self.previous_token is not None:
            x = self.previous_token(x, ids, doc_ids, cache, self.embed_at)
        angles = positions[..., None, None] * self.frequencies  # (T, 1, D / 2) or (B, T, 1, D / 2)
        cos, sin = angles.cos(), angles.sin()
        rope = torch.cat((cos, cos), dim=-1), torch.cat((sin, -sin), dim=-1)
        windows, layers = c.windows, [None] * c.n_layer if cache is None else cache.layers
        masks = {w: self.attention_mask(T, w, doc_ids, x.device) if cache is None else cache.mask(T, w) for w in set(windows)}
        for block, window, layer_cache in zip(self.blocks, windows, layers, strict=True):
            x = block(x, ids, rope, masks[window], layer_cache)
        return self.norm(x)

    def embed_at(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Embeddings (B, T, C) of ids (B, T) at positions (T,) or (B, T); in float32 under autocast, as the residual stream."""
        x = self.embed(ids).float() if torch.is_autocast_enabled(ids.device.type) else self.embed(ids)
        if self.pos_embed is not None:
            x = x + self.pos_embed(positions)
        elif self.config.position == "sinusoidal":  # scaled as in the paper (section 3.4), so that the tokens outweigh the angles
            angles = positions[..., None] * self.frequencies
            x = x * math.sqrt(self.config.n_embd) + torch.cat((angles.sin(), angles.cos()), dim=-1)
        return x if self.embed_norm is None else self.embed_norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states (..., C) -> logits (..., V)."""
        logits = (F.linear(x, self.embed.weight) if self.head is None else self.head(x))[..., : self.config.vocab_size]
        cap = self.config.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits
