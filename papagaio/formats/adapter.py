"""Adapters (LoRA) for PEFT on the exported base model."""

from pathlib import Path

import torch

from papagaio.errors import UserError
from papagaio.files import read_object, to_json
from papagaio.formats.names import Names, rotary_rows
from papagaio.runs.checkpoint import ADAPTERS, Checkpoint
from papagaio.runs.tensors import CURE, finite_tensors, write_tensors
from papagaio.training.lora import PREFIX


def write(directory: Path, checkpoint: Checkpoint, names: Names) -> None:
    """adapter_model.safetensors and adapter_config.json under the names of transformers' model. Raises UserError if the
    checkpoint has no adapters, or if transformers keeps several of our layers in one."""
    if checkpoint.weights.name != ADAPTERS:
        raise UserError(f"{checkpoint.path}: a whole model, no adapters (LoRA); leave --adapter out")
    if names.family == "gpt2":
        raise UserError("transformers keeps GPT-2's queries, keys and values in one layer, ours are three: leave --adapter out")
    tensors, config = finite_tensors(checkpoint.weights), read_object(checkpoint.path / "adapter_config.json", CURE)
    found = {}
    for name, tensor in tensors.items():
        layer, _, part = name.removeprefix(PREFIX).rpartition(".lora_")
        ours = f"{layer}.weight"
        if part == "B.weight":  # its rows are the weight's
            tensor = tensor[: names.vocab_size] if layer == "head" else tensor
            if layer.endswith((".q", ".k")) and names.family == "llama":
                tensor = rotary_rows(tensor, names.head_size, names.interleaved, back=True)
        found[f"{PREFIX}{names.theirs(ours).removesuffix('.weight')}.lora_{part}"] = tensor
    layout = {name: (tensor.shape, torch.float32) for name, tensor in found.items()}
    write_tensors(directory / ADAPTERS, layout, found.__getitem__, {"format": "pt"})
    targets = sorted({name.rpartition(".lora_")[0].rpartition(".")[2] for name in found})
    config |= {"target_modules": targets, "task_type": "CAUSAL_LM"}
    (directory / "adapter_config.json").write_text(to_json(config), encoding="utf-8")
