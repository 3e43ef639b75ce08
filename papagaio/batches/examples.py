"""The data of a fine-tuning run: questions read from their files, held out, and encoded as examples."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from papagaio.batches import preferences
from papagaio.batches.conversations import Conversation, Preference
from papagaio.batches.mixture import Mixture, parse_source
from papagaio.batches.options import QuestionOptions
from papagaio.batches.packing import Example, encode
from papagaio.batches.preferences import Pair
from papagaio.batches.questions import Reader, hold_out, select
from papagaio.batches.wordings import repeated
from papagaio.errors import UserError
from papagaio.tokenizer import Tokenizer


@dataclass(frozen=True)
class Data:
    """The training examples and their order, the validation examples, and held-out conversations to show."""

    training: list[Example] | list[Pair]
    mixture: Mixture
    validation: list[Example] | list[Pair]
    shown: list[Conversation]

    @property
    def pairs(self) -> bool:
        return isinstance(self.training[0], Pair)


def sides(items: Sequence[Example | Pair]) -> list[Example]:
    """The examples, with both sides of the pairs."""
    return [side for item in items for side in (item if isinstance(item, Pair) else [item])]


def read_data(
    config: QuestionOptions, reader: Reader, tokenizer: Tokenizer, block_size: int, seed: int, test: Sequence[Conversation]
) -> Data:
    """The files' conversations or preferences as examples. Prints what there is, and what was left out and why.

    Raises UserError if rows cannot be read, or if nothing is left to train on or to validate with.
    """
    sources = [parse_source(word) for word in config.data]
    read = [[row for file in reader.files(source.name) for row in reader.examples(file)] for source in sources]
    read_held_out = reader.examples(config.val_data) if config.val_data is not None else []
    report, known = reader.check(), set[str]()

    def encoded(rows: Sequence[Conversation] | Sequence[Preference]) -> list[Example] | list[Pair]:
        if rows and isinstance(rows[0], Preference):
            return preferences.encode_pairs(rows, tokenizer, block_size, report, config.too_long)
        return encode(rows, tokenizer, block_size, report, config.too_long, config.train_on)

    files = [select(rows, report, known, config.keep_duplicates) for rows in read]
    if config.val_data is not None:
        held_out = select(read_held_out, report, set(), config.keep_duplicates)
        held_out_keys = {row.key for row in held_out}
        for place in (row.place for rows in files for row in rows if row.key in held_out_keys):
            report.note("dropped, held out in --val_data", place)
        files = [[row for row in rows if row.key not in held_out_keys] for rows in files]
    else:
        parts = [hold_out(rows, config.val_fraction) for rows in files]
        files, held_out = [training for training, _ in parts], [row for _, rows in parts for row in rows]
    kinds = {type(row).__name__ for rows in (*files, held_out) for row in rows}
    if len(kinds) > 1:
        raise UserError(f"{config.data[0]}: {' and '.join(sorted(kinds))} rows do not go together; they need runs of their own")
    examples, validation = [encoded(rows) for rows in files], encoded(held_out)
    training = [example for part in examples for example in part]
    if on_training_data := config.val_data is None and config.val_fraction == 0:
        held_out, validation = [row for rows in files for row in rows], training

    lengths = [len(side.ids) for side in sides(training)]
    supervised = sum(int(side.supervised[1:].sum()) for side in sides(training))
    apart = "none held out (val_loss is of the training data)" if on_training_data else f"{len(validation):,} held out"
    print(
        f"{len(training):,} {'preferences' if 'Preference' in kinds else 'conversations'} to train on, {apart}; "
        f"{sum(lengths):,} tokens, {supervised:,} of them supervised; the longest has {max(lengths, default=0):,}, the context "
        f"{block_size:,}",
        *report.lines(),
        sep="\n",
        file=sys.stderr,
    )
    if not training:
        raise UserError(f"{report.first(Path(sources[0].name))}; nothing is left to train on in {', '.join(config.data)}")
    if not validation and not config.preview:
        where = report.first(config.val_data or Path(sources[0].name))
        cure = "name a --val_data file, or a larger --val_fraction"
        if config.val_data is None and len(training) == 1:
            cure = "the only one is trained on; --val_fraction 0 measures val_loss on it too, --val_data FILE on others"
        raise UserError(f"{where}; no conversation is left to validate with: {cure}")
    if leaked := len(known & {conversation.key for conversation in test}):
        print(f"warning: {leaked:,} of the {len(test):,} --test_data questions are in --data with their answers", file=sys.stderr)
    asked = [row.messages[-2].content for rows in files for row in rows if isinstance(row, Conversation)]
    if line := repeated(asked):
        print(f"note: {line}", file=sys.stderr)
    used = [(part, source.weight) for part, source in zip(examples, sources, strict=True) if part]
    mixture = Mixture([len(part) for part, _ in used], [weight for _, weight in used], seed)
    if not mixture.size:
        raise UserError(f"{config.data[0]}: the weights of the files leave nothing to train on; give larger ones")
    shown = [row if isinstance(row, Conversation) else Conversation(messages=[*row.messages, row.chosen]) for row in held_out]
    return Data(training, mixture, validation, shown)
