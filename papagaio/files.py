"""Files that are there whole or not at all, and that show when they are not as they were written.

What is written first gets another name, then goes to the disk, and then gets its own: a crash at any moment leaves the old
file or the new one. Manifests name the sha256 of every file beside them, and in `sha256` that of what they say themselves.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import IO, Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints, ValidationError

from papagaio.errors import UserError

LARGEST_JSON = 2**24  # bytes of a file that is read as a whole; the manifest of a dataset of 10**13 tokens has as many
PICKLES = (".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".bin")
SAVE_TENSORS = (
    "save the tensors with safetensors.torch.save_file in the program that made them, and name a checkpoint directory of papagaio"
)
GIVE_TEXT = "give the text itself, which data/prepare.py prepares (nanoGPT's train.bin holds tokens of a vocabulary not told)"


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush_to_disk(path: Path) -> None:
    """Wait until a file's content, or the names in a directory, are on the disk: what survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_and_close(file: IO) -> None:
    """Close a file once its content is on the disk: what is renamed afterwards survives a power cut whole."""
    file.flush()
    os.fsync(file.fileno())
    file.close()


def write_whole(path: Path, text: str) -> None:
    """Write a file, or replace it, at one stroke; also where several processes do so."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            sync_and_close(file)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    flush_to_disk(path.parent)


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"


def sealed(manifest: dict[str, Any]) -> str:
    """The text of a manifest, in which the sha256 of all that it says is added: a change to itself shows as well."""
    return to_json(manifest | {"sha256": hashlib.sha256(to_json(manifest).encode()).hexdigest()})


def _stays_inside(name: str) -> str:
    """The name of a file, where a directory's manifest may have it: of nothing outside of the directory."""
    if PurePosixPath(name).is_absolute() or {"", ".", ".."} & set(name.split("/")) or "\0" in name:
        raise ValueError(f"{name!r} is not the name of a file in this directory")
    return name


FileName = Annotated[str, AfterValidator(_stays_inside)]
Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


class Manifest(BaseModel):
    """Base of what manifests say. Other keys are refused, so that `sha256` with a flipped bit is no key that is left out."""

    model_config = ConfigDict(strict=True, extra="forbid")
    of: ClassVar[str]  # what it is called


def read_manifest(path: Path, shape: type[Manifest], cure: str) -> dict[str, Any]:
    """What a manifest says. Raises UserError, which ends with the cure, where it is missing, damaged, or has other keys.

    One without `sha256`, from before manifests had it, is taken as it is.
    """
    text = read_text(path, cure)
    found = parse_json(text, lambda: str(path))
    seal = found.pop("sha256", None) if isinstance(found, dict) else None
    if seal is not None and text != sealed(found):
        raise UserError(f"{path}: changed or cut short since it was written; {cure}")
    try:
        return shape.model_validate(found).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        what = ": ".join((*map(str, first["loc"]), first["msg"].removeprefix("Value error, ")))
        raise UserError(f"{path}: not {shape.of} ({what}); {cure}") from None


def read_text(path: Path, cure: str) -> str:
    """A small text file, byte for byte. Raises UserError, which ends with the cure, where it is missing, a pickle, not UTF-8,
    or beyond measure."""
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_JSON + 1)
        if len(data) > LARGEST_JSON:
            raise UserError(f"{path}: more than {LARGEST_JSON:,} bytes; {cure}")
        return data.decode("utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {cure}") from None
    except UnicodeDecodeError as error:
        refuse_pickle(path, cure)
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; {cure}") from None


def parse_json(text: str, place: Callable[[], str]) -> Any:
    """What a JSON text says; `place` tells where it stands (file:line). Raises UserError where it is not JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{place()}: not JSON: {error.msg} at column {error.colno}") from None
    except ValueError:
        raise UserError(f"{place()}: a number with thousands of digits") from None
    except RecursionError:
        raise UserError(f"{place()}: JSON nested too deep") from None


def read_object(path: Path, cure: str) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError where there is none."""
    found = parse_json(read_text(path, cure), lambda: str(path))
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object; {cure}")
    return found


def refuse_pickle(path: Path, cure: str) -> None:
    """Raises UserError, which ends with the cure, for a file that is a pickle by its name or first bytes, and for a directory
    that holds such: loading one would run what code it names."""
    if path.is_dir():
        found = next((file for file in sorted(path.iterdir()) if file.suffix.lower() in PICKLES), None)
    else:
        found = path if path.suffix.lower() in (*PICKLES, ".npy", ".npz") or _begins_as_pickle(path) else None
    if found is not None:
        raise UserError(f"{found}: papagaio reads no pickles or bare arrays (.pt, .bin, .pkl, .npy): they can run code; {cure}")


def _begins_as_pickle(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(256)
    except OSError:
        return False
    # Protocols 2 to 5; and torch.save's zip archive, whose first file that is.
    return head.startswith((b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5")) or (head.startswith(b"PK") and b"data.pkl" in head)
