"""Which of several processes this is, as torchrun or srun says it in the environment. Nothing here imports torch."""

import os
import sys
from typing import NamedTuple


class Launch(NamedTuple):
    """A process among `size`: `rank` counts over all machines, `local_rank` on this one. Rank 0 writes and prints."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0


TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")


def launcher() -> tuple[str, str, str] | None:
    """The variables with rank, size and local rank, if torchrun or srun started this process as one of several.

    Slurm sets SLURM_NTASKS and SLURM_PROCID in the shells of sbatch, salloc and srun --pty too, where a command runs once.
    """
    if os.environ.keys() >= set(TORCHRUN):
        return TORCHRUN
    return SRUN if os.environ.keys() >= set(SRUN) and "SLURM_PTY_PORT" not in os.environ else None


def launched() -> Launch:
    """The place of this process, which is alone unless torchrun or srun started it as one of several."""
    return Launch(*(int(os.environ[name]) for name in launcher() or ()))


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
