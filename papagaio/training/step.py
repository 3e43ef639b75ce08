"""One optimizer step: gradients of micro-batches, checked, then applied. fit, --dry_run and --budget all use it."""

import math
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from papagaio import kernels, runtime
from papagaio.batches.mixture import mix
from papagaio.batches.windows import Objective
from papagaio.errors import STOP_SIGNALS, MachineError, is_out_of_memory
from papagaio.training.gradients import Gradients
from papagaio.training.guard import Places, Say, accepts
from papagaio.training.options import RunOptions
from papagaio.training.parallel import ALONE, World
from papagaio.training.progress import Progress
from papagaio.training.sharding import whole


class Step(NamedTuple):
    """What a training step returns: the loss of each of its batches in nats, the norm of its gradient, and the number of its
    targets, over all ranks."""

    losses: list[float]
    grad_norm: float
    targets: int


def prepare_model(model: nn.Module, config: RunOptions) -> None:
    """Switch on in place, in this order, what makes a model train fast: kernels, activation checkpointing, compilation."""
    runtime.keep_memory()
    kernels.accelerate(model)
    if config.activation_checkpointing:
        kernels.checkpoint_activations(model)
    if config.compile:
        runtime.compile_in_place(model, next(model.parameters()).device)
    if config.deterministic:
        runtime.be_deterministic()
    model.train()


class TrainingStep:
    """`step(batches, places)` trains on the batches of one optimizer step, whose weights sum to 1, in micro-batches.

    `progress` tells which step it is, and keeps what the guard and the out-of-memory retry have to remember. Of several ranks,
    each is given its part of the batches; after the step, all have the same weights, and the same signal in `stop`, if any.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        objective: Objective,
        config: RunOptions,
        progress: Progress,
        say: Say = lambda text: print(text, file=sys.stderr),
        world: World = ALONE,
        stop: runtime.StopSignal | None = None,
    ) -> None:
        self.model, self.optimizers, self.objective = model, optimizers, objective
        self.config, self.progress, self.say = config, progress, say
        self.world, self.stop, self.gradients = world, stop or runtime.StopSignal(), Gradients(model, world)
        self.device = next(model.parameters()).device
        self.dtype = runtime.pick_dtype(config.dtype, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)  # small float16 gradients are 0
        if self.scaler.is_enabled() and progress.loss_scale:
            self.scaler.load_state_dict(progress.loss_scale)

    def __call__(self, batches: list[Any], places: Places = list) -> Step:
        """Raises MachineError if the loss or the gradient is not finite, or if memory runs out, unless the options say how to go
        on."""
        losses = self.accumulate_gradients(batches)
        targets = sum(int((batch.targets != -100).sum()) for batch in batches)
        told = self._reduced(losses, targets) if self.world.size > 1 else losses
        if self.config.compile and (notice := runtime.compilation_notice()):
            self.say(notice)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = whole(nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip or math.inf))
        *values, norm = torch.cat((told, norm[None])).tolist()  # the one moment at which the program waits for the device
        losses = values[: len(batches)]
        if self.world.size > 1:
            targets, *signals = map(int, values[len(batches) :])
            self.stop.received = next((number for number, count in zip(STOP_SIGNALS, signals, strict=True) if count), None)
        if accepts(sum(losses), norm, self.scaler.get_scale(), self.progress, self.config, places, self.say):
            for optimizer in self.optimizers:
                optimizer.step()
        self.scaler.update()
        self.gradients.clear()
        return Step(losses, norm, targets)

    def _reduced(self, losses: Tensor, targets: int) -> Tensor:
        """The losses and the number of targets of all ranks, and how many ranks have received each of STOP_SIGNALS."""
        signals = [float(self.stop.noted == number) for number in STOP_SIGNALS]
        mine = torch.tensor([targets, *signals], dtype=torch.float64, device=self.device)
        return self.world.sum_(torch.cat((losses.double(), mine)))

    def accumulate_gradients(self, batches: list[Any]) -> Tensor:
        """Add up the gradients of all micro-batches, and of all ranks, in the parameters; returns the loss of each batch, on this
        rank. Their sum is minimised.

        If memory runs out on any rank, all repeat the whole step with micro-batches of half the size, which progress keeps (with
        config.auto_microbatch), or MachineError names the option to lower.
        """
        wanted = self.config.micro_batch_size or self.config.batch_size
        size = min(wanted, self.progress.micro_batch_size or wanted, max(len(batch.ids) for batch in batches))
        while True:
            # Dropout depends on the seed, the step and the rank alone, so that a resumed run repeats it.
            torch.manual_seed(mix(self.config.seed, self.progress.step, *([self.world.rank] if self.world.rank else [])))
            losses, failed = torch.zeros(len(batches), device=self.device), False
            parts = [(number, micro) for number, batch in enumerate(batches) for micro in batch.split(size)]
            try:
                for i, (number, micro) in enumerate(parts, 1):
                    self.gradients.final = i == len(parts)
                    with runtime.autocast(self.device, self.dtype):
                        part = self.objective(self.model, micro.to(self.device))
                    self.scaler.scale(part).backward()
                    losses[number] += part.detach()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                failed = True
            part = micro = None  # release their memory
            if not failed or self.config.auto_microbatch:
                self.gradients.finish()  # also if memory has run out here: the other ranks wait for this one's part of the sums
                if self.config.auto_microbatch:
                    failed = bool(self.world.sum_(torch.tensor(int(failed))))
            if not failed:
                return losses
            if not self.config.auto_microbatch or size == 1:
                lower = "micro_batch_size" if size > 1 else "block_size, or add --activation_checkpointing"
                raise MachineError(
                    f"out of memory at step {self.progress.step + 1:,}, with {size} sequences at a time: lower {lower} (or "
                    "let --auto_microbatch do it); what was saved is kept, --resume goes on from there"
                )
            self.gradients.clear()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            size = self.progress.micro_batch_size = size // 2
            self.say(
                f"out of memory: from step {self.progress.step + 1:,} on {size} sequences at a time, micro_batch_size={size}"
            )
