"""Fine-tune a pretrained checkpoint into a chat model, on questions and answers; or a chat model on preferences.

    python finetune.py --init_from out/run --data qa.jsonl --out_dir out/chat
    python finetune.py --init_from out/run --data qa.jsonl:2 more.csv --out_dir out/chat --replay_data out/mine --lora_rank 8
    python finetune.py --init_from out/chat --data preferences.jsonl --out_dir out/better
    python finetune.py config/demo_finetune.toml

The loss is on the assistant's tokens and the end token after them; for rows of {"prompt", "chosen", "rejected"} it is DPO's
(papagaio/batches/preferences.py). The loop is train.fit. At the end the model is asked the questions of --test_data, which it
has never seen.
"""

import math
import random
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Self

from pydantic import model_validator

from papagaio.batches.mixture import parse_source
from papagaio.batches.options import QuestionOptions
from papagaio.batches.questions import Reader
from papagaio.errors import UserError, run
from papagaio.launch import silence_other_ranks
from papagaio.options import load_toml, option, parse
from papagaio.report import Report
from papagaio.training.options import RunOptions

# Learning rates are a fraction of pretraining's, so that the model keeps what it knows. By the optimizer that the checkpoint was
# trained with, unless adapters or preferences are trained. Found on the demo, Shakespeare and Python's documentation (LOG.md).
RECIPES: dict[str, dict[str, Any]] = {
    "muon": dict(learning_rate=0.00125, embedding_learning_rate=0.035, head_learning_rate=0.00175, decay_fraction=1.0),
    "adamw": dict(learning_rate=1e-4, warmup_steps=20, beta1=0.9, decay_fraction=1.0, grad_clip=1.0),
    "lora": dict(optimizer="adamw", learning_rate=1.5e-3, beta1=0.9, decay_fraction=1.0),
    "preferences": dict(optimizer="adamw", learning_rate=2e-5, beta1=0.9, decay_fraction=1.0, grad_clip=1.0),
}
REPLAY_EVAL_TOKENS = 16384  # of each evaluation of replayed text, without --eval_tokens: a run on sixty questions takes seconds
EPOCHS, LEAST_STEPS = 3, 150  # default of max_steps: a small model needs some steps to learn the template
MUCH_FORGOTTEN = 0.1  # rise of the bits per byte of pretraining text that is warned of
_replay, _lora = partial(option, group="Replay"), partial(option, group="LoRA")
_train = partial(option, group="What is trained")


class FinetuneOptions(RunOptions, QuestionOptions):
    """Options of finetune.py."""

    init_from: Path = option(..., "checkpoint to start from: a run, or a checkpoint directory", group="Run", resume="content")
    replay_data: Path | None = _replay(None, "dataset directory whose text is mixed in against forgetting", resume="content")
    replay: float = _replay(0.1, "fraction of a step's sequences that are windows of --replay_data", ge=0, lt=1)
    freeze_layers: int = _train(0, "number of blocks, from the first, that do not change", ge=0)
    freeze_embeddings: bool = _train(False, "the embeddings (and a head that shares their table) do not change")
    dropout: float = _train(0.0, "fraction of activations that are set to 0 in training", ge=0, lt=1)
    dpo_beta: float = _train(0.1, "preferences: how strongly the model is held to its beginning; smaller moves it more", gt=0)
    lora_rank: int = _lora(0, "rank of adapters that are trained instead of the weights (0: train the weights)", ge=0)
    lora_alpha: float | None = _lora(None, "adapters are scaled by alpha / rank (default: twice the rank)", gt=0)
    lora_targets: tuple[str, ...] = _lora((), "linear layers with adapters: q k v proj fc gate head (default: all)")
    lora_merge: bool = _lora(False, "at the end, write merged/ too: a checkpoint with adapters added in", resume="ignored")
    base: Path | None = _lora(None, "checkpoint that init_from's adapters were trained for, if it has moved", resume="content")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.lora_rank and (self.freeze_layers or self.freeze_embeddings):
            raise ValueError("lora_rank trains adapters alone: nothing else is left to freeze")
        if self.lora_merge and not self.lora_rank:
            raise ValueError("lora_merge needs adapters: give a lora_rank")
        return self


if __name__ == "__main__":  # a wrong option is refused before torch is imported, which takes a second or two
    silence_other_ranks()
    OPTIONS = parse(FinetuneOptions, doc=__doc__)

import torch

