"""What a preparation does, and the work directory in which it is done.

The work directory keeps the plan in plan.json and what has been made so far: a run that was interrupted is continued if its plan
is the same. When the dataset is complete, manifest.json is written there, and the dataset is moved to its place (`publish`).
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from papagaio.corpus.dataset import Dataset, DatasetManifest
from papagaio.corpus.spans import LEAF_BYTES, Span
from papagaio.corpus.workers import processors
from papagaio.errors import UserError
from papagaio.files import file_sha256, flush_to_disk, locked_file, parse_json, read_manifest, sealed, write_whole

Task = list[Span]  # the spans that one job encodes


def make_tasks(spans: list[Span]) -> list[Task]:
    """Group the spans: small ones together, up to the size of a large one."""
    largest = max([LEAF_BYTES, *(span.stop - span.start for span in spans if span.kind in ("text", "jsonl") and span.stop > 0)])
    tasks: list[Task] = []
    room = 0
    for span in spans:
        if not tasks or span.size > room or span.kind == "hub" or len(tasks[-1]) == 1000:
            tasks.append([])
            room = largest
        tasks[-1].append(span)
        room -= span.size
    return tasks


@dataclass(frozen=True)
class Plan:
    """What a dataset is made from: the options that change its content, and the input as tasks.

    The first `val_tasks` tasks are the text of --val_input.
    """

    options: dict[str, Any]
    tasks: list[Task]
    val_tasks: int = 0

    @cached_property
    def inputs(self) -> list[dict[str, Any]]:
        """For each task its spans with absolute paths, and size and time of the last change of each span's file. A piece that an
        interrupted run has left is kept if they are the same."""
        tasks = []
        for task in self.tasks:
            here = [span.path if span.kind == "hub" else os.path.abspath(span.path) for span in task]
            states = [None if span.kind == "hub" else os.stat(span.path) for span in task]
            spans = [[path, *span[1:]] for path, span in zip(here, task, strict=True)]
            tasks.append({"spans": spans, "changed": [state and [state.st_size, state.st_mtime_ns] for state in states]})
        return tasks

    @property
    def spans(self) -> list[Span]:
        return [span for task in self.tasks for span in task]

    @cached_property
    def files(self) -> list[str]:
        """The files of the input, in order."""
        return list(dict.fromkeys(span.path for task in self.tasks for span in task if span.kind != "hub"))

    @cached_property
    def n_bytes(self) -> int:
        return sum(os.path.getsize(path) for path in self.files)

    @cached_property
    def sha256(self) -> str:
        """Identity of the dataset: a hash of the options and of the content of the input, which is read for that.

        It is the same for equal files in other directories, with other times. Of a file's name, only the suffix counts: it says
        how the file is decompressed.
        """
        with ThreadPoolExecutor(processors()) as pool:  # hashing releases the GIL
            content = dict(zip(self.files, pool.map(lambda path: file_sha256(Path(path)), self.files), strict=True))
        found: dict[Any, None] = {}  # in order, each file once
        for number, task in enumerate(self.tasks):
            for path, kind, start, _, _ in task:
                of_val = number < self.val_tasks
                found[
                    (of_val, kind, path, start) if kind == "hub" else (of_val, kind, Path(path).suffix, content[path], path)
                ] = None
        inputs = [key if key[1] == "hub" else key[:-1] for key in found]
        return hashlib.sha256(json.dumps([self.options, inputs]).encode()).hexdigest()

    def is_done(self, out: Path) -> bool:
        """Whether this plan's dataset is in `out`. Raises UserError if another dataset is there."""
        if not (out / "manifest.json").exists():
            return False
        found = Dataset(out).manifest
        same_size = (found["input_files"], found["input_bytes"]) == (len(self.files), self.n_bytes)
        if not same_size or found["made_from"] != self.sha256:  # the content is only read if the size is the same
            raise UserError(f"{out}: a dataset made from other input or with other options; --overwrite replaces it")
        return True

    def is_complete(self, work: Path) -> bool:
        """Whether this plan's dataset is complete in the work directory, and only has to be published."""
        path = work / "manifest.json"
        return path.exists() and read_manifest(path, DatasetManifest, f"delete {work}")["made_from"] == self.sha256

    def start(self, work: Path, overwrite: bool) -> None:
        """Make the work directory ready, keeping what an interrupted run has made and what is still right.

        Raises UserError if that run had other options, unless `overwrite`. --skip_bad may be added: pieces are only complete if
        nothing in them was bad.
        """
        path = work / "plan.json"
        before: dict[str, Any] = {"options": self.options, "tasks": None}  # without plan.json everything is removed
        if path.exists():
            before = parse_json(path.read_text(encoding="utf-8", errors="replace"), lambda: f"{path}: damaged, delete {work}")
        options = before["options"] | ({"skip_bad": True} if self.options.get("skip_bad") else {})
        if options != self.options:
            if not overwrite:
                different = ", ".join(key for key in self.options if options.get(key) != self.options[key])
                raise UserError(
                    f"{work}: left by an interrupted run with other options ({different}); complete that run, or --overwrite"
                )
            before["tasks"] = None
        if before["tasks"] != self.inputs:
            # Shards depend on the whole input. So does a tokenizer that is trained: it is trained again, and `use_tokenizer` then
            # keeps the pieces if it is equal. Otherwise a piece depends on its task alone.
            for name in ("manifest.json", "cuts.json"):
                (work / name).unlink(missing_ok=True)
            shutil.rmtree(work / "tokenizer", ignore_errors=True)
            for shard in work.glob("*.npy"):
                shard.unlink()
            for index in work.glob("pieces/*.npy"):
                here = slice(int(index.stem), int(index.stem) + 1)
                same = before["tasks"] and before["tasks"][here] == self.inputs[here]
                if not same or not index.with_suffix(".tokens").exists():
                    index.unlink()
        (work / "pieces").mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"options": self.options, "tasks": self.inputs}))

    def check_unchanged(self) -> None:
        """Raises UserError if an input file has been changed since the plan was made."""
        now = Plan(self.options, self.tasks).inputs
        for task, before, after in zip(self.tasks, self.inputs, now, strict=True):
            for span, old, new in zip(task, before["changed"], after["changed"], strict=True):
                if old != new:
                    raise UserError(f"{span.path}: changed while it was read; the same command reads it again")


