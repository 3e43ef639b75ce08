"""Runs side by side: learning curves, last and best figures, and the options in which they differ."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from papagaio.errors import UserError
from papagaio.inside import drawing
from papagaio.inside.options import RunsOptions
from papagaio.inside.page import Found
from papagaio.options import load_toml
from papagaio.runs.checkpoint import MakeModel
from papagaio.training.metrics import read_metrics

AXES = (("step", "optimizer steps"), ("tokens", "tokens"), ("elapsed_seconds", "seconds"))


def look(config: RunsOptions, make: MakeModel) -> Found:
    """Figures, options and curves of the runs; no model is opened."""
    opened = [read_run(path) for path in config.source]
    names, found_figures = [str(one.path) for one in opened], [figures(one) for one in opened]
    keys = dict.fromkeys(key for one in found_figures for key in one)
    lines = [table(("figure", *names), {key: [one.get(key, "-") for one in found_figures] for key in keys})]
    if len(opened) > 1:
        lines += ["", table(("option", *names), differences(opened))]
    return Found(lines, {"runs": draw(opened)})


class Run(NamedTuple):
    """A run's directory, its options and the lines of its metrics.jsonl."""

    path: Path
    options: dict[str, Any]
    metrics: list[dict[str, Any]]

    def values(self, key: str) -> list[Any]:
        """The values of a metric, in order."""
        return [line[key] for line in self.metrics if key in line]


def read_run(path: Path) -> Run:
    """Raises UserError if the directory holds no run that was trained here."""
    if not path.is_dir():
        raise UserError(f"{path}: no such run")
    if not (path / "config.toml").is_file() or not (metrics := read_metrics(path / "metrics.jsonl")):
        raise UserError(f"{path}: no config.toml and metrics.jsonl: not a run made by train.py or finetune.py")
    return Run(path, load_toml(path / "config.toml")[1], metrics)


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The options in which runs differ: {name: a value for each run}. `-`: it is not set."""
    names = dict.fromkeys(name for run in runs for name in run.options if name != "out_dir")
    rows = {name: [spell(run.options.get(name)) for run in runs] for name in names}
    return {name: values for name, values in rows.items() if len(set(values)) > 1}


def spell(value: Any) -> str:
    """A value of an option for people."""
    return "-" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)


def figures(run: Run) -> dict[str, str]:
    """The last and the best figures of a run."""
    last = run.metrics[-1]
    found = {"steps": f"{last['step']:,}", "tokens trained": f"{last['tokens']:,}", "seconds": f"{last['elapsed_seconds']:,.1f}"}
    for key, name in (("val_loss", "validation loss (nats per token)"), ("val_bpb", "bits per byte")):
        if values := run.values(key):
            found |= {name: f"{values[-1]:.4f}", f"{name}, best": f"{min(values):.4f}"}
    return found


def draw(runs: Sequence[Run]) -> Any:
    """Validation loss (or training loss) of each run over steps, tokens and seconds."""
    from matplotlib.ticker import EngFormatter

    picture = drawing.figure(13, 4.4)
    key = "val_loss" if all(run.values("val_loss") for run in runs) else "train_loss"
    late = [line[key] for run in runs for line in run.metrics if key in line and line["step"] >= 0.1 * run.metrics[-1]["step"]]
    for axes, (unit, label) in zip(picture.subplots(1, 3, sharey=True), AXES, strict=True):
        for number, run in enumerate(runs):
            points = [(line[unit], line[key]) for line in run.metrics if key in line]
            name, (colour, marker) = drawing.literal(drawing.clip(run.path.name, 30)), drawing.style(number)
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1.2, markersize=4, color=colour, marker=marker)
        axes.set_xlabel(label)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 100k
        axes.grid()
        if late and max(late) > min(late):  # the beginning, some nats higher, is cut off, as in loss.png
            margin = 0.06 * (max(late) - min(late))
            axes.set_ylim(min(late) - margin, max(late) + margin)
    handles, names = axes.get_legend_handles_labels()
    picture.axes[0].set_ylabel(f"{'validation' if key == 'val_loss' else 'training'} loss (nats per token)")
    picture.legend(handles, names, loc="outside lower center", ncols=min(4, len(runs)))
    return picture


def table(head: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join([name, *cells])} |" for name, cells in rows.items())])
