"""Pictures of a run."""

from pathlib import Path

from papagaio.training.metrics import read_metrics


def plot_losses(metrics: Path, picture: Path) -> None:
    """Draw training and validation loss over the steps of a metrics.jsonl."""
    from matplotlib.figure import Figure  # without pyplot, which looks for a screen and takes longer to import

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    lines = read_metrics(metrics)
    for key, label, style in (("train_loss", "training", "-"), ("val_loss", "validation", "o-")):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4, linewidth=1.2)
    last = next((line for line in reversed(lines) if "val_loss" in line), None)
    if last is not None:
        axes.set_title(f"validation loss {last['val_loss']:.4f} after {last['step']:,} steps", fontsize=10)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    temporary = picture.with_name(f".{picture.name}.tmp")
    figure.savefig(temporary, dpi=120, format="png")
    temporary.replace(picture)
