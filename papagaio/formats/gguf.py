"""GGUF files, as llama.cpp and Ollama run them: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

The `gguf` package of llama.cpp's authors reads, writes and (de)quantises; the names of metadata keys are in that document.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from papagaio.errors import UserError
from papagaio.formats.configs import FAMILIES, family_of, without_defaults
from papagaio.formats.names import Names
from papagaio.formats.release import Release
from papagaio.formats.vocabulary import Vocabulary, huggingface_json, jinja_of, released, vocabulary
from papagaio.released_tokenizer import ReleasedTokenizer
from papagaio.tokenizer import Tokenizer

CURE = "take the whole file again from where it was made"
FACTORS = "rope_freqs.weight"  # divisors of the rotary frequencies: Llama 3.1's scaling
# GGUF's architecture: our family, whether rotary pairs are neighbours, and fields of GPTConfig beside the family's.
ARCHITECTURES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "gpt2": ("gpt2", False, {}),
    "llama": ("llama", True, {}),
    "qwen2": ("llama", False, {"qkv_bias": True}),
    "qwen3": ("llama", False, {"qk_norm_affine": True}),
}
# GGUF's key after the architecture's name, and GPTConfig's field: used in both directions.
KEYS = {
    "context_length": "block_size",
    "embedding_length": "n_embd",
    "block_count": "n_layer",
    "feed_forward_length": "mlp_hidden",
    "attention.head_count": "n_head",
    "attention.head_count_kv": "n_kv_head",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "norm_eps",
    "rope.freq_base": "rope_theta",
}
# llama.cpp computes with these in float32.
FLOAT32 = ("position_embd.weight",)


def require_gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise UserError("GGUF files need the gguf package: pip install gguf") from None
    return gguf


class GgufFile:
    """The metadata and tensors of a GGUF file, memory-mapped. Tensors are dequantised when they are read."""

    def __init__(self, path: Path) -> None:
        """Raises UserError if the file is missing, cut short or damaged."""
        gguf = require_gguf()
        self.path = path
        if not path.is_file():
            raise UserError(f"{path}: no such file; a model in GGUF is needed")
        try:
            reader = gguf.GGUFReader(path)
            self.tensors = {tensor.name: tensor for tensor in reader.tensors}
            self.metadata = {name: field.contents() for name, field in reader.fields.items()}
        except Exception as error:  # the package checks little: whatever a damaged file leads to
            raise UserError(f"{path}: not a whole GGUF file ({type(error).__name__}: {error}); {CURE}") from None

    def shape(self, name: str) -> list[int]:
        return [int(size) for size in reversed(self.tensors[name].shape)]

    def read(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        try:
            array = require_gguf().dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise UserError(
                f"{self.path}: {name} is of the type {tensor.tensor_type.name}, which gguf cannot read: {error}"
            ) from None
        return torch.from_numpy(np.array(array, np.float32)).view(self.shape(name))

    def get(self, key: str, kind: type = int, default: Any = None) -> Any:
        """A value of the metadata. Raises UserError if it is missing and has no default, or is not of this kind."""
        value = self.metadata.get(key, default)
        if value is None and default is None:
            raise UserError(f"{self.path}: lacks {key}, which is needed to run it; {CURE}")
        if type(value) is not kind:
            raise UserError(f"{self.path}: {key} is {str(value)[:40]!r} and not of the type {kind.__name__}; {CURE}")
        return value


def open_release(path: Path) -> Release:
    """A model in GGUF. Raises UserError, which names what cannot be taken over."""
    file = GgufFile(path)
    name = file.get("general.architecture", str)
    if name not in ARCHITECTURES:
        raise UserError(f"{path}: the architecture {name} has no counterpart; known are {', '.join(ARCHITECTURES)}")
    family, interleaved, more = ARCHITECTURES[name]
    fields = _fields(file, name, family) | more
    tensors = set(file.tensors) - {FACTORS}
    if (
        family == "gpt2"
        and "output.weight" in tensors
        and torch.equal(file.read("output.weight"), file.read("token_embd.weight"))
    ):
        tensors.remove("output.weight")
    fields["tie_embeddings"] = "output.weight" not in tensors
    kinds = sorted({file.tensors[each].tensor_type.name for each in tensors} - {"F32", "F16", "BF16"})
    if kinds:
        print(f"{path}: quantised weights ({', '.join(kinds)}): they are taken as they are, rounded", file=sys.stderr)
    tokenizer = _tokenizer(file, fields["vocab_size"])
    answers = bool(tokenizer.chat) and "tokenizer.chat_template" in file.metadata
    state = {"architecture": name, "quantised": ", ".join(kinds), "base_license": file.metadata.get("general.license")}
    return Release(
        path / "metadata", "gguf", family, interleaved, fields, tokenizer, answers, tensors, file.shape, file.read, state
    )


def _fields(file: GgufFile, name: str, family: str) -> dict[str, Any]:
    """GPTConfig's fields, beside the architecture's own."""
    sizes = dict.fromkeys(("n_kv_head", "head_dim"))  # files without these keys have the usual ones
    fields = FAMILIES[family] | sizes | {"qkv_bias": False, "qk_norm_affine": False, "zero_init": False}
    if "token_embd.weight" not in file.tensors or len(file.shape("token_embd.weight")) != 2:
        raise UserError(f"{file.path}: lacks token_embd.weight, the table of embeddings; {CURE}")
    fields["vocab_size"] = file.shape("token_embd.weight")[0]
    optional = {"attention.head_count_kv", "attention.key_length", "rope.freq_base"}
    for key, ours in KEYS.items():
        whole = f"{name}.{key}"
        if key.startswith(("attention.layer_norm_rms", "rope.")):
            if family != "gpt2":
                value = file.get(whole, float, 10000.0 if key in optional else None)
                fields[ours] = float(f"{value:.7g}")  # it was rounded to float32
        elif key not in optional or whole in file.metadata:
            fields[ours] = file.get(whole)
    fields = without_defaults(fields)
    head_size = fields["head_dim"] or fields["n_embd"] // max(1, fields["n_head"])
    if family == "gpt2":
        if abs(file.get(f"{name}.attention.layer_norm_epsilon", float) - 1e-5) > 1e-9:
            raise UserError(f"{file.path}: {name}.attention.layer_norm_epsilon must be 1e-05, which model.py has")
        return fields
    rotated = file.metadata.get(f"{name}.rope.dimension_count", head_size)
    if rotated != head_size:
        raise UserError(f"{file.path}: rotary positions for {rotated} channels of a head have no counterpart; all of them have")
    for key, plain in (("rope.scaling.type", "none"), ("expert_count", 0), ("attention.sliding_window", 0)):
        if (value := file.metadata.get(f"{name}.{key}", plain)) != plain:
            raise UserError(f"{file.path}: {name}.{key} is {value}, which model.py cannot compute")
    return fields | (_scaling(file, fields) if FACTORS in file.tensors else {})


def _scaling(file: GgufFile, fields: dict[str, Any]) -> dict[str, Any]:
    """rope_scaling and rope_context that give the factors in the file."""
    factors = file.read(FACTORS).flatten()
    size, scaling = 2 * len(factors), float(factors.max())
    frequencies = fields["rope_theta"] ** -(torch.arange(0, size, 2) / size)
    between = (factors > 1.001) & (factors < 0.999 * scaling)  # from one of these the context follows
    kept = (1 / factors[between] - 1 / scaling) / (1 - 1 / scaling)
    contexts = (2 * torch.pi * (1 + 3 * kept) / frequencies[between]).round().tolist() or [8192.0]
    found = {"rope_scaling": scaling, "rope_context": int(contexts[0])}
    if contexts[0] >= 1 and torch.allclose(rope_factors(frequencies, **found), factors, rtol=1e-5):
        return found
    raise UserError(f"{file.path}: {FACTORS} is not Llama 3.1's scaling, the only one that has a counterpart")


def rope_factors(frequencies: Tensor, rope_scaling: float, rope_context: int) -> Tensor:
    """The divisors (D / 2,) of rotary frequencies that model.py's rope_scaling amounts to."""
    kept = ((frequencies * rope_context / (2 * torch.pi) - 1) / 3).clamp(0, 1)
    return 1 / (kept + (1 - kept) / rope_scaling)


