"""Options of generation: where the model is and how it computes, and how the next token is drawn."""

import re
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import model_validator

from papagaio.options import Options, option

model_option, sampling_option = partial(option, group="Model"), partial(option, group="Sampling")


# Below the first temperature the most probable token would be drawn anyway, and logits / temperature could overflow; above the
# second, so could the other way round.
GREEDY_BELOW, HIGHEST_TEMPERATURE = 1e-5, 1e6
LARGEST_BIAS = 10**9


class ModelOptions(Options):
    """Which model generates, and how it computes."""

    checkpoint: Path = model_option(..., "a run, whose last checkpoint is taken, or a checkpoint directory")
    base: Path | None = model_option(None, "the checkpoint that adapters (LoRA) were trained for, if it has moved since")
    device: str = model_option("auto", "auto, cpu, cuda, cuda:N or mps", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    dtype: Literal["auto", "float32", "bfloat16"] = model_option("auto", "of matrix products; auto: bfloat16 if in hardware")
    quantize: Literal["none", "int8"] = model_option("none", "int8: weights of 8 bits with a scale per row, on a CPU")
    compile: bool = model_option(False, "compile the step of one token (up to half a minute): for large models and long texts")


def temperature_option(default: float) -> Any:
    return sampling_option(
        default,
        "divides the logits; 0 (or below 1e-5): always the most probable token, 1: as trained",
        ge=0,
        le=HIGHEST_TEMPERATURE,
    )


class SamplingOptions(Options):
    """How the next token is drawn, and when a completion ends."""

    max_new_tokens: int = sampling_option(256, "longest completion, in tokens", ge=1)
    temperature: float = temperature_option(0.8)
    top_k: int = sampling_option(0, "keep the k most probable tokens (0: off)", ge=0)
    top_p: float = sampling_option(1.0, "keep the most probable tokens that together reach this probability (1: off)", gt=0, le=1)
    min_p: float = sampling_option(0.0, "keep tokens at least this fraction as probable as the best one (0: off)", ge=0, le=1)
    repetition_penalty: float = sampling_option(
        1.0, "divide positive logits of tokens that occurred, multiply negative ones (1: off)", gt=0
    )
    frequency_penalty: float = sampling_option(0.0, "subtract from a token's logit for each time that it was drawn (0: off)")
    presence_penalty: float = sampling_option(0.0, "subtract from a token's logit once it was drawn (0: off)")
    stop: tuple[str, ...] = sampling_option((), "texts before which the completion ends")
    seed: int = sampling_option(1337, "of the draws: the same seed gives the same text", ge=0, lt=2**63)
    logit_bias: tuple[str, ...] = sampling_option((), "ID=VALUE: add VALUE to the logit of the token ID; -1000 rules it out")

    @property
    def biases(self) -> dict[int, float]:
        """logit_bias as {id: value}."""
        return {int(token): float(value) for token, value in (word.split("=") for word in self.logit_bias)}

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature < GREEDY_BELOW

    def hints(self) -> list[str]:
        """What the user may have meant otherwise: `--stop '\\n'` is a backslash and an n."""
        names = {r"\n": "a line break", r"\t": "a tab", r"\r": "a carriage return"}
        return [
            f"--stop '{text}' is searched for literally; {meaning} is $'{escape}' in the shell, \"{escape}\" in a TOML file"
            for text in self.stop
            for escape, meaning in names.items()
            if escape in text
        ]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not all(re.fullmatch(r"-?\d+=[-+]?\d+(\.\d+)?", word) for word in self.logit_bias):
            raise ValueError(f"logit_bias {' '.join(self.logit_bias)}: must be written ID=VALUE, as in 50256=-5")
        if any(abs(value) > LARGEST_BIAS for value in self.biases.values()):
            raise ValueError(f"logit_bias {' '.join(self.logit_bias)}: a VALUE must not exceed {LARGEST_BIAS:,}")
        return self
