"""Options of a script: declared once as a pydantic model, read from defaults, then a TOML file, then `--key=value` flags.

Worked example, for a script with `class Config(Options): steps: int = option(10, "optimizer steps", ge=1)`:

    python script.py                           -> Config(steps=10)
    python script.py run.toml                  -> Config(steps=20)   if run.toml contains `steps = 20`
    python script.py run.toml --steps=30       -> Config(steps=30)
    python script.py --stepps=30               -> error: --stepps=30: no such option; did you mean --steps?   (exit status 2)

Nothing here imports torch, so that a mistyped option is reported in a fraction of a second.
"""

import argparse
import difflib
import inspect
import json
import re
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn, Self, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError
from pydantic.fields import FieldInfo

from papagaio.errors import UserError, catch_signals, fail, leave

OptionsT = TypeVar("OptionsT", bound="Options")
# What an option means for a resumed run: it must be the same; it may change (free); it is a path whose content is compared
# instead; or it has no part in training (ignored).
Resume = Literal["same", "free", "content", "ignored"]


class Options(BaseModel):
    """Base class of every script's options. Instances are frozen; unknown keys, NaN and infinity are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    _places: dict[str, str] = PrivateAttr(default_factory=dict)  # where the user set each option: "run.toml:3" or "--name"

    def with_defaults(self, defaults: dict[str, Any]) -> Self:
        """A copy with `defaults` for the options that the user has not set, validated again. Raises UserError with the place of
        the user's option concerned if values do not fit together."""
        chosen = {name: getattr(self, name) for name in self.model_fields_set}
        return _build(type(self), defaults | chosen, self._places)

    @classmethod
    def by_resume(cls, *kinds: Resume) -> list[str]:
        """The names of the options whose declaration has one of these values of `resume`."""
        return [name for name, field in cls.model_fields.items() if field.json_schema_extra["resume"] in kinds]


def option(default: Any, description: str, *, group: str = "Options", resume: Resume = "same", **bounds: Any) -> Any:
    """Declare an option: its default (`...` if it is required), its help with the unit, its heading in --help, what it means for
    a resumed run, and pydantic's bounds (ge, gt, le, lt). A Python keyword gets a trailing underscore: `from_` is --from."""
    return Field(default, description=description, json_schema_extra={"group": group, "resume": resume}, **bounds)


def parse(options: type[OptionsT], argv: list[str] | None = None, doc: str | None = None) -> OptionsT:
    """The options on the command line; `doc` is shown by --help. A user's mistake ends the process with status 2."""
    if argv is None:  # the script's next step is to import torch: a signal during that ends the process without a traceback
        catch_signals(leave)
    try:
        return read_options(options, sys.argv[1:] if argv is None else argv, doc)
    except UserError as error:
        fail(str(error), 2)


def parse_command(commands: Mapping[str, type[Options]], argv: list[str], doc: str) -> Options:
    """The options of the command that the first word names; words behind it that are no options are --source."""
    name, *words = argv or [""]
    if name in ("-h", "--help"):
        print(doc)
        for command, options in commands.items():
            print(f"{command}: {options.__doc__}\n  default: --help")
        sys.exit(0)
    if name not in commands:
        what = f"{name}: no such option" if name.startswith("-") else f"{name or 'no command'}: not a command"
        fail(f"{what}; the first word must be one of {', '.join(commands)}", 2)
    if words and not words[0].startswith("-"):
        words.insert(0, "--source")
    return parse(commands[name], words, doc=commands[name].__doc__)


