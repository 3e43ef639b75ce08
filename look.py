"""Look inside a model: its tokens, vectors, attention, and where its answers come from.

    python look.py tokens --checkpoint out/run --text "understanding" --beside out/other
    python look.py embeddings --checkpoint out/run --word Monday --analogy king man woman
    python look.py attention --checkpoint out/run --text "The currency of Brazil:"
    python look.py positions --checkpoint out/run --text my_texts/ --beside out/run_without_positions
    python look.py lens --checkpoint out/run --text "The currency of Brazil is the" --answer " Brazilian"
    python look.py knowledge --checkpoint out/run --text "The currency of Brazil is the" --answer " Brazilian real" \\
        --subject Brazil --other Japan
    python look.py diff out/base out/chat --questions qa_test.jsonl
    python look.py runs out/run out/other
    python look.py report out/run

Each prints what it finds, and writes pictures into --out; with --html also a page on which one can point and click.
`look.py COMMAND --help` lists the options of a command.
"""

import sys

from papagaio.errors import UserError, run
from papagaio.inside.options import (
    COMMANDS,
    AttentionOptions,
    DiffOptions,
    EmbeddingsOptions,
    KnowledgeOptions,
    LensOptions,
    OutputOptions,
    PositionsOptions,
    ReportOptions,
    RunsOptions,
    TextOptions,
    TokensOptions,
)
from papagaio.options import parse_command

if __name__ == "__main__":  # a wrong option is refused before torch is imported, which takes a second or two
    OPTIONS = parse_command(COMMANDS, sys.argv[1:], __doc__)

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from model import GPT, GPTConfig
from papagaio import runtime
from papagaio.batches.questions import read_conversations
from papagaio.batches.windows import Batch, ValidationWindows
from papagaio.corpus.dataset import Dataset
from papagaio.corpus.options import ReadingOptions
from papagaio.corpus.reading import list_spans, read
from papagaio.evaluation import dataset_texts, evaluate_loss
from papagaio.files import write_whole
from papagaio.generation.engine import Engine, Request
from papagaio.generation.options import SamplingOptions
from papagaio.inside import attention, diff, drawing, embeddings, knowledge, lens, page, positions, runs, tokens
from papagaio.inside.hooks import check_layer, observe, prompt_ids, spell
from papagaio.report import Report
from papagaio.runs.checkpoint import Checkpoint, model_maker
from papagaio.runs.directory import open_checkpoint, resolve, steps_saved
from papagaio.terminal import progress

MAKE_MODEL = model_maker(GPT, GPTConfig)


@dataclass
class Found:
    """What a command found: lines for standard output, pictures by name, and parts of the page besides the pictures."""

    lines: list[str] = field(default_factory=list)
    pictures: dict[str, Any] = field(default_factory=dict)
    parts: list[page.Map | page.Attention | page.Grid] = field(default_factory=list)


def main(config: OutputOptions) -> None:
    name, found = next(name for name, kind in COMMANDS.items() if kind is type(config)), LOOKS[type(config)](config)
    print("\n".join(found.lines))
    config.out.mkdir(parents=True, exist_ok=True)
    paths = [config.out / f"{picture}.png" for picture in found.pictures]
    for path, picture in zip(paths, found.pictures.values(), strict=True):
        drawing.save(picture, path)
    if config.html:
        text = "\n".join(found.lines)
        page.write(config.out / f"{name}.html", f"look.py {name}", text, [*found.parts, *map(page.Picture, paths)])
        paths.append(config.out / f"{name}.html")
    for path in paths:
        print(path, file=sys.stderr)


def open_engine(path: Path, base: Path | None, device: str) -> Engine:
    """The model of a checkpoint in float32, with model.py's own operations; adapters are added to its weights."""
    return make_engine(open_checkpoint(path, base), device)


def make_engine(checkpoint: Checkpoint, device: str) -> Engine:
    model = checkpoint.build(MAKE_MODEL, runtime.pick_device(device), torch.float32).requires_grad_(False)
    return Engine(model, checkpoint.tokenizer, is_chat=checkpoint.is_chat)


def open_text(config: TextOptions, more: int = 0) -> tuple[Engine, list[int], list[str]]:
    """The model, the ids of the text or question, and their spellings."""
    engine = open_engine(config.checkpoint, config.base, config.device)
    ids = prompt_ids(engine, config.text, config.question, more)
    return engine, ids, [spell(engine, token) for token in ids]


