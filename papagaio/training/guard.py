"""What stands between a step's loss and gradient and the weights: numbers that are not finite, and losses that leap."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from papagaio.errors import MachineError
from papagaio.training.options import RunOptions

WINDOW = 128  # steps whose losses tell what is usual
SIGMAS = 6.0  # standard deviations above their mean that are not


def accepts(
    loss: float,
    norm: float,
    scale: float,
    state: dict[str, Any],
    config: RunOptions,
    places: Callable[[], Sequence[str]],
    say: Callable[[str], None],
) -> bool:
    """Whether a step may change the weights. `norm` is the gradient's, `scale` that of float16's losses (1: not scaled).

    Keeps in the state the losses of the last steps, and how many in a row were not finite. `places()` tells where the step's
    sequences come from. Raises MachineError where a loss or gradient is not finite and config.on_nonfinite allows no more.
    """
    step = state["step"] + 1
    if math.isfinite(loss) and not math.isfinite(norm) and scale > 1:
        return False  # the scale was too large: it is halved, and this step left out
    if not (math.isfinite(loss) and math.isfinite(norm)):
        state["nonfinite"] += 1
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the norm of the gradient is {norm}"
        message = f"{what} at step {step:,}, whose sequences are {_listed(places())}"
        if state["nonfinite"] > int(config.on_nonfinite.removeprefix("skip:").replace("stop", "0")):
            raise MachineError(
                f"{message}. The weights were not changed, and the checkpoints are kept: --resume goes on from the newest, with "
                "a lower learning_rate, or with --on_nonfinite skip:1 without this step"
            )
        say(f"warning: {message}. It is left out")
        return False
    state["nonfinite"] = 0
    sigmas = deviation(loss, state["recent_losses"])
    state["recent_losses"] = [*state["recent_losses"], loss][-WINDOW:]
    if sigmas <= SIGMAS:
        return True
    skipped = config.on_spike == "skip"
    say(
        f"warning: the loss leaps to {loss:.4f} at step {step:,}, {sigmas:.1f} sigma above the mean of the last {WINDOW} steps"
        f"{', and the step is left out' if skipped else ''}; its sequences are {_listed(places())}"
    )
    return not skipped


def deviation(loss: float, recent: Sequence[float]) -> float:
    """By how many standard deviations a loss is above the mean of the recent ones; 0 as long as these are fewer than 128."""
    if len(recent) < WINDOW:
        return 0.0
    mean, sigma = statistics.fmean(recent), statistics.pstdev(recent)
    return (loss - mean) / sigma if sigma else 0.0


def _listed(places: Sequence[str], most: int = 64) -> str:
    more = f" and {len(places) - most:,} more" if len(places) > most else ""
    return ", ".join(places[:most]) + more
