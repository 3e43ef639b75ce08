"""Options that pretraining and fine-tuning share."""

from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from papagaio.options import Options, option


class RunOptions(Options):
    """What pretraining and fine-tuning share: everything that `train.fit` reads. Intervals are in optimizer steps."""

    out_dir: Path = option(..., "directory of the run: config.toml, metrics.jsonl, loss.png, checkpoints/")
    max_steps: int = option(1000, "optimizer steps of the run (0: only save the initial weights)", ge=0)
    batch_size: int = option(32, "sequences of one optimizer step over all devices", ge=1)
    micro_batch_size: int | None = option(
        None, "sequences of one forward pass of one device; accumulation follows (default: batch_size)", ge=1
    )
    optimizer: Literal["muon", "adamw"] = option("muon", "muon: Muon for hidden matrices, AdamW for the rest; or adamw for all")
    learning_rate: float = option(0.03, "peak learning rate (with muon: of the hidden matrices)", ge=0)
    min_learning_rate: float = option(0.0, "learning rate at the last step; other groups shrink in proportion", ge=0)
    embedding_learning_rate: float = option(
        0.17, "muon only: peak AdamW learning rate of the tables at 384 channels; times sqrt(384 / n_embd) at others", ge=0
    )
    head_learning_rate: float = option(0.0115, "muon only: the same of the head, norms and biases", ge=0)
    muon_momentum: float = option(0.9, "muon only: decay of the mean of past gradients", ge=0, lt=1)
    schedule: Literal["cosine", "linear"] = option(
        "linear", "decay to min_learning_rate after the warm-up: cosine, or constant and then linear"
    )
    decay_fraction: float = option(0.6, "linear schedule: the last part of the run in which the rate falls", ge=0, le=1)
    warmup_steps: int = option(0, "steps over which the learning rate rises linearly from 0", ge=0)
    weight_decay: float = option(0.0, "decoupled weight decay, on matrices only", ge=0)
    beta1: float = option(0.8, "AdamW: decay of the first moment", ge=0, lt=1)
    beta2: float = option(0.95, "AdamW: decay of the second moment", ge=0, lt=1)
    grad_clip: float = option(0.0, "largest global norm of the gradient (0: off)", ge=0)
    seed: int = option(1337, "of initial weights, order of the data, dropout and sampling", ge=0, lt=2**63)
    log_interval: int = option(10, "steps between training lines in metrics.jsonl", ge=1)
    eval_interval: int = option(250, "steps between evaluations; also before the first and after the last step", ge=1)
    eval_tokens: int = option(
        0, "tokens of the validation split, always the same ones, spread over it (0: the whole split)", ge=0
    )
    patience: int = option(0, "stop after so many evaluations in a row without a lower validation loss (0: never)", ge=0)
    sample_tokens: int = option(48, "longest text shown at each evaluation, in tokens (0: off)", ge=0)
    checkpoint_interval: int = option(
        1000, "steps between checkpoints; also before each evaluation and at the end (0: only there)", ge=0
    )
    keep: int = option(2, "newest checkpoints that are kept, beside the best", ge=1)
    on_nonfinite: str = option(
        "stop",
        "a loss or gradient that is not finite: stop before it changes the weights, or skip:N, leave out up to N steps in a row",
        pattern=r"^(stop|skip:[1-9]\d*)$",
    )
    on_spike: Literal["report", "skip"] = option(
        "report", "a loss over 6 sigma above the mean of the last 128 steps: report it, or leave the step out as well"
    )
    auto_microbatch: bool = option(False, "out of memory: halve micro_batch_size and go on; the optimizer step stays the same")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "of matrix products; auto: bfloat16 where the hardware computes it, float16 on other GPUs"
    )
    compile: bool = option(False, "compile the model with torch.compile (worth it from minutes of training on)")
    activation_checkpointing: bool = option(
        False, "keep less for the gradient and compute it again: less memory, a third more time"
    )
    resume: bool = option(False, "continue the run in out_dir from its last checkpoint")
    overwrite: bool = option(False, "replace the run in out_dir")
    wandb: Literal["off", "offline", "online"] = option("off", "log to Weights & Biases as well")
    wandb_project: str = option("papagaio", "name of the Weights & Biases project")
    dry_run: bool = option(False, "print parameters, memory, FLOPs, epochs and time, and stop")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.batch_size % (self.micro_batch_size or self.batch_size):
            raise ValueError(f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(f"min_learning_rate {self.min_learning_rate} is above learning_rate {self.learning_rate}")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other")
        return self
