"""Options of a script: declared once as a pydantic model, read from defaults, then a TOML file, then `--key=value` flags.

Worked example, for a script with `class Config(Options): steps: int = option(10, "optimizer steps", ge=1)`:

    python script.py                           -> Config(steps=10)
    python script.py run.toml                  -> Config(steps=20)   where run.toml holds `steps = 20`
    python script.py run.toml --steps=30       -> Config(steps=30)
    python script.py --stepps=30               -> error: --stepps: no such option; did you mean --steps?   (exit status 2)

Nothing here imports torch, so that a mistyped option costs a fraction of a second.
"""

import argparse
import contextlib
import difflib
import json
import os
import re
import signal
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal, NoReturn, Self, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

# What asks a process to end: Ctrl-C, a scheduler, and Slurm's warning before its time is over (--signal=USR1@60).
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class UserError(ValueError):
    """A user's mistake. The message says what is wrong, where (file:line) and what would be right; exit status 2."""


@contextlib.contextmanager
def located(place: str) -> Iterator[None]:
    """A UserError that is raised inside says first where (file:line)."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


class MachineError(RuntimeError):
    """A failure of the machine or of a file it holds (disk, memory, weights that are not finite); exit status 1."""


class Options(BaseModel):
    """Base of every script's configuration: frozen, and deaf to unknown keys and to NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def option(default: Any, description: str, **bounds: Any) -> Any:
    """Declare an option: its default (`...` if there is none), its help with the unit, and pydantic's bounds (ge, gt, le, lt).

    An option that is a Python keyword is declared with an underscore after it: `from_` is --from.
    """
    return Field(default, description=description, **bounds)


