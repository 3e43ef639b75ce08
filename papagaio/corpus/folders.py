"""Which files an input stands for: files, directories and patterns. Each file is read once; what is passed over is counted.

    find_files(("texts/", "crawl/**/*.jsonl"), report) -> ["texts/a.txt", "texts/b/c.md", "crawl/1/x.jsonl", ...]

Directories and patterns are walked in the same way. Links are followed, and a directory is read once, so that links in a circle
end. kinds.py tells text and tables from other files. A file that the user names must be usable.
"""

import fnmatch
import glob
import os
import re
import stat
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from papagaio.corpus.kinds import TABLES, check_named, kind_of
from papagaio.corpus.rows import uncompressed_suffix
from papagaio.errors import UserError
from papagaio.files import GIVE_TEXT, printable, refuse_pickle
from papagaio.report import Report

OTHER_SPLIT = r"(validation|valid|val|dev|test|eval)"
NOTES = re.compile(r"(readme|license|licence|citation|changelog|dataset_infos?|dataset_dict|state)\b.*", re.IGNORECASE)


class Found(NamedTuple):
    """A file below a directory: its path there in parts, and whether a symbolic link leads to it."""

    linked: bool
    parts: tuple[str, ...]


class Pattern:
    """The parts of a path pattern as a state machine: a state is a frozenset of how many parts may have been matched so far."""

    def __init__(self, parts: Sequence[str]) -> None:
        self.parts = parts
        self.start = self._with_empty({0})

    def _with_empty(self, state: set[int]) -> frozenset[int]:
        """A state, with the parts `**` that stand for nothing passed as well."""
        for i, part in enumerate(self.parts):
            if part == "**" and i in state:
                state.add(i + 1)
        return frozenset(state)

    def step(self, state: frozenset[int], name: str) -> frozenset[int]:
        """The state after one more name of a path; empty if no path with it can match."""
        found = set()
        for i in state - {len(self.parts)}:
            if self.parts[i] == "**":
                found.add(i)
            elif fnmatch.fnmatchcase(name, self.parts[i]):
                found.add(i + 1)
        if self.takes(state):  # below a directory that matches, everything does
            return frozenset(range(len(self.parts) + 1))
        return self._with_empty(found)

    def takes(self, state: frozenset[int]) -> bool:
        """Whether a path that has led to this state matches."""
        return len(self.parts) in state

    def names(self, state: frozenset[int], name: str) -> bool:
        """Whether the pattern itself begins with a dot where this hidden name is."""
        return any(self.parts[i].startswith(".") and fnmatch.fnmatchcase(name, self.parts[i]) for i in state - {len(self.parts)})


def find_files(
    names: Iterable[str], report: Report, exclude: Sequence[str] = (), as_text: bool = False, encoding: str = "utf-8"
) -> list[str]:
    """The files of all names, in the order of the names, those of a directory or pattern sorted by path.

    What is passed over is noted in `report`. `exclude` are patterns for file names and for paths below a directory. Web pages
    are text with `as_text`, and with a UTF-16 `encoding` NUL bytes are no sign of a binary file. Names with hf:// are kept.
    Raises UserError if a name stands for no file, or for one that cannot be used.
    """
    seen: set[tuple[int, int]] = set()
    found: list[str] = []
    for name in names:
        if name.startswith("hf://"):
            found.append(name)
            continue
        if os.path.isdir(name):
            if os.path.exists(os.path.join(name, "manifest.json")):  # a dataset of papagaio holds arrays
                for path in sorted(Path(name).glob("*.npy")):
                    refuse_pickle(path, GIVE_TEXT)
            inside = below(name, Pattern(["**"]), report, exclude, as_text, encoding)
        elif glob.has_magic(name) and not os.path.lexists(name):
            base, pattern = split_pattern(name)
            inside = below(base, pattern, report, exclude, as_text, encoding) if os.path.isdir(base) else []
        elif excluded((Path(name).name,), exclude):
            report.note("passed over, excluded", printable(name))
            continue
        else:
            check_named(name, as_text, encoding)
            inside = [name]
        if not inside:
            raise UserError(f"{printable(name)}: {nothing_there(name, report)}")
        for path in inside:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in seen:
                report.note("passed over, another name of a file that is read already", printable(path))
            else:
                seen.add((status.st_dev, status.st_ino))
                found.append(path)
    return found


def nothing_there(name: str, report: Report) -> str:
    what = "a directory without files; text is needed" if os.path.isdir(name) else "no file has a name like that"
    passed = "; ".join(report.lines())
    return f"no file to read ({passed})" if passed else what


def split_pattern(name: str) -> tuple[str, Pattern]:
    """`a/b/**/*.txt` -> the directory `a/b`, and the pattern for paths below it."""
    parts = Path(name).parts
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    if parts[-2:] == ("**", "*"):
        parts = parts[:-1]
    return os.path.join(*parts[:first]) if first else ".", Pattern(parts[first:])


