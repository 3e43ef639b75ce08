"""Words as vectors: nearest neighbours, analogies, a map, and how much nearer words of one group are than chance.

A word is a row of the table of embeddings if it is a single token (with the blank before it, or else without), or with a layer
the mean of its tokens' hidden states after that many blocks. Vectors are compared by their cosine.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import regex
import torch
import torch.nn.functional as F
from torch import Tensor

from papagaio.errors import UserError
from papagaio.files import read_text
from papagaio.generation.engine import Engine
from papagaio.inside import drawing
from papagaio.inside.hooks import check_layer, observe, span
from papagaio.options import load_toml

NEIGHBOURS = 5  # whose groups are counted for the purity


class Words(NamedTuple):
    """Words and their vectors (N, C) of length 1."""

    names: list[str]
    vectors: Tensor

    def row(self, name: str) -> Tensor:
        return self.vectors[self.names.index(name)]


def token_of(engine: Engine, word: str) -> int | None:
    """The id of a word that is a single token."""
    found = (engine.tokenizer.encode(text) for text in (f" {word}", word))
    return next((ids[0] for ids in found if len(ids) == 1), None)


def vectors(engine: Engine, words: Sequence[str], layer: int | None = None, around: str = "{}", pool: str = "mean") -> Words:
    """The vectors of words; `pool`: the mean of a word's tokens, or its last one, which has seen the whole word.

    Raises UserError for a word of several tokens if no layer is given, and for a layer that is not there.
    """
    model = engine.model
    if layer is None:
        ids = [token_of(engine, word) for word in words]
        for word, token in zip(words, ids, strict=True):
            if token is None:
                count = len(engine.tokenizer.encode(f" {word}"))
                raise UserError(f"{word!r} has {count} tokens, not one: --layer=N takes its mean hidden state after N blocks")
        table = model.embed.weight.detach()
        return Words(list(words), F.normalize(table[torch.tensor(ids, device=table.device)].float(), dim=-1))
    check_layer(layer, model.config.n_layer)
    before, after = around.split("{}")
    rows = [engine.encode(before + word + after) for word in words]
    found: dict[int, Tensor] = {}
    for length in {len(row) for row in rows}:  # rows of one length make a batch
        if length > engine.block_size:
            raise UserError(f"a word has {length} tokens, the model's context only {engine.block_size}")
        same = [i for i, row in enumerate(rows) if len(row) == length]
        for start in range(0, len(same), 64):
            part = same[start : start + 64]
            hidden = observe(model, torch.tensor([rows[i] for i in part], device=engine.device)).hidden[layer]  # (B, T, C)
            for i, x in zip(part, hidden, strict=True):
                own = x[span(engine, rows[i], words[i])]  # (tokens, C)
                found[i] = own[-1] if pool == "last" else own.mean(0)
    return Words(list(words), F.normalize(torch.stack([found[i] for i in range(len(words))]).float(), dim=-1))


def vocabulary(engine: Engine) -> Words:
    """The words that are single tokens: letters only, with the blank before them if the tokenizer has that form."""
    texts = {token: text for token in range(engine.tokenizer.vocab_size) if (text := engine.tokenizer.decode([token]))}
    with_blank = {text[1:]: token for token, text in texts.items() if regex.fullmatch(r" \p{L}{2,}", text)}
    bare = {text: token for token, text in texts.items() if regex.fullmatch(r"\p{L}{2,}", text)}
    words = bare | with_blank if len(with_blank) < 100 else with_blank
    table = engine.model.embed.weight.detach()
    return Words(list(words), F.normalize(table[torch.tensor(list(words.values()), device=table.device)].float(), dim=-1))


def nearest(words: Words, vector: Tensor, count: int, without: Sequence[str] = ()) -> list[tuple[str, float]]:
    """The words nearest to a vector (C,), with their cosines; without these words, whatever their capitals."""
    left_out, found = {word.casefold() for word in without}, list[tuple[str, float]]()
    cosines = words.vectors @ F.normalize(vector, dim=0)
    most = min(len(cosines), count + 8 * (1 + len(without)))  # room for the spellings of the words left out
    for i in cosines.topk(most).indices.tolist():
        if words.names[i].casefold() not in left_out and len(found) < count:
            found.append((words.names[i], float(cosines[i])))
    return found


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
    questions: int
    top1: float
    top5: float
    mean_offset: float  # top 1 of each pair, by the mean offset of the section's other pairs
    candidates: int
    left_out: int


def score(engine: Engine, section: Section, layer: int | None, around: str, pool: str, among: Words | None) -> Score:
    """How often D is nearest to B - A + C (3CosAdd: Mikolov et al., arXiv:1301.3781), A, B and C excluded. With `among` None,
    which a layer needs, the candidates are the section's own second words."""
    known = (lambda word: token_of(engine, word) is not None) if layer is None else (lambda word: True)
    asked = [question for question in section.questions if all(map(known, question))]
    pairs = [pair for pair in section.pairs if all(map(known, pair))]
    if not asked:
        return Score(section.name, 0, 0.0, 0.0, 0.0, 0, len(section.questions))
    own = vectors(engine, list(dict.fromkeys(word for pair in pairs for word in pair)), layer, around, pool)
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
    left_out = len(section.questions) - len(asked)
    return Score(section.name, len(asked), *shares, sum(right) / len(right), len(among.names), left_out)


