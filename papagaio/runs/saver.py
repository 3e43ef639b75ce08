"""Saving during training: the weights are copied, and a thread writes the copy to the disk.

If the disk fails, a warning is printed and training goes on: earlier checkpoints are kept, and the next save tries again.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from papagaio import runtime
from papagaio.errors import MachineError
from papagaio.files import write_whole
from papagaio.runs.checkpoint import Contents, contents, write_checkpoint
from papagaio.runs.directory import prune
from papagaio.tokenizer import Tokenizer
from papagaio.training.metrics import RunLog
from papagaio.training.options import RunOptions
from papagaio.training.parallel import ALONE, World
from papagaio.training.plots import plot_losses
from papagaio.training.sharding import holders, to_rank_0


class Saver:
    """Writes checkpoints/step-N, `last`, `best` and loss.png of a run in a thread, in the order of the calls. `saved` is the step
    of the newest checkpoint on the disk. Leaving the `with` block waits for what is being written.

    Of several processes, rank 0 writes; all call the methods, and give it what it does not have itself, one tensor after another.
    """

    def __init__(self, config: RunOptions, tokenizer: Tokenizer, log: RunLog, saved: int | None, world: World = ALONE) -> None:
        self.world = world
        self.directory, self.keep, self.tokenizer, self.log = config.out_dir / "checkpoints", config.keep, tokenizer, log
        self.saved = self.asked = saved
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self.tasks: list[Future[Any]] = []
        self.copies: dict[tuple[str, str], Tensor] = {}  # by file and name

    def save(self, model: nn.Module, optimizers: list[torch.optim.Optimizer], state: dict[str, Any]) -> None:
        """Save the state after state["step"] steps, unless it is saved already. Waits for the save before."""
        self.wait()
        if not self.world.on_rank_0(lambda: state["step"] != self.saved):
            return
        found = contents(model, optimizers, state)
        copied = self._copied(found.tensors)
        if self.world.rank:
            return
        self.asked = state["step"]
        self.tasks.append(self.pool.submit(self._save, self.asked, found._replace(tensors=copied)))
        if copied is found.tensors:
            self.wait()

    def mark_best(self) -> None:
        """Let `best` name the checkpoint that was saved last, once it is on the disk."""
        if self.world.rank == 0:
            self.tasks.append(self.pool.submit(self._mark_best, self.asked))

    def plot(self) -> None:
        """Draw the losses so far."""
        arguments = ("loss.png was not drawn", plot_losses, self.log.path, self.log.path.with_name("loss.png"))
        if self.world.rank == 0:
            self.tasks.append(self.pool.submit(self._attempt, *arguments))

    def wait(self) -> None:
        """Wait until all tasks so far are done, or have failed."""
        for task in self.tasks:
            task.result()
        self.tasks.clear()

    def finish(self) -> None:
        """Wait for all tasks, on every rank. Raises MachineError if the last state to be saved is not on the disk."""
        self.world.on_rank_0(self._finish)

    def _finish(self) -> None:
        self.wait()
        if self.saved != self.asked:
            kept = f"{self.directory}/step-{self.saved} is kept" if self.saved is not None else "there is no checkpoint"
            raise MachineError(f"step {self.asked} could not be saved; {kept}, and --resume goes on from there")

    def _save(self, step: int, found: Contents) -> None:
        self._attempt(f"step-{step} was not saved", self._write, step, found)
        self._attempt("old checkpoints were not deleted", prune, self.directory, step, self.keep)

    def _write(self, step: int, found: Contents) -> None:
        self.log.sync()
        write_checkpoint(self.directory / f"step-{step}", found, self.tokenizer)
        write_whole(self.directory / "last", f"step-{step}\n")
        self.saved = step

    def _mark_best(self, step: int) -> None:
        if self.saved == step:
            self._attempt("checkpoints/best was not changed", write_whole, self.directory / "best", f"step-{step}\n")
            self._attempt("old checkpoints were not deleted", prune, self.directory, step, self.keep)

    def _attempt(self, failure: str, work: Callable[..., None], *arguments: Any) -> None:
        """Call `work`; print a warning if the disk fails."""
        try:
            work(*arguments)
        except (OSError, SafetensorError) as error:
            reason = (isinstance(error, OSError) and error.strerror) or str(error)
            self.log.say(f"warning: {failure}: {reason}; what was saved before is kept, and the next save tries again")

    def _copied(self, tensors: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """A copy of the tensors, in memory that the next save uses again, page-locked for a GPU; the tensors themselves if there
        is too little memory, and then saving blocks training."""
        named = sorted((file, name) for file in tensors for name in tensors[file])  # in the same order on all ranks
        every = {(file, name): tensors[file][name].detach() for file, name in named}
        new = {key: tensor for key, tensor in every.items() if key not in self.copies and self.world.rank == 0}
        free = runtime.free_memory(torch.device("cpu")) if self.world.size == 1 else None
        if new and free is not None and free < 2 * sum(tensor.nbytes for tensor in new.values()):
            return tensors
        self.copies |= {key: torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda) for key, t in new.items()}
        device = next(iter(every.values())).device  # of the weights
        for (key, tensor), holder in zip(every.items(), holders(list(every.values()), self.world), strict=True):
            found = to_rank_0(tensor, holder, device, self.world)
            if self.world.rank == 0:
                self.copies[key].copy_(found, non_blocking=True)
        runtime.synchronize(device)
        if self.world.rank:
            return {}
        return {file: {name: self.copies[file, name] for name in named} for file, named in tensors.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown()
