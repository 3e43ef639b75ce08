"""Options that pretraining and fine-tuning share."""

from functools import partial
from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from papagaio.options import Options, option

run, batch = partial(option, group="Run"), partial(option, group="Length and batch")
optimization, measurement = partial(option, group="Optimizer"), partial(option, group="Measuring")
saving, safety, machine = partial(option, group="Checkpoints"), partial(option, group="Safety"), partial(option, group="Machine")


class RunOptions(Options):
    """Options that train.py and finetune.py share: all that the training loop reads. Intervals are in optimizer steps."""

    out_dir: Path = run(..., "directory of the run: config.toml, metrics.jsonl, loss.png, checkpoints/", resume="ignored")
    max_steps: int = run(1000, "optimizer steps of the run (0: only save the initial weights)", resume="free", ge=0)
    resume: bool = run(False, "continue the run in out_dir from its last checkpoint", resume="ignored")
    overwrite: bool = run(False, "replace the run in out_dir", resume="ignored")
    dry_run: bool = run(False, "print parameters, memory, FLOPs, epochs and time, and stop", resume="ignored")
    seed: int = run(1337, "of initial weights, order of the data, dropout and sampling", ge=0, lt=2**63)

    batch_size: int = batch(32, "sequences of one optimizer step over all devices", ge=1)
    micro_batch_size: int | None = batch(
        None, "sequences of one forward pass; gradients are accumulated (default: batch_size)", resume="free", ge=1
    )

    optimizer: Literal["muon", "adamw"] = optimization(
        "muon", "muon: Muon for hidden matrices, AdamW for the rest; or AdamW for all"
    )
    learning_rate: float = optimization(0.03, "peak learning rate (with muon: of the hidden matrices)", resume="free", ge=0)
    min_learning_rate: float = optimization(
        0.0, "learning rate at the last step; other parameters' rates shrink by the same factor", resume="free", ge=0
    )
    embedding_learning_rate: float = optimization(
        0.17, "muon only: peak rate of the embeddings at 384 channels; times sqrt(384 / n_embd) at others", resume="free", ge=0
    )
    head_learning_rate: float = optimization(0.0115, "muon only: the same for the head, norms and biases", resume="free", ge=0)
    schedule: Literal["cosine", "linear"] = optimization(
        "linear", "decay to min_learning_rate after the warm-up: cosine, or constant and then linear"
    )
    decay_fraction: float = optimization(0.6, "linear schedule: last part of the run, in which the rate falls", ge=0, le=1)
    warmup_steps: int = optimization(0, "steps over which the learning rate rises linearly from 0", ge=0)
    weight_decay: float = optimization(0.0, "decoupled weight decay, of matrices only", ge=0)
    beta1: float = optimization(0.8, "AdamW: decay of the first moment", ge=0, lt=1)
    beta2: float = optimization(0.95, "AdamW: decay of the second moment", ge=0, lt=1)
    grad_clip: float = optimization(0.0, "largest global norm of the gradient (0: no clipping)", resume="free", ge=0)

    eval_interval: int = measurement(
        250, "steps between evaluations; also before the first and after the last step", resume="free", ge=1
    )
    eval_tokens: int = measurement(131072, "validation tokens, always the same, spread over the split (0: all)", ge=0)
    sample_tokens: int = measurement(48, "longest text shown at each evaluation, in tokens (0: none)", resume="free", ge=0)
    log_interval: int = measurement(10, "steps between training lines in metrics.jsonl", resume="free", ge=1)
    patience: int = measurement(
        0, "stop after this many evaluations in a row without a lower validation loss (0: never)", resume="free", ge=0
    )
    wandb: Literal["off", "offline", "online"] = measurement("off", "log to Weights & Biases too", resume="free")

    checkpoint_interval: int = saving(
        1000, "steps between checkpoints; also before each evaluation and at the end (0: only there)", resume="free", ge=0
    )
    keep: int = saving(2, "number of newest checkpoints to keep, besides the best", resume="free", ge=1)

    on_nonfinite: str = safety(
        "stop",
        "a loss or gradient that is not finite: stop before it changes the weights, or skip:N, skip up to N steps in a row",
        resume="free",
        pattern=r"^(stop|skip:[1-9]\d*)$",
    )
    auto_microbatch: bool = safety(
        False, "if memory runs out, halve micro_batch_size and continue; the optimizer step stays the same", resume="free"
    )

    device: str = machine("auto", "auto, cpu, cuda, cuda:N or mps", resume="free", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = machine(
        "auto", "of matrix products; auto: bfloat16 if the hardware computes it, float16 on other GPUs", resume="free"
    )
    parallel: Literal["auto", "ddp", "fsdp"] = machine(
        "auto", "several processes (torchrun): ddp, each has the model; fsdp, it is divided; auto: ddp if it fits", resume="free"
    )
    compile: bool = machine(False, "use torch.compile (pays off after minutes of training)", resume="free")
    deterministic: bool = machine(
        False, "the same bits from run to run on a GPU too, which takes longer; on a CPU they are so anyway", resume="free"
    )
    activation_checkpointing: bool = machine(
        False, "recompute activations in the backward pass: less memory, a third more time", resume="free"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.batch_size % (self.micro_batch_size or self.batch_size):
            raise ValueError(f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(f"min_learning_rate {self.min_learning_rate} is above learning_rate {self.learning_rate}")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other")
        return self