def look_at_tokens(config: TokensOptions) -> Found:
    engine = open_engine(config.checkpoint, config.base, config.device)
    named = [(str(config.checkpoint), engine.tokenizer)]
    named += [(str(path), tokens.find_tokenizer(path)) for path in config.beside]
    cuts = [tokens.cut(name, tokenizer, config.text) for name, tokenizer in named]
    found = Found(pictures={"tokens": tokens.draw(cuts)})
    for one in cuts:
        found.lines += [f"{one.name}: {len(one.ids)} tokens, {one.bytes_per_token:.2f} bytes per token"]
        found.lines += ["  " + "|".join(map(tokens.show, one.pieces)), "  " + " ".join(map(str, one.ids))]
    pieces = [(token, tokens.show(piece)) for token, piece in zip(cuts[0].ids, cuts[0].pieces, strict=True)]
    found.lines += ["", *tokens.worked_example(engine.model.embed.weight.detach(), pieces)]
    return found


def look_at_embeddings(config: EmbeddingsOptions) -> Found:
    checkpoint = open_checkpoint(config.checkpoint, config.base)
    engine, layer, around = make_engine(checkpoint, config.device), config.layer, config.around
    where = (
        "rows of the table of embeddings"
        if layer is None
        else f"hidden states after {layer} blocks ({config.pool} of the tokens), in {around!r}"
    )
    print(f"words are {where}", file=sys.stderr)
    found, all_words = Found(), embeddings.vocabulary(engine) if layer is None else None
    if config.clusters:
        some = embeddings.vocabulary(engine)
        groups = embeddings.cluster(embeddings.Words(some.names[:500], some.vectors[:500]), config.clusters)
        layer = None
        print(f"clusters of {min(500, len(some.names))} of {len(some.names):,} words, those with the lowest ids", file=sys.stderr)
    else:
        named = embeddings.read_groups(config.groups) if config.groups else embeddings.default_groups(config.language)
        groups = embeddings.choose(engine, named, layer)
    names = [word for words in groups.values() for word in words]
    labels = [number for number, words in enumerate(groups.values()) for _ in words]
    words = embeddings.vectors(engine, names, layer, around, config.pool)
    among = all_words or words
    for word in config.word:
        vector = embeddings.vectors(engine, [word], config.layer, around, config.pool).vectors[0]
        near = embeddings.nearest(among, vector, config.neighbours, (word,))
        found.lines.append(f"{word}: " + ", ".join(f"{name} {cosine:.2f}" for name, cosine in near))
    if config.analogy:
        a, b, c = embeddings.vectors(engine, config.analogy, config.layer, around, config.pool).vectors
        near = embeddings.nearest(among, a - b + c, config.neighbours, config.analogy)
        question = "{} - {} + {}".format(*config.analogy)
        found.lines.append(f"{question}: " + ", ".join(f"{name} {cosine:.2f}" for name, cosine in near))
    if config.analogies:
        found.lines += analogy_table(engine, config, all_words)
    measured = embeddings.nearness(words.vectors, labels)
    if config.clusters:
        found.lines += [f"{name}: {', '.join(own[:12])}" for name, own in groups.items()]
    found.lines.append(f"{len(names)} words in {len(groups)} groups: {describe(measured)}")
    flat = embeddings.project(words.vectors)
    title = f"{len(names)} words: {where}"
    found.pictures["embeddings"] = embeddings.draw_map(words, labels, list(groups), flat, title)
    cosines = (words.vectors @ words.vectors.T).fill_diagonal_(-2)
    near = cosines.topk(min(8, len(names) - 1)).indices.tolist()
    points = [[round(float(x), 3) for x in point] for point in list(flat.values())[-1]]
    found.parts.append(page.Map(points, names, labels, near, drawing.COLOURS[:7]))
    if config.training:
        steps = list(over_training(checkpoint, config, names, labels))
        found.lines += [f"{name:>12}  {describe(one)}" for name, one in steps]
        found.pictures["embeddings_training"] = embeddings.draw_training(*map(list, zip(*steps, strict=True)))
    return found


def describe(measured: embeddings.Nearness) -> str:
    return (
        f"{measured.purity:.3f} of the {embeddings.NEIGHBOURS} nearest are of the same group (chance {measured.chance:.3f}), "
        f"silhouette {measured.silhouette:+.3f}"
    )