def default_groups(language: str) -> dict[str, list[str]]:
    """Weekdays, months, countries and today's currencies in a language, from Babel's tables (CLDR)."""
    from babel import Locale, UnknownLocaleError
    from babel.numbers import get_territory_currencies

    try:
        locale = Locale.parse(language)
    except (UnknownLocaleError, ValueError):
        raise UserError(
            f"--language={language}: Babel knows no language of this name; en, pt or another code is needed"
        ) from None
    countries = {code: name for code, name in locale.territories.items() if code.isalpha() and len(code) == 2}
    current = {currency for code in countries for currency in get_territory_currencies(code)}
    tables = {
        "weekdays": locale.days["stand-alone"]["wide"].values(),
        "months": locale.months["stand-alone"]["wide"].values(),
        "countries": countries.values(),
        "currencies": [name for code, name in locale.currencies.items() if code in current],
    }
    # Without "Congo - Kinshasa" and "Bosnia-Herzegovina convertible mark (BAM)".
    return {
        name: [word for word in table if regex.fullmatch(r"(?!.* - )\p{L}[\p{L}\p{M} .’'&-]*", word)]
        for name, table in tables.items()
    }


def read_groups(path: Path) -> dict[str, list[str]]:
    """name = [words] from a TOML file. Raises UserError."""
    groups = load_toml(path)[1]
    for name, words in groups.items():
        if not isinstance(words, list) or not all(isinstance(word, str) and word for word in words):
            raise UserError(f"{path}: {name} must be a list of words")
    return groups


def choose(engine: Engine, groups: dict[str, list[str]], layer: int | None, largest: int = 40) -> dict[str, list[str]]:
    """The words of groups that have a vector, those in several groups left out, the first `largest` of each; says how many are
    left. Raises UserError if fewer than two groups with two words are left."""
    seen = [word for words in groups.values() for word in dict.fromkeys(words)]
    chosen = {}
    for name, words in groups.items():
        own = [word for word in dict.fromkeys(words) if seen.count(word) == 1]
        fit = [word for word in own if layer is not None or token_of(engine, word) is not None]
        chosen[name] = fit[:largest]
        reason = "in one group only" if layer is not None else "of one token, in one group only"
        print(f"{name}: {len(chosen[name])} of {len(set(words))} words ({len(fit)} are {reason})", file=sys.stderr)
    chosen = {name: words for name, words in chosen.items() if len(words) > 1}
    if len(chosen) < 2:
        raise UserError("fewer than two groups have two words of one token: name other --groups, or --layer=N for any words")
    return chosen


class Nearness(NamedTuple):
    """How near words of one group are."""

    purity: float  # share of a word's nearest neighbours that are of its group
    chance: float  # the same if neighbours were drawn by chance
    silhouette: float  # -1 to 1; 0: groups are not apart (Rousseeuw 1987)


