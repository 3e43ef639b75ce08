"""torchrun ... tests/ranked.py SCRIPT ARGUMENTS: one of several processes, in which happens what a test wants.

TEST_FAULT="1 papagaio.training.gradients.Gradients.finish 3 KILL"   rank 1, at its third call, before any restart
TEST_WITNESS=DIR     each rank writes the gradients of its first step, the sha256 of its weights after each step, and their size
TEST_LITTLE_MEMORY=1 the memory has no room for a copy of the weights
TEST_FLOAT32=1       Muon computes in float32: in bfloat16, a last bit of the gradient changes the update by 1 %
"""

import errno
import hashlib
import importlib
import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def patch(name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a function, given by its module or class, by wrapper(function)."""
    place, _, attribute = name.rpartition(".")
    try:
        owner: Any = importlib.import_module(place)
    except ModuleNotFoundError:
        module, _, kind = place.rpartition(".")
        owner = getattr(importlib.import_module(module), kind)
    setattr(owner, attribute, wrapper(getattr(owner, attribute)))


def with_fault(count: int, action: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    left = count

    def wrapper(function: Callable[..., Any]) -> Callable[..., Any]:
        def faulty(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                if action == "OOM":
                    import torch

                    raise torch.OutOfMemoryError("out of memory, says the test")
                if action == "FULL":
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.kill(os.getpid(), getattr(signal, f"SIG{action}"))
            return function(*args, **kwargs)

        return faulty

    return wrapper


def watched(folder: Path, rank: str) -> None:
    """Write down gradients, sha256 of weights, and the bytes of parameters and optimizer state that this rank has."""
    from safetensors.torch import save_file

    from papagaio.training.sharding import local, whole

    def clearing(clear: Callable[..., Any]) -> Callable[..., Any]:
        def first(self: Any) -> None:
            if not (path := folder / f"gradients-{rank}.safetensors").exists():
                save_file({n: whole(p.grad).clone() for n, p in self.model.named_parameters() if p.grad is not None}, path)
            clear(self)

        return first

    def stepping(step: Callable[..., Any]) -> Callable[..., Any]:
        def then(self: Any, *args: Any) -> Any:
            done = step(self, *args)
            digest = hashlib.sha256()
            for p in self.model.parameters():
                digest.update(whole(p.detach()).contiguous().numpy().tobytes())
            with (folder / f"weights-{rank}.txt").open("a") as file:
                file.write(digest.hexdigest() + "\n")
            kept = [t for optimizer in self.optimizers for state in optimizer.state.values() for t in state.values()]
            held = [local(t) for t in (*self.model.parameters(), *kept) if not t.is_meta]
            (folder / f"bytes-{rank}.txt").write_text(str(sum(t.nbytes for t in held)))
            return done

        return then

    patch("papagaio.training.gradients.Gradients.clear", clearing)
    patch("papagaio.training.step.TrainingStep.__call__", stepping)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    from papagaio.launch import launched, restarts, silence_other_ranks

    silence_other_ranks()
    if os.environ.get("TEST_FLOAT32"):
        patch("papagaio.training.optimizers.computes_bfloat16", lambda _: lambda device_type: False)
    if os.environ.get("TEST_LITTLE_MEMORY"):
        patch("papagaio.runtime.free_memory", lambda _: lambda device: 1000)
    if os.environ.get("TEST_WITNESS"):
        watched(Path(os.environ["TEST_WITNESS"]), str(launched().rank))
    if fault := os.environ.get("TEST_FAULT"):
        rank, name, count, action = fault.split()
        if launched().rank == int(rank) and not restarts():
            patch(name, with_fault(int(count), action))
    script, *sys.argv[1:] = sys.argv[1:]
    sys.argv[0] = script
    runpy.run_path(str(ROOT / script), run_name="__main__")
