"""LoRA: fine-tuning that keeps the weights W and trains a small matrix product B A beside them (arXiv:2106.09685).

    y = W x + (alpha / rank) B A x          A (rank, in), B (out, rank); B starts at zero, so that nothing changes at first

A base model has never seen the tokens of the chat template: without an adapter of the head it hardly learns to write <|end|>.
`train_rows` trains the rows of a few tokens in the table of the head as well (PEFT's trainable_token_indices).

Only A, B and these rows are saved, in PEFT's format: `PeftModel.from_pretrained(model, directory)` reads
adapter_model.safetensors and adapter_config.json. (Exception: rows of a tied table, `embed`, if the model has a `pos_embed`,
which PEFT takes for the same.) For generation, `merged` adds them to W, so that they cost nothing.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from papagaio.training.sharding import local, part_for

TARGETS = ("q", "k", "v", "proj", "fc", "gate", "head")  # model.py's linear layers; proj is attention's and the MLP's
PREFIX = "base_model.model."  # of PEFT's names
ROWS = ".token_adapter.trainable_tokens_delta"  # PEFT's name for trained rows; it holds the rows, not their change


class LoRALinear(nn.Linear):
    """A linear layer with a trained addition of low rank to its frozen weight."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        nn.Module.__init__(self)  # nn.Linear's would allocate another weight
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.scale = alpha / rank
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=base.weight.device)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=base.weight.device)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))  # as PEFT
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.scale * self.lora_B(self.lora_A(x))

    def widen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, in + rank) and a table (out, in + rank) whose product is `forward`: for kernels.next_token_loss."""
        low = self.scale * self.lora_A(x)
        return torch.cat((x, low.to(x.dtype)), dim=-1), torch.cat((self.weight, self.lora_B.weight), dim=-1)


class TrainedRows(nn.Module):
    """A frozen table (V, C) with trained rows (N, C) in the places of N tokens."""

    def __init__(self, table: Tensor, tokens: Collection[int]) -> None:
        super().__init__()
        self.register_buffer("tokens", torch.tensor(list(tokens), device=table.device), persistent=False)
        self.lora_rows = nn.Parameter(table.detach()[self.tokens].clone())

    def forward(self, table: Tensor) -> Tensor:
        return table.index_copy(0, self.tokens, self.lora_rows.to(table.dtype))


def add_adapters(model: nn.Module, targets: Collection[str], rank: int, alpha: float) -> None:
    """Freeze a model and give each linear layer whose last name is in `targets` an adapter, in place.

    Raises ValueError if the model has no layer of one of these names.
    """
    model.requires_grad_(False)
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear) and _last(name) in targets]
    if missing := set(targets) - {_last(name) for name, _ in found}:
        raise ValueError(f"this model has no linear layer named {', '.join(sorted(missing))}")
    for name, module in found:
        setattr(model.get_submodule(name.rpartition(".")[0]), _last(name), LoRALinear(module, rank, alpha))


def round_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep the frozen weights of the blocks' layers with adapters in the type in which autocast multiplies them, in place: the
    same products with half the memory, and without a cast in every step."""
    for name, layer in adapters(model).items():
        if _last(name) != "head":  # whose table is widened
            layer.weight.data = layer.weight.data.to(dtype)


def train_rows(model: nn.Module, tokens: Collection[int]) -> None:
    """Train the rows of these tokens in a GPT's head, in place; in its embedding, if this is the head as well."""
    table = model.embed if model.head is None else model.head
    parametrize.register_parametrization(table, "weight", TrainedRows(table.weight, tokens))


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers with adapters, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def trained_rows(model: nn.Module) -> dict[str, TrainedRows]:
    """The tables with trained rows, by the name of their layer."""
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, TrainedRows))
    return {name.partition(".parametrizations.")[0]: module for name, module in found}


def adapter_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The contents of PEFT's adapter_model.safetensors and adapter_config.json: the trained tensors, and how to use them."""
    layers = adapters(model)
    first = next(iter(layers.values()))
    rank = first.lora_A.out_features
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A.weight.detach()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B.weight.detach()
    rows = trained_rows(model)
    tensors |= {f"{PREFIX}{name}{ROWS}": module.lora_rows.detach() for name, module in rows.items()}
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": first.scale * rank,
        "lora_dropout": 0.0,
        "target_modules": sorted({_last(name) for name in layers}),
        "trainable_token_indices": {name: module.tokens.tolist() for name, module in rows.items()} or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "base_model_name_or_path": None,
        "task_type": None,
    }
    return tensors, config


def expected(weights: Mapping[str, Tensor], names: Iterable[str], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The adapters that `config` describes for these weights, for the layers in `names`: tensors on the meta device."""
    found = {}
    for layer in sorted({name.rpartition(".lora_")[0] for name in names if not name.endswith(ROWS)}):
        weight = weights.get(f"{layer.removeprefix(PREFIX)}.weight")
        if weight is not None and weight.ndim == 2:
            found[f"{layer}.lora_A.weight"] = torch.empty(config["r"], weight.size(1), device="meta")
            found[f"{layer}.lora_B.weight"] = torch.empty(weight.size(0), config["r"], device="meta")
    for layer, tokens in (config.get("trainable_token_indices") or {}).items():
        weight = weights.get(f"{layer}.weight")
        if weight is not None and weight.ndim == 2 and max(tokens, default=0) < len(weight):
            found[f"{PREFIX}{layer}{ROWS}"] = torch.empty(len(tokens), weight.size(1), device="meta")
    return found


def load_adapters(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load saved adapters, of the same names and shapes, into a model with adapters."""
    for name, tensor in adapter_state(model)[0].items():
        local(tensor).copy_(part_for(tensors[name], tensor))


def merged(weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a model with adapters added, W + (alpha / rank) B A, and with the trained rows in their places.

    Raises ValueError if they belong to a model of another shape, KeyError if config lacks r or lora_alpha.
    """
    scale = config["lora_alpha"] / config["r"]
    result = dict(weights)
    for layer, tokens in (config.get("trainable_token_indices") or {}).items():
        table, rows = result.get(f"{layer}.weight"), tensors.get(f"{PREFIX}{layer}{ROWS}")
        if table is None or rows is None or rows.shape != (len(tokens), table.size(1)) or max(tokens, default=0) >= len(table):
            raise ValueError(f"{layer}.weight: no such rows in the base, or of another shape")
        result[f"{layer}.weight"] = table.index_copy(0, torch.tensor(tokens), rows.to(table.dtype))
    for name in {key.rpartition(".lora_")[0] for key in tensors if not key.endswith(ROWS)}:
        target = f"{name.removeprefix(PREFIX)}.weight"
        a, b = tensors.get(f"{name}.lora_A.weight"), tensors.get(f"{name}.lora_B.weight")
        if a is None or b is None or target not in weights or weights[target].shape != (b.size(0), a.size(1)):
            raise ValueError(f"{target}: no such weight in the base, or of another shape")
        result[target] = result[target] + scale * (b @ a)
    return result