def excluded(parts: tuple[str, ...], exclude: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(parts[-1], pattern) or fnmatch.fnmatch("/".join(parts), pattern) for pattern in exclude)


def below(base: str, pattern: Pattern, report: Report, exclude: Sequence[str], as_text: bool, encoding: str) -> list[str]:
    """The files below a directory that match and are text or tables, sorted by path."""
    found = sorted(walk(base, pattern, report, exclude))  # real files first: of several names of a file, the real one counts
    seen: set[tuple[int, int]] = set()
    taken: list[tuple[str, ...]] = []
    splits = other_splits([parts for _, parts in found])
    for _, parts in found:
        path = os.path.join(base, *parts)
        status = os.stat(path)
        key = status.st_dev, status.st_ino
        if parts in splits:
            reason = "passed over, named as another split than train (read if named itself, or by --val_input)"
        elif kind := kind_of(path, as_text, encoding):
            reason = f"passed over, {kind}"
        elif key in seen:
            reason = "passed over, another name of a file that is read already"
        else:
            seen.add(key)
            taken.append(parts)
            continue
        report.note(reason, printable(os.path.join(base, *parts)))
    notes = [parts for parts in taken if NOTES.fullmatch(parts[-1])]
    if any(uncompressed_suffix(parts[-1]) in TABLES for parts in taken if parts not in notes) and all(
        uncompressed_suffix(parts[-1]) in TABLES or parts in notes for parts in taken
    ):  # a snapshot of a dataset
        for parts in notes:
            report.note("passed over, a description beside tables", printable(os.path.join(base, *parts)))
        taken = [parts for parts in taken if parts not in notes]
    return [
        os.path.normpath(os.path.join(base, *parts)) if base == "." else os.path.join(base, *parts) for parts in sorted(taken)
    ]


def walk(base: str, pattern: Pattern, report: Report, exclude: Sequence[str]) -> list[Found]:
    """The regular files below a directory that match a pattern. A directory is read once, links to directories last."""
    found: list[Found] = []
    seen: dict[tuple[int, int], list[frozenset[int]]] = {}  # the states in which a directory was read
    real: deque[tuple[str, tuple[str, ...], frozenset[int], bool]] = deque([(base, (), pattern.start, False)])
    linked: deque[tuple[str, tuple[str, ...], frozenset[int], bool]] = deque()
    while real or linked:
        directory, above, state, by_link = real.popleft() if real else linked.popleft()
        try:
            status = os.stat(directory)
            states = seen.setdefault((status.st_dev, status.st_ino), [])
            if any(state <= before for before in states):
                report.note("passed over, links to a directory that is read already", printable(directory))
                continue
            states.append(state)
            entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
        except OSError:
            report.note("passed over, unreadable directories", printable(directory))
            continue
        for entry in entries:
            parts, after = (*above, entry.name), pattern.step(state, entry.name)
            if not after:
                continue
            is_link = by_link or entry.is_symlink()
            reason = ""
            try:
                mode = entry.stat().st_mode
            except FileNotFoundError:
                mode, reason = 0, "links to nothing"
            except OSError:
                mode, reason = 0, "links that lead in a circle"
            if entry.name.startswith(".") and not pattern.names(state, entry.name):
                reason = "hidden"
            elif excluded(parts, exclude):
                reason = "excluded"
            elif stat.S_ISDIR(mode):
                (linked if is_link else real).append((entry.path, parts, after, is_link))
                continue
            elif not pattern.takes(after):
                continue
            elif mode and not stat.S_ISREG(mode):
                reason = "pipes, sockets and devices"
            elif mode and not os.access(entry.path, os.R_OK):
                reason = "unreadable"
            if not reason:
                found.append(Found(is_link, parts))
            elif pattern.takes(after):
                report.note(f"passed over, {reason}", printable(entry.path))
    return found


def other_splits(files: Sequence[tuple[str, ...]]) -> set[tuple[str, ...]]:
    """The files whose name, or whose directory's name, is that of a train split apart from the word for another split.

    `validation-00000-of-00001.parquet` and `val.jsonl` beside `train-00000-of-00009.parquet`, `wiki.test.raw` beside
    `wiki.train.raw`, `test/a.txt` beside `train/b.txt`.
    """

    def keys(word: str, parts: tuple[str, ...]) -> set[tuple[str, ...]]:
        """For each name in a path that has the word: the path up to it, without the word, numbers and hashes."""
        found = set()
        for i, name in enumerate(parts):
            ending = "/" if i + 1 < len(parts) else uncompressed_suffix(name)
            words = re.split(r"[-_.]", name.lower().split(ending)[0] if ending else name.lower())
            if any(re.fullmatch(word, each) for each in words):
                rest = [each for each in words if not re.search(rf"\d|^of$|^$|^{word}$", each)]
                found.add((*parts[:i], *rest, "table" if ending in TABLES else ending))
        return found

    train = set().union(*(keys("(train|training)", parts) for parts in files))
    return {parts for parts in files if train and keys(OTHER_SPLIT, parts) & train}
