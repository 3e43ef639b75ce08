"""What protects the weights from a bad step: losses and gradients that are not finite, and losses that leap."""

import math
import statistics
from collections.abc import Callable, Sequence

from papagaio.errors import MachineError
from papagaio.training.options import RunOptions
from papagaio.training.progress import Progress

Places = Callable[[], Sequence[str]]  # gives the origin of a step's sequences, for messages
Say = Callable[[str], None]  # shows a message
WINDOW = 128  # steps whose losses tell what is usual
SIGMAS = 6.0  # a loss this many standard deviations above their mean is reported


def accepts(loss: float, norm: float, scale: float, progress: Progress, config: RunOptions, places: Places, say: Say) -> bool:
    """Whether a step may change the weights. `norm` is the gradient's, `scale` that of float16's losses (1: not scaled).

    Raises MachineError if the loss or the gradient is not finite and config.on_nonfinite allows no more of these steps in a row.
    """
    step, recent = progress.step + 1, progress.recent_losses
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
    progress.recent_losses = [*recent, loss][-WINDOW:]
    sigma = statistics.pstdev(recent) if len(recent) == WINDOW else 0.0
    sigmas = (loss - statistics.fmean(recent)) / sigma if sigma else 0.0
    if sigmas > SIGMAS:
        say(
            f"warning: the loss leaps to {loss:.4f} at step {step:,}, {sigmas:.1f} sigma above the mean of the last {WINDOW} "
            f"steps; its sequences are {_listed(places())}"
        )
    return True


def _listed(places: Sequence[str]) -> str:
    return ", ".join(places[:64]) + (f" and {len(places) - 64:,} more" if len(places) > 64 else "")
