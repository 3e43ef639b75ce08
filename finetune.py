"""Fine-tune a pretrained checkpoint into a chat model, on questions and answers.

    python finetune.py --init_from out/run --data qa.jsonl --out_dir out/chat
    python finetune.py config/demo_finetune.toml

The loss is on the assistant's tokens and the end token after them; the loop is train.fit. At the end the model is asked the
questions of --test_data, which it has never seen.
"""

import os
import random
import sys
from itertools import groupby
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError, model_validator

from papagaio.config import RunOptions, UserError, option, parse, run

# Learning rates are a part of pretraining's, so that what was learnt stays; by the optimizer that the checkpoint was trained
# with, which goes on. Found on the demo's development questions (LOG.md).
RECIPES: dict[str, dict[str, Any]] = {
    "muon": {"learning_rate": 0.0025, "embedding_learning_rate": 0.07, "head_learning_rate": 0.0035, "decay_fraction": 1.0},
    "adamw": {"learning_rate": 1e-4, "warmup_steps": 20, "beta1": 0.9, "decay_fraction": 1.0, "grad_clip": 1.0},
}


class FinetuneOptions(RunOptions):
    """Options of finetune.py."""

    init_from: Path = option(..., "checkpoint to start from: a run, or a checkpoint directory")
    data: tuple[Path, ...] = option(..., "questions and answers in JSON lines", min_length=1)
    val_data: Path | None = option(None, "held-out questions for the validation loss (default: a part of --data)")
    val_fraction: float = option(0.05, "part of --data held out where there is no --val_data", gt=0, lt=1)
    test_data: Path | None = option(None, "questions asked at the end: exact match of greedy answers")
    control_data: Path | None = option(None, "questions whose answers were never told: what guessing reaches")
    replay_data: Path | None = option(None, "dataset directory with pretraining text, mixed in against forgetting")
    replay: float = option(1.0, "weight of the pretraining text's loss beside that of the answers", ge=0)
    replay_batch_size: int = option(8, "windows of pretraining text in each step", ge=1)
    dropout: float = option(0.0, "share of activations dropped in training", ge=0, lt=1)

    @model_validator(mode="after")
    def _files(self) -> Self:
        for path in (*self.data, self.val_data, self.test_data, self.control_data):
            if path is not None and not path.is_file():
                raise ValueError(f"{path}: no such file; questions and answers in JSON lines are needed")
        return self


if __name__ == "__main__":  # a wrong option is refused before torch is imported, which takes a second or two
    OPTIONS = parse(FinetuneOptions, doc=__doc__)

import torch

from model import GPT, GPTConfig
from papagaio import runtime
from papagaio.checkpoint import open_checkpoint
from papagaio.dialogue import Conversation, Tokens, read_conversations, render
from papagaio.dryrun import dry_run
from papagaio.evaluation import answer_questions, exact_match_line, exact_match_table
from papagaio.loader import Batch, WindowLoader, permute
from papagaio.shards import Dataset, share
from papagaio.tokenizer import Tokenizer
from train import fit


def main(config: FinetuneOptions) -> None:
    checkpoint = open_checkpoint(config.init_from)
    chosen = config.model_dump(exclude_unset=True)
    optimizer = chosen.get("optimizer", checkpoint.state["optimizer"])
    try:
        config = FinetuneOptions(**{"optimizer": optimizer} | RECIPES[optimizer] | chosen)
    except ValidationError as error:
        raise UserError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
    tokenizer = checkpoint.tokenizer
    model = GPT(GPTConfig(**checkpoint.model_fields | {"dropout": config.dropout}))
    block_size = model.config.block_size

    conversations = [conversation for path in config.data for conversation in read_conversations(path)]
    if config.val_data is not None:
        held_out = read_conversations(config.val_data)
    else:
        held_out = [c for c in conversations if share(c.said) < config.val_fraction]
        conversations = [c for c in conversations if share(c.said) >= config.val_fraction]
        if not held_out or not conversations:
            raise UserError(f"{config.data[0]}: too few conversations to hold some out; name a --val_data file")
    test = read_conversations(config.test_data) if config.test_data else []
    control = read_conversations(config.control_data) if config.control_data else []
    training = fitting(conversations, tokenizer, block_size)
    validation = [pad(group, 1.0) for group in _groups(fitting(held_out, tokenizer, block_size), config.batch_size)]
    replay = None
    if config.replay_data is not None and config.replay > 0:
        dataset = Dataset(config.replay_data)
        if dataset.tokenizer.sha256 != tokenizer.sha256:
            raise UserError(f"{config.replay_data}: its tokenizer is not the checkpoint's; prepare it with --tokenizer DIR")
        replay = WindowLoader(dataset, "train", block_size, config.replay_batch_size, config.seed)
    loader = ConversationLoader(training, config, replay)
    show_example(training[0], tokenizer)

    device = runtime.pick_device(config.device)
    dtype = runtime.pick_dtype(config.dtype, device)
    if config.dry_run:
        dry_run(lambda: GPT(model.config), loader, config, device)
        return
    checkpoint.load_model(model)
    model.to(device)

    def preview() -> str:
        """The model's answer to the first held-out question."""
        answer = answer_questions(model, tokenizer, held_out[:1], block_size, dtype)[0]
        return f"{held_out[0].messages[-2].content} -> {answer.text}"

    fit(model, loader, validation, preview, tokenizer, config, stage="finetune")
    report(model, tokenizer, test, control, dtype, config.seed)


