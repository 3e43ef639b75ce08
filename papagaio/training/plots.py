"""Pictures of a run."""

from pathlib import Path

from papagaio.training.metrics import read_metrics


def plot_losses(metrics: Path, picture: Path) -> None:
    """Draw training and validation loss over the steps of a metrics.jsonl.

    The scale is that of all but the first tenth of the steps, where the loss falls by several nats; what lies above is cut off.
    """
    from matplotlib.figure import Figure  # not pyplot, which looks for a screen and takes longer to import

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    lines = read_metrics(metrics)
    settled: list[float] = []  # the losses that set the scale
    for key, label, style in (("train_loss", "training", "-"), ("val_loss", "validation", "o-")):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            settled += [loss for step, loss in points if step >= 0.1 * lines[-1]["step"]]
            axes.plot(*zip(*points, strict=True), style, label=f"{label}, from {points[0][1]:.2f}", markersize=4, linewidth=1.2)
    if len(settled) > 1 and max(settled) > min(settled):
        margin = 0.06 * (max(settled) - min(settled))
        axes.set_ylim(min(settled) - margin, max(settled) + margin)
    if evaluated := [line for line in lines if "val_loss" in line]:
        last = evaluated[-1]
        axes.set_title(f"validation loss {last['val_loss']:.4f} after {last['step']:,} steps", fontsize=10)
    axes.set(xlabel="optimizer steps", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    temporary = picture.with_name(f".{picture.name}.tmp")
    figure.savefig(temporary, dpi=120, format="png")
    temporary.replace(picture)