class RunOptions(Options):
    """What pretraining and fine-tuning share: everything that `train.fit` reads. Intervals are in optimizer steps."""

    out_dir: Path = option(..., "directory of the run: config.toml, metrics.jsonl, loss.png, checkpoints/")
    max_steps: int = option(1000, "optimizer steps of the run (0: only save the initial weights)", ge=0)
    batch_size: int = option(32, "sequences of one optimizer step over all devices", ge=1)
    micro_batch_size: int | None = option(
        None, "sequences of one forward pass of one device; accumulation follows (default: batch_size)", ge=1
    )
    optimizer: Literal["muon", "adamw"] = option("muon", "muon: Muon for hidden matrices, AdamW for the rest; or adamw for all")
    learning_rate: float = option(0.03, "peak learning rate (with muon: of the hidden matrices)", ge=0)
    min_learning_rate: float = option(0.0, "learning rate at the last step; other groups shrink in proportion", ge=0)
    embedding_learning_rate: float = option(
        0.17, "muon only: peak AdamW learning rate of the tables at 384 channels; times sqrt(384 / n_embd) at others", ge=0
    )
    head_learning_rate: float = option(0.0115, "muon only: the same of the head, norms and biases", ge=0)
    muon_momentum: float = option(0.9, "muon only: decay of the mean of past gradients", ge=0, lt=1)
    schedule: Literal["cosine", "linear"] = option(
        "linear", "decay to min_learning_rate after the warm-up: cosine, or constant and then linear"
    )
    decay_fraction: float = option(0.6, "linear schedule: the last part of the run in which the rate falls", ge=0, le=1)
    warmup_steps: int = option(0, "steps over which the learning rate rises linearly from 0", ge=0)
    weight_decay: float = option(0.0, "decoupled weight decay, on matrices only", ge=0)
    beta1: float = option(0.8, "AdamW: decay of the first moment", ge=0, lt=1)
    beta2: float = option(0.95, "AdamW: decay of the second moment", ge=0, lt=1)
    grad_clip: float = option(0.0, "largest global norm of the gradient (0: off)", ge=0)
    seed: int = option(1337, "of initial weights, order of the data, dropout and sampling", ge=0, lt=2**63)
    log_interval: int = option(10, "steps between training lines in metrics.jsonl", ge=1)
    eval_interval: int = option(250, "steps between evaluations; also before the first and after the last step", ge=1)
    eval_tokens: int = option(
        0, "tokens of the validation split, always the same ones, spread over it (0: the whole split)", ge=0
    )
    patience: int = option(0, "stop after so many evaluations in a row without a lower validation loss (0: never)", ge=0)
    sample_tokens: int = option(48, "longest text shown at each evaluation, in tokens (0: off)", ge=0)
    checkpoint_interval: int = option(
        1000, "steps between checkpoints; also before each evaluation and at the end (0: only there)", ge=0
    )
    keep: int = option(2, "newest checkpoints that are kept, beside the best", ge=1)
    on_nonfinite: str = option(
        "stop",
        "a loss or gradient that is not finite: stop before it changes the weights, or skip:N, leave out up to N steps in a row",
        pattern=r"^(stop|skip:[1-9]\d*)$",
    )
    on_spike: Literal["report", "skip"] = option(
        "report", "a loss over 6 sigma above the mean of the last 128 steps: report it, or leave the step out as well"
    )
    auto_microbatch: bool = option(False, "out of memory: halve micro_batch_size and go on; the optimizer step stays the same")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "of matrix products; auto: bfloat16 where the hardware computes it, float16 on other GPUs"
    )
    compile: bool = option(False, "compile the model with torch.compile (worth it from minutes of training on)")
    activation_checkpointing: bool = option(
        False, "keep less for the gradient and compute it again: less memory, a third more time"
    )
    resume: bool = option(False, "continue the run in out_dir from its last checkpoint")
    overwrite: bool = option(False, "replace the run in out_dir")
    wandb: Literal["off", "offline", "online"] = option("off", "log to Weights & Biases as well")
    wandb_project: str = option("papagaio", "name of the Weights & Biases project")
    dry_run: bool = option(False, "print parameters, memory, FLOPs, epochs and time, and stop")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.batch_size % (self.micro_batch_size or self.batch_size):
            raise ValueError(f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(f"min_learning_rate {self.min_learning_rate} is above learning_rate {self.learning_rate}")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other")
        return self


class SamplingOptions(Options):
    """How the next token is drawn; shared by sample.py and chat.py."""

    checkpoint: Path = option(..., "a run (its last checkpoint is taken), or a checkpoint directory")
    base: Path | None = option(None, "the checkpoint that adapters (LoRA) belong to, where it has moved since")
    max_new_tokens: int = option(256, "longest completion, in tokens", ge=1)
    min_new_tokens: int = option(0, "tokens before which the completion neither ends nor stops", ge=0)
    temperature: float = option(0.8, "divides the logits: 0 is greedy, 1 the model's own distribution", ge=0)
    top_k: int = option(0, "keep the k most probable tokens (0: off)", ge=0)
    top_p: float = option(1.0, "keep the most probable tokens that together reach this probability (1: off)", gt=0, le=1)
    min_p: float = option(0.0, "keep tokens at least this fraction as probable as the best one (0: off)", ge=0, le=1)
    repetition_penalty: float = option(
        1.0, "divide positive logits of tokens already there, multiply negative ones (1: off)", gt=0
    )
    frequency_penalty: float = option(0.0, "take from a token's logit for each time that it was drawn (0: off)")
    logit_bias: tuple[str, ...] = option((), "ID=VALUE: add to the logit of the token with this id")
    banned_tokens: tuple[int, ...] = option((), "ids that are never drawn")
    forced_tokens: tuple[int, ...] = option((), "ids that the completion begins with")
    stop: tuple[str, ...] = option((), "texts before which the completion ends")
    seed: int = option(1337, "of the draw: the same seed gives the same text", ge=0, lt=2**63)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "of matrix products; auto: bfloat16 where the hardware computes it"
    )

    quantize: Literal["none", "int8"] = option("none", "weights of 8 bits, a scale a row: half of bfloat16's memory")
    compile: bool = option(False, "compile the step of a token: up to half a minute at first; for large models and long texts")

    @property
    def biases(self) -> dict[int, float]:
        """logit_bias by id."""
        pairs = (word.split("=") for word in self.logit_bias)
        return {int(token): float(value) for token, value in pairs}

    @model_validator(mode="after")
    def _together(self) -> Self:
        try:
            finite = all(abs(value) < float("inf") for value in self.biases.values())
        except ValueError:
            finite = False
        if not finite:
            raise ValueError(f"logit_bias {' '.join(self.logit_bias)}: must be written ID=VALUE, as in 50256=-5")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens {self.min_new_tokens} is above max_new_tokens {self.max_new_tokens}")
        return self


OptionsT = TypeVar("OptionsT", bound=Options)


def parse(options: type[OptionsT], argv: list[str] | None = None, doc: str | None = None) -> OptionsT:
    """Configuration of a script from its command line; ends the process with one line and status 2 on a user's mistake.

    `doc` is the script's docstring, shown by --help.
    """
    if argv is None:  # torch has still to be imported: a signal that comes meanwhile ends the process quietly
        for number in STOP_SIGNALS:
            signal.signal(number, _leave)
    try:
        return read_options(options, sys.argv[1:] if argv is None else argv, doc)
    except UserError as error:
        fail(str(error), 2)


