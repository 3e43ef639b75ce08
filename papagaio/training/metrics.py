"""What a run reports while it trains: metrics.jsonl, a progress bar or plain lines, and Weights & Biases if it is switched on."""

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from torch import nn
from tqdm import tqdm

from papagaio.files import write_whole
from papagaio.training.options import RunOptions
from papagaio.training.progress import Progress

WANDB_ID = "wandb_id"  # a small file in out_dir


def flops_per_token(model: nn.Module) -> int:
    """Floating-point operations to train a GPT on one token (PaLM, arXiv:2204.02311, appendix B): 6 per weight of the matrices
    and the head, and 12 H D per token attended to in each layer, T or the window. The causal half is not subtracted."""
    c, T = model.config, model.config.block_size
    matrices = sum(layer.weight.numel() for layer in model.blocks.modules() if isinstance(layer, nn.Linear))
    windows = sum(min(window or T, T) for window in c.windows)
    return 6 * (matrices + c.padded_vocab_size * c.n_embd) + 12 * c.n_head * c.head_size * windows


class RunLog:
    """Appends lines to out_dir/metrics.jsonl and shows them; a resumed run keeps the first progress.metrics_lines of them.

    On a terminal there is a bar, elsewhere lines on standard error. A line that a full disk refuses is written with a later one.
    Of several processes, one writes: that of the others writes to nowhere.
    """

    def __init__(self, config: RunOptions, progress: Progress, stage: str = "pretrain", writes: bool = True) -> None:
        self.stage, self.path = stage, config.out_dir / "metrics.jsonl" if writes else Path(os.devnull)
        kept = read_metrics(self.path)[: progress.metrics_lines]
        self.elapsed_before = kept[-1]["elapsed_seconds"] if kept else 0.0
        self.lines = len(kept)
        self.file = self.path.open("ab+")
        if writes:
            self.file.seek(0)
            self.file.truncate(sum(len(self.file.readline()) for _ in kept))  # the steps of the other lines are trained again
        self.started = self.measured_from = time.perf_counter()
        self.measured_tokens = 0
        self.interactive = sys.stderr.isatty()
        shown = {"unit": "step", "disable": not self.interactive, "dynamic_ncols": True}
        self.bar = tqdm(total=config.max_steps, initial=progress.step, **shown)
        self.wandb = _start_wandb(config, resumed=progress.step > 0) if writes and config.wandb != "off" else None

    def write(self, progress: Progress, **values: float) -> None:
        """One line: step, predicted tokens so far, seconds since the run began (earlier parts included), and these values."""
        seconds = self.elapsed_before + time.perf_counter() - self.started
        line = {"step": progress.step, "tokens": progress.tokens, "elapsed_seconds": round(seconds, 3), **values}
        self.file.write(json.dumps(line).encode() + b"\n")
        self.lines += 1
        try:
            self.file.flush()
        except OSError as error:
            self.say(f"warning: {self.path.name} could not be written: {error.strerror}; the line is kept for later")
        if self.wandb is not None:
            self.wandb.log({key: value for key, value in line.items() if key != "step"}, step=progress.step)
        if self.interactive and "train_loss" in values:
            self.bar.set_postfix(loss=f"{values['train_loss']:.4f}", tokens_per_s=f"{values['tokens_per_second']:,.0f}")
        else:
            shown = " ".join(f"{key} {value:.5g}" for key, value in values.items())
            self.say(f"step {progress.step:,}/{self.bar.total:,} {shown}")

    def write_evaluation(self, progress: Progress, text: str, epoch: float, **measured: float) -> bool:
        """The line of an evaluation, a warning of overfitting, and a text of the model; returns whether val_loss is the best."""
        self.write(progress, epoch=epoch, **measured)
        best = progress.note_evaluation(measured["val_loss"])
        if notice := progress.overfitting_notice(measured["val_loss"], epoch, self.stage):
            self.say(notice)
        if text:
            self.say("  | " + text.replace("\n", "\n  | "))
        return best

    def write_training(self, progress: Progress, flops_per_token: int, peak: float | None, **values: float) -> None:
        """The line of the steps since the one before: their losses, those of these values that are finite, tokens_per_second, and
        mfu if `peak`, the device's FLOP/s, is known."""
        losses = progress.close_line()
        speed = self.measured_tokens / (time.perf_counter() - self.measured_from)
        self.measured_from, self.measured_tokens = time.perf_counter(), 0
        values = {key: value for key, value in values.items() if math.isfinite(value)} | {"tokens_per_second": speed}
        if peak:
            values["mfu"] = speed * flops_per_token / peak
        self.write(progress, **losses, **values)

    def advance(self, tokens: int) -> None:
        """Count a step and the tokens that it computed, padding included."""
        self.bar.update()
        self.measured_tokens += tokens

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time inside does not count for tokens_per_second."""
        start = time.perf_counter()
        yield
        self.measured_from += time.perf_counter() - start

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
    """The lines of a metrics.jsonl; none if there is no file. A last line that a crash has cut short is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def _start_wandb(config: RunOptions, resumed: bool) -> Any:
    """The run at Weights & Biases, which has the name of out_dir. A resumed run goes on in the one whose id is in WANDB_ID."""
    import wandb

    path = config.out_dir / WANDB_ID
    known = {"id": path.read_text(encoding="utf-8").strip(), "resume": "allow"} if resumed and path.exists() else {}
    # Numbers and choices: never a path, or anything about the machine.
    values = config.model_dump(mode="json", include=set(config.by_resume("same", "free")))
    settings = wandb.Settings(console="off", disable_git=True, save_code=False, x_disable_meta=True, x_disable_machine_info=True)
    name = config.out_dir.resolve().name
    place = {"project": "papagaio", "name": name, "mode": config.wandb, "dir": config.out_dir}
    started = wandb.init(**place, **known, config=values, settings=settings)
    write_whole(path, f"{started.id}\n")
    return started