def read_options(options: type[OptionsT], argv: list[str], doc: str | None = None) -> OptionsT:
    """Like `parse`, but raises UserError."""
    # Dashes and underscores are equal in a flag's name, but not in its value.
    argv = [re.sub(r"^--[^=]+", lambda m: "--" + m[0][2:].replace("-", "_"), word) for word in argv]
    found, unknown = _make_parser(options, doc).parse_known_args(argv)
    for word in unknown:
        if word.startswith("-"):
            raise UserError(f"{word}: no such option{_nearest(word.split('=')[0].lstrip('-'), options, '--')}")
        raise UserError(f"{word}: unexpected argument; options are written --key=value")
    flags = vars(found)
    path = flags.pop("config")
    values, places = _read_toml(options, Path(path)) if path else ({}, {})
    return _build(options, values | flags, places | {name: f"--{name.rstrip('_')}" for name in flags})


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def _make_parser(options: type[Options], doc: str | None) -> _Parser:
    """An argparse parser with a heading for each group. A class's own options come before inherited ones."""
    parser = _Parser(description=doc, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", help="TOML file with options, written key = value")
    own = inspect.get_annotations(options)
    fields = sorted(options.model_fields.items(), key=lambda item: item[0] not in own)
    titles = dict.fromkeys(field.json_schema_extra["group"] for _, field in fields)
    groups = {title: parser.add_argument_group(title) for title in titles}
    for name, field in fields:
        group, arity = groups[field.json_schema_extra["group"]], _arity(field.annotation)
        group.add_argument(f"--{name.rstrip('_')}", dest=name, help=_help(field), default=argparse.SUPPRESS, **arity)
    return parser


def _arity(annotation: Any) -> dict[str, Any]:
    """argparse's arguments for a type: a bool needs no value, a tuple takes several, the others take one."""
    if annotation is bool:
        return {"nargs": "?", "const": "true", "metavar": "BOOL"}
    if get_origin(annotation) is tuple:
        return {"nargs": "+", "action": "extend", "metavar": "X"}
    literals = [arg for arg in get_args(annotation) if isinstance(arg, str)]
    return {"metavar": "|".join(literals) or "X"}


def _help(field: FieldInfo) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    notes = [f"{sign} {getattr(rule, key)}" for rule in field.metadata for key, sign in signs.items() if hasattr(rule, key)]
    if field.is_required():
        notes.append("required")
    elif field.default not in (None, ()):
        notes.append(f"default: {field.default}")
    return " ".join([field.description, *([f"[{', '.join(notes)}]"] if notes else [])]).replace("%", "%%")


def _build(options: type[OptionsT], values: dict[str, Any], places: dict[str, str]) -> OptionsT:
    """The options with these values; flags are text, which pydantic converts. Raises UserError for the first mistake."""
    try:
        config = options(**values)
    except ValidationError as error:
        first = min(error.errors(), key=lambda each: each["type"] == "missing")  # what is wrong before what is missing
        if first["type"] == "missing":
            name = str(first["loc"][0])
            raise UserError(f"--{name.rstrip('_')} is required: {options.model_fields[name].description}") from None
        raise UserError(_message(first, values, places)) from None
    config._places = places
    return config


def _message(error: Any, values: dict[str, Any], places: dict[str, str]) -> str:
    """One of pydantic's errors as a line that begins with the place of the option concerned."""
    message = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:  # of several options, which the message names: those from the command line need no further place
        named = [places[word] for word in re.findall(r"\w+", message) if word in places]
        return ": ".join([*[place for place in named if not place.startswith("--")][:1], message])
    name = error["loc"][0]
    place, value = places.get(name, name), values[name]
    if place.startswith("--"):
        return f"{place}={' '.join(value) if isinstance(value, list) else value}: {message}"
    return f"{place}: {name} = {value!r}: {message}"


LARGEST_TOML = 2**18  # bytes
# tomllib keeps every prefix of a dotted key: tens of gigabytes for one with 100,000 parts.
_DOTTED = re.compile(r"(?:[^.=\n]{1,64}\.){64}")


def load_toml(path: Path) -> tuple[str, dict[str, Any]]:
    """The text of a TOML file and its content. Raises UserError if it is not TOML, or larger than any configuration."""
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST_TOML + 1).decode("utf-8")
        if len(text) <= LARGEST_TOML and not _DOTTED.search(text):
            return text, tomllib.loads(text)
        problem = "too long, or a key with too many dots; options are written one per line, key = value"
    except OSError as error:
        problem = f"{error.strerror}; the configuration must be a TOML file"
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 at byte {error.start}; the configuration must be a TOML file"
    except ValueError as error:  # not only TOMLDecodeError: int() refuses numbers of thousands of digits
        problem = f"not TOML: {error}"
    except RecursionError:
        problem = "TOML nested too deep; options are written one per line, key = value"
    raise UserError(f"{path}: {problem}")


def _read_toml(options: type[Options], path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The options in a TOML file, and the place (file:line) of each. Their types must match exactly: "3" is not a number."""
    text, table = load_toml(path)
    values, places = {}, {}
    for key, value in table.items():
        line = next((i for i, row in enumerate(text.splitlines(), 1) if re.match(rf"\s*\[?[\"']?{re.escape(key)}\b", row)), 1)
        name = key.replace("-", "_")
        name = f"{name}_" if f"{name}_" in options.model_fields else name
        if name not in options.model_fields:
            raise UserError(f"{path}:{line}: {key} = {value!r}: no such option{_nearest(name, options)}")
        several = get_origin(options.model_fields[name].annotation) is tuple
        values[name] = [value] if several and not isinstance(value, list) else value  # one value needs no brackets, as in a flag
        places[name] = f"{path}:{line}"
    try:  # pydantic's strict mode knows paths and tuples only from JSON
        options.model_validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:  # what is missing, or does not fit together, may still be set by flags
        for wrong in error.errors():
            if wrong["loc"] and wrong["loc"][0] in values:
                raise UserError(_message(wrong, values, places)) from None
    return values, places


def _nearest(name: str, options: type[Options], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, options.model_fields, n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else "; --help lists all options"
