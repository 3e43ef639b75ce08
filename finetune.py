"""Fine-tune a pretrained checkpoint into a chat model, on questions and answers; or a chat model on preferences.

    python finetune.py --init_from out/run --data qa.jsonl --out_dir out/chat
    python finetune.py --init_from out/run --data qa.jsonl:2 more.csv --out_dir out/chat --replay_data out/mine --lora_rank 8
    python finetune.py --init_from out/chat --data preferences.jsonl --out_dir out/better
    python finetune.py config/demo_finetune.toml

The loss is on the assistant's tokens and the end token after them; of {"prompt", "chosen", "rejected"} it is DPO's
(papagaio/batches/preferences.py). The loop is train.fit. At the end the model is asked the questions of --test_data, which it has
never seen.
"""

import math
import random
import sys
from collections.abc import Sequence
from itertools import chain, groupby
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import ValidationError, model_validator

from papagaio.batches.questions import Report, hold_out, parse_source, read_conversations, read_examples, select
from papagaio.errors import UserError, run
from papagaio.options import option, parse
from papagaio.training.options import RunOptions

# Learning rates are a part of pretraining's, so that what was learnt stays; by the optimizer that the checkpoint was trained
# with, which goes on, but for adapters, and for preferences. Found on the demo's development questions (LOG.md).
RECIPES: dict[str, dict[str, Any]] = {
    "muon": {"learning_rate": 0.0025, "embedding_learning_rate": 0.07, "head_learning_rate": 0.0035, "decay_fraction": 1.0},
    "adamw": {"learning_rate": 1e-4, "warmup_steps": 20, "beta1": 0.9, "decay_fraction": 1.0, "grad_clip": 1.0},
    "lora": {"optimizer": "adamw", "learning_rate": 1e-2, "beta1": 0.9, "decay_fraction": 1.0},
    "preferences": {"optimizer": "adamw", "learning_rate": 2e-5, "beta1": 0.9, "decay_fraction": 1.0, "grad_clip": 1.0},
}
EPOCHS, LEAST_STEPS = 3, 150  # where the user does not say max_steps: a small model needs some steps to learn the template


