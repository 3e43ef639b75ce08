"""A released model as a run's directory, which sample.py, chat.py, finetune.py, evaluate.py and train.py --init_from take."""

import dataclasses
import sys
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from papagaio import files
from papagaio.errors import UserError
from papagaio.formats.names import Format, Names
from papagaio.runs.checkpoint import MOMENTS, WEIGHTS, Contents, MakeModel, write_checkpoint
from papagaio.runs.tensors import write_tensors
from papagaio.tokenizer import Tokenizer


class Release(NamedTuple):
    """What a released model is made of, whatever its format."""

    place: Path  # file:line of messages about the configuration
    format: Format
    family: str
    interleaved: bool  # see Names
    fields: dict[str, Any]  # of GPTConfig
    tokenizer: Tokenizer
    answers: bool  # it was trained for conversations
    tensors: Collection[str]  # the names of all its tensors
    shape: Callable[[str], Sequence[int]]
    read: Callable[[str], Tensor]
    state: dict[str, Any]  # where it comes from, for state.json


def names_of(model: nn.Module, format_: Format, family: str, interleaved: bool = False) -> Names:
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    return Names(format_, family, interleaved, model.config.head_size, model.config.vocab_size, shapes)


def outline(make_model: MakeModel, fields: dict[str, Any], place: Path) -> nn.Module:
    """The model without weights. Raises UserError if the fields describe none."""
    try:
        with torch.device("meta"):
            return make_model(fields)
    except (TypeError, ValueError, OverflowError, ZeroDivisionError, RuntimeError, MemoryError) as error:
        raise UserError(f"{place}: {error}") from None


def write_run(out_dir: Path, release: Release, make_model: MakeModel) -> None:
    """Make out_dir, a run's directory with the checkpoint step-0; it is there as a whole or not at all.

    Raises UserError if tensors are missing, left over, of another shape or not finite.
    """
    fields, place = release.fields, release.place
    if fields["n_layer"] > len(release.tensors):  # before any layer is made
        raise UserError(f"{place}: {fields['n_layer']:,} blocks, but the weights have only {len(release.tensors):,} tensors")
    model = outline(make_model, fields, place)
    names = names_of(model, release.format, release.family, release.interleaved)
    _compare(names, release)

    def read(name: str) -> Tensor:
        tensor = names.to_ours(name, lambda theirs: release.read(theirs).float())
        if not torch.isfinite(tensor).all():
            raise UserError(f"{place.parent}: {names.theirs(name)} holds numbers that are not finite")
        return tensor

    layout = {name: (shape, torch.float32) for name, shape in names.shapes.items()}
    weights = partial(write_tensors, layout=layout, read=read)
    state = {"step": 0, "stage": "released", "answers": release.answers, "optimizer": "adamw", **release.state}
    texts = {"model.json": files.to_json(dataclasses.asdict(model.config)), "state.json": files.to_json(state)}
    with files.whole(out_dir) as temporary:
        contents = Contents({WEIGHTS: weights, MOMENTS: {}}, texts)
        write_checkpoint(temporary / "checkpoints" / "step-0", contents, release.tokenizer)
        files.write_whole(temporary / "checkpoints" / "last", "step-0\n")
    parameters = sum(tensor.numel() for tensor in model.parameters())
    print(f"{out_dir}: {release.family}, {parameters:,} parameters, {release.tokenizer.vocab_size:,} tokens", file=sys.stderr)


def _compare(names: Names, release: Release) -> None:
    """Raises UserError unless the release has exactly the tensors that the model needs, with their shapes."""
    needed, where = names.parts, release.place.parent
    for name in needed:
        if name not in release.tensors:
            raise UserError(f"{where}: lacks the tensor {name}, which {release.place.name} calls for")
        if tuple(found := release.shape(name)) != names.shape(name):
            raise UserError(
                f"{where}: {name} has the shape {list(found)}; {release.place.name} calls for {list(names.shape(name))}"
            )
    if more := sorted(set(release.tensors) - needed.keys()):
        raise UserError(f"{where}: {len(more)} tensors that {release.place.name} does not call for, such as {more[0]}")