def _tokenizer(file: GgufFile, vocab_size: int) -> ReleasedTokenizer:
    """The tokenizer in the metadata, with the ids that llama.cpp gives."""
    model = file.get("tokenizer.ggml.model", str)
    if model != "gpt2":
        raise UserError(
            f"{file.path}: tokenizer.ggml.model is {model}; only byte-level BPE (gpt2) can be taken over: use from-hf"
        )
    tokens, merges = file.get("tokenizer.ggml.tokens", list), file.get("tokenizer.ggml.merges", list, [])
    types = file.get("tokenizer.ggml.token_type", list, [1] * len(tokens))
    pre = file.get("tokenizer.ggml.pre", str, "gpt-2")
    if len(types) != len(tokens) or len(tokens) != vocab_size or not all(isinstance(token, str) for token in tokens):
        raise UserError(f"{file.path}: {len(tokens):,} tokens, {len(types):,} types of tokens and a table of {vocab_size:,} rows")
    unused = [token for token, kind in zip(tokens, types, strict=True) if kind == 5]
    variables = {}
    for key in ("bos", "eos"):
        token = file.metadata.get(f"tokenizer.ggml.{key}_token_id", -1)
        variables[f"{key}_token"] = tokens[token] if 0 <= token < len(tokens) else ""
    adds = file.metadata.get("tokenizer.ggml.add_bos_token", pre.startswith("llama"))
    start = file.metadata.get("tokenizer.ggml.bos_token_id") if adds else None
    ends = [
        file.metadata[f"tokenizer.ggml.{key}_token_id"]
        for key in ("eos", "eot")
        if f"tokenizer.ggml.{key}_token_id" in file.metadata
    ]
    try:
        whole = Vocabulary(tokens, types, merges, pre)
        if unused:
            print(f"{file.path}: {len(unused)} rows of the table belong to no token", file=sys.stderr)
        return released(huggingface_json(whole), vocab_size, start, ends, file.metadata.get("tokenizer.chat_template"), variables)
    except UserError as error:
        raise UserError(f"{file.path}: {error}") from None


