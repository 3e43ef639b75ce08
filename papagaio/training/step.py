"""One optimizer step: gradients of micro-batches, checked, then applied. fit, --dry_run and --budget all use it."""

import math
import sys
from typing import Any, NamedTuple

import torch
from torch import nn

from papagaio import kernels, runtime
from papagaio.batches.mixture import mix
from papagaio.batches.windows import Objective
from papagaio.errors import MachineError, is_out_of_memory
from papagaio.training.guard import Places, Say, accepts
from papagaio.training.options import RunOptions
from papagaio.training.progress import Progress


class Step(NamedTuple):
    """What a training step returns: the loss of each of its batches in nats, and the norm of its gradient."""

    losses: list[float]
    grad_norm: float


def prepare_model(model: nn.Module, config: RunOptions) -> None:
    """Switch on in place, in this order, what makes a model train fast: kernels, activation checkpointing, compilation."""
    runtime.keep_memory()
    kernels.accelerate(model)
    if config.activation_checkpointing:
        kernels.checkpoint_activations(model)
    if config.compile:
        runtime.compile_in_place(model, next(model.parameters()).device)
    model.train()


class TrainingStep:
    """`step(batches, places)` trains on the batches of one optimizer step, whose weights sum to 1, in micro-batches.

    `progress` tells which step it is, and keeps what the guard and the out-of-memory retry have to remember.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        objective: Objective,
        config: RunOptions,
        progress: Progress,
        say: Say = lambda text: print(text, file=sys.stderr),
    ) -> None:
        self.model, self.optimizers, self.objective = model, optimizers, objective
        self.config, self.progress, self.say = config, progress, say
        self.device = next(model.parameters()).device
        self.dtype = runtime.pick_dtype(config.dtype, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)  # small float16 gradients are 0
        if self.scaler.is_enabled() and progress.loss_scale:
            self.scaler.load_state_dict(progress.loss_scale)

    def __call__(self, batches: list[Any], places: Places = list) -> Step:
        """Raises MachineError if the loss or the gradient is not finite, or if memory runs out, unless the options say how to go
        on."""
        losses = self.accumulate_gradients(batches)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip or math.inf))
        if accepts(sum(losses), norm, self.scaler.get_scale(), self.progress, self.config, places, self.say):
            for optimizer in self.optimizers:
                optimizer.step()
        self.scaler.update()
        self.model.zero_grad(set_to_none=True)
        return Step(losses, norm)

    def accumulate_gradients(self, batches: list[Any]) -> list[float]:
        """Add up the gradients of all micro-batches in the parameters; returns the loss of each batch. Their sum is minimised.

        If memory runs out, the whole step is repeated with micro-batches of half the size, which progress keeps (with
        config.auto_microbatch), or MachineError names the option to lower.
        """
        wanted = self.config.micro_batch_size or self.config.batch_size
        size = min(wanted, self.progress.micro_batch_size or wanted, max(len(batch.ids) for batch in batches))
        while True:
            # Dropout depends on the seed and the step alone, so that a resumed run repeats it.
            torch.manual_seed(mix(self.config.seed, self.progress.step))
            losses = torch.zeros(len(batches), device=self.device)
            try:
                for number, micro in ((number, micro) for number, batch in enumerate(batches) for micro in batch.split(size)):
                    with runtime.autocast(self.device, self.dtype):
                        part = self.objective(self.model, micro.to(self.device))
                    self.scaler.scale(part).backward()
                    losses[number] += part.detach()
                return losses.tolist()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if not self.config.auto_microbatch or size == 1:
                    lower = "micro_batch_size" if size > 1 else "block_size, or add --activation_checkpointing"
                    raise MachineError(
                        f"out of memory at step {self.progress.step + 1:,}, with {size} sequences at a time: lower {lower} (or "
                        "let --auto_microbatch do it); what was saved is kept, --resume goes on from there"
                    ) from None
            part = micro = None  # release their memory
            self.model.zero_grad(set_to_none=True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            size = self.progress.micro_batch_size = size // 2
            self.say(
                f"out of memory: from step {self.progress.step + 1:,} on {size} sequences at a time, micro_batch_size={size}"
            )