def read_options(options: type[OptionsT], argv: list[str], doc: str | None = None) -> OptionsT:
    """As `parse`, but raises UserError."""
    parser = _Parser(description=doc, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", help="TOML file with options, flat as on the command line")
    for name, field in options.model_fields.items():
        arity = _arity(field.annotation)
        parser.add_argument(f"--{name.rstrip('_')}", dest=name, help=_help(field), default=argparse.SUPPRESS, **arity)
    # Dashes and underscores are the same in a flag's name, never in its value.
    argv = [re.sub(r"^--[^=]+", lambda m: "--" + m[0][2:].replace("-", "_"), word) for word in argv]
    found, unknown = parser.parse_known_args(argv)
    flags = vars(found)
    for word in unknown:
        if word.startswith("-"):
            raise UserError(f"{word}: no such option{_nearest(word.split('=')[0].lstrip('-'), options, '--')}")
        raise UserError(f"{word}: unexpected argument; options are written --key=value")

    toml_path = flags.pop("config")
    values, origin = _read_toml(options, Path(toml_path)) if toml_path else ({}, {})
    for name, text in flags.items():
        values[name] = _validate(options, name, text, f"--{name}={text if isinstance(text, str) else ' '.join(text)}")
        origin[name] = f"--{name}"
    try:
        return options(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else ""
        if first["type"] == "missing":
            raise UserError(f"--{key} is required: {options.model_fields[key].description}") from None
        place = f"{origin[key]}: " if key in origin else f"{toml_path}: " if toml_path else ""
        raise UserError(place + first["msg"].removeprefix("Value error, ")) from None


def run(main: Callable[[OptionsT], None], config: OptionsT) -> NoReturn:
    """Call `main(config)` and end the process as the design says: one line and a status, a traceback only for our own bugs."""
    for number in STOP_SIGNALS:
        signal.signal(number, _leave)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main(config)
        sys.stdout.flush()
    except UserError as error:
        fail(str(error), 2)
    except BrokenPipeError:  # the reader of our output has left (`| head`): not an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (MachineError, OSError, MemoryError) as error:
        fail(str(error) or "out of memory", 1)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
            fail("out of memory: lower micro_batch_size or block_size (nothing that was saved is lost)", 1)
        raise
    sys.exit(0)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def fail(message: str, status: int) -> NoReturn:
    """Print `error: message` as one line on standard error and exit with `status`."""
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(status)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def _arity(annotation: Any) -> dict[str, Any]:
    """argparse's arguments for a type: a bool needs no value, a tuple takes several, the rest take one."""
    if annotation is bool:
        return {"nargs": "?", "const": "true", "metavar": "BOOL"}
    if get_origin(annotation) is tuple:
        return {"nargs": "+", "action": "extend", "metavar": "X"}
    literals = [arg for arg in get_args(annotation) if isinstance(arg, str)]
    return {"metavar": "|".join(literals) if literals else "X"}


def _help(field: Any) -> str:
    default = "required" if field.is_required() else "" if field.default is None else f"default: {field.default}"
    bounds = [f"{sign} {getattr(rule, key)}" for rule in field.metadata for key, sign in _SIGNS.items() if hasattr(rule, key)]
    notes = [note for note in (*bounds, default) if note]
    return (field.description + (f" [{', '.join(notes)}]" if notes else "")).replace("%", "%%")


_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def _validate(options: type[Options], name: str, value: Any, place: str) -> Any:
    """Check one value. Flags are text and are converted; TOML values have types already and must match (JSON's strict rules)."""
    field = options.model_fields[name]
    adapter = TypeAdapter(Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation)
    try:
        if not place.startswith("--"):
            value = adapter.validate_json(json.dumps(value, default=str), strict=True)
        elif isinstance(value, list):
            value = adapter.validate_python(value)  # validate_strings knows no tuples
        else:
            value = adapter.validate_strings(value)
    except ValidationError as error:
        raise UserError(f"{place}: {error.errors()[0]['msg']}") from None
    if isinstance(value, float) and not abs(value) < float("inf"):
        raise UserError(f"{place}: a finite number is needed")
    return value


LARGEST_TOML = 2**18  # bytes
# tomllib keeps every beginning of a dotted key: of one with 100,000 parts, tens of gigabytes.
_DOTTED = re.compile(r"(?:[^.=\n]{1,64}\.){64}")


def load_toml(path: Path) -> tuple[str, dict[str, Any]]:
    """The text of a TOML file, and what it says. Raises UserError where it is not one, or beyond measure."""
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST_TOML + 1).decode("utf-8")
        if len(text) > LARGEST_TOML or _DOTTED.search(text):
            raise UserError(f"{path}: too long, or a key with too many dots; options are written one a line, key = value")
        return text, tomllib.loads(text)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; the configuration must be a TOML file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; the configuration must be a TOML file") from None
    except UserError:
        raise
    except ValueError as error:  # a number of thousands of digits is one that is not TOMLDecodeError
        raise UserError(f"{path}: not TOML: {error}") from None
    except RecursionError:
        raise UserError(f"{path}: TOML nested too deep; options are written one a line, key = value") from None


def _read_toml(options: type[Options], path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Options of a TOML file, and for each the place (file:line) where it stands."""
    text, table = load_toml(path)
    values, origin = {}, {}
    for key, value in table.items():
        line = next((i for i, row in enumerate(text.splitlines(), 1) if re.match(rf"\s*\[?[\"']?{re.escape(key)}\b", row)), 1)
        name = key.replace("-", "_")
        name = f"{name}_" if f"{name}_" in options.model_fields else name
        origin[name] = f"{path}:{line}"
        if name not in options.model_fields:
            raise UserError(f"{path}:{line}: {key} = {value!r}: no such option{_nearest(name, options)}")
        values[name] = _validate(options, name, value, f"{path}:{line}: {key} = {value!r}")
    return values, origin


def _nearest(name: str, options: type[Options], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, options.model_fields, n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else "; --help lists them all"
