"""Which of several processes this is, as torchrun or srun says it in the environment. Nothing here imports torch."""

import os
import sys
from typing import NamedTuple


class Launch(NamedTuple):
    """A process among `size`: `rank` counts over all machines, `local_rank` on this one. Rank 0 writes and prints."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0


def launched() -> Launch:
    """The place of this process, which is alone unless torchrun started it, or srun with several tasks in this step."""
    found = os.environ
    if {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= found.keys():
        return Launch(int(found["RANK"]), int(found["WORLD_SIZE"]), int(found["LOCAL_RANK"]))
    if int(found.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # which a script of sbatch has not: it is one process
        return Launch(int(found["SLURM_PROCID"]), int(found["SLURM_STEP_NUM_TASKS"]), int(found["SLURM_LOCALID"]))
    return Launch()


def silence_other_ranks() -> None:
    """Let rank 0 alone print, from here on. World prints the errors that another rank has and rank 0 has not."""
    if launched().rank:
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - open as long as the process


def launch_id() -> str | None:
    """What all restarts of one torchrun have in common; None without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"none {os.getppid()}" if name == "none" else name  # none: without --standalone, each launch has this name


def restarts() -> int:
    """How often torchrun has started this process again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
