"""Several processes that train one model: what they share, and how all of them end if one does.

    with World.start() as world:
        main(world.join(config), world)

torchrun or srun starts a process per device. Each computes its part of every batch; the weights of a step's tokens sum to 1 over
all of them, so their gradients are added up. Rank 0 alone locks, writes and prints. With one process, nothing here does anything.
"""

import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from papagaio import runtime
from papagaio.batches.share import Share
from papagaio.batches.windows import Loader
from papagaio.errors import MachineError, UserError
from papagaio.launch import launched
from papagaio.training.ending import Ending, listed

T = TypeVar("T")
ConfigT = TypeVar("ConfigT")
ARRIVAL = timedelta(minutes=2)  # until all processes must have started
LONGEST = timedelta(hours=1)  # that ranks wait for rank 0, which saves and answers questions; who is lost is noticed earlier


@dataclass(frozen=True)
class World:
    """The processes that train together, seen from one of them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    ending: list[Ending] = field(default_factory=list)  # one, after start

    @classmethod
    def start(cls) -> Self:
        """The world of this process. Raises MachineError that names the ranks that have not come in time."""
        rank, size, local_rank = launched()
        if size == 1:
            return cls()
        try:
            store = _connect(rank, size)
            return cls(rank, size, local_rank, [Ending(_meet(store, rank, size), rank, size)])
        except MachineError:
            raise
        except RuntimeError as error:
            if rank > 1:
                sys.exit(1)  # rank 1 says it
            sys.stderr = sys.__stderr__
            raise MachineError(f"rank {rank}: rank 0 cannot be reached: {str(error).splitlines()[0]}") from None

    def join(self, config: ConfigT) -> ConfigT:
        """Connect the ranks; returns the options. Raises UserError if a rank has other options than rank 0."""
        if self.size == 1:
            return config
        device = self.pick_device(config.device)
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        if device.type == "cuda":
            torch.cuda.set_device(device)
        group = dist.PrefixStore("group", self.ending[0].store)
        dist.init_process_group(backend, store=group, rank=self.rank, world_size=self.size, timeout=LONGEST)
        mine = config.model_dump(mode="json")
        first = self.on_rank_0(lambda: mine)
        if differing := [name for name, value in mine.items() if first[name] != value]:
            raise UserError(f"--{differing[0]} differs from rank 0's; all processes of one run need the same options")
        if self.rank == 0:
            print(f"{self.size} processes train together ({backend})", file=sys.stderr)
        return config

    def pick_device(self, name: str) -> torch.device:
        """The device of this process: of several processes on a machine, each has a GPU of its own, or all use the CPU."""
        if self.size == 1:
            return runtime.pick_device(name)
        if name not in ("auto", "cpu", "cuda"):
            raise UserError(f"--device={name}: several processes use cpu, or cuda, one GPU each")
        if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
            return torch.device("cpu")
        if self.local_rank >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise UserError(f"--device={name}: process {self.local_rank + 1} of a machine with {count} GPUs; start {count}")
        return torch.device("cuda", self.local_rank)

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def on_rank_0(self, function: Callable[[], T]) -> T:
        """Call `function` on rank 0; every rank returns its result, which JSON must be able to hold. If it raises, all end."""
        if self.size == 1:
            return function()
        data = json.dumps(function()).encode() if self.rank == 0 else b""
        length = torch.tensor(len(data))
        dist.broadcast(length, 0)
        content = torch.tensor(list(data) if data else [0] * int(length), dtype=torch.uint8)
        dist.broadcast(content, 0)
        return json.loads(bytes(content.tolist()))

    @contextmanager
    def entering(self, context: AbstractContextManager[Any]) -> Iterator[None]:
        """Rank 0 alone enters a context, such as the lock of a run."""
        with ExitStack() as stack:
            self.on_rank_0(lambda: bool(stack.enter_context(context)))
            yield

    def deal(self, items: Iterable[T]) -> Iterator[tuple[T, bool]]:
        """Every size-th item, from `rank` on, and True; all ranks get equally many, because the passes of a sharded model need
        all ranks: what is given a second time comes with False."""
        number, item = -1, None
        for number, item in enumerate(items):
            if number % self.size == self.rank:
                yield item, True
        if (number + 1) % self.size and self.rank >= (number + 1) % self.size:
            yield item, False

    def share(self, loader: Loader) -> Loader:
        """This rank's part of the batches."""
        return loader if self.size == 1 else Share(loader, self.rank, self.size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, given: BaseException | None, trace: Any) -> None:
        error = given
        if self.size == 1:
            return
        if error is None:
            try:
                dist.barrier()  # nobody leaves while rank 0 is still at work
                self.ending[0].stop_watching()
                dist.destroy_process_group()
                return
            except RuntimeError as broken:
                error = broken
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        try:
            self.ending[0].fail(error)
        finally:
            if dist.is_initialized() and dist.get_backend() == "gloo":  # its threads must not outlive the interpreter
                dist.destroy_process_group()
        if error is not given:
            raise error


ALONE = World()


def together(main: Callable[[Any, World], None]) -> Callable[[Any], None]:
    """`main(config, world)` as a function of the options alone, in the world that torchrun or srun has started."""

    def main_in_world(config: Any) -> None:
        with World.start() as world:
            main(world.join(config), world)

    return main_in_world


def _meet(store: Any, rank: int, size: int) -> Any:
    """A part of the store that the ranks of this start have to themselves, when all of them are there.

    torchrun's store outlives its processes: when it starts them again, it still holds what the earlier ones have written, such as
    the addresses at which they listened. So each greets rank 0 with a new word, and rank 0 answers it with the name of the part.
    """
    until, word = time.monotonic() + ARRIVAL.total_seconds(), secrets.token_hex(8)
    store.set(f"hello/{rank}", word)
    missing = set(range(1, size)) if rank == 0 else {0}

    def read(key: str) -> str:
        return store.get(key).decode() if store.check([key]) else ""

    while missing:
        if rank == 0:
            for each in missing:
                store.set(f"answer/{each}", f"{read(f'hello/{each}')} {word}")
            missing = {each for each in missing if read(f"heard/{each}") != word}
        elif (answer := read(f"answer/{rank}").split(" "))[0] == word:
            word, missing = answer[1], set()
            store.set(f"heard/{rank}", word)
        if missing and time.monotonic() > until:
            if rank:
                sys.exit(1)  # rank 0 says who is missing
            raise MachineError(f"{listed(sorted(missing))} missing {ARRIVAL.seconds} seconds after the start")
        time.sleep(0.05)
    return dist.PrefixStore(word, store)


def _connect(rank: int, size: int) -> Any:
    """The store of torchrun, or under srun one that rank 0 opens."""
    found = os.environ
    if "TORCHELASTIC_RUN_ID" in found:
        return next(iter(dist.rendezvous("env://", rank, size, timeout=ARRIVAL)))[0]
    host = found.get("MASTER_ADDR") or found.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")
    port = int(found.get("MASTER_PORT") or 20000 + int(found.get("SLURM_JOB_ID", 0)) % 20000)
    return dist.TCPStore(host, port, size, is_master=rank == 0, timeout=ARRIVAL, wait_for_workers=False)
