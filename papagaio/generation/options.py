"""Options of generation: where the model is and how it computes, and how the next token is drawn."""

import re
from functools import partial
from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from papagaio.options import Options, option

model_option, sampling_option = partial(option, group="Model"), partial(option, group="Sampling")


class ModelOptions(Options):
    """Which model generates, and how it computes."""

    checkpoint: Path = model_option(..., "a run, whose last checkpoint is taken, or a checkpoint directory")
    base: Path | None = model_option(None, "the checkpoint that adapters (LoRA) were trained for, if it has moved since")
    device: str = model_option("auto", "auto, cpu, cuda, cuda:N or mps", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    dtype: Literal["auto", "float32", "bfloat16"] = model_option("auto", "of matrix products; auto: bfloat16 if in hardware")
    quantize: Literal["none", "int8"] = model_option("none", "int8: weights of 8 bits, with a scale per row of the matrix")
    compile: bool = model_option(False, "compile the step of one token (up to half a minute): for large models and long texts")


class SamplingOptions(Options):
    """How the next token is drawn, and when a completion ends."""

    max_new_tokens: int = sampling_option(256, "longest completion, in tokens", ge=1)
    temperature: float = sampling_option(0.8, "divides the logits; 0: always the most probable token, 1: as trained", ge=0)
    top_k: int = sampling_option(0, "keep the k most probable tokens (0: off)", ge=0)
    top_p: float = sampling_option(1.0, "keep the most probable tokens that together reach this probability (1: off)", gt=0, le=1)
    min_p: float = sampling_option(0.0, "keep tokens at least this fraction as probable as the best one (0: off)", ge=0, le=1)
    repetition_penalty: float = sampling_option(
        1.0, "divide positive logits of tokens that occurred, multiply negative ones (1: off)", gt=0
    )
    frequency_penalty: float = sampling_option(0.0, "subtract from a token's logit for each time that it was drawn (0: off)")
    stop: tuple[str, ...] = sampling_option((), "texts before which the completion ends")
    seed: int = sampling_option(1337, "of the draws: the same seed gives the same text", ge=0, lt=2**63)
    logit_bias: tuple[str, ...] = sampling_option((), "ID=VALUE: add VALUE to the logit of the token ID; -1000 rules it out")

    @property
    def biases(self) -> dict[int, float]:
        """logit_bias as {id: value}."""
        return {int(token): float(value) for token, value in (word.split("=") for word in self.logit_bias)}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not all(re.fullmatch(r"-?\d+=[-+]?\d+(\.\d+)?", word) for word in self.logit_bias):
            raise ValueError(f"logit_bias {' '.join(self.logit_bias)}: must be written ID=VALUE, as in 50256=-5")
        return self
