"""What a run is, and how far it has come: together with the options they make up a checkpoint's state.json."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

# What helps against overfitting, by stage. Fine-tuning has few rows, and the size of its model is given.
OVERFITTING_CURES = {
    "pretrain": "more text, fewer --max_steps, --dropout=0.2, --weight_decay=0.3, or a smaller model (--n_layer, --n_embd)",
    "finetune": (
        "fewer --max_steps, or --patience=2; more questions, or each question in several phrasings; --replay_data with the text "
        "of pretraining; a lower --learning_rate; or adapters (--lora_rank=8)"
    ),
}


@dataclass(frozen=True)
class Identity:
    """What a resumed run must have in common with the run that it continues, besides its options."""

    stage: str  # pretrain or finetune
    data_sha256: str
    objective: str | None = None  # of fine-tuning: answers or preferences
    base_sha256: str | None = None  # of the weights that fine-tuning starts from
    replay_sha256: str | None = None
    base_license: str | None = None  # of the released model that it goes back to


@dataclass
class Progress:
    """How far a run has come. Losses are in nats; `train_loss` is the mean over the steps of the last training line, without the
    pretraining text that fine-tuning replays."""

    step: int = 0
    tokens: int = 0  # predicted tokens so far: the targets other than -100
    metrics_lines: int = 0
    loss_sum: float = 0.0  # over the steps since the last training line
    loss_count: int = 0
    replay_sum: float | None = None  # as loss_sum, of the replayed text
    train_loss: float | None = None
    evaluated_step: int | None = None
    best_val_loss: float | None = None
    best_step: int = 0
    best_train_loss: float | None = None  # train_loss at best_step
    unimproved: int = 0  # evaluations since best_step
    overfitting_reported: bool = False
    recent_losses: list[float] = field(default_factory=list)  # of the steps that tell which loss is usual
    nonfinite: int = 0  # steps in a row whose loss or gradient was not finite
    micro_batch_size: int | None = None  # in sequences, if memory was too small for the one in the options
    loss_scale: dict[str, Any] | None = None  # of float16's gradient scaler

    def add_step(self, losses: Sequence[float], tokens: int) -> None:
        """Count a step. `losses` are those of its batches: the training data, and the replayed text if there is any. A step with
        a loss that is not finite does not count in the means."""
        self.step += 1
        self.tokens += tokens
        if all(map(math.isfinite, losses)):
            self.loss_sum, self.loss_count = self.loss_sum + losses[0], self.loss_count + 1
            if len(losses) > 1:
                self.replay_sum = (self.replay_sum or 0.0) + sum(losses[1:])

    def close_line(self) -> dict[str, float]:
        """The mean losses over the steps since this was called last: train_loss, and replay_loss if text is replayed."""
        self.train_loss = self.loss_sum / self.loss_count
        means = {"train_loss": self.train_loss}
        if self.replay_sum is not None:
            means["replay_loss"] = self.replay_sum / self.loss_count
        self.loss_sum, self.loss_count, self.replay_sum = 0.0, 0, None
        return means

    def note_evaluation(self, val_loss: float) -> bool:
        """Take in the validation loss of the current step; returns whether it is the lowest so far."""
        self.evaluated_step = self.step
        if self.best_val_loss is None or val_loss < self.best_val_loss:
            self.best_val_loss, self.best_step, self.best_train_loss, self.unimproved = val_loss, self.step, self.train_loss, 0
            return True
        self.unimproved += 1
        return False

    def overfitting_notice(self, val_loss: float, epochs: float, stage: str) -> str | None:
        """A warning with what helps in this stage, once, if the validation loss has clearly risen since its best, in at least two
        evaluations in a row, while the training loss has fallen. Less than 2 % and 0.02 nats is noise: 0.0091 -> 0.0092 is no
        overfitting."""
        if self.overfitting_reported or self.best_train_loss is None or self.unimproved < 2:
            return None
        risen = val_loss - self.best_val_loss
        if risen <= max(0.02, 0.02 * self.best_val_loss) or self.train_loss >= self.best_train_loss:
            return None
        self.overfitting_reported = True
        return (
            f"warning: overfitting. Since step {self.best_step:,} the validation loss has risen from {self.best_val_loss:.4f} to "
            f"{val_loss:.4f} while the training loss has fallen from {self.best_train_loss:.4f} to {self.train_loss:.4f}: after "
            f"{epochs:.1f} epochs the model memorises its training data. checkpoints/best keeps step {self.best_step:,}. What "
            f"helps: {OVERFITTING_CURES[stage]}."
        )

    def gave_up(self, patience: int) -> bool:
        """Whether `patience` evaluations in a row have brought no lower validation loss; 0 never gives up."""
        return bool(patience) and self.unimproved >= patience
