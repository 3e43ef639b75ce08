"""Runs independent jobs in several processes, with a progress bar."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

from tqdm import tqdm

from papagaio.errors import MachineError

Job = tuple[Callable[..., Any], *tuple[Any, ...]]  # a function and its arguments


def processors() -> int:
    """The processors that this process may use: its affinity mask's (taskset, Slurm), within its cgroup's limit (Docker)."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    count = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError, StopIteration):
        groups = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
        group = next(line.removeprefix("0::") for line in groups if line.startswith("0::"))  # cgroup v2
        quota, period = Path(f"/sys/fs/cgroup{group}/cpu.max").read_text(encoding="ascii").split()
        count = max(1, min(count, int(quota) // int(period)))  # "max" is no number: no limit
    return count


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
