"""Saving during training: the weights are copied, and a thread writes the copy to the disk. Where the memory has no room for a
copy, training waits while one tensor after another is written.

If the disk fails, a warning is printed and training goes on: earlier checkpoints are kept, and the next save tries again.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Self

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from papagaio import runtime
from papagaio.errors import MachineError
from papagaio.files import write_whole
from papagaio.runs.checkpoint import METADATA, Contents, contents, write_checkpoint
from papagaio.runs.directory import prune
from papagaio.runs.tensors import Layout, in_file_order, write_tensors
from papagaio.tokenizer import Tokenizer
from papagaio.training.metrics import RunLog
from papagaio.training.options import RunOptions
from papagaio.training.parallel import ALONE, World
from papagaio.training.plots import plot_losses
from papagaio.training.sharding import holders, to_rank_0

Tensors = dict[tuple[str, str], Tensor]  # by file and name


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
        self.copies: Tensors = {}

    def save(self, model: nn.Module, optimizers: list[torch.optim.Optimizer], state: dict[str, Any]) -> None:
        """Save the state after state["step"] steps, unless it is saved already. Waits for the save before."""
        self.wait()
        if not self.world.on_rank_0(lambda: state["step"] != self.saved):
            return
        found, self.asked = contents(model, optimizers, state), state["step"]
        layouts = {file: {name: (t.shape, t.dtype) for name, t in named.items()} for file, named in found.tensors.items()}
        tensors = {(file, name): found.tensors[file][name] for file, layout in layouts.items() for name in in_file_order(layout)}
        if self.world.on_rank_0(partial(self._has_room, tensors)):
            self._copy(tensors)
            given = {file: {name: self.copies.get((file, name)) for name in layout} for file, layout in layouts.items()}
            if self.world.rank == 0:
                self.tasks.append(self.pool.submit(self._save, self.asked, found._replace(tensors=given)))
        else:
            self._save_one_by_one(found, layouts, self._whole(tensors))

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

    def _has_room(self, tensors: Tensors) -> bool:
        """Whether a copy of the tensors fits into the memory, as far as it can be measured, and leaves as much free."""
        new = sum(tensor.numel() * tensor.element_size() for key, tensor in tensors.items() if key not in self.copies)
        free = runtime.free_memory(torch.device("cpu"))
        return not new or free is None or free >= 2 * new

    def _copy(self, tensors: Tensors) -> None:
        """Copy the tensors into memory that the next save uses again, page-locked for a GPU."""
        device = next(iter(tensors.values())).device  # of the weights
        for key, tensor in self._whole(tensors):
            if self.world.rank == 0:
                if key not in self.copies:
                    self.copies[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self.copies[key].copy_(tensor, non_blocking=True)
        runtime.synchronize(device)

    def _save_one_by_one(self, found: Contents, layouts: dict[str, Layout], arriving: Iterator[tuple[Any, Tensor]]) -> None:
        """Rank 0 writes each tensor as soon as it arrives."""

        def read(name: str) -> Tensor:
            key, tensor = next(arriving)
            assert key[1] == name
            return tensor.cpu()

        if self.world.rank == 0:
            files = {f: partial(write_tensors, layout=named, read=read, metadata=METADATA[f]) for f, named in layouts.items()}
            self._save(self.asked, found._replace(tensors=files))
        for _ in arriving:  # all ranks pass all tensors on, also if rank 0's disk has failed
            pass

    def _whole(self, tensors: Tensors) -> Iterator[tuple[tuple[str, str], Tensor]]:
        """The tensors one by one; rank 0 gets them whole, whichever rank has them. All ranks must take all of them."""
        device = next(iter(tensors.values())).device
        for (key, tensor), holder in zip(tensors.items(), holders(list(tensors.values()), self.world), strict=True):
            yield key, to_rank_0(tensor.detach(), holder, device, self.world)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown()
