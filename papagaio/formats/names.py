"""One table of names per family: model.py's parameters beside those of Hugging Face and of GGUF, used in both directions.

Each tensor of theirs is made of one or more of ours, by operations that lose nothing:

    rows      a table has rows for the vocabulary alone; ours is padded with zeros
    rotary    rows of queries and keys in another order, see `rotary_rows`
    join      GPT-2 keeps queries, keys and values in one tensor
    transpose Hugging Face's GPT-2 keeps its matrices as (in, out)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Format = Literal["huggingface", "gguf"]

# Ours, Hugging Face's, GGUF's; {} is the number of the block. GGUF has no NanoChat.
_LLAMA = """
embed.weight                  model.embed_tokens.weight                      token_embd.weight
norm.weight                   model.norm.weight                              output_norm.weight
head.weight                   lm_head.weight                                 output.weight
blocks.{}.norm_1.weight       model.layers.{}.input_layernorm.weight         blk.{}.attn_norm.weight
blocks.{}.attn.q.weight       model.layers.{}.self_attn.q_proj.weight        blk.{}.attn_q.weight
blocks.{}.attn.k.weight       model.layers.{}.self_attn.k_proj.weight        blk.{}.attn_k.weight
blocks.{}.attn.v.weight       model.layers.{}.self_attn.v_proj.weight        blk.{}.attn_v.weight
blocks.{}.attn.q.bias         model.layers.{}.self_attn.q_proj.bias          blk.{}.attn_q.bias
blocks.{}.attn.k.bias         model.layers.{}.self_attn.k_proj.bias          blk.{}.attn_k.bias
blocks.{}.attn.v.bias         model.layers.{}.self_attn.v_proj.bias          blk.{}.attn_v.bias
blocks.{}.attn.q_norm.weight  model.layers.{}.self_attn.q_norm.weight        blk.{}.attn_q_norm.weight
blocks.{}.attn.k_norm.weight  model.layers.{}.self_attn.k_norm.weight        blk.{}.attn_k_norm.weight
blocks.{}.attn.proj.weight    model.layers.{}.self_attn.o_proj.weight        blk.{}.attn_output.weight
blocks.{}.norm_2.weight       model.layers.{}.post_attention_layernorm.weight  blk.{}.ffn_norm.weight
blocks.{}.mlp.gate.weight     model.layers.{}.mlp.gate_proj.weight           blk.{}.ffn_gate.weight
blocks.{}.mlp.fc.weight       model.layers.{}.mlp.up_proj.weight             blk.{}.ffn_up.weight
blocks.{}.mlp.proj.weight     model.layers.{}.mlp.down_proj.weight           blk.{}.ffn_down.weight
"""
_NANOCHAT = """
embed.weight                  model.embed_tokens.weight                      -
head.weight                   lm_head.weight                                 -
blocks.{}.attn.q.weight       model.layers.{}.self_attn.q_proj.weight        -
blocks.{}.attn.k.weight       model.layers.{}.self_attn.k_proj.weight        -
blocks.{}.attn.v.weight       model.layers.{}.self_attn.v_proj.weight        -
blocks.{}.attn.proj.weight    model.layers.{}.self_attn.o_proj.weight        -
blocks.{}.mlp.fc.weight       model.layers.{}.mlp.fc1.weight                 -
blocks.{}.mlp.proj.weight     model.layers.{}.mlp.fc2.weight                 -
"""
# * stands for weight and bias.
_GPT2 = """
embed.weight                  transformer.wte.weight                         token_embd.weight
pos_embed.weight              transformer.wpe.weight                         position_embd.weight
norm.*                        transformer.ln_f.*                             output_norm.*
blocks.{}.norm_1.*            transformer.h.{}.ln_1.*                        blk.{}.attn_norm.*
blocks.{}.attn.q.*            transformer.h.{}.attn.c_attn.*                 blk.{}.attn_qkv.*
blocks.{}.attn.k.*            transformer.h.{}.attn.c_attn.*                 blk.{}.attn_qkv.*
blocks.{}.attn.v.*            transformer.h.{}.attn.c_attn.*                 blk.{}.attn_qkv.*
blocks.{}.attn.proj.*         transformer.h.{}.attn.c_proj.*                 blk.{}.attn_output.*
blocks.{}.norm_2.*            transformer.h.{}.ln_2.*                        blk.{}.ffn_norm.*
blocks.{}.mlp.fc.*            transformer.h.{}.mlp.c_fc.*                    blk.{}.ffn_up.*
blocks.{}.mlp.proj.*          transformer.h.{}.mlp.c_proj.*                  blk.{}.ffn_down.*
"""


def _read(table: str) -> dict[str, dict[Format, str]]:
    rows = [line.split() for line in table.strip().splitlines()]
    rows = [
        [word.replace("*", kind) for word in row]
        for row in rows
        for kind in ("weight", "bias")
        if "*" in row[0] or kind == "weight"
    ]
    return {ours: {"huggingface": theirs, "gguf": gguf} for ours, theirs, gguf in rows}


TABLES = {"llama": _read(_LLAMA), "nanochat": _read(_NANOCHAT), "gpt2": _read(_GPT2)}


@dataclass(frozen=True)
class Names:
    """The names of one model's tensors in another format. `shapes` are our parameters' (on any device, the meta device too)."""

    format: Format
    family: str  # gpt2, llama or nanochat
    interleaved: bool  # rotary pairs are neighbours: GGUF's architecture llama
    head_size: int
    vocab_size: int
    shapes: dict[str, torch.Size]

    def theirs(self, name: str) -> str:
        """Their name of our parameter."""
        block = next((part for part in name.split(".") if part.isdecimal()), "")
        return TABLES[self.family][name.replace(f".{block}.", ".{}.")][self.format].replace("{}", block)

    @property
    def parts(self) -> dict[str, list[str]]:
        """Each of their names, and our parameters that it is made of, in order."""
        found: dict[str, list[str]] = {}
        for name in self.shapes:
            found.setdefault(self.theirs(name), []).append(name)
        return found

    def shape(self, theirs: str) -> tuple[int, ...]:
        """The shape of one of their tensors."""
        shapes = [self._cut(name, torch.empty(self.shapes[name], device="meta")).shape for name in self.parts[theirs]]
        whole = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        return whole[::-1] if self._transposed(theirs) else whole

    def to_ours(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """Our parameter from their tensors, which `read` gives by name."""
        theirs = self.theirs(name)
        tensor = read(theirs).T if self._transposed(theirs) else read(theirs)
        start = 0
        for part in self.parts[theirs]:
            rows = self._rows(part)
            if part == name:
                tensor = tensor[start : start + rows]
                break
            start += rows
        if self._is_rotary(name):
            tensor = rotary_rows(tensor, self.head_size, self.interleaved)
        missing = self.shapes[name][0] - len(tensor)
        return torch.cat((tensor, tensor.new_zeros(missing, *tensor.shape[1:]))) if missing else tensor.contiguous()

    def to_theirs(self, theirs: str, ours: Callable[[str], Tensor]) -> Tensor:
        """Their tensor from our parameters, which `ours` gives by name."""
        tensors = []
        for name in self.parts[theirs]:
            tensor = self._cut(name, ours(name))
            tensors.append(rotary_rows(tensor, self.head_size, self.interleaved, back=True) if self._is_rotary(name) else tensor)
        tensor = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        return (tensor.T if self._transposed(theirs) else tensor).contiguous()

    def _rows(self, name: str) -> int:
        return self.vocab_size if name in ("embed.weight", "head.weight") else self.shapes[name][0]

    def _cut(self, name: str, tensor: Tensor) -> Tensor:
        return tensor[: self._rows(name)]

    def _is_rotary(self, name: str) -> bool:
        return self.family == "llama" and name.split(".")[-2] in ("q", "k", "q_norm", "k_norm")

    def _transposed(self, theirs: str) -> bool:
        return (
            self.family == "gpt2"
            and self.format == "huggingface"
            and theirs.rpartition(".")[0].rpartition(".")[2].startswith("c_")
            and theirs.endswith("weight")
        )


def rotary_rows(tensor: Tensor, head_size: int, interleaved: bool, back: bool = False) -> Tensor:
    """Rows (heads x D, ...) of queries or keys in the order that model.py's `rotate` needs; `back`: in theirs again.

    model.py turns the pair (x[i], x[i + D/2]) by the negative angle. Llama turns its pair (a, b) by the positive one: at i and
    i + D/2 in Hugging Face, at 2 i and 2 i + 1 in GGUF. Exchanging a and b turns the angle's sign around, (b, a) by the negative
    angle is (a, b) by the positive one, so only rows move, and no number changes.
    """
    if interleaved and not back:  # (a0, b0, a1, b1, ...) -> (b0, b1, ..., a0, a1, ...)
        return tensor.unflatten(0, (-1, head_size // 2, 2)).transpose(1, 2).flip(1).flatten(0, 2)
    halves = tensor.unflatten(0, (-1, 2, head_size // 2)).flip(1)
    return (halves.transpose(1, 2) if interleaved else halves).flatten(0, 2)