def analogy_table(engine: Engine, config: EmbeddingsOptions, among: embeddings.Words | None) -> list[str]:
    """A line for each section of a file of analogies, and one for all."""
    sections = embeddings.read_analogies(config.analogies)
    scores = [embeddings.score(engine, section, config.layer, config.around, config.pool, among) for section in sections]
    asked = sum(score.questions for score in scores)
    if left_out := sum(score.left_out for score in scores):
        print(f"left out, a word has several tokens (--layer=N takes any word): {left_out:,} analogies", file=sys.stderr)
    if not asked:
        raise UserError(f"{config.analogies}: no analogy is made of single tokens; --layer=N takes mean hidden states")
    width = max(len(score.name) for score in scores)
    lines = [f"{'analogies':<{width}}  questions  top 1  top 5  by mean offset  chance"]
    for one in scores:
        shares = f"{one.top1:>5.3f}  {one.top5:>5.3f}  {one.mean_offset:>14.3f}  {1 / max(1, one.candidates):>6.2g}"
        lines.append(f"{one.name:<{width}}  {one.questions:>9,}  {shares}")
    means = [sum(getattr(one, name) * one.questions for one in scores) / asked for name in ("top1", "top5")]
    return [*lines, f"{'all':<{width}}  {asked:>9,}  {means[0]:>5.3f}  {means[1]:>5.3f}"]


def over_training(
    checkpoint: Checkpoint, config: EmbeddingsOptions, names: list[str], labels: list[int]
) -> Iterable[tuple[str, embeddings.Nearness]]:
    """How near the groups' words are at random weights, drawn as the run's own were, and at each checkpoint of the run."""
    torch.manual_seed((checkpoint.state.get("options") or {}).get("seed", 1337))
    random_model = MAKE_MODEL(checkpoint.model_fields).requires_grad_(False).eval()
    engines = [("random", Engine(random_model, checkpoint.tokenizer))]
    directory = checkpoint.path.parent
    paths = [directory / f"step-{step}" for step in steps_saved(directory)] or [checkpoint.path]
    for path in progress(paths, "checkpoints"):
        engines.append((path.name, open_engine(path, config.base, "cpu")))
    for name, engine in engines:
        words = embeddings.vectors(engine, names, None if config.clusters else config.layer, config.around, config.pool)
        yield name, embeddings.nearness(words.vectors, labels)


