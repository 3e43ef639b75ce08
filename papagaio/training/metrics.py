"""What a run says while it trains: metrics.jsonl, a progress bar or plain lines, Weights & Biases on wish."""

import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any, Self

from tqdm import tqdm

from papagaio.training.options import RunOptions


class RunLog:
    """Writes a line a call into out_dir/metrics.jsonl and shows it; a resumed run goes on after `lines` of them.

    On a terminal there is a tqdm bar with speed and time left, elsewhere plain lines on standard error. What a full disk does
    not take is kept and written with a later line.
    """

    def __init__(self, config: RunOptions, start_step: int, lines: int) -> None:
        self.path = config.out_dir / "metrics.jsonl"
        kept = read_metrics(self.path)[:lines]
        self.elapsed_before = kept[-1]["elapsed_seconds"] if kept else 0.0
        self.lines = len(kept)
        self.file = self.path.open("ab+")
        self.file.seek(0)
        self.file.truncate(sum(len(self.file.readline()) for _ in kept))  # what follows is of steps to be done again
        self.started = time.perf_counter()
        self.interactive = sys.stderr.isatty()
        self.bar = tqdm(total=config.max_steps, initial=start_step, unit="step", disable=not self.interactive, dynamic_ncols=True)
        self.wandb = _start_wandb(config) if config.wandb != "off" else None

    @property
    def elapsed_seconds(self) -> float:
        """Seconds since the run began, those before a resume included."""
        return self.elapsed_before + time.perf_counter() - self.started

    def log(self, step: int, tokens: int, **values: float) -> None:
        """One line: step, tokens trained on so far, seconds, and what was measured."""
        line = {"step": step, "tokens": tokens, "elapsed_seconds": round(self.elapsed_seconds, 3), **values}
        self.file.write(json.dumps(line).encode() + b"\n")
        self.lines += 1
        try:
            self.file.flush()
        except OSError as error:
            self.say(f"warning: {self.path.name} could not be written: {error.strerror}; the line is kept for later")
        if self.wandb is not None:
            self.wandb.log({key: value for key, value in line.items() if key != "step"}, step=step)
        if self.interactive and "train_loss" in values:
            self.bar.set_postfix(loss=f"{values['train_loss']:.4f}", tokens_per_s=f"{values['tokens_per_second']:,.0f}")
        else:
            self.say(f"step {step:,}/{self.bar.total:,} " + " ".join(f"{key} {value:.5g}" for key, value in values.items()))

    def advance(self) -> None:
        """A step is done."""
        self.bar.update()

    def say(self, text: str) -> None:
        """Show text without disturbing the bar."""
        tqdm.write(text, file=sys.stderr)

    def sync(self) -> None:
        """Wait until the lines are on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        try:
            self.file.close()
        except OSError as error:
            self.say(f"warning: the last lines of {self.path.name} are lost: {error.strerror}")
        if self.wandb is not None:
            self.wandb.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; none where there is no file. A last line that a crash cut short is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


# What Weights & Biases is told: numbers and choices. Never a path, a name, or anything of the machine or its environment.
TOLD = (
    *("preset", "n_layer", "n_head", "n_kv_head", "n_embd", "block_size", "dropout", "depth", "budget", "document_mask"),
    *("start_at_documents", "max_steps", "batch_size", "micro_batch_size", "optimizer", "learning_rate", "min_learning_rate"),
    *("embedding_learning_rate", "head_learning_rate", "muon_momentum", "schedule", "decay_fraction", "warmup_steps"),
    *("weight_decay", "beta1", "beta2", "grad_clip", "seed", "log_interval", "eval_interval", "eval_tokens", "patience"),
    *("checkpoint_interval", "keep", "dtype", "compile", "activation_checkpointing", "on_nonfinite", "on_spike"),
    *("val_fraction", "train_on", "too_long", "keep_duplicates", "packing", "replay", "replay_weight", "lora_rank"),
    *("lora_alpha", "lora_dropout", "freeze_layers", "freeze_embeddings", "dpo_beta"),
)


def _start_wandb(config: RunOptions) -> ModuleType:
    import wandb

    wandb.init(
        project=config.wandb_project,
        mode=config.wandb,
        dir=config.out_dir,
        config=config.model_dump(mode="json", include=set(TOLD)),
        settings=wandb.Settings(
            console="off", disable_git=True, save_code=False, x_disable_meta=True, x_disable_machine_info=True
        ),
    )
    return wandb