def nearness(vectors: Tensor, labels: Sequence[int]) -> Nearness:
    """Of vectors (N, C) with the number of the group of each, by cosine."""
    from sklearn.metrics import silhouette_score

    own, sizes = torch.tensor(labels), torch.bincount(torch.tensor(labels))
    unit = F.normalize(vectors.cpu().float(), dim=-1)
    cosines = (unit @ unit.T).fill_diagonal_(-2)
    neighbours = own[cosines.topk(min(NEIGHBOURS, len(labels) - 1)).indices]  # (N, NEIGHBOURS)
    purity = float((neighbours == own[:, None]).float().mean())
    chance = float((sizes * (sizes - 1)).sum()) / (len(labels) * (len(labels) - 1))
    return Nearness(purity, chance, float(silhouette_score(unit.numpy(), labels, metric="cosine")))


def cluster(words: Words, count: int) -> dict[str, list[str]]:
    """Groups found by k-means on vectors of length 1, named by the words nearest to their centres, which stand first."""
    from sklearn.cluster import KMeans

    if count > len(words.names):
        raise UserError(f"--clusters={count}: there are {len(words.names)} words only")
    found = KMeans(count, n_init=4, random_state=0).fit(words.vectors.cpu().numpy())
    groups = {}
    for number in range(count):
        inside = [i for i, label in enumerate(found.labels_) if label == number]
        near = words.vectors[inside].cpu() @ torch.tensor(found.cluster_centers_[number], dtype=torch.float32)
        own = [words.names[inside[i]] for i in near.argsort(descending=True).tolist()]
        groups[", ".join(own[:3])] = own
    return groups


def project(vectors: Tensor) -> dict[str, Any]:
    """Vectors (N, C) in two dimensions (N, 2): by PCA, which is linear, and by t-SNE, which keeps neighbours together."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    x = vectors.cpu().numpy()
    pca = PCA(2, random_state=0).fit(x)
    kept = pca.explained_variance_ratio_.sum()
    perplexity = max(2, min(30, (len(x) - 1) // 4))
    tsne = TSNE(2, perplexity=perplexity, metric="cosine", init="pca", random_state=0).fit_transform(x)
    return {f"PCA ({kept:.0%} of the variance)": pca.transform(x), f"t-SNE (perplexity {perplexity})": tsne}


def draw_map(words: Words, labels: Sequence[int], groups: Sequence[str], flat: dict[str, Any], title: str) -> Any:
    """Two maps of the words, coloured by group; words are written beside their points where there is room."""
    picture = drawing.figure(14, 7.4)
    for axes, (name, points) in zip(picture.subplots(1, 2), flat.items(), strict=True):
        low, size = points.min(0), points.max(0) - points.min(0)
        axes.set_xlim(low[0] - 0.03 * size[0], low[0] + 1.1 * size[0])
        axes.set_ylim(low[1] - 0.04 * size[1], low[1] + 1.04 * size[1])
        free = drawing.Room()
        for number, group in enumerate(groups):
            own = [i for i, label in enumerate(labels) if label == number]
            colour, marker = drawing.COLOURS[number % 7], drawing.MARKERS[(number + number // 7) % 7]
            axes.scatter(*points[own].T, s=16, c=colour, marker=marker, label=drawing.literal(drawing.clip(group, 34)))
        for i, point in enumerate(points):
            word, width, (x, y) = words.names[i], 0.0115 * len(words.names[i]), (point - low) / size
            left = x + width > 1.08  # of its point, so that it stays inside
            if free.take(x - width if left else x, y, width, 0.02):
                style = {"fontsize": 7, "color": drawing.COLOURS[labels[i] % 7], "ha": "right" if left else "left"}
                axes.annotate(drawing.literal(word), point, (-2 if left else 2, 2), textcoords="offset points", **style)
        axes.set_title(name, fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
    picture.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=min(5, len(groups)), fontsize=9)
    picture.suptitle(title, fontsize=12)
    return picture


def draw_training(names: Sequence[str], found: Sequence[Nearness]) -> Any:
    """Purity and silhouette, a checkpoint a point."""
    picture = drawing.figure(7, 4.2)
    axes = picture.subplots()
    places = range(len(names))
    axes.plot(places, [n.purity for n in found], "o-", color=drawing.COLOURS[0], label="neighbours of the same group")
    axes.plot(places, [n.silhouette for n in found], "s--", color=drawing.COLOURS[3], label="silhouette")
    axes.axhline(found[0].chance, color="grey", linewidth=1, linestyle=":", label="neighbours by chance")
    axes.set_xticks(places, names, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_ylim(min(0.0, *(n.silhouette for n in found)) - 0.05, 1.02)
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title("training brings words of a group together")
    return picture
