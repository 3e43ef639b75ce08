"""Analogies: Paris is to France as Rome is to Italy. How often is a word found from three others?"""

import sys
from pathlib import Path
from typing import NamedTuple

import torch

from papagaio.errors import UserError
from papagaio.files import read_text
from papagaio.inside.words import Space, Words, nearest


class Section(NamedTuple):
    """Analogies of one kind. `pairs` are all pairs (A, B), `questions` those (A, B, C, D) in which D is asked for."""

    name: str
    pairs: list[tuple[str, str]]
    questions: list[tuple[str, str, str, str]]


def read_analogies(path: Path) -> list[Section]:
    """Sections of a file: `: capitals`, then lines `Paris France Rome Italy` (Google's format), or `Paris France`, which stands
    for every question made of two pairs. Words are separated by tabs if they hold blanks. Raises UserError."""
    sections: list[Section] = []
    for number, line in enumerate(read_text(path, "a file of analogies is text in UTF-8").splitlines(), 1):
        words = line.split("\t") if "\t" in line else line.split()
        if line.startswith(":"):
            sections.append(Section(line[1:].strip(), [], []))
        elif line.strip():
            sections = sections or [Section(path.stem, [], [])]
            if len(words) not in (2, 4):
                raise UserError(f"{path}:{number}: two or four words are needed (tabs between them if they hold blanks)")
            sections[-1].pairs.extend(
                pair for pair in zip(words[::2], words[1::2], strict=True) if pair not in sections[-1].pairs
            )
            sections[-1].questions.extend([(*words,)] if len(words) == 4 else [])
    for section in sections:
        if not section.questions:
            pairs = section.pairs
            section.questions.extend((*p, *q) for p in pairs for q in pairs if p != q and p[0] != q[0] and p[1] != q[1])
    if not any(section.questions for section in sections):
        raise UserError(f"{path}: no analogies: lines of two or four words are needed")
    return sections


class Score(NamedTuple):
    """The share of right answers. `candidates` is the number of words among which they were found."""

    name: str
    questions: int = 0
    top1: float = 0.0
    top5: float = 0.0
    mean_offset: float = 0.0  # top 1 of each pair, by the mean offset of the section's other pairs
    candidates: int = 1


def score(space: Space, section: Section, among: Words | None) -> Score:
    """How often D is nearest to B - A + C (3CosAdd: Mikolov et al., arXiv:1301.3781), A, B and C excluded. With `among` None,
    which a layer needs, the candidates are the section's own second words. Words without a vector are left out."""
    asked = [question for question in section.questions if all(map(space.has, question))]
    pairs = [pair for pair in section.pairs if all(map(space.has, pair))]
    if not asked:
        return Score(section.name)
    own = space.vectors(list(dict.fromkeys(word for pair in pairs for word in pair)))
    seconds = list(dict.fromkeys(b for _, b in pairs))
    among = among or Words(seconds, torch.stack([own.row(b) for b in seconds]))
    ranks = []
    for a, b, c, d in asked:
        found = [word.casefold() for word, _ in nearest(among, own.row(b) - own.row(a) + own.row(c), 5, (a, b, c))]
        ranks.append(found.index(d.casefold()) if d.casefold() in found else 5)
    offsets = torch.stack([own.row(b) - own.row(a) for a, b in pairs])
    means = (offsets.sum(0) - offsets) / max(1, len(pairs) - 1)
    right = [nearest(among, own.row(a) + mean, 1, (a,))[0][0] == b for (a, b), mean in zip(pairs, means, strict=True)]
    shares = (sum(rank <= worst for rank in ranks) / len(ranks) for worst in (0, 4))
    return Score(section.name, len(asked), *shares, sum(right) / len(right), len(among.names))


def lines(space: Space, path: Path, among: Words | None) -> list[str]:
    """A line for each section of a file, and one for all. Raises UserError if no question is left."""
    sections = read_analogies(path)
    scores = [score(space, section, among) for section in sections]
    asked = sum(one.questions for one in scores)
    if left_out := sum(len(section.questions) for section in sections) - asked:
        print(f"left out, a word has several tokens (--layer=N takes any word): {left_out:,} analogies", file=sys.stderr)
    if not asked:
        raise UserError(f"{path}: no analogy is made of single tokens; --layer=N takes mean hidden states")
    width = max(len(one.name) for one in scores)
    found = [f"{'analogies':<{width}}  questions  top 1  top 5  by mean offset  chance"]
    for one in scores:
        shares = f"{one.top1:>5.3f}  {one.top5:>5.3f}  {one.mean_offset:>14.3f}  {1 / one.candidates:>6.2g}"
        found.append(f"{one.name:<{width}}  {one.questions:>9,}  {shares}")
    means = [sum(getattr(one, name) * one.questions for one in scores) / asked for name in ("top1", "top5")]
    return [*found, f"{'all':<{width}}  {asked:>9,}  {means[0]:>5.3f}  {means[1]:>5.3f}"]