def write_gguf(
    path: Path,
    make_names: Callable[[str, bool], Names],
    read: Callable[[str], Tensor],
    fields: dict[str, Any],
    tokenizer: Tokenizer,
    answers: bool,
    kind: str,
) -> None:
    """Write a model; `make_names(family, interleaved)` gives its names, `read` its parameters by our names.

    `kind` is f32, f16, bf16 or q8_0; vectors stay in float32, and so do matrices whose rows do not fit into blocks of q8_0.
    Raises UserError if llama.cpp has no counterpart.
    """
    gguf = require_gguf()
    family = family_of(fields)
    if family == "nanochat":
        raise UserError("llama.cpp does not run the preset modern (NanoChat); train with --preset llama, or use to-hf")
    more = {key: fields[key] for key in ("qkv_bias", "qk_norm_affine")}
    name = next(n for n, (f, _, own) in ARCHITECTURES.items() if f == family and more == {**dict.fromkeys(more, False), **own})
    names, types = make_names(family, ARCHITECTURES[name][1]), gguf.GGMLQuantizationType
    words = vocabulary(tokenizer)
    sizes = fields | {
        "mlp_hidden": names.shapes["blocks.0.mlp.fc.weight"][0],
        "n_kv_head": fields["n_kv_head"] or fields["n_head"],
        "head_dim": names.head_size,
    }
    writer = gguf.GGUFWriter(path, name)
    writer.add_name(path.stem)
    file_types = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(gguf.LlamaFileType[file_types[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, ours in KEYS.items():
        if ours == "head_dim":
            if family != "gpt2":
                writer.add_key_length(sizes[ours])
                writer.add_value_length(sizes[ours])
                writer.add_rope_dimension_count(sizes[ours])
        elif family != "gpt2" or ours not in ("norm_eps", "rope_theta", "n_kv_head"):
            add = writer.add_float32 if ours in ("norm_eps", "rope_theta") else writer.add_uint32
            add(f"{name}.{key}", sizes[ours])
    if family == "gpt2":
        writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(len(words.tokens))
    _write_vocabulary(writer, words, tokenizer, answers)

    half = {"f32": types.F32, "f16": types.F16, "bf16": types.BF16, "q8_0": types.Q8_0}[kind]
    plans, unfit = {}, []
    for theirs in names.parts:
        shape = names.shape(theirs)
        chosen = types.F32 if len(shape) == 1 or theirs in FLOAT32 else half
        if chosen == types.Q8_0 and shape[-1] % 32:
            chosen = types.F32
            unfit.append(theirs)
        plans[theirs] = chosen
    if unfit:
        print(
            f"{len(unfit)} matrices have rows that are no multiple of 32 and stay in float32, such as {unfit[0]}", file=sys.stderr
        )

    def array(theirs: str) -> Any:
        return gguf.quantize(names.to_theirs(theirs, read).float().numpy(), plans[theirs])

    for theirs, chosen in plans.items():
        shape = names.shape(theirs)
        block, size = gguf.GGML_QUANT_SIZES[chosen]
        stored = (*shape[:-1], shape[-1] // block * size)  # quantised rows are bytes
        quantised = chosen not in (types.F32, types.F16)
        n_bytes = int(np.prod(shape)) // block * size
        dtype = np.dtype(np.float32 if chosen == types.F32 else np.float16)
        writer.add_tensor_info(
            theirs, stored if quantised else shape, np.dtype(np.uint8) if quantised else dtype, n_bytes, chosen
        )
    factors = None
    if fields["rope_scaling"] != 1:
        frequencies = fields["rope_theta"] ** -(torch.arange(0, names.head_size, 2) / names.head_size)
        factors = rope_factors(frequencies, fields["rope_scaling"], fields["rope_context"]).numpy()
        writer.add_tensor_info(FACTORS, factors.shape, factors.dtype, factors.nbytes, types.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for theirs in plans:
        writer.write_tensor_data(array(theirs))
    if factors is not None:
        writer.write_tensor_data(factors)
    writer.close()


def _write_vocabulary(writer: Any, words: Vocabulary, tokenizer: Tokenizer, answers: bool) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    writer.add_token_merges(words.merges)
    taken = isinstance(tokenizer, ReleasedTokenizer)
    writer.add_bos_token_id(tokenizer.start)
    writer.add_eos_token_id(tokenizer.answer_end if answers else min(tokenizer.ends) if taken else tokenizer.start)
    # Our own models saw it before every document; a released one says so in its tokenizer.json.
    starts = json.loads(tokenizer.text).get("post_processor") is not None if taken else True
    writer.add_add_bos_token(starts)
    jinja = tokenizer.chat["jinja"] if taken and tokenizer.chat else jinja_of(tokenizer.template) if tokenizer.template else None
    if jinja and answers:
        writer.add_chat_template(jinja)


def modelfile(name: str, tokenizer: Tokenizer, answers: bool, context: int) -> str:
    """A Modelfile beside a GGUF file, for `ollama create NAME -f Modelfile`: the chat template in Go's syntax, and the end."""
    lines = [f"FROM ./{name}", f"PARAMETER num_ctx {context}", "PARAMETER temperature 0"]
    if not (answers and tokenizer.template):
        return "\n".join([*lines, 'TEMPLATE """{{ .Prompt }}"""']) + "\n"
    piece = {key: text.replace('"""', '\\"\\"\\"') for key, text in tokenizer.template.items()}
    role = (
        '{{ $before := "" }}{{ range .Messages }}'
        f'{{{{ if eq .Role "system" }}}}{piece.get(">system", "")}{{{{ else if eq .Role "user" }}}}'
        f'{{{{ if eq $before "" }}}}{piece[">user"]}{{{{ else if eq $before "system" }}}}{piece.get("system>user", "")}'
        f"{{{{ else }}}}{piece['assistant>user']}{{{{ end }}}}{{{{ else }}}}{piece['user>assistant']}{{{{ end }}}}"
        f"{{{{ .Content }}}}{{{{ $before = .Role }}}}{{{{ end }}}}{piece['user>assistant']}"
    )
    names = {token: name for name, token in tokenizer.special.items()}
    stops = [f'PARAMETER stop "{names[token]}"' for token in sorted(tokenizer.ends | {tokenizer.answer_end})]
    return "\n".join([*lines, *stops, f'TEMPLATE """{role}"""']) + "\n"
