"""One page about a run, in Markdown: figures, curves, data, options, samples. export.py puts `facts` into model cards."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from papagaio.corpus.dataset import Dataset
from papagaio.files import write_whole
from papagaio.generation.engine import Engine, Request
from papagaio.generation.options import SamplingOptions
from papagaio.inside.opening import make_engine, prompt_ids
from papagaio.inside.options import ReportOptions
from papagaio.inside.page import Found
from papagaio.inside.runs import Run, draw, figures, read_run, spell, table
from papagaio.runs.checkpoint import MakeModel
from papagaio.runs.directory import open_checkpoint


def look(config: ReportOptions, make: MakeModel) -> Found:
    """The page, which is also written as report.md."""
    run, checkpoint = read_run(config.source[0]), open_checkpoint(config.source[0])
    engine = make_engine(checkpoint, make, "cpu")
    described = facts(checkpoint.model_fields, checkpoint.state, sum(p.numel() for p in engine.model.parameters()))
    text = report(run, described, samples(engine, config.prompt, config.max_new_tokens), "report.png")
    config.out.mkdir(parents=True, exist_ok=True)
    write_whole(config.out / "report.md", text)
    print(config.out / "report.md", file=sys.stderr)
    return Found(text.splitlines(), {"report": draw([run])})


def samples(engine: Engine, prompts: Sequence[str], length: int) -> list[tuple[str, str]]:
    """(prompt, continuation) of each prompt, `length` tokens at most (0: no samples)."""
    if not length:
        return []
    requests = [Request(prompt_ids(engine, None, text) if engine.is_chat else engine.encode(text)) for text in prompts]
    found = [""] * len(requests)
    for step in engine.complete(requests, SamplingOptions(max_new_tokens=length, temperature=0.8), batch_size=len(requests)):
        found[step.index] += step.text
    return list(zip(prompts, found, strict=True))


def facts(fields: Mapping[str, Any], state: Mapping[str, Any], parameters: int) -> str:
    """A model's shape and training from its checkpoint alone, as Markdown: what a model card needs."""
    shape = {key: str(value) for key, value in fields.items() if value is not None}
    training = {k: v for k, v in state.items() if k not in ("metrics_lines", "recent_losses")} | (state.get("options") or {})
    plain = {key: spell(value) for key, value in training.items() if isinstance(value, str | int | float)}
    model = {name: [value] for name, value in ({"parameters": f"{parameters:,}"} | shape).items()}
    return "\n\n".join(
        ["## Model", table(("field", ""), model), "## Training", table(("training", ""), {k: [v] for k, v in plain.items()})]
    )


def data_rows(run: Run) -> dict[str, list[str]]:
    """The datasets of a run, if they are still where it found them."""
    rows = {}
    for name in run.options.get("data", []):
        path = Path(str(name))
        path = path if path.exists() else Path(str(name).rpartition(":")[0] or name)
        if (path / "manifest.json").is_file():
            splits = Dataset(path).splits
            rows[path.name] = [f"{splits[s]['documents']:,} documents, {splits[s]['tokens']:,} tokens" for s in ("train", "val")]
        else:
            rows[path.name] = ["a file of questions" if path.is_file() else "not there any more", "-"]
    return rows


def report(run: Run, described: str, samples: Sequence[tuple[str, str]], picture: str) -> str:
    """One page about a run, as Markdown. `described` is from `facts`; samples are (prompt, continuation)."""
    parts = [f"# {run.path.name}", "## Figures", table(("figure", ""), {name: [value] for name, value in figures(run).items()})]
    parts += [f"![learning curves]({picture})"]
    if rows := data_rows(run):
        parts += ["## Data", table(("data", "training", "validation"), rows)]
    parts += ["## Options", table(("option", ""), {name: [spell(value)] for name, value in run.options.items()}), described]
    if samples:
        parts += ["## Samples", *(f"```\n{prompt}[...]{text}\n```" for prompt, text in samples)]
    return "\n\n".join(parts) + "\n"
