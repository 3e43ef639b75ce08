"""model.py's GPTConfig beside transformers' config.json, in both directions. What one of them cannot say is refused by name."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from papagaio.errors import UserError

# Hugging Face's key and ours: one table, used in both directions.
KEYS = {
    "gpt2": {
        "vocab_size": "vocab_size",
        "n_embd": "n_embd",
        "n_layer": "n_layer",
        "n_head": "n_head",
        "n_positions": "block_size",
        "n_inner": "mlp_hidden",
    },
    "llama": {
        "vocab_size": "vocab_size",
        "hidden_size": "n_embd",
        "intermediate_size": "mlp_hidden",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_kv_head",
        "head_dim": "head_dim",
        "max_position_embeddings": "block_size",
        "rms_norm_eps": "norm_eps",
        "tie_word_embeddings": "tie_embeddings",
    },
}
KEYS["nanochat"] = {key: ours for key, ours in KEYS["llama"].items() if ours != "head_dim"}
KEYS["nanochat"]["final_logit_softcapping"] = "logit_softcap"
# What transformers takes for a key that config.json lacks.
ABSENT: dict[str, Any] = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "final_logit_softcapping": 15.0}
OPTIONAL = {"n_inner", "num_key_value_heads", "head_dim"}

# The fields that make a family; the others are sizes, or have no part in what a trained model computes.
_PLAIN = {"window_pattern": "L", "smear": False, "bigram_rows": 0, "value_embed_interval": 0, "attention_scale": 1.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {
        **dict(position="learned", norm="layernorm", norm_affine=True, embed_norm=False, mlp="gelu", qk_norm=False, bias=True),
        **dict(tie_embeddings=True, logit_softcap=0.0, head_dim=None, n_kv_head=None, qk_norm_affine=False, qkv_bias=False),
    }
    | _PLAIN,
    "llama": {
        **dict(position="rope", norm="rmsnorm", norm_affine=True, embed_norm=False, mlp="swiglu", qk_norm=False, bias=False),
        **dict(logit_softcap=0.0),
    }
    | _PLAIN,
    "nanochat": {
        **dict(position="rope", norm="rmsnorm", norm_affine=False, embed_norm=True, mlp="relu2", qk_norm=True, bias=False),
        **dict(head_dim=None, qk_norm_affine=False, qkv_bias=False, tie_embeddings=False),
    }
    | _PLAIN,
}


class Architecture(NamedTuple):
    family: str
    model_type: str
    fields: dict[str, Any]  # of GPTConfig, beside the family's
    must: dict[str, tuple[Any, ...]]  # config.json's keys that may have these values, or be absent


_LLAMA = {"hidden_act": ("silu",), "mlp_bias": (False,), "rope_interleaved": (False,), "partial_rotary_factor": (1.0,)}
_NO_WINDOW = {"use_sliding_window": (False,)}
ARCHITECTURES = {
    "GPT2LMHeadModel": Architecture(
        *("gpt2", "gpt2", {}),
        {
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "layer_norm_epsilon": (1e-5,),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
            "tie_word_embeddings": (True,),
        },
    ),
    "LlamaForCausalLM": Architecture("llama", "llama", {}, _LLAMA | {"attention_bias": (False,)}),
    "MistralForCausalLM": Architecture("llama", "mistral", {}, _LLAMA | {"sliding_window": (None,)}),
    "Qwen2ForCausalLM": Architecture("llama", "qwen2", {"qkv_bias": True}, _LLAMA | _NO_WINDOW),
    "Qwen3ForCausalLM": Architecture(
        "llama", "qwen3", {"qk_norm_affine": True}, _LLAMA | _NO_WINDOW | {"attention_bias": (False,)}
    ),
    "NanoChatForCausalLM": Architecture("nanochat", "nanochat", {}, {"hidden_act": ("relu2",), "attention_bias": (False,)}),
}
# Keys without a part in what a trained model computes.
IGNORED = {
    *("architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache", "_name_or_path"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "initializer_range", "pretraining_tp", "is_llama_config"),
    *("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "reorder_and_upcast_attn", "n_ctx", "task_specific_params"),
    *("summary_type", "summary_use_proj", "summary_activation", "summary_first_dropout", "summary_proj_to_labels"),
    *("max_window_layers", "sliding_window", "transformers.js_config"),
}


def from_huggingface(config: Mapping[str, Any], place: str) -> tuple[str, dict[str, Any], list[str]]:
    """(family, GPTConfig's fields, keys that were not read) of a config.json. Raises UserError, which begins with `place`."""
    name = (config.get("architectures") or ["none"])[0]
    if name not in ARCHITECTURES:
        raise UserError(f"{place}: the architecture {name} has no counterpart; known are {', '.join(ARCHITECTURES)}")
    family, _, more, must = ARCHITECTURES[name]
    for key, values in must.items():
        if key in config and config[key] not in values and not (config[key] is None and values == (False,)):
            wanted = " or ".join(map(repr, values))
            raise UserError(f"{place}: {key} is {config[key]!r}, which model.py cannot compute; {wanted} would be right")
    if {*(config.get("layer_types") or [])} - {"full_attention"}:
        raise UserError(f"{place}: layer_types has layers without full attention, which model.py cannot compute")
    fields = FAMILIES[family] | {"qk_norm_affine": False, "qkv_bias": False, "zero_init": family == "nanochat"} | more
    for key, ours in KEYS[family].items():
        if config.get(key) is None and key not in OPTIONAL and key not in ABSENT:
            raise UserError(f"{place}: lacks {key}; a whole config.json of {name} has it")
        value = config.get(key, ABSENT.get(key))
        value = 0.0 if value is None and ours == "logit_softcap" else ABSENT.get(key) if value is None else value
        kinds = {"tie_embeddings": (bool,), "norm_eps": (float,), "logit_softcap": (float, int)}.get(ours, (int,))
        if type(value) not in kinds and not (value is None and key in OPTIONAL):
            raise UserError(f"{place}: {key} must be of the type {kinds[0].__name__}, not {value!r}")
        fields[ours] = value
    fields = without_defaults(fields)
    known = {*KEYS[family], *must, *IGNORED, "layer_types"}
    if family != "gpt2":
        fields |= _rotary(config, place)
        known |= {"rope_theta", "rope_scaling", "rope_parameters"}
    return family, fields, sorted(config.keys() - known)


def without_defaults(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with None for sizes that GPTConfig has by itself: equal models then have equal fields."""
    C, H = fields["n_embd"], fields["n_head"]
    usual = {"n_kv_head": H, "head_dim": C // H if H and C % H == 0 else None, "mlp_hidden": None}
    if fields["mlp"] != "swiglu":
        usual["mlp_hidden"] = 4 * C
    return fields | {name: None for name, size in usual.items() if fields.get(name) == size}


_ROPE = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _rotary(config: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The fields for rotary positions: of rope_parameters, or before transformers 5 of rope_theta and rope_scaling."""
    rope = (config.get("rope_scaling") or {}) | (config.get("rope_parameters") or {})
    numbers = {key: rope.get(key, config.get(key) if key == "rope_theta" else None) for key in _ROPE}
    if wrong := [key for key, value in numbers.items() if value is not None and type(value) not in (int, float)]:
        raise UserError(f"{place}: {wrong[0]} must be a number, not {numbers[wrong[0]]!r}")
    fields = {"rope_theta": float(numbers["rope_theta"] or 10000.0)}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "llama3" and None not in numbers.values() and (rope["low_freq_factor"], rope["high_freq_factor"]) == (1, 4):
        return fields | {"rope_scaling": float(rope["factor"]), "rope_context": int(rope["original_max_position_embeddings"])}
    if kind != "default":
        raise UserError(f"{place}: rope_scaling of the type {kind} has no counterpart; the default and Llama 3.1's have one")
    return fields


def family_of(fields: Mapping[str, Any]) -> str:
    """The family of a model with these fields. Raises UserError, which names what no family has."""
    fields = dict(fields) | ({"n_kv_head": None} if fields["n_kv_head"] == fields["n_head"] else {})
    differing = {family: [key for key, value in made_by.items() if fields[key] != value] for family, made_by in FAMILIES.items()}
    family = min(differing, key=lambda name: len(differing[name]))
    if differing[family]:
        found = ", ".join(f"{key} {fields[key]!r}" for key in differing[family])
        raise UserError(f"no released architecture has this model's {found}; the presets gpt2, modern and llama can be exported")
    if fields["qkv_bias"] and fields["qk_norm_affine"]:
        raise UserError("no released architecture has both qkv_bias and qk_norm_affine")
    return family


def to_huggingface(fields: Mapping[str, Any], mlp_hidden: int) -> dict[str, Any]:
    """config.json for a model with these fields; the token ids are added by the caller. Raises UserError, see `family_of`."""
    family = family_of(fields)
    more = {key: fields[key] for key in ("qkv_bias", "qk_norm_affine")}
    found = (
        name
        for name, known in ARCHITECTURES.items()
        if known.family == family and more == {**dict.fromkeys(more, False), **known.fields}
    )
    name = next(found)
    config = {"architectures": [name], "model_type": ARCHITECTURES[name].model_type}
    config |= {key: fields[ours] for key, ours in KEYS[family].items()}
    config |= {
        key: values[0]
        for key, values in ARCHITECTURES[name].must.items()
        if key not in ("rope_interleaved", "partial_rotary_factor")
    }
    config["n_inner" if family == "gpt2" else "intermediate_size"] = mlp_hidden
    if family == "gpt2":
        return config
    config["num_key_value_heads"] = fields["n_kv_head"] or fields["n_head"]
    if family == "llama":
        config["head_dim"] = fields["head_dim"] or fields["n_embd"] // fields["n_head"]
    if family == "nanochat":
        config["final_logit_softcapping"] = fields["logit_softcap"] or None
    rope = {"rope_type": "default"}
    if fields["rope_scaling"] != 1:
        context = {"original_max_position_embeddings": fields["rope_context"]}
        rope = {
            "rope_type": "llama3",
            "factor": fields["rope_scaling"],
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        } | context
    # Both spellings: transformers reads rope_parameters since version 5, other tools rope_theta and rope_scaling.
    both = {"rope_theta": fields["rope_theta"], "rope_parameters": rope | {"rope_theta": fields["rope_theta"]}}
    return config | both | ({"rope_scaling": rope} if len(rope) > 1 else {})