def use_tokenizer(work: Path, sha256: str) -> None:
    """Note which tokenizer makes the pieces, and discard those that another one has made."""
    path = work / "tokenizer.sha256"
    if not path.exists() or path.read_text(encoding="utf-8") != sha256:
        for index in work.glob("pieces/*.npy"):
            index.unlink()
        write_whole(path, sha256)


def destination(out: Path) -> tuple[Path, Path]:
    """The dataset directory with links resolved, and the work directory for it.

    The work directory is .NAME.partial beside the dataset directory, and is renamed at the end. If the dataset directory cannot
    be renamed (a mount point, the current directory, or in a directory that cannot be written), the work directory is .partial
    inside it, and its content is moved at the end. Raises UserError if `out` is something else than a dataset.
    """
    home = Path(os.path.realpath(out))
    if home.is_symlink():
        raise UserError(f"{out}: a symbolic link that leads back to itself; choose another --out")
    inside = home / ".partial"
    parent_is_closed = home.is_dir() and not os.access(home.parent, os.W_OK | os.X_OK)
    in_place = is_mount(home) or Path.cwd().is_relative_to(home) or parent_is_closed
    work = inside if in_place else home.with_name(f".{home.name}.partial")
    begun = (work / "manifest.json").exists() or (in_place and work.exists())  # an earlier run may have moved a part
    free = begun or not home.exists() or (home / "manifest.json").exists()
    if not free and not (home.is_dir() and {path.name for path in home.iterdir()} <= {"lost+found"}):
        raise UserError(f"{out}: exists and is not a dataset, which even --overwrite leaves alone; choose another --out")
    return home, work


def is_mount(path: Path) -> bool:
    """Whether a file system is mounted at a path; os.path.ismount does not see bind mounts of the same file system."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return os.path.ismount(path)
    points = (re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), line.split()[4]) for line in mounts)  # blanks as \040
    return os.path.ismount(path) or str(path) in points


@contextmanager
def locked(work: Path, index: int, count: int) -> Iterator[None]:
    """Hold the work directory: several parts may work in it at once, but a run that does or merges everything works alone."""
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{work}: cannot be made ({error.strerror}); choose another --out") from None
    own = work / f"part-{index}-of-{count}.lock"
    busy = f"{work}: in use by another run; wait until it has ended"
    with ExitStack() as stack:
        for path in work.glob("part-*.lock" if count == 1 else "part-0-of-1.lock"):
            if path != own:
                with locked_file(path, busy):
                    pass
        stack.enter_context(locked_file(own, busy))
        try:
            yield
        finally:
            own.unlink(missing_ok=True)
            if work.exists() and not any(work.iterdir()):
                work.rmdir()


def clear(work: Path, out: Path) -> None:
    """Remove what a run that was killed at its very end has left beside the dataset it has made."""
    shutil.rmtree(work.with_name(f".{out.name}.before"), ignore_errors=True)
    (work / "stdin").unlink(missing_ok=True)


def finish(work: Path, out: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, which makes the dataset complete in the work directory, and move it to `out`."""
    write_whole(work / "manifest.json", sealed(manifest))
    publish(work, out)


def publish(work: Path, out: Path) -> None:
    """Move a dataset that is complete in the work directory to `out`, replacing a dataset there.

    After a crash at any moment, `out` has the old dataset, none (no manifest), or the new one. Calling it again completes the
    move.
    """
    manifest = read_manifest(work / "manifest.json", DatasetManifest, f"delete {work}")
    shards = [shard["file"] for split in manifest["splits"].values() for shard in split["shards"]]
    for path in work.iterdir():  # locks, what the dataset was made from, what a crash has left
        if path.name not in ("manifest.json", "tokenizer", *shards):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    before = work.with_name(f".{out.name}.before")
    if work.parent != out and all((work / name).exists() for name in ("tokenizer", *shards)):
        shutil.rmtree(before, ignore_errors=True)
        try:
            if out.exists():
                out.rename(before)
            work.rename(out)
            shutil.rmtree(before, ignore_errors=True)
            return
        except OSError:  # a directory that cannot be renamed for a reason that `destination` has not seen
            if not out.exists():
                raise
    # File by file: first the old dataset loses its manifest, last of all the new one gets it.
    (out / "manifest.json").unlink(missing_ok=True)
    for shard in out.glob("*.npy"):
        if re.fullmatch(r"(train|val)-\d+\.npy", shard.name) and shard.name not in shards:
            shard.unlink()
    for name in ("tokenizer", *shards):
        if (work / name).exists():
            if (out / name).is_dir():
                shutil.rmtree(out / name)
            (work / name).rename(out / name)
    flush_to_disk(out)
    (work / "manifest.json").rename(out / "manifest.json")
    flush_to_disk(out)
    shutil.rmtree(work)