from model import GPT, GPTConfig
from papagaio import kernels, runtime
from papagaio.batches import preferences
from papagaio.batches.conversations import Conversation
from papagaio.batches.examples import Data, read_data, sides
from papagaio.batches.packing import ConversationLoader, Example, evaluation_batches, fingerprint
from papagaio.batches.preferences import Pair, PairLoader
from papagaio.batches.prefetch import Prefetch
from papagaio.batches.windows import ValidationWindows, WindowLoader, likelihood
from papagaio.corpus.dataset import Dataset
from papagaio.evaluation import answer_questions, endings, evaluate_loss, exact_match_line, exact_match_table
from papagaio.generation.engine import Engine
from papagaio.runs.checkpoint import Checkpoint, contents, model_maker, write_checkpoint
from papagaio.runs.directory import locked, open_checkpoint, refuse_taken, restarted
from papagaio.terminal import colours
from papagaio.tokenizer import Tokenizer
from papagaio.training import lora
from papagaio.training.dry_run import dry_run
from papagaio.training.metrics import read_metrics
from papagaio.training.parallel import ALONE, World, together
from papagaio.training.progress import Identity
from papagaio.training.sharding import is_sharded, place
from train import fit


def main(config: FinetuneOptions, world: World = ALONE) -> None:
    config = restarted(config, world)
    if not config.dry_run and config.preview is None:
        world.on_rank_0(partial(refuse_taken, config))
    checkpoint = open_checkpoint(config.init_from, config.base)
    checkpoint.outline(model_maker(GPT, GPTConfig))  # refuses a model.json that the weights do not fit
    tokenizer, block_size = checkpoint.tokenizer, checkpoint.model_fields["block_size"]
    reader = Reader(config.encoding, config.skip_bad, config.question_key, config.answer_key)
    tests = {path: reader.conversations(path) for path in config.test_data}
    control = reader.conversations(config.control_data) if config.control_data else []
    data = read_data(config, reader, tokenizer, block_size, config.seed, [row for rows in tests.values() for row in rows])
    # Rows need not be as wide as a large context: as the longest example, or wide enough to be packed, and for replayed text.
    width = 1024 if config.packing else 256
    block_size = min(block_size, max(width, *(side.length for side in sides([*data.training, *data.validation]))))
    if config.preview is not None:
        for example in data.training[: config.preview]:
            print(marked(example, tokenizer, colours(sys.stdout)))
        return
    print("the first example, with its supervised tokens marked:", file=sys.stderr)
    print(marked(data.training[0], tokenizer, colours(sys.stderr)), file=sys.stderr)
    if config.freeze_layers > checkpoint.model_fields["n_layer"]:
        raise UserError(f"--freeze_layers={config.freeze_layers}: the model has {checkpoint.model_fields['n_layer']} blocks")
    config = complete_options(config, checkpoint, data)
    base_text = Dataset(config.replay_data) if config.replay_data else pretraining_data(checkpoint)
    replay, replay_validation = open_replay(config, base_text, tokenizer, block_size, data)
    unseen = [] if checkpoint.is_chat else tokenizer.template_tokens
    device = world.pick_device(config.device)
    dtype = runtime.pick_dtype(config.dtype, device)
    torch.manual_seed(config.seed)
    objective = preferences.objective(config.dpo_beta) if data.pairs else likelihood

    def make_model(**changes: Any) -> GPT:
        return GPT(GPTConfig(**checkpoint.model_fields | {"dropout": config.dropout} | changes))

    order = data.training, data.mixture, config.batch_size
    if data.pairs:
        loader = PairLoader(*order, torch.zeros(len(data.training), 2), replay=replay)  # the reference is computed below
    else:
        loader = ConversationLoader(*order, block_size, packing=config.packing, replay=replay)
    if config.dry_run:
        evaluated = sum(item.length for item in data.validation)
        make, part = lambda **changes: restrict(make_model(**changes), config, unseen), world.share(loader)
        world.on_rank_0(lambda: dry_run(make, part, objective, config, device, evaluated, ranks=world.size))
        return
    model = make_model()
    checkpoint.load_model(model)
    restrict(model, config, unseen)
    if world.size == 1 and dtype == torch.bfloat16:  # what several processes divide has one type
        lora.round_frozen(model, dtype)
    kernels.accelerate(place(model, config, device, world))  # here and not only in fit: the reference uses it
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    every = sum(p.numel() for p in model.parameters())
    print(f"{trained:,} of {every:,} parameters are trained ({trained / every:.1%}), on {device}", file=sys.stderr)
    engine = Engine(model, tokenizer, dtype, is_chat=True)
    with world.entering(locked(config)):
        if data.pairs:
            pairs = [*data.training, *data.validation]
            reference = loader.reference = preferences.reference_log_probabilities(model, pairs, dtype, world=world)
            size, held_out = config.micro_batch_size or config.batch_size, reference[len(data.training) :]
            parts = [slice(i, i + size) for i in range(0, len(data.validation), size)]
            validation = [preferences.collate_pairs(data.validation[part], held_out[part]) for part in parts]
            measure = partial(preferences.evaluate_pairs, model, validation, config.dpo_beta, dtype, world)
        else:
            validation = evaluation_batches(data.validation, block_size, config.micro_batch_size or 64, config.packing)
            measure = partial(evaluate_loss, model, validation, tokenizer, dtype, world)

        def evaluate() -> dict[str, float]:
            measured = measure()
            if replay_validation is not None:
                replayed = evaluate_loss(model, replay_validation, tokenizer, dtype, world)
                measured |= {"replay_val_loss": replayed["val_loss"], "replay_bpb": replayed["val_bpb"]}
            return measured

        def preview() -> str:
            """The model's answer to the first held-out question."""
            answer = answer_questions(engine, data.shown[:1])[0]
            return f"{data.shown[0].messages[-2].content} -> {answer.shown}"

        identity = Identity(
            stage="finetune",
            objective="preferences" if data.pairs else "answers",
            **checkpoint.origin,
            data_sha256=fingerprint(sides(data.training)),
            replay_sha256=replay.datasets[0].sha256 if replay is not None else None,
        )
        with Prefetch(world.share(loader), device) as batches:
            fit(model, batches, evaluate, preview, tokenizer, config, identity, objective, world)
        if world.rank:
            return  # rank 0 does the rest
        if config.patience:
            open_checkpoint(config.out_dir).load_model(model)  # the best one
        if config.lora_merge:
            result, merged = open_checkpoint(config.out_dir, config.init_from), make_model()
            result.load_model(merged)
            final = (config.out_dir / "merged").resolve()  # a link to another disk stays
            write_checkpoint(final, contents(merged, [], result.state), tokenizer)
            print(f"{config.out_dir / 'merged'}: a checkpoint with the adapters added in", file=sys.stderr)
        if is_sharded(model):
            print("no questions are asked, because no process has the whole model: evaluate.py asks them", file=sys.stderr)
        else:
            report(engine, tests, control, base_text.directory if base_text is not None else None, config)


