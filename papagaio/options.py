"""Options of a script: declared once as a pydantic model, read from defaults, then a TOML file, then `--key=value` flags.

Worked example, for a script with `class Config(Options): steps: int = option(10, "optimizer steps", ge=1)`:

    python script.py                           -> Config(steps=10)
    python script.py run.toml                  -> Config(steps=20)   where run.toml holds `steps = 20`
    python script.py run.toml --steps=30       -> Config(steps=30)
    python script.py --stepps=30               -> error: --stepps: no such option; did you mean --steps?   (exit status 2)

Nothing here imports torch, so that a mistyped option costs a fraction of a second.
"""

import argparse
import difflib
import json
import re
import signal
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from papagaio.errors import STOP_SIGNALS, UserError, fail, leave


class Options(BaseModel):
    """Base of every script's configuration: frozen, and deaf to unknown keys and to NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def option(default: Any, description: str, **bounds: Any) -> Any:
    """Declare an option: its default (`...` if there is none), its help with the unit, and pydantic's bounds (ge, gt, le, lt).

    An option that is a Python keyword is declared with an underscore after it: `from_` is --from.
    """
    return Field(default, description=description, **bounds)


OptionsT = TypeVar("OptionsT", bound=Options)


def parse(options: type[OptionsT], argv: list[str] | None = None, doc: str | None = None) -> OptionsT:
    """Configuration of a script from its command line; ends the process with one line and status 2 on a user's mistake.

    `doc` is the script's docstring, shown by --help.
    """
    if argv is None:  # torch has still to be imported: a signal that comes meanwhile ends the process quietly
        for number in STOP_SIGNALS:
            signal.signal(number, leave)
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
