"""What a run says while it trains: metrics.jsonl, a progress bar or plain lines, Weights & Biases on wish."""

import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any, Self

from tqdm import tqdm

from papagaio.config import RunOptions


class RunLog:
    """Writes a line a call into out_dir/metrics.jsonl and shows it; a resumed run goes on after `start_step`.

    On a terminal there is a tqdm bar with speed and time left, elsewhere plain lines on standard error.
    """

    def __init__(self, config: RunOptions, start_step: int) -> None:
        self.path = config.out_dir / "metrics.jsonl"
        kept = [line for line in read_metrics(self.path) if line["step"] <= start_step]
        self.elapsed_before = kept[-1]["elapsed_seconds"] if kept else 0.0
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self.file = self.path.open("a", encoding="utf-8")
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
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        self.file.close()
        if self.wandb is not None:
            self.wandb.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; none where there is no file. A last line that a crash cut short is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def _start_wandb(config: RunOptions) -> ModuleType:
    import wandb

    # Options only, no paths: what is sent says nothing about the machine.
    values = {key: value for key, value in config.model_dump().items() if not isinstance(value, (Path, tuple))}
    wandb.init(
        project=config.wandb_project,
        mode=config.wandb,
        dir=config.out_dir,
        config=values,
        settings=wandb.Settings(
            console="off", disable_git=True, save_code=False, x_disable_meta=True, x_disable_machine_info=True
        ),
    )
    return wandb