def look_at_attention(config: AttentionOptions) -> Found:
    engine, ids, labels = open_text(config)
    model, c = engine.model, engine.model.config
    check_layer(config.layer or 0, c.n_layer)
    check_layer(config.head or 0, c.n_head, "--head")
    if len(ids) < 3:
        raise UserError("attention needs a text of at least two tokens")
    row = torch.tensor([ids], device=engine.device)
    weights = torch.stack(observe(model, row).attention)[:, 0].cpu()  # (L, H, T, T)
    scores = torch.cat((attention.habits(weights, row[0].cpu()), attention.induction(engine, config.seed)[..., None]), dim=-1)
    words = attention.summary(scores)
    if config.data:
        dataset = Dataset(config.data)
        if dataset.tokenizer.sha256 != engine.tokenizer.sha256:
            raise UserError(f"{config.data}: prepared with another tokenizer than the model's")
        batches = list(ValidationWindows(dataset, engine.block_size, 16, config.windows * engine.block_size))
    else:
        batches = [Batch(row[:, :-1], row[:, 1:], torch.ones(1, len(ids) - 1))]  # without padding
    parts = progress(range(c.n_layer * (c.n_head + 1) + 1), "parts taken out")

    def measure() -> float:
        next(parts)
        return evaluate_loss(model, batches, engine.tokenizer, engine.dtype)["val_loss"]

    costs = attention.costs(model, measure)
    found = Found(["layer.head  does                       " + "  ".join(f"{h:>17}" for h in attention.HABITS) + "  cost (nats)"])
    for i in range(c.n_layer):
        for head in range(c.n_head):
            shares = "  ".join(f"{share:>17.2f}" for share in scores[i, head].tolist())
            found.lines.append(f"{i + 1:>5}.{head + 1:<4}  {words[i][head]:<25}  {shares}  {costs.heads[i, head]:+.4f}")
    positive = costs.heads.clamp_min(0).flatten()
    share = float(positive.max() / positive.sum().clamp_min(1e-9))
    worst = int(positive.argmax())
    measured = f"{config.data}'s validation split" if config.data else "the text itself"
    found.lines += [
        f"loss {costs.whole:.4f} nats per token, on {measured}",
        f"the costliest head: {worst // c.n_head + 1}.{worst % c.n_head + 1}, "
        f"{share:.0%} of what all heads cost one by one ({1 / positive.numel():.1%} if all did the same)",
        *(f"layer {i + 1} without attention: {cost:+.4f}" for i, cost in enumerate(costs.layers.tolist())),
    ]
    best = int(scores[..., [0, 3, 4]].amax(-1).flatten().argmax())
    layer, head = (config.layer or best // c.n_head + 1), (config.head or best % c.n_head + 1)
    title = f"layer {layer}, head {head}: {words[layer - 1][head - 1]}"
    shown = [drawing.literal(drawing.clip(label, 14)) for label in labels]
    found.pictures = {
        "attention": attention.draw_maps(weights, shown, words),
        "attention_head": attention.draw_head(weights[layer - 1, head - 1], shown, title),
        "attention_costs": attention.draw_costs(costs, words),
    }
    found.parts.append(page.Attention(labels, weights.tolist(), words))
    return found


def look_at_positions(config: PositionsOptions) -> Found:
    engines = [(str(path), open_engine(path, config.base, config.device)) for path in (config.checkpoint, *config.beside)]
    found = Found()
    for number, (name, engine) in enumerate(engines):
        kind, numbers = engine.model.config.position, positions.table(engine.model)
        if numbers is None:
            found.lines.append(f"{name}: {kind}: no positional encoding; order comes from the causal mask alone")
            continue
        near = positions.similarity(numbers)
        some = [distance for distance in (1, 4, 16, 64, 256) if distance < len(near)]
        cosines = ", ".join(f"{distance}: {float(near[distance]):.2f}" for distance in some)
        found.lines.append(f"{name}: {kind}: mean cosine of two positions by distance: {cosines}")
        found.pictures[f"positions_{number + 1}_{kind}" if number else f"positions_{kind}"] = positions.draw(kind, numbers)
    if config.text:
        fragments = positions.some(texts(config.text), engines[0][1], config.windows)
        orders = [positions.measure(engine, name, fragments, config.seed) for name, engine in progress(engines, "models")]
        found.lines.append(f"bits per byte of {sum(len(text.encode()) for text, _ in fragments):,} bytes:")
        found.lines.append(f"{'in order':>10}  {'shuffled':>10}  {'order pays':>10}  position")
        for one in orders:
            pays = one.shuffled - one.in_order
            found.lines.append(f"{one.in_order:>10.4f}  {one.shuffled:>10.4f}  {pays:>10.4f}  {one.position}: {one.name}")
        found.pictures["positions_order"] = positions.draw_order(orders)
    return found


def texts(names: tuple[str, ...]) -> Iterable[tuple[str, bool]]:
    """Texts of files, or of a dataset's validation split; whether each begins a document."""
    for name in names:
        if Path(name, "manifest.json").is_file():
            yield from dataset_texts(Dataset(Path(name)))
            continue
        report, options = Report(), ReadingOptions()
        spans = list_spans((name,), options, report)
        for line in report.lines():
            print(line, file=sys.stderr)
        yield from ((fragment.text, fragment.first) for span in spans for fragment in read(span, options))


def look_at_lens(config: LensOptions) -> Found:
    engine, ids, labels = open_text(config)
    answer = engine.tokenizer.encode(config.answer)[0] if config.answer else None
    views = lens.look(engine, ids, answer)
    name = "" if answer is None else spell(engine, answer)
    found = Found(["what comes next, after each layer:", *lens.table(engine, views, config.top, answer)])
    if answer is not None:
        first = lens.first_win(views, answer)
        won = "never wins" if first is None else f"wins from layer {first} on" if first else "wins from the embedding on"
        found.lines.append(f"the right answer, {name}, {won}")
    following = [*labels[1:], name] if name else labels[1:]
    found.pictures["lens"] = lens.draw(views, labels, following, drawing.clip(config.text or config.question or "", 90))
    found.pictures["lens_distribution"] = lens.draw_distribution(views, answer, name)
    rows = ["embedding", *(f"layer {i}" for i in range(1, len(views.chance)))]
    best = views.probabilities.topk(min(10, views.probabilities.size(-1)))  # (L + 1, T, 10)
    details = [
        [
            ", ".join(f"{spell(engine, t)} {p:.3f}" for t, p in zip(*cell, strict=True)) + f"; entropy {entropy:.2f} bits"
            for *cell, entropy in zip(*row, strict=True)
        ]
        for row in zip(best.indices.tolist(), best.values.tolist(), views.entropy.tolist(), strict=True)
    ]
    found.parts.append(page.Grid(rows, labels, views.chance.tolist(), views.best, details))
    return found


def look_at_knowledge(config: KnowledgeOptions) -> Found:
    engine = open_engine(config.checkpoint, config.base, config.device)
    answer = engine.tokenizer.encode(config.answer)
    prompt = prompt_ids(engine, config.text, config.question, len(answer))
    whole, costs = knowledge.ablations(engine, prompt, answer)
    patched = None
    if config.subject and config.other:
        swapped = [text and text.replace(config.subject, config.other) for text in (config.text, config.question)]
        other = prompt_ids(engine, *swapped, len(answer))
        patched = knowledge.patches(engine, prompt, other, answer, config.subject, config.other)
    shown = f"{config.text or config.question} -> {config.answer}"
    found = Found([f"{shown}: {whole:.3f} nats, probability {torch.tensor(-whole).exp():.3f}"])
    found.lines += knowledge.lines(costs, patched)
    found.pictures["knowledge"] = knowledge.draw(whole, costs, patched, drawing.clip(shown.replace("\n", "↵"), 100))
    if patched is not None:
        rows = ["embedding", *(f"layer {i}" for i in range(1, len(costs) + 1))]
        texts = [[f"{value:.2f}" for value in row] for row in patched.recovered.tolist()]
        details = [[f"{value:.4f} of the answer comes back" for value in row] for row in patched.recovered.tolist()]
        found.parts.append(page.Grid(rows, patched.places, patched.recovered.clamp(0, 1).tolist(), texts, details))
    return found


def look_at_diff(config: DiffOptions) -> Found:
    opened = [open_checkpoint(path) for path in config.source]
    names = [str(path) for path in config.source]
    parts, matrix, others = diff.by_layer(diff.changes(*(one.tensors() for one in opened)))
    means = [sum(row) / len(row) for row in matrix]
    found = Found(["change, relative to the norm of the weights:"])
    found.lines += [f"  layer {i + 1}: {mean:.4f}" for i, mean in enumerate(means)]
    found.lines += [f"  {name}: {value:.4f}" for name, value in others.items()]
    found.pictures["diff"] = diff.draw_changes(parts, matrix, others, f"from {names[0]} to {names[1]}")
    if config.questions:
        rows = read_conversations(config.questions)
        asked_rows = rows[: config.limit or None]
        engines = [make_engine(one, config.device) for one in opened]
        asked = diff.ask(engines, asked_rows)
        means = asked.probabilities.nanmean(1).tolist()
        rose = int((asked.probabilities[1] > asked.probabilities[0]).sum())
        missing = int(asked.probabilities.isnan().any(0).sum())
        note = f", {missing} do not fit the context" if missing else ""
        found.lines.append(f"{len(asked_rows):,} of {len(rows):,} questions{note}: mean probability of the right answer "
                           f"{means[0]:.4f} before, {means[1]:.4f} after; {rose:,} rose")  # fmt: skip
        found.pictures["diff_questions"] = diff.draw_questions(asked, names)
    return found


def look_at_runs(config: RunsOptions) -> Found:
    opened = [runs.read_run(path) for path in config.source]
    names = [str(one.path) for one in opened]
    figures = [runs.figures(one) for one in opened]
    keys = dict.fromkeys(key for one in figures for key in one)
    found = Found([runs.table(("figure", *names), {key: [one.get(key, "-") for one in figures] for key in keys})])
    if len(opened) > 1:
        found.lines += ["", runs.table(("option", *names), runs.differences(opened))]
    found.pictures["runs"] = runs.draw(opened)
    return found


def look_at_report(config: ReportOptions) -> Found:
    one = runs.read_run(config.source[0])
    checkpoint = open_checkpoint(resolve(config.source[0]))
    engine = make_engine(checkpoint, "cpu")
    parameters = sum(p.numel() for p in engine.model.parameters())
    samples = []
    if config.max_new_tokens:
        options = SamplingOptions(max_new_tokens=config.max_new_tokens, temperature=0.8)
        requests = [Request(prompt_ids(engine, None, text) if engine.is_chat else engine.encode(text)) for text in config.prompt]
        found_texts = [""] * len(requests)
        for step in engine.complete(requests, options, batch_size=len(requests)):
            found_texts[step.index] += step.text
        samples = list(zip(config.prompt, found_texts, strict=True))
    described = runs.facts(checkpoint.model_fields, checkpoint.state, parameters)
    text = runs.report(one, described, samples, "report.png")
    config.out.mkdir(parents=True, exist_ok=True)
    write_whole(config.out / "report.md", text)
    print(config.out / "report.md", file=sys.stderr)
    return Found(text.splitlines(), {"report": runs.draw([one])})


LOOKS: dict[type[OutputOptions], Callable[[Any], Found]] = {
    TokensOptions: look_at_tokens,
    EmbeddingsOptions: look_at_embeddings,
    AttentionOptions: look_at_attention,
    PositionsOptions: look_at_positions,
    LensOptions: look_at_lens,
    KnowledgeOptions: look_at_knowledge,
    DiffOptions: look_at_diff,
    RunsOptions: look_at_runs,
    ReportOptions: look_at_report,
}

if __name__ == "__main__":
    run(main, OPTIONS)