def complete_options(config: FinetuneOptions, checkpoint: Checkpoint, data: Data) -> FinetuneOptions:
    """The options, with defaults for this checkpoint and this data: optimizer, learning rates and number of steps."""
    chosen = config.model_fields_set
    optimizer = config.optimizer if "optimizer" in chosen else checkpoint.state.get("optimizer", "muon")
    recipe = RECIPES["preferences" if data.pairs else "lora" if config.lora_rank else optimizer]
    steps = config.max_steps
    if "max_steps" not in chosen:
        steps = max(LEAST_STEPS, math.ceil(EPOCHS * data.mixture.size / config.batch_size))
        times = steps * config.batch_size / data.mixture.size
        least = f", because a small model needs {LEAST_STEPS} steps to learn the template" if steps == LEAST_STEPS else ""
        print(f"max_steps {steps:,}: {times:,.1f} times through the data{least}", file=sys.stderr)
    intervals = {"max_steps": steps, "eval_interval": max(1, math.ceil(steps / 5))}
    return config.with_defaults({"optimizer": optimizer} | intervals | recipe)


def restrict(model: GPT, config: FinetuneOptions, unseen: Sequence[int] = ()) -> GPT:
    """Train only what the options say, in place: adapters, or all but the frozen parts. Raises UserError if they do not fit.

    If the head has no adapter, the rows of the tokens that the base has never seen are trained beside the adapters.
    """
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    if config.lora_rank:
        targets = config.lora_targets or [name for name in lora.TARGETS if name in names]
        try:
            lora.add_adapters(model, targets, config.lora_rank, config.lora_alpha or 2 * config.lora_rank)
        except ValueError as error:
            raise UserError(f"--lora_targets: {error}; it has {' '.join(sorted(names))}") from None
        if "head" not in targets and unseen:
            lora.train_rows(model, unseen)
    model.blocks[: config.freeze_layers].requires_grad_(False)
    for name, parameter in model.named_parameters():
        if config.freeze_embeddings and "embed" in name:
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError("--freeze_layers and --freeze_embeddings leave nothing to train")
    return model


def pretraining_data(checkpoint: Checkpoint) -> Dataset | None:
    """The dataset that the checkpoint was pretrained on, if its run's config.toml names it and it is still there."""
    with suppress(UserError, KeyError):
        config = load_toml(checkpoint.path.parent.parent / "config.toml")[1]
        words = [] if "init_from" in config else config["data"]
        for word in [words] if isinstance(words, str) else words:
            path = Path(parse_source(word).name)
            if (path / "manifest.json").is_file() and (found := Dataset(path)).tokenizer.sha256 == checkpoint.tokenizer.sha256:
                return found
    return None


