"""Groups of words on a map: how much nearer words of one group are than chance, at the end and over training."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import regex
import torch
import torch.nn.functional as F
from torch import Tensor

from papagaio.errors import UserError
from papagaio.generation.engine import Engine
from papagaio.inside import analogies, drawing, page
from papagaio.inside.opening import make_engine
from papagaio.inside.options import EmbeddingsOptions
from papagaio.inside.words import Space, Words, neighbours, vocabulary
from papagaio.options import load_toml
from papagaio.runs.checkpoint import Checkpoint, MakeModel
from papagaio.runs.directory import open_checkpoint, steps_saved
from papagaio.terminal import progress

NEIGHBOURS = 5  # whose groups are counted for the purity
LARGEST = 40  # words of a group
CLUSTERED = 500  # words of the vocabulary


def look(config: EmbeddingsOptions, make: MakeModel) -> page.Found:
    """Neighbours and analogies of words that are named, and groups of words on a map."""
    checkpoint = open_checkpoint(config.checkpoint, config.base)
    space = Space(make_engine(checkpoint, make, config.device), config.layer, config.around, config.pool)
    print(f"words are {space}", file=sys.stderr)
    found, all_words = page.Found(), vocabulary(space.engine)
    on_map = space
    if config.clusters:
        on_map = Space(space.engine)
        groups = cluster(Words(all_words.names[:CLUSTERED], all_words.vectors[:CLUSTERED]), config.clusters)
        some = sum(map(len, groups.values()))
        print(f"clusters of {some} of {len(all_words.names):,} words, those with the lowest ids", file=sys.stderr)
    else:
        named = read_groups(config.groups) if config.groups else default_groups(config.language)
        groups = choose(space, named)
    names = [word for words in groups.values() for word in words]
    labels = [number for number, words in enumerate(groups.values()) for _ in words]
    words = on_map.vectors(names)
    among = all_words if space.layer is None else words
    for word in config.word:
        found.lines.append(f"{word}: {neighbours(among, space.vectors([word]).vectors[0], (word,))}")
    if config.analogy:
        a, b, c = space.vectors(config.analogy).vectors
        found.lines.append("{} - {} + {}: ".format(*config.analogy) + neighbours(among, a - b + c, config.analogy))
    if config.analogies:
        found.lines += analogies.lines(space, config.analogies, all_words if space.layer is None else None)
    if config.clusters:
        found.lines += [f"{name}: {', '.join(own[:12])}" for name, own in groups.items()]
    found.lines.append(f"{len(names)} words in {len(groups)} groups: {nearness(words.vectors, labels)}")
    flat = project(words.vectors)
    found.pictures["embeddings"] = draw_map(words, labels, list(groups), flat, f"{len(names)} words: {on_map}")
    near = (words.vectors @ words.vectors.T).fill_diagonal_(-2).topk(min(8, len(names) - 1)).indices.tolist()
    found.parts.append(page.words(list(flat.values())[-1], names, labels, near, drawing.COLOURS[:7]))
    if config.training:
        steps = {
            name: nearness(on_map._replace(engine=engine).vectors(names).vectors, labels)
            for name, engine in over_training(checkpoint, config, make)
        }
        found.lines += [f"{name:>12}  {one}" for name, one in steps.items()]
        found.pictures["embeddings_training"] = draw_training(steps)
    return found


def over_training(checkpoint: Checkpoint, config: EmbeddingsOptions, make: MakeModel) -> Iterator[tuple[str, Engine]]:
    """The model with random weights, drawn as the run's own were, and at each checkpoint of the run."""
    torch.manual_seed((checkpoint.state.get("options") or {}).get("seed", 1337))
    yield "random", Engine(make(checkpoint.model_fields).requires_grad_(False).eval(), checkpoint.tokenizer)
    directory = checkpoint.path.parent
    paths = [directory / f"step-{step}" for step in steps_saved(directory)] or [checkpoint.path]
    for path in progress(paths, "checkpoints"):
        yield path.name, make_engine(open_checkpoint(path, config.base), make, config.device)


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


def choose(space: Space, groups: dict[str, list[str]]) -> dict[str, list[str]]:
    """The words of groups that have a vector, those in several groups left out, the first LARGEST of each; says how many are
    left. Raises UserError if fewer than two groups with two words are left."""
    seen = [word for words in groups.values() for word in dict.fromkeys(words)]
    chosen = {}
    for name, words in groups.items():
        own = [word for word in dict.fromkeys(words) if seen.count(word) == 1]
        fit = [word for word in own if space.has(word)]
        chosen[name] = fit[:LARGEST]
        reason = "in one group only" if space.layer is not None else "of one token, in one group only"
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

    def __str__(self) -> str:
        nearest = f"{self.purity:.3f} of the {NEIGHBOURS} nearest are of the same group (chance {self.chance:.3f})"
        return f"{nearest}, silhouette {self.silhouette:+.3f}"


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
    """Two maps of the words, coloured by group; a word is written on the first side of its point that has room, if one has."""
    picture = drawing.figure(14, 7.4)
    for axes, (name, points) in zip(picture.subplots(1, 2), flat.items(), strict=True):
        low, size = points.min(0), points.max(0) - points.min(0)
        axes.set_xlim(low[0] - 0.03 * size[0], low[0] + 1.1 * size[0])
        axes.set_ylim(low[1] - 0.04 * size[1], low[1] + 1.04 * size[1])
        for number, group in enumerate(groups):
            own = [i for i, label in enumerate(labels) if label == number]
            colour, marker = drawing.style(number)
            axes.scatter(*points[own].T, s=16, c=colour, marker=marker, label=drawing.literal(drawing.clip(group, 34)))
        places = (points - low) / size  # 0 to 1
        free = drawing.Room([(x - 0.006, y - 0.008, 0.012, 0.016) for x, y in places])
        for word, point, (x, y) in zip(words.names, points, places, strict=True):
            width = 0.0115 * len(word)
            for align, dx, dy in (("left", 1, 0), ("right", -1, 0), ("center", 0, 1), ("center", 0, -1)):
                left = x + 0.009 * dx - {"left": 0, "right": width, "center": width / 2}[align]
                if -0.03 < left < 1.1 - width and free.take(left, y - 0.01 + 0.02 * dy, width, 0.02):
                    style = {"fontsize": 7, "ha": align, "va": "center", "textcoords": "offset points"}
                    axes.annotate(drawing.literal(word), point, (4 * dx, 8 * dy), **style)
                    break
        axes.set(title=name, xticks=[], yticks=[])
    picture.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=min(5, len(groups)))
    picture.suptitle(title)
    return picture


def draw_training(steps: dict[str, Nearness]) -> Any:
    """Purity and silhouette, a checkpoint a point."""
    names, found = list(steps), list(steps.values())
    picture = drawing.figure(7, 4.2)
    axes = picture.subplots()
    places = range(len(names))
    axes.plot(places, [n.purity for n in found], "o-", color=drawing.COLOURS[0], label="neighbours of the same group")
    axes.plot(places, [n.silhouette for n in found], "s--", color=drawing.COLOURS[3], label="silhouette")
    axes.axhline(found[0].chance, color="grey", linewidth=1, linestyle=":", label="neighbours by chance")
    axes.set_xticks(places, names, rotation=30, ha="right", rotation_mode="anchor")
    axes.set(ylim=(min(0.0, *(n.silhouette for n in found)) - 0.05, 1.02), title="training brings words of a group together")
    axes.grid()
    axes.legend()
    return picture
