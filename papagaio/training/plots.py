"""Pictures of a run."""

from pathlib import Path
from typing import Any

from papagaio.training.metrics import read_metrics

CONVERSATIONS = (("train_loss", "training", "-"), ("val_loss", "validation", "o-"))
REPLAYED = (("replay_loss", "training", "-"), ("replay_val_loss", "validation", "o-"))


def plot_losses(metrics: Path, picture: Path) -> None:
    """Draw training and validation loss over the steps of a metrics.jsonl; replayed text has a panel of its own below."""
    from matplotlib.figure import Figure  # not pyplot, which looks for a screen and takes longer to import

    lines = read_metrics(metrics)
    replays = any("replay_loss" in line for line in lines)
    figure = Figure(figsize=(7, 7 if replays else 4.2), layout="constrained")
    panels = figure.subplots(1 + replays, sharex=True, squeeze=False)[:, 0]
    _draw(panels[0], lines, CONVERSATIONS)
    if evaluated := [line for line in lines if "val_loss" in line]:
        last = evaluated[-1]
        panels[0].set_title(f"validation loss {last['val_loss']:.4f} after {last['step']:,} steps", fontsize=10)
    if replays:
        _draw(panels[1], lines, REPLAYED)
        panels[1].set_title("replayed text of pretraining", fontsize=10)
    panels[-1].set_xlabel("optimizer steps")
    temporary = picture.with_name(f".{picture.name}.tmp")
    figure.savefig(temporary, dpi=120, format="png")
    temporary.replace(picture)


def _draw(axes: Any, lines: list[dict[str, Any]], curves: tuple[tuple[str, str, str], ...]) -> None:
    """Draw curves (key in the lines, label, style) over the steps.

    The scale is that of all but the first tenth of the steps, where the loss falls by several nats; what lies above is cut off.
    """
    settled: list[float] = []  # the losses that set the scale
    for key, label, style in curves:
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            settled += [loss for step, loss in points if step >= 0.1 * lines[-1]["step"]]
            axes.plot(*zip(*points, strict=True), style, label=f"{label}, from {points[0][1]:.2f}", markersize=4, linewidth=1.2)
    if len(settled) > 1 and max(settled) > min(settled):
        margin = 0.06 * (max(settled) - min(settled))
        axes.set_ylim(min(settled) - margin, max(settled) + margin)
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