def open_replay(
    config: FinetuneOptions, dataset: Dataset | None, tokenizer: Tokenizer, block_size: int, data: Data
) -> tuple[WindowLoader | None, ValidationWindows | None]:
    """Windows of pretraining text to mix in (--replay_data), and its validation split, on which forgetting is measured."""
    if dataset is None:
        print(
            "forgetting is not measured: name the text of pretraining with --replay_data (--replay 0: only measure)",
            file=sys.stderr,
        )
        return None, None
    if dataset.tokenizer.sha256 != tokenizer.sha256:
        raise UserError(f"{dataset.directory}: its tokenizer is not the checkpoint's; prepare it with --tokenizer DIR")
    tokens = config.eval_tokens if "eval_tokens" in config.model_fields_set else REPLAY_EVAL_TOKENS
    validation = ValidationWindows(dataset, block_size, max(1, 8192 // block_size), tokens)
    whole = dataset.splits["val"]["tokens"]
    measured = f"{min(whole, len(validation.starts) * block_size):,} of {whole:,} validation tokens"
    print(f"forgetting is measured on {measured} of {dataset.directory} (--eval_tokens)", file=sys.stderr)
    if config.replay == 0 or config.replay_data is None:
        return None, validation
    windows = max(1, round(config.replay / (1 - config.replay) * config.batch_size))
    length = sum(item.length for item in data.training) / len(data.training)
    conversations = f"{config.batch_size:,} conversations of {length:.0f} tokens"
    print(f"replay: a step has {windows:,} windows of {block_size:,} tokens of text beside {conversations}", file=sys.stderr)
    return WindowLoader(dataset, "train", block_size, windows, config.seed), validation


def marked(example: Example | Pair, tokenizer: Tokenizer, in_colour: bool) -> str:
    """An example's text, its supervised tokens green, or between [[ and ]]. A pair gives both answers."""
    if isinstance(example, Pair):
        chosen, rejected = (marked(side, tokenizer, in_colour) for side in example)
        return f"chosen: {chosen}\nrejected: {rejected}"
    start, end = ("\x1b[32m", "\x1b[0m") if in_colour else ("[[", "]]")
    text = ""
    tokens = zip(example.ids.tolist(), example.supervised.tolist(), strict=True)
    for supervised, group in groupby(tokens, key=lambda pair: pair[1]):
        piece = tokenizer.decode(token for token, _ in group)
        text += f"{start}{piece}{end}" if supervised else piece
    return text


def report(
    engine: Engine,
    tests: dict[Path, list[Conversation]],
    control: list[Conversation],
    base_text: Path | None,
    config: FinetuneOptions,
) -> None:
    """Print on standard output what was forgotten, and for each file of test questions a table by kind and ten answers. The last
    lines are the exact match of each file, that of the first file last."""
    bits = [line["replay_bpb"] for line in read_metrics(config.out_dir / "metrics.jsonl") if "replay_bpb" in line]
    if bits:
        change = bits[-1] / bits[0] - 1
        print(f"held-out text of {base_text}: {bits[0]:.4f} bits per byte before, {bits[-1]:.4f} after ({change:+.1%})")
        if change > MUCH_FORGOTTEN:
            cures = "a lower --learning_rate, fewer --max_steps, or --replay_data"
            print(f"warning: the model has forgotten much of what it was pretrained on; {cures} helps", file=sys.stderr)
    unfit = Report()
    if control:
        print(f"never told, so guessed: exact match {exact_match_line(answer_questions(engine, control, unfit))}\n")
    found = {path: answer_questions(engine, rows, unfit) for path, rows in tests.items()}
    for path, answers in found.items():
        if len(found) > 1:
            print(f"{path}:")
        print(exact_match_table(answers) + "\n")
        for answer in random.Random(config.seed).sample(answers, min(10, len(answers))):
            question, right = (message.content for message in answer.conversation.messages[-2:])
            verdict = "right" if answer.correct else f"wrong, it is {right}"
            print(f"{question} -> {answer.shown}   {verdict}")
        print(f"\n{endings(answers)}\n")
    for line in unfit.lines():
        print(line, file=sys.stderr)
    print(f"next: chat.py --checkpoint {shlex.quote(str(config.out_dir))}", file=sys.stderr)
    for path in list(found)[1:]:
        print(f"{path.name}: exact match {exact_match_line(found[path])}")
    if found:
        print(f"held-out exact match {exact_match_line(next(iter(found.values())))}")


if __name__ == "__main__":
    run(together(main), OPTIONS)
