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
from papagaio.training.plots import plot_losses


class Saver:
    """Writes checkpoints/step-N, `last`, `best` and loss.png of a run in a thread, in the order of the calls. `saved` is the step
    of the newest checkpoint on the disk. Leaving the `with` block waits for what is being written."""

    def __init__(self, config: RunOptions, tokenizer: Tokenizer, log: RunLog, saved: int | None) -> None:
        self.directory, self.keep, self.tokenizer, self.log = config.out_dir / "checkpoints", config.keep, tokenizer, log
        self.saved = self.asked = saved
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self.tasks: list[Future[Any]] = []
        self.copies: dict[tuple[str, str], Tensor] = {}  # by file and name

    def save(self, model: nn.Module, optimizers: list[torch.optim.Optimizer], state: dict[str, Any]) -> None:
        """Save the state after state["step"] steps, unless it is saved already. Waits for the save before."""
        self.wait()
        if state["step"] == self.saved:
            return
        found = contents(model, optimizers, state)
        copied = self._copied(found.tensors)
        self.asked = state["step"]
        self.tasks.append(self.pool.submit(self._save, self.asked, found._replace(tensors=copied)))
        if copied is found.tensors:
            self.wait()

    def mark_best(self) -> None:
        """Let `best` name the checkpoint that was saved last, once it is on the disk."""
        self.tasks.append(self.pool.submit(self._mark_best, self.asked))

    def plot(self) -> None:
        """Draw the losses so far."""
        arguments = ("loss.png was not drawn", plot_losses, self.log.path, self.log.path.with_name("loss.png"))
        self.tasks.append(self.pool.submit(self._attempt, *arguments))

    def wait(self) -> None:
        """Wait until all tasks so far are done, or have failed."""
        for task in self.tasks:
            task.result()
        self.tasks.clear()

    def finish(self) -> None:
        """Wait for all tasks. Raises MachineError if the last state to be saved is not on the disk."""
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
        every = {(file, name): tensor.detach() for file, named in tensors.items() for name, tensor in named.items()}
        new = {key: tensor for key, tensor in every.items() if key not in self.copies}
        free = runtime.free_memory(torch.device("cpu"))
        if new and free is not None and free < 2 * sum(tensor.nbytes for tensor in new.values()):
            return tensors
        self.copies |= {key: torch.empty_like(t, device="cpu", pin_memory=t.is_cuda) for key, t in new.items()}
        for key, tensor in every.items():
            self.copies[key].copy_(tensor, non_blocking=True)
        for device in {tensor.device for tensor in every.values()}:
            runtime.synchronize(device)
        return {file: {name: self.copies[file, name] for name in named} for file, named in tensors.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown()
