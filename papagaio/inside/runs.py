"""Runs side by side: learning curves and differing options; and one page about a run, for model cards too."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from papagaio.corpus.dataset import Dataset
from papagaio.errors import UserError
from papagaio.inside import drawing
from papagaio.options import load_toml
from papagaio.training.metrics import read_metrics

AXES = (("step", "optimizer steps"), ("tokens", "tokens"), ("elapsed_seconds", "seconds"))


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
    rows = {name: [_value(run.options.get(name)) for run in runs] for name in names}
    return {name: values for name, values in rows.items() if len(set(values)) > 1}


def _value(value: Any) -> str:
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
    picture = drawing.figure(13, 4.4)
    key = "val_loss" if all(run.values("val_loss") for run in runs) else "train_loss"
    late = [line[key] for run in runs for line in run.metrics if key in line and line["step"] >= 0.1 * run.metrics[-1]["step"]]
    for axes, (unit, label) in zip(picture.subplots(1, 3, sharey=True), AXES, strict=True):
        for number, run in enumerate(runs):
            points = [(line[unit], line[key]) for line in run.metrics if key in line]
            style = {"color": drawing.COLOURS[number % 7], "marker": drawing.MARKERS[(number + number // 7) % 7], "markersize": 4}
            name = drawing.literal(drawing.clip(run.path.name, 30))
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1.2, **style)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
        if late and max(late) > min(late):  # the beginning, some nats higher, is cut off, as in loss.png
            margin = 0.06 * (max(late) - min(late))
            axes.set_ylim(min(late) - margin, max(late) + margin)
    handles, names = axes.get_legend_handles_labels()
    picture.axes[0].set_ylabel(f"{'validation' if key == 'val_loss' else 'training'} loss (nats per token)")
    picture.legend(handles, names, loc="outside lower center", ncols=min(4, len(runs)), fontsize=8)
    return picture


def table(head: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join([name, *cells])} |" for name, cells in rows.items())])


def facts(fields: Mapping[str, Any], state: Mapping[str, Any], parameters: int) -> str:
    """A model's shape and training from its checkpoint alone, as Markdown: what a model card needs."""
    shape = {key: str(value) for key, value in fields.items() if value is not None}
    training = {k: v for k, v in state.items() if k not in ("metrics_lines", "recent_losses")} | (state.get("options") or {})
    plain = {key: _value(value) for key, value in training.items() if isinstance(value, str | int | float)}
    model = {name: [value] for name, value in ({"parameters": f"{parameters:,}"} | shape).items()}
    return "\n\n".join(
        ["## Model", table(("field", ""), model), "## Training", table(("training", ""), {k: [v] for k, v in plain.items()})]
    )


def data_rows(run: Run) -> dict[str, list[str]]:
    """The datasets of a run, if they are still where it found them."""
    rows = {}
    for name in run.options.get("data", []):
        path = Path(str(name))
        path = path if path.exists() else Path(str(name).rpartition(":")[0] or name)
        if (path / "manifest.json").is_file():
            splits = Dataset(path).splits
            rows[path.name] = [f"{splits[s]['documents']:,} documents, {splits[s]['tokens']:,} tokens" for s in ("train", "val")]
        else:
            rows[path.name] = ["a file of questions" if path.is_file() else "not there any more", "-"]
    return rows


def report(run: Run, described: str, samples: Sequence[tuple[str, str]], picture: str) -> str:
    """One page about a run, as Markdown. `described` is from `facts`; samples are (prompt, continuation)."""
    parts = [f"# {run.path.name}", "## Figures", table(("figure", ""), {name: [value] for name, value in figures(run).items()})]
    parts += [f"![learning curves]({picture})"]
    if rows := data_rows(run):
        parts += ["## Data", table(("data", "training", "validation"), rows)]
    parts += ["## Options", table(("option", ""), {name: [_value(value)] for name, value in run.options.items()}), described]
    if samples:
        parts += ["## Samples", *(f"```\n{prompt}[...]{text}\n```" for prompt, text in samples)]
    return "\n\n".join(parts) + "\n"
