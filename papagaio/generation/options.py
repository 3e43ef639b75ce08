"""Options of generation: where the model is, and how the next token is drawn."""

from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from papagaio.options import Options, option


class SamplingOptions(Options):
    """How the next token is drawn; shared by sample.py and chat.py."""

    checkpoint: Path = option(..., "a run (its last checkpoint is taken), or a checkpoint directory")
    base: Path | None = option(None, "the checkpoint that adapters (LoRA) belong to, where it has moved since")
    max_new_tokens: int = option(256, "longest completion, in tokens", ge=1)
    min_new_tokens: int = option(0, "tokens before which the completion neither ends nor stops", ge=0)
    temperature: float = option(0.8, "divides the logits: 0 is greedy, 1 the model's own distribution", ge=0)
    top_k: int = option(0, "keep the k most probable tokens (0: off)", ge=0)
    top_p: float = option(1.0, "keep the most probable tokens that together reach this probability (1: off)", gt=0, le=1)
    min_p: float = option(0.0, "keep tokens at least this fraction as probable as the best one (0: off)", ge=0, le=1)
    repetition_penalty: float = option(
        1.0, "divide positive logits of tokens already there, multiply negative ones (1: off)", gt=0
    )
    frequency_penalty: float = option(0.0, "take from a token's logit for each time that it was drawn (0: off)")
    logit_bias: tuple[str, ...] = option((), "ID=VALUE: add to the logit of the token with this id")
    banned_tokens: tuple[int, ...] = option((), "ids that are never drawn")
    forced_tokens: tuple[int, ...] = option((), "ids that the completion begins with")
    stop: tuple[str, ...] = option((), "texts before which the completion ends")
    seed: int = option(1337, "of the draw: the same seed gives the same text", ge=0, lt=2**63)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "of matrix products; auto: bfloat16 where the hardware computes it"
    )

    quantize: Literal["none", "int8"] = option("none", "weights of 8 bits, a scale a row: half of bfloat16's memory")
    compile: bool = option(False, "compile the step of a token: up to half a minute at first; for large models and long texts")

    @property
    def biases(self) -> dict[int, float]:
        """logit_bias by id."""
        pairs = (word.split("=") for word in self.logit_bias)
        return {int(token): float(value) for token, value in pairs}

    @model_validator(mode="after")
    def _together(self) -> Self:
        try:
            finite = all(abs(value) < float("inf") for value in self.biases.values())
        except ValueError:
            finite = False
        if not finite:
            raise ValueError(f"logit_bias {' '.join(self.logit_bias)}: must be written ID=VALUE, as in 50256=-5")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens {self.min_new_tokens} is above max_new_tokens {self.max_new_tokens}")
        return self
