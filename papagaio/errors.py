"""How a script ends: errors as one line with a status, signals, and tracebacks for our own bugs alone.

Nothing here imports torch.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn, TypeVar

ConfigT = TypeVar("ConfigT")

# What asks a process to end: Ctrl-C, a scheduler, and Slurm's warning before its time is over (--signal=USR1@60).
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class UserError(ValueError):
    """A user's mistake. The message says what is wrong, where (file:line) and what would be right; exit status 2."""


@contextlib.contextmanager
def located(place: str) -> Iterator[None]:
    """A UserError that is raised inside says first where (file:line)."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


class MachineError(RuntimeError):
    """A failure of the machine or of a file it holds (disk, memory, weights that are not finite); exit status 1."""


def run(main: Callable[[ConfigT], None], config: ConfigT) -> NoReturn:
    """Call `main(config)` and end the process as the design says: one line and a status, a traceback only for our own bugs."""
    for number in STOP_SIGNALS:
        signal.signal(number, leave)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main(config)
        sys.stdout.flush()
    except UserError as error:
        fail(str(error), 2)
    except BrokenPipeError:  # the reader of our output has left (`| head`): not an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (MachineError, OSError, MemoryError) as error:
        fail(str(error) or "out of memory", 1)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
            fail("out of memory: lower micro_batch_size or block_size (nothing that was saved is lost)", 1)
        raise
    sys.exit(0)


def leave(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def fail(message: str, status: int) -> NoReturn:
    """Print `error: message` as one line on standard error and exit with `status`."""
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(status)