class ConversationLoader:
    """Batches of conversations, every one once an epoch: `loader(step)` is a pure function of step and seed.

    The conversations of a step are sorted by length and padded in groups, so that little is computed for padding. Each
    supervised token weighs the same, whatever group it is in, and the weights of the answers sum to 1; those of the
    pretraining text, where there is some, sum to config.replay more.
    """

    def __init__(self, training: list[Tokens], config: FinetuneOptions, replay: WindowLoader | None) -> None:
        self.training, self.config, self.replay = training, config, replay

    def __call__(self, step: int) -> list[Batch]:
        size, count = self.config.batch_size, len(self.training)
        chosen = []
        for number in range(step * size, (step + 1) * size):
            epoch, index = divmod(number, count)
            chosen.append(self.training[permute(index, count, self.config.seed, epoch)])
        supervised = sum(sum(tokens.learnt) for tokens in chosen)
        parts = [pad(group, 1 / supervised) for group in _groups(chosen, self.config.micro_batch_size or max(1, size // 4))]
        if self.replay is not None:
            parts += [b._replace(weights=b.weights * self.config.replay) for b in self.replay(step)]
        return parts

    def epochs(self, step: int) -> float:
        """Passes over the conversations after `step` steps."""
        return step * self.config.batch_size / len(self.training)


def fitting(conversations: list[Conversation], tokenizer: Tokenizer, block_size: int) -> list[Tokens]:
    """The conversations as tokens; those longer than the context are dropped, and counted on standard error."""
    rendered = [(c, render(tokenizer, c.messages)) for c in conversations]
    too_long = [(c, tokens) for c, tokens in rendered if len(tokens.ids) > block_size + 1]
    for conversation, tokens in too_long[:5]:
        print(f"dropped: {conversation.place}: {len(tokens.ids)} tokens, the context has {block_size}", file=sys.stderr)
    kept = [tokens for _, tokens in rendered if len(tokens.ids) <= block_size + 1]
    if not kept:
        raise UserError(f"{conversations[0].place}: every conversation is longer than the context of {block_size} tokens")
    supervised = sum(sum(tokens.learnt) for tokens in kept)
    print(
        f"{len(kept):,} conversations, {sum(len(tokens.ids) for tokens in kept):,} tokens, {supervised:,} of them supervised; "
        f"{len(too_long):,} dropped as too long",
        file=sys.stderr,
    )
    return kept


def pad(group: list[Tokens], weight: float) -> Batch:
    """Conversations as a batch as wide as the longest, padded on the right; targets are -100 but where answers are learnt."""
    width = max(len(tokens.ids) for tokens in group) - 1
    ids = torch.zeros((len(group), width), dtype=torch.int64)
    targets = torch.full((len(group), width), -100)
    for row, tokens in enumerate(group):
        length = len(tokens.ids) - 1
        ids[row, :length] = torch.tensor(tokens.ids[:-1])
        wanted = torch.tensor(tokens.learnt[1:])
        targets[row, :length] = torch.where(wanted, torch.tensor(tokens.ids[1:]), -100)
    return Batch(ids, targets, weight * (targets != -100).float())


def _groups(conversations: list[Tokens], size: int) -> list[list[Tokens]]:
    """Conversations of like length together, `size` in a group."""
    ordered = sorted(conversations, key=lambda tokens: len(tokens.ids))
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def show_example(tokens: Tokens, tokenizer: Tokenizer) -> None:
    """Print the first example; what is learnt is green on a terminal, between [[ and ]] elsewhere."""
    coloured = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    start, end = ("\x1b[32m", "\x1b[0m") if coloured else ("[[", "]]")
    text = ""
    for learnt, group in groupby(zip(*tokens, strict=True), key=lambda pair: pair[1]):
        piece = tokenizer.decode(token for token, _ in group)
        text += f"{start}{piece}{end}" if learnt else piece
    print(f"the first example, what is learnt in {'green' if coloured else '[[ ]]'}: {text}", file=sys.stderr)


def report(
    model: GPT, tokenizer: Tokenizer, test: list[Conversation], control: list[Conversation], dtype: torch.dtype, seed: int
) -> None:
    """Ask the held-out questions and print, on standard output, a table by kind, ten of the answers, and the exact match."""
    if control:
        answers = answer_questions(model, tokenizer, control, model.config.block_size, dtype)
        print(f"never told, so guessed: exact match {exact_match_line(answers)}\n")
    if test:
        answers = answer_questions(model, tokenizer, test, model.config.block_size, dtype)
        print(exact_match_table(answers) + "\n")
        for answer in random.Random(seed).sample(answers, min(10, len(answers))):
            question, right = (message.content for message in answer.conversation.messages[-2:])
            verdict = "right" if answer.correct else f"wrong, it is {right}"
            print(f"{question} -> {answer.text}   {verdict}")
        ended = sum(answer.ended for answer in answers) / len(answers)
        print(f"\nanswers that ended by themselves: {ended:.3f}")
        print(f"held-out exact match {exact_match_line(answers)}")


if __name__ == "__main__":
    run(main, OPTIONS)
