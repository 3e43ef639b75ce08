"""What a preparation does, and the work directory in which it is done.

The work directory keeps the plan in plan.json and what has been made so far: a run that was interrupted is continued if its plan
is the same. When the dataset is complete, the work directory becomes the dataset directory.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from papagaio.corpus.dataset import Dataset
from papagaio.corpus.spans import LEAF_BYTES, Span
from papagaio.errors import UserError
from papagaio.files import parse_json, sealed, write_whole

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
    """What a dataset is made from: the options that change its content, and the input as tasks."""

    options: dict[str, Any]
    tasks: list[Task]

    @cached_property
    def inputs(self) -> list[dict[str, Any]]:
        """For each task its spans, without the files' directories, and the times of the files' last changes."""
        tasks = []
        for task in self.tasks:
            spans = [[span.path if span.kind == "hub" else Path(span.path).name, *span[1:]] for span in task]
            changed = [0 if span.kind == "hub" else os.stat(span.path).st_mtime_ns for span in task]
            tasks.append({"spans": spans, "changed": changed})
        return tasks

    @cached_property
    def sha256(self) -> str:
        """The same for the same input and options, wherever the files are."""
        spans = {"tasks": [task["spans"] for task in self.inputs]}
        return hashlib.sha256(json.dumps(self.options | spans).encode()).hexdigest()

    def is_done(self, out: Path) -> bool:
        """Whether this plan's dataset is in `out`. Raises UserError if another dataset is there."""
        manifest = out / "manifest.json"
        if not manifest.exists():
            return False
        changed = max(time for task in self.inputs for time in task["changed"])
        if Dataset(out).manifest["made_from"] != self.sha256 or changed > manifest.stat().st_mtime_ns:
            raise UserError(f"{out}: a dataset made from other input or with other options; --overwrite replaces it")
        return True

    def start(self, work: Path, overwrite: bool) -> None:
        """Make the work directory ready, keeping what an interrupted run has made and what is still right.

        Raises UserError if that run had other options, unless `overwrite`.
        """
        path = work / "plan.json"
        before: dict[str, Any] = {"options": self.options, "tasks": None}  # without plan.json everything is removed
        if path.exists():
            before = parse_json(path.read_text(encoding="utf-8", errors="replace"), lambda: f"{path}: damaged, delete {work}")
        if before["options"] != self.options:
            if not overwrite:
                different = ", ".join(key for key in self.options if before["options"].get(key) != self.options[key])
                raise UserError(
                    f"{work}: left by an interrupted run with other options ({different}); complete that run, or --overwrite"
                )
            before["tasks"] = None
        if before["tasks"] != self.inputs:
            # Shards and trained tokenizers depend on the whole input, a piece on its task and the tokenizer.
            shutil.rmtree(work / "tokenizer", ignore_errors=True)
            for shard in work.glob("*.npy"):
                shard.unlink()
            trained = self.options["tokenizer"] in ("bpe", "char")
            for index in work.glob("pieces/*.npy"):
                here = slice(int(index.stem), int(index.stem) + 1)
                same = before["tasks"] and before["tasks"][here] == self.inputs[here]
                if trained or not same or not index.with_suffix(".tokens").exists():
                    index.unlink()
        (work / "pieces").mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"options": self.options, "tasks": self.inputs}))


@contextmanager
def locked(work: Path, index: int, count: int) -> Iterator[None]:
    """Hold the work directory: several parts may work in it at once, but a run that does or merges everything works alone."""
    work.mkdir(parents=True, exist_ok=True)
    own = work / f"part-{index}-of-{count}.lock"
    with ExitStack() as stack:
        try:
            for path in {own, *work.glob("part-*.lock" if count == 1 else "part-0-of-1.lock")}:
                lock = stack.enter_context(FileLock(path, timeout=0))
                if path != own:
                    lock.release()
        except Timeout:
            raise UserError(f"{work}: in use by another run; wait until it has ended") from None
        try:
            yield
        finally:
            own.unlink(missing_ok=True)
            if work.exists() and not any(work.iterdir()):
                work.rmdir()


def finish(work: Path, out: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, remove the intermediate files, and rename the work directory to `out`."""
    write_whole(work / "manifest.json", sealed(manifest))
    shutil.rmtree(work / "pieces")
    for path in [*work.glob("*.lock"), work / "stdin", work / "plan.json"]:
        path.unlink(missing_ok=True)
    before = work.with_name(f".{out.name}.before")
    shutil.rmtree(before, ignore_errors=True)
    if out.exists():
        out.rename(before)
    work.rename(out)
    shutil.rmtree(before, ignore_errors=True)
