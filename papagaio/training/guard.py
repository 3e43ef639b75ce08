"""What protects the weights from a bad step: losses and gradients that are not finite, and losses that leap."""

import math
import statistics
from collections.abc import Callable, Sequence

from papagaio.errors import MachineError
from papagaio.training.options import RunOptions
from papagaio.training.progress import Progress

WINDOW = 128  # steps whose losses tell what is usual
SIGMAS = 6.0  # a loss this many standard deviations above their mean is reported


def accepts(
    loss: float,
    norm: float,
    scale: float,
    progress: Progress,
    config: RunOptions,
    places: Callable[[], Sequence[str]],
    say: Callable[[str], None],
) -> bool:
    """Whether a step may change the weights. `norm` is the gradient's, `scale` that of float16's losses (1: not scaled).

    `places()` gives the origin of the step's sequences. Raises MachineError if the loss or the gradient is not finite and
    config.on_nonfinite allows no more such steps in a row.
    """
    step = progress.step + 1
    if math.isfinite(loss) and not math.isfinite(norm) and scale > 1:
        return False  # float16's scale was too large: the scaler halves it, and the step is skipped
    if not (math.isfinite(loss) and math.isfinite(norm)):
        progress.nonfinite += 1
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the norm of the gradient is {norm}"
        message = f"{what} at step {step:,}, whose sequences are {_listed(places())}"
        if progress.nonfinite > int(config.on_nonfinite.removeprefix("skip:").replace("stop", "0")):
            raise MachineError(
                f"{message}. The weights were not changed, and the checkpoints are kept: --resume goes on from the newest, with "
                "a lower learning_rate, or with --on_nonfinite skip:1 without this step"
            )
        say(f"warning: {message}. It is skipped")
        return False
    progress.nonfinite = 0
    sigmas = deviation(loss, progress.recent_losses)
    progress.recent_losses = [*progress.recent_losses, loss][-WINDOW:]
    if sigmas > SIGMAS:
        say(
            f"warning: the loss leaps to {loss:.4f} at step {step:,}, {sigmas:.1f} sigma above the mean of the last {WINDOW} "
            f"steps; its sequences are {_listed(places())}"
        )
    return True


def deviation(loss: float, recent: Sequence[float]) -> float:
    """How many standard deviations a loss is above the mean of the recent ones; 0 while there are fewer than WINDOW of them."""
    if len(recent) < WINDOW:
        return 0.0
    mean, sigma = statistics.fmean(recent), statistics.pstdev(recent)
    return (loss - mean) / sigma if sigma else 0.0


def _listed(places: Sequence[str], most: int = 64) -> str:
    more = f" and {len(places) - most:,} more" if len(places) > most else ""
    return ", ".join(places[:most]) + more