class FinetuneOptions(RunOptions):
    """Options of finetune.py."""

    init_from: Path = option(..., "checkpoint to start from: a run, or a checkpoint directory")
    base: Path | None = option(None, "where init_from holds adapters: the checkpoint that they belong to, if it has moved")
    data: tuple[str, ...] = option(
        ..., "questions and answers: .jsonl, .json, .csv or .parquet files; FILE:2 has each twice an epoch", min_length=1
    )
    val_data: Path | None = option(None, "held-out questions for the validation loss (default: a part of --data)")
    val_fraction: float = option(
        0.05,
        "part of --data held out, by a hash, where there is no --val_data; 0: none, val_loss is of what is learnt",
        ge=0,
        lt=1,
    )
    test_data: Path | None = option(None, "questions asked at the end: exact match of greedy answers")
    control_data: Path | None = option(None, "questions whose answers were never told: what guessing reaches")
    preview: int | None = option(None, "show so many training examples, what is learnt in colour, and stop", ge=1)
    train_on: Literal["all", "last"] = option("all", "assistant turns of a conversation that are learnt")
    too_long: Literal["drop", "truncate"] = option("drop", "conversations longer than the context: drop, or cut the answer")
    keep_duplicates: bool = option(False, "keep conversations that were there before")
    packing: bool = option(True, "several conversations in a row, each seeing itself alone, so that nothing is lost to padding")
    replay_data: Path | None = option(None, "dataset directory with pretraining text, mixed in against forgetting")
    replay: float = option(
        0.1,
        "share of a step's sequences that are windows of pretraining text, as long as the context, of --replay_data",
        ge=0,
        lt=1,
    )
    replay_weight: float = option(1.0, "weight of the pretraining text's loss beside that of the answers", ge=0)
    lora_rank: int = option(0, "rank of adapters that are trained in place of the weights (0: the weights themselves)", ge=0)
    lora_alpha: float | None = option(None, "adapters count alpha / rank (default: twice the rank)", gt=0)
    lora_dropout: float = option(0.0, "share of what goes into an adapter dropped in training", ge=0, lt=1)
    lora_targets: tuple[str, ...] = option((), "linear layers with adapters: q k v proj fc gate head (default: all there are)")
    lora_merge: bool = option(False, "at the end, write merged/ as well: a checkpoint with the adapters added in")
    freeze_layers: int = option(0, "blocks, from the first, that stay as they are", ge=0)
    freeze_embeddings: bool = option(False, "the embeddings (and a head that shares their table) stay as they are")
    dpo_beta: float = option(0.1, "preferences: how much the model is held to what it was; smaller moves it more", gt=0)
    dropout: float = option(0.0, "share of activations dropped in training", ge=0, lt=1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for word in self.data:
            parse_source(word)
        for path in (self.val_data, self.test_data, self.control_data):
            if path is not None and not path.is_file():
                raise ValueError(f"{path}: no such file; questions and answers in .jsonl, .json, .csv or .parquet are needed")
        if self.lora_rank and (self.freeze_layers or self.freeze_embeddings):
            raise ValueError("lora_rank trains adapters alone: nothing else is left to freeze")
        if self.lora_merge and not self.lora_rank:
            raise ValueError("lora_merge needs adapters: give a lora_rank")
        return self


if __name__ == "__main__":  # a wrong option is refused before torch is imported, which takes a second or two
    OPTIONS = parse(FinetuneOptions, doc=__doc__)

from dataclasses import asdict, dataclass

import torch

from model import GPT, GPTConfig
from papagaio import runtime
from papagaio.batches import preferences as preference
from papagaio.batches.conversations import Conversation, Preference
from papagaio.batches.packing import ConversationLoader, Example, Mixture, encode, evaluation_batches, fingerprint
from papagaio.batches.preferences import Pair, PairLoader
from papagaio.batches.windows import ValidationWindows, WindowLoader, likelihood
from papagaio.corpus.dataset import Dataset
from papagaio.evaluation import answer_questions, evaluate_loss, exact_match_line, exact_match_table
from papagaio.runs.checkpoint import Checkpoint, contents, open_checkpoint, write_checkpoint
from papagaio.runs.directory import owned
from papagaio.terminal import colours
from papagaio.tokenizer import Tokenizer
from papagaio.training import lora
from papagaio.training.dry_run import dry_run
from papagaio.training.metrics import read_metrics
from train import fit


def main(config: FinetuneOptions) -> None:
    checkpoint = open_checkpoint(config.init_from, config.base)
    checkpoint.outline(lambda fields: GPT(GPTConfig(**fields)))  # refuses a model.json that the weights are not of
    tokenizer, block_size = checkpoint.tokenizer, checkpoint.model_fields["block_size"]
    test = read_conversations(config.test_data) if config.test_data else []
    control = read_conversations(config.control_data) if config.control_data else []
    data = read_data(config, tokenizer, block_size, test)
    if config.preview is not None:
        for example in data.training[: config.preview]:
            print(*marked(example, tokenizer, colours(sys.stdout)), sep="\n")
        return
    print("the first example, and what of it is learnt:", file=sys.stderr)
    print(*marked(data.training[0], tokenizer, colours(sys.stderr)), sep="\n", file=sys.stderr)
    config = with_recipe(config, checkpoint, data)
    replay, replayed = open_replay(config, tokenizer, block_size, data)

    device = runtime.pick_device(config.device)
    dtype = runtime.pick_dtype(config.dtype, device)
    torch.manual_seed(config.seed)

    def make_model() -> GPT:
        return GPT(GPTConfig(**checkpoint.model_fields | {"dropout": config.dropout}))

    if config.dry_run:
        loader = make_loader(config, data, block_size, replay, torch.zeros(len(data.training), 2))
        if data.pairs:
            loader = preference.AsAnswers(loader)
        dry_run(lambda: restricted(make_model(), config), loader, config, device)
        return
    model = make_model()
    checkpoint.load_model(model)
    restricted(model, config).to(device)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = trained / model.num_parameters()
    print(f"{trained:,} of {model.num_parameters():,} parameters are trained ({share:.1%}), on {device}", file=sys.stderr)

    with owned(config):
        reference = None
        if data.pairs:
            stored = config.out_dir / "reference.safetensors"
            everything = [*data.training, *data.validation]
            reference = preference.stored_reference(stored, model, checkpoint.weights_sha256, everything, dtype)
            objective = preference.objective(config.dpo_beta)
            held_out, size = reference[len(data.training) :], config.micro_batch_size or config.batch_size
            parts = [slice(i, i + size) for i in range(0, len(data.validation), size)]
            validation = [preference.collate_pairs(data.validation[part], held_out[part]) for part in parts]
        else:
            objective = likelihood
            validation = evaluation_batches(data.validation, block_size, config.micro_batch_size or 64, config.packing)

        loader = make_loader(config, data, block_size, replay, reference)

        def evaluate() -> dict[str, float]:
            if data.pairs:
                found = preference.evaluate_pairs(model, validation, config.dpo_beta, dtype)
            else:
                found = evaluate_loss(model, validation, tokenizer, dtype)
            if replayed is not None:
                found["replay_bpb"] = evaluate_loss(model, replayed, tokenizer, dtype)["val_bpb"]
            return found

        def preview() -> str:
            """The model's answer to the first held-out question."""
            answer = answer_questions(model, tokenizer, data.shown[:1], block_size, dtype)[0]
            return f"{data.shown[0].messages[-2].content} -> {answer.text}"

        facts = {"stage": "finetune", "objective": "preferences" if data.pairs else "answers"}
        facts |= {"base_sha256": checkpoint.weights_sha256, "data_sha256": data.sha256}
        facts |= {"replay_sha256": replay.dataset.sha256 if replay is not None else None}
        fit(model, loader, evaluate, preview, tokenizer, config, facts, objective)
        if config.patience:
            open_checkpoint(config.out_dir).load_model(model)  # the best one
        if config.lora_merge:
            plain = make_model()
            result = open_checkpoint(config.out_dir, config.init_from)
            result.load_model(plain)
            path = config.out_dir / "merged"
            write_checkpoint(path, contents(plain, asdict(plain.config), [], result.state), tokenizer)
            print(f"{path}: a checkpoint with the adapters added in", file=sys.stderr)
        report(model, tokenizer, test, control, dtype, config)


@dataclass(frozen=True)
class Data:
    """What is learnt, what it is measured on, and the held-out conversations that are shown."""

    training: list[Example] | list[Pair]
    mixture: Mixture
    validation: list[Example] | list[Pair]
    shown: list[Conversation]

    @property
    def pairs(self) -> bool:
        return isinstance(self.training[0], Pair)

    @property
    def sha256(self) -> str:
        """Identity of what is learnt, wherever its files stand."""
        return fingerprint(chain.from_iterable(self.training) if self.pairs else self.training)


def read_data(config: FinetuneOptions, tokenizer: Tokenizer, block_size: int, test: Sequence[Conversation]) -> Data:
    """The conversations or preferences of the files, as examples; what there is, and what was left out and why, is printed.

    Raises UserError where nothing is left to learn, or to validate with.
    """
    left_out = Report()

    def encoded(rows: Sequence[Conversation] | Sequence[Preference]) -> list[Example] | list[Pair]:
        if rows and isinstance(rows[0], Preference):
            return preference.encode_pairs(rows, tokenizer, block_size, left_out, config.too_long)
        return encode(rows, tokenizer, block_size, left_out, config.too_long, config.train_on)

    sources = [parse_source(word) for word in config.data]
    known: set[str] = set()
    files = [select(read_examples(source.path), left_out, known, config.keep_duplicates) for source in sources]
    if config.val_data is not None:
        held_out = select(read_examples(config.val_data), left_out, set(), config.keep_duplicates)
        aside = {row.said for row in held_out}
        for place in (row.place for rows in files for row in rows if row.said in aside):
            left_out.drop("held out in --val_data", place)
        files = [[row for row in rows if row.said not in aside] for rows in files]
    else:
        parts = [hold_out(rows, config.val_fraction) for rows in files]
        files, held_out = [training for training, _ in parts], [row for _, rows in parts for row in rows]
        if config.val_fraction == 0:
            held_out = [row for rows in files for row in rows]
            print("nothing is held out: val_loss is of the conversations that are learnt", file=sys.stderr)
    kinds = {type(row).__name__ for rows in (*files, held_out) for row in rows}
    if len(kinds) > 1:
        raise UserError(f"{config.data[0]}: {' and '.join(sorted(kinds))} rows do not go together; they need runs of their own")
    examples, validation = [encoded(rows) for rows in files], encoded(held_out)
    total = [example for part in examples for example in part]

    tokens = [part for item in total for part in (item if isinstance(item, Pair) else [item])]
    supervised = sum(int(part.learnt[1:].sum()) for part in tokens)
    print(
        f"{len(total):,} {'preferences' if 'Preference' in kinds else 'conversations'} to learn, {len(validation):,} held out; "
        f"{sum(len(part.ids) for part in tokens):,} tokens, {supervised:,} of them supervised; the longest has "
        f"{max((len(part.ids) for part in tokens), default=0):,}, the context {block_size:,}",
        file=sys.stderr,
    )
    for line in left_out.lines():
        print(line, file=sys.stderr)
    if not total:
        raise UserError(f"{left_out.first(sources[0].path)}; nothing is left to learn from {', '.join(config.data)}")
    if not validation:
        where = left_out.first(config.val_data or sources[0].path)
        raise UserError(f"{where}; no conversation is left to validate with: name a --val_data file, or a larger --val_fraction")
    asked = known & {conversation.said for conversation in test}
    if asked:
        print(
            f"warning: {len(asked):,} of the {len(test):,} --test_data questions are in --data with their answers",
            file=sys.stderr,
        )
    used = [(part, source.weight) for part, source in zip(examples, sources, strict=True) if part]
    mixture = Mixture([len(part) for part, _ in used], [weight for _, weight in used], config.seed)
    if not mixture.size:
        raise UserError(f"{config.data[0]}: the weights of the files leave nothing to learn; give larger ones")
    shown = [row if isinstance(row, Conversation) else Conversation(messages=[*row.messages, row.chosen]) for row in held_out]
    return Data(total, mixture, validation, shown)


def with_recipe(config: FinetuneOptions, checkpoint: Checkpoint, data: Data) -> FinetuneOptions:
    """The options with what the user has not chosen: the learning rates of what is to be done, and the steps for the data."""
    chosen = config.model_dump(exclude_unset=True)
    optimizer = chosen.get("optimizer", checkpoint.state.get("optimizer", "muon"))
    recipe = RECIPES["preferences" if data.pairs else "lora" if config.lora_rank else optimizer]
    steps = chosen.get("max_steps")
    if steps is None:
        steps = max(LEAST_STEPS, math.ceil(EPOCHS * data.mixture.size / config.batch_size))
        print(f"max_steps {steps:,}: {EPOCHS} times through the data, and {LEAST_STEPS} at least", file=sys.stderr)
    fitted = {"optimizer": optimizer, "max_steps": steps, "eval_interval": max(1, math.ceil(steps / 5))}
    try:
        return FinetuneOptions(**fitted | recipe | chosen)
    except ValidationError as error:
        raise UserError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None


def restricted(model: GPT, config: FinetuneOptions) -> GPT:
    """The model, in place, with only that left to train which the options say. Raises UserError where they do not fit it."""
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    if config.lora_rank:
        targets = config.lora_targets or [name for name in lora.TARGETS if name in names]
        alpha = config.lora_alpha or 2 * config.lora_rank
        try:
            lora.add_adapters(model, targets, config.lora_rank, alpha, config.lora_dropout)
        except ValueError as error:
            raise UserError(f"--lora_targets: {error}; it has {' '.join(sorted(names))}") from None
    if config.freeze_layers > len(model.blocks):
        raise UserError(f"--freeze_layers={config.freeze_layers}: the model has {len(model.blocks)} blocks")
    model.blocks[: config.freeze_layers].requires_grad_(False)
    if config.freeze_embeddings:
        for name, parameter in model.named_parameters():
            if "embed" in name:
                parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError("--freeze_layers and --freeze_embeddings leave nothing to train")
    return model


def open_replay(
    config: FinetuneOptions, tokenizer: Tokenizer, block_size: int, data: Data
) -> tuple[WindowLoader | None, ValidationWindows | None]:
    """Pretraining text to mix in, and its held-out split, on which forgetting is measured; None where there is none."""
    if config.replay_data is None:
        return None, None
    dataset = Dataset(config.replay_data)
    if dataset.tokenizer.sha256 != tokenizer.sha256:
        raise UserError(f"{config.replay_data}: its tokenizer is not the checkpoint's; prepare it with --tokenizer DIR")
    validation = ValidationWindows(dataset, block_size, max(1, 8192 // block_size), config.eval_tokens)
    if config.replay == 0 or config.replay_weight == 0:
        return None, validation
    windows = max(1, round(config.replay / (1 - config.replay) * config.batch_size))
    length = sum(item.length for item in data.training) / len(data.training)
    print(
        f"replay: a step has {windows:,} windows of {block_size:,} tokens of pretraining text beside {config.batch_size:,} "
        f"conversations of {length:.0f} tokens",
        file=sys.stderr,
    )
    return WindowLoader(dataset, "train", block_size, windows, config.seed), validation


def make_loader(
    config: FinetuneOptions, data: Data, block_size: int, replay: WindowLoader | None, reference: torch.Tensor | None
) -> ConversationLoader | PairLoader:
    """The batches of a step; of pairs with the `reference` log-probabilities of those that are learnt, and maybe more."""
    options = {"replay": replay, "replay_weight": config.replay_weight}
    if data.pairs:
        return PairLoader(data.training, reference, data.mixture, config.batch_size, **options)
    return ConversationLoader(data.training, data.mixture, config.batch_size, block_size, packing=config.packing, **options)


def marked(example: Example | Pair, tokenizer: Tokenizer, in_colour: bool) -> list[str]:
    """An example's text; what is learnt is green, or between [[ and ]]. Of a pair, both answers."""
    if isinstance(example, Pair):
        sides = zip(("chosen: ", "rejected: "), example, strict=True)
        return [name + line for name, side in sides for line in marked(side, tokenizer, in_colour)]
    start, end = ("\x1b[32m", "\x1b[0m") if in_colour else ("[[", "]]")
    text = ""
    for learnt, group in groupby(zip(example.ids.tolist(), example.learnt.tolist(), strict=True), key=lambda pair: pair[1]):
        piece = tokenizer.decode(token for token, _ in group)
        text += f"{start}{piece}{end}" if learnt else piece
    return [text]


def report(
    model: GPT,
    tokenizer: Tokenizer,
    test: list[Conversation],
    control: list[Conversation],
    dtype: torch.dtype,
    config: FinetuneOptions,
) -> None:
    """Print, on standard output, what was forgotten, and of the held-out questions a table by kind, ten of the answers, and
    the exact match."""
    bits = [line["replay_bpb"] for line in read_metrics(config.out_dir / "metrics.jsonl") if "replay_bpb" in line]
    if bits:
        change = bits[-1] / bits[0] - 1
        print(f"held-out text of {config.replay_data}: {bits[0]:.4f} bits per byte before, {bits[-1]:.4f} after ({change:+.1%})")
    if control:
        answers = answer_questions(model, tokenizer, control, model.config.block_size, dtype)
        print(f"never told, so guessed: exact match {exact_match_line(answers)}\n")
    if test:
        answers = answer_questions(model, tokenizer, test, model.config.block_size, dtype)
        print(exact_match_table(answers) + "\n")
        for answer in random.Random(config.seed).sample(answers, min(10, len(answers))):
            question, right = (message.content for message in answer.conversation.messages[-2:])
            verdict = "right" if answer.correct else f"wrong, it is {right}"
            print(f"{question} -> {answer.text}   {verdict}")
        ended = sum(answer.ended for answer in answers) / len(answers)
        print(f"\nanswers that ended by themselves: {ended:.3f}")
        print(f"held-out exact match {exact_match_line(answers)}")


if __name__ == "__main__":
    run(main, OPTIONS)
