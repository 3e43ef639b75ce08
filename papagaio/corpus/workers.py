"""Runs independent jobs in several processes, with a progress bar."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from typing import Any

from tqdm import tqdm

from papagaio.errors import MachineError

Job = tuple[Callable[..., Any], *tuple[Any, ...]]  # a function and its arguments


def in_parallel(jobs: Sequence[Job], workers: int, sizes: Sequence[int] | None = None) -> Iterator[Any]:
    """Run the jobs in up to `workers` processes and yield their results as they finish, in any order.

    `sizes` (bytes, one per job) asks for a progress bar. An exception in a job ends all. Raises MachineError if a process was
    killed, most likely because memory ran out.
    """
    tqdm.monitor_interval = 0  # no thread beside the bar: forking needs a process with a single thread
    terminal = sys.stderr.isatty()  # elsewhere a line is printed now and then, for large inputs
    hidden = not (sizes and (terminal or sum(sizes) > 2**28))
    sizes, seconds = sizes or [0] * len(jobs), 0.1 if terminal else 30
    with tqdm(total=sum(sizes), unit="B", unit_scale=True, disable=hidden, mininterval=seconds, desc="encoding") as bar:
        if min(workers, len(jobs)) <= 1:
            for (function, *arguments), size in zip(jobs, sizes, strict=True):
                yield function(*arguments)
                bar.update(size)
            return
        # A forked process inherits what its parent has loaded. That is safe without threads and open connections.
        forked = sys.platform == "linux" and threading.active_count() == 1 and "datasets" not in sys.modules
        context = multiprocessing.get_context("fork" if forked else "spawn")
        pool = ProcessPoolExecutor(min(workers, len(jobs)), context, initializer=_start_worker)
        try:
            size_of = {pool.submit(*job): size for job, size in zip(jobs, sizes, strict=True)}
            for future in as_completed(size_of):
                yield future.result()
                bar.update(size_of[future])
        except BrokenProcessPool:
            raise MachineError("a worker process was killed, perhaps because memory ran out: lower --workers") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """In a worker: leave Ctrl-C to the parent, and end when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def end_with_parent() -> None:
        wait_for([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
