"""Options of generation: where the model is and how it computes, and how the next token is drawn."""

from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from papagaio.options import Options, option


class ModelOptions(Options):
    """Which model generates, and how it computes."""

    checkpoint: Path = option(..., "a run, whose last checkpoint is taken, or a checkpoint directory", group="Model")
    base: Path | None = option(None, "the checkpoint that adapters (LoRA) were trained for, if it has moved since", group="Model")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps", group="Model", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "of matrix products; auto: bfloat16 if the hardware computes it", group="Model"
    )
    quantize: Literal["none", "int8"] = option(
        "none", "int8: weights of 8 bits with a scale per row, half the memory of bfloat16", group="Model"
    )
    compile: bool = option(
        False, "compile the step of one token, which takes up to half a minute; for large models and long texts", group="Model"
    )


class SamplingOptions(Options):
    """How the next token is drawn, and when a completion ends."""

    max_new_tokens: int = option(256, "longest completion, in tokens", group="Sampling", ge=1)
    temperature: float = option(
        0.8, "divides the logits; 0: always the most probable token, 1: the model's own distribution", group="Sampling", ge=0
    )
    top_k: int = option(0, "keep the k most probable tokens (0: off)", group="Sampling", ge=0)
    top_p: float = option(
        1.0, "keep the most probable tokens that together reach this probability (1: off)", group="Sampling", gt=0, le=1
    )
    min_p: float = option(
        0.0, "keep tokens at least this fraction as probable as the best one (0: off)", group="Sampling", ge=0, le=1
    )
    repetition_penalty: float = option(
        1.0, "divide positive logits of tokens that occurred, multiply negative ones (1: off)", group="Sampling", gt=0
    )
    frequency_penalty: float = option(
        0.0, "subtract from a token's logit for each time that it was drawn (0: off)", group="Sampling"
    )
    stop: tuple[str, ...] = option((), "texts before which the completion ends", group="Sampling")
    seed: int = option(1337, "of the draws: the same seed gives the same text", group="Sampling", ge=0, lt=2**63)
    min_new_tokens: int = option(0, "tokens before which the completion does not end", group="Sampling", ge=0)
    logit_bias: tuple[str, ...] = option((), "ID=VALUE: add VALUE to the logit of the token ID", group="Sampling")
    banned_tokens: tuple[int, ...] = option((), "ids that are never drawn", group="Sampling")

    @property
    def biases(self) -> dict[int, float]:
        """logit_bias as {id: value}."""
        pairs = (word.split("=") for word in self.logit_bias)
        return {int(token): float(value) for token, value in pairs}

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            finite = all(abs(value) < float("inf") for value in self.biases.values())
        except ValueError:
            finite = False
        if not finite:
            raise ValueError(f"logit_bias {' '.join(self.logit_bias)}: must be written ID=VALUE, as in 50256=-5")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens {self.min_new_tokens} is above max_new_tokens {self.max_new_tokens}")
        return self
