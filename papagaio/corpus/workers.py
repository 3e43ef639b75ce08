"""Work for several processes: jobs that are independent of each other, some at a time, with a bar that shows how far it is."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from typing import Any

from tqdm import tqdm

from papagaio.errors import MachineError

Job = tuple[Callable[..., Any], *tuple[Any, ...]]  # a function and its arguments


def in_parallel(jobs: Sequence[Job], workers: int, sizes: Sequence[int] | None = None) -> Iterator[Any]:
    """Call the jobs in up to `workers` processes and give their results as they come, in no certain order.

    `sizes` in bytes, one a job, asks for a progress bar. An exception in a job ends all. Raises MachineError where a process
    was killed, most likely for want of memory.
    """
    tqdm.monitor_interval = 0  # no thread beside the bar, see below
    # On a terminal the bar moves; elsewhere a line is printed now and then.
    terminal = sys.stderr.isatty()
    bar = tqdm(
        total=sum(sizes or ()),
        unit="B",
        unit_scale=True,
        disable=not sizes or not (terminal or sum(sizes) > 2**28),
        mininterval=0.1 if terminal else 30,
        desc="encoding",
    )
    todo = list(range(len(jobs)))[::-1]
    with bar:
        if min(workers, len(jobs)) <= 1:
            for number, (function, *arguments) in enumerate(jobs):
                yield function(*arguments)
                bar.update(sizes[number] if sizes else 0)
            return
        # A forked process has what its parent has loaded. Where that is not to be had, or not safe for threads and open
        # connections, a fresh one loads it anew.
        forked = sys.platform == "linux" and threading.active_count() == 1 and "datasets" not in sys.modules
        context = multiprocessing.get_context("fork" if forked else "spawn")
        pool = ProcessPoolExecutor(min(workers, len(jobs)), context, initializer=_start)
        running: dict[Future, int] = {}
        try:
            while todo or running:
                while todo and len(running) < 2 * workers:
                    number = todo.pop()
                    running[pool.submit(*jobs[number])] = number
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    number = running.pop(future)
                    yield future.result()
                    bar.update(sizes[number] if sizes else 0)
        except BrokenProcessPool:
            raise MachineError("a worker process was killed, perhaps for want of memory: lower --workers") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start() -> None:
    """In a worker: Ctrl-C is the parent's affair, and a parent that was killed leaves no worker behind."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def end_with_parent() -> None:
        wait_for([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
