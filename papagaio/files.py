"""Files that are written whole or not at all, and whose damage is detected.

A file is written under a temporary name, flushed to the disk and then renamed: a crash at any moment leaves the old file or the
new one. A manifest holds the sha256 of every file beside it, and in `sha256` the hash of its own content.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints, ValidationError

from papagaio.errors import UserError

LARGEST_JSON = 2**24  # bytes of a file that is read at once; the manifest of a dataset of 10**13 tokens has about as many
PICKLES = (".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".bin")
SAVE_TENSORS = "save the tensors with safetensors.torch.save_file where they were made, and name a checkpoint of papagaio"
GIVE_TEXT = "give the text itself to data/prepare.py (nanoGPT's train.bin holds tokens, but does not name their vocabulary)"


def printable(name: str) -> str:
    """A file name for a message or a manifest; bytes that are not UTF-8 become \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush_to_disk(path: Path) -> None:
    """Wait until a file's content, or a directory's list of names, is on the disk and survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_and_close(file: IO) -> None:
    """Close a file after its content has reached the disk, so that it may be renamed."""
    file.flush()
    os.fsync(file.fileno())
    file.close()


def write_whole(path: Path, text: str) -> None:
    """Write or replace a file atomically; several processes may do so at once."""
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


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines, as `write_whole` does."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A free name beside `path` for a file or directory, which becomes `path` if no error comes, and is removed otherwise."""
    temporary = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    if temporary.exists():  # left by a crash
        remove(temporary)
    try:
        yield temporary
        temporary.rename(path)
    except BaseException:
        if temporary.exists():
            remove(temporary)
        raise


@contextlib.contextmanager
def locked_file(path: Path, message: str) -> Iterator[None]:
    """Lock a file inside the block, for this process alone; the kernel drops the lock when the process dies.

    A file system that refuses locks (NFS without lockd, Lustre without -o flock, some FUSE mounts) gets a file PATH.held instead,
    which names the process that holds it. Raises UserError(message) if another process holds the lock.
    """
    from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

    lock: BaseFileLock = FileLock(path, timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(message) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        held = path.with_name(f"{path.name}.held")
        lock = SoftFileLock(held, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise UserError(f"{message}; if none is running on any machine, delete {held}") from None
        print(f"{path}: this file system locks no files ({error.strerror}); {held} marks it as in use instead", file=sys.stderr)
    try:
        yield
    finally:
        lock.release()


def remove(path: Path) -> None:
    """Delete a file, a directory, or a link (not what it leads to)."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def discard(path: Path) -> None:
    """Delete a directory. It is renamed first, so that a crash leaves no half of it under its name. Of a link, only the link."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        condemned = path.with_name(f".{path.name.lstrip('.')}.old")
        shutil.rmtree(condemned, ignore_errors=True)
        path.rename(condemned)
        shutil.rmtree(condemned)


def clear(path: Path) -> None:
    """Delete a directory as `discard` does, but empty a link to a directory and a mount point, which stay."""
    try:
        if not path.is_symlink():
            discard(path)
    except OSError as error:
        if error.errno != errno.EBUSY:  # a mount point; os.path.ismount does not see those of the same disk
            raise
    for inside in path.iterdir() if path.exists() else ():
        discard(inside) if inside.is_dir() else inside.unlink()


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"


def sealed(manifest: dict[str, Any]) -> str:
    """The text of a manifest, with the sha256 of its own content added."""
    return to_json(manifest | {"sha256": hashlib.sha256(to_json(manifest).encode()).hexdigest()})


def _stays_inside(name: str) -> str:
    """Raises ValueError unless a manifest may list a file of this name: one inside the manifest's directory."""
    if PurePosixPath(name).is_absolute() or {"", ".", ".."} & set(name.split("/")) or "\0" in name:
        raise ValueError(f"{name!r} is not the name of a file in this directory")
    return name


FileName = Annotated[str, AfterValidator(_stays_inside)]
Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


class Manifest(BaseModel):
    """Base class of the kinds of manifests. Unknown keys are refused."""

    model_config = ConfigDict(strict=True, extra="forbid")
    of: ClassVar[str]  # its name in error messages


def read_manifest(path: Path, shape: type[Manifest], cure: str) -> dict[str, Any]:
    """The content of a manifest. Raises UserError, which ends with the cure, if it is missing, damaged or of another shape."""
    text, found = read_text(path, cure), read_object(path, cure)
    if found.pop("sha256", None) is None or text != sealed(found):
        raise UserError(f"{path}: changed or cut short since it was written; {cure}")
    try:
        return shape.model_validate(found).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        what = ": ".join((*map(str, first["loc"]), first["msg"].removeprefix("Value error, ")))
        raise UserError(f"{path}: not {shape.of} ({what}); {cure}") from None


def read_text(path: Path, cure: str) -> str:
    """A small text file, byte for byte. Raises UserError, which ends with the cure, if it is missing, too large or not UTF-8."""
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


def parse_json(text: str, place: Path | Callable[[], str]) -> Any:
    """The value of a JSON text. Raises UserError if it is not JSON. `place` is the text's file, or gives the text's file:line."""
    line = 1
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line, problem = error.lineno, f"not JSON: {error.msg} at column {error.colno}"
    except ValueError:
        problem = "a number with thousands of digits"
    except RecursionError:
        problem = "JSON nested too deep"
    raise UserError(f"{f'{place}:{line}' if isinstance(place, Path) else place()}: {problem}")


def read_object(path: Path, cure: str) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError if it holds anything else."""
    found = parse_json(read_text(path, cure), path)
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object; {cure}")
    return found


def refuse_pickle(path: Path, cure: str) -> None:
    """Raises UserError, which ends with the cure, for a file whose name or first bytes are those of a pickle or a bare array, and
    for a directory that holds such a file: loading a pickle can run any code."""
    if path.is_dir():
        found = next((file for file in sorted(path.iterdir()) if file.suffix.lower() in PICKLES), None)
    else:
        found = path if path.suffix.lower() in (*PICKLES, ".npy", ".npz") or _begins_as_pickle(path) else None
    if found is not None:
        raise UserError(f"{found}: papagaio reads no pickles or bare arrays (.pt, .bin, .pkl, .npy): they can run code; {cure}")


def _begins_as_pickle(path: Path) -> bool:
    """Whether a file begins as a pickle of protocol 2 to 5, or as torch.save's zip archive, in which data.pkl comes first."""
    head = b""
    with contextlib.suppress(OSError), path.open("rb") as file:
        head = file.read(256)
    return re.match(rb"\x80[\2-\5]|PK.*data\.pkl", head, re.DOTALL) is not None
