"""How a script ends: errors as one line and an exit status, signals, and tracebacks for our own bugs only.

Nothing here imports torch.
"""

import codecs
import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn, TypeVar

ConfigT = TypeVar("ConfigT")

# Requests to end: Ctrl-C, a scheduler's SIGTERM, a closed terminal, and Slurm's warning (--signal=USR1@60).
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class UserError(ValueError):
    """A user's mistake. The message says what is wrong, where (file:line) and what would be right; exit status 2."""


class MachineError(RuntimeError):
    """A failure of the machine or of a file (disk, memory, weights that are not finite); exit status 1."""


@contextlib.contextmanager
def located(place: str) -> Iterator[None]:
    """Put a place (file:line) before the message of a UserError that is raised inside."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def run(main: Callable[[ConfigT], None], config: ConfigT) -> NoReturn:
    """Call `main(config)` and end the process: errors become one line and a status; our own bugs keep their traceback."""
    catch_signals(leave)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    show_any_character()
    try:
        main(config)
        sys.stdout.flush()
    except UserError as error:
        fail(str(error), 2)
    except BrokenPipeError:  # the reader of our output has gone (`| head`), which is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (MachineError, OSError, MemoryError) as error:
        fail(str(error) or "out of memory", 1)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except RuntimeError as error:
        if is_out_of_memory(error):
            fail("out of memory: lower micro_batch_size or block_size (nothing that was saved is lost)", 1)
        raise
    sys.exit(0)


def show_any_character() -> None:
    """Let standard output take every character: what the console's encoding lacks is written as in Python, and said once."""
    said = False

    def escape(error: UnicodeError) -> tuple[str | bytes, int]:
        nonlocal said
        if not said:
            said = True
            print(
                f"the console's encoding, {sys.stdout.encoding}, lacks some characters: they are written as \\xe9 or \\u20ac; "
                "PYTHONIOENCODING=utf-8 shows them",
                file=sys.stderr,
            )
        return codecs.backslashreplace_errors(error)

    codecs.register_error("papagaio.escape", escape)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="papagaio.escape")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch could not get the memory it asked for, on a GPU (torch.OutOfMemoryError, or cuBLAS for itself) or a CPU."""
    texts = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return type(error).__name__ == "OutOfMemoryError" or any(text in str(error) for text in texts)


def catch_signals(handler: Callable[[int, FrameType | None], Any]) -> dict[int, Any]:
    """Have `handler` called at each of STOP_SIGNALS; returns the handlers before. A SIGHUP that nohup ignores stays ignored."""
    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
    return {number: signal.signal(number, handler) for number in STOP_SIGNALS if number not in ignored}


def leave(number: int, frame: FrameType | None) -> NoReturn:
    """A signal handler that ends the process with 128 + the signal's number."""
    sys.exit(128 + number)


def fail(message: str, status: int) -> NoReturn:
    """Print `error: message` as one line on standard error and exit with `status`."""
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(status)
