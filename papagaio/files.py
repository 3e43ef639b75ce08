"""Files that are there whole or not at all, and that show when they are not as they were written.

What is written first gets another name, then goes to the disk, and then gets its own: a crash at any moment leaves the old
file or the new one. Manifests name the sha256 of every file beside them, and in `sha256` that of what they say themselves.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import IO, Any

from papagaio.config import UserError


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


def read_manifest(path: Path, keys: set[str], cure: str) -> dict[str, Any]:
    """What a manifest says. Raises UserError, which ends with the cure, where it is missing, damaged, or has other keys.

    One without `sha256`, from before manifests had it, is taken as it is.
    """
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text)
        missing, unknown = keys - found.keys(), found.keys() - keys - {"sha256"}
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {cure}") from None
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a manifest ({error!r}); {cure}") from None
    if missing or unknown:
        raise UserError(f"{path}: not a manifest ({', '.join(sorted(missing or unknown))} {'missing' if missing else 'unknown'})")
    if "sha256" in found and text != sealed({key: value for key, value in found.items() if key != "sha256"}):
        raise UserError(f"{path}: changed or cut short since it was written; {cure}")
    found.pop("sha256", None)
    return found
