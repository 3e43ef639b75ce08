"""The knowledge curve: how often questions never asked before are answered right, by how long the model was pretrained, and
by how many of the entities fine-tuning has asked about.

    python bench/knowledge_curve.py --out out/knowledge --plot bench/knowledge_curve.png

Every point is a run of the demo with other --max_steps, or with questions about a random part of the training entities
(its questions are then seen more often: the steps of fine-tuning stay the same). Few-shot: the base model is shown four
questions with answers as text. Runs that are in --out already are not run again. Prints a JSON line a run.
"""

import importlib.util
import json
import random
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from papagaio.errors import UserError, run
from papagaio.options import Options, option, parse

ROOT = Path(__file__).resolve().parents[1]
ATLAS = ROOT / "out" / "atlas"


class KnowledgeCurveOptions(Options):
    """Options of bench/knowledge_curve.py."""

    out: Path = option(..., "directory for the runs")
    plot: Path = option(..., "the picture, a .png file")
    steps: tuple[int, ...] = option(
        (50, 100, 200, 400, 900), "steps of pretraining; the last of them with all shares", min_length=1
    )
    shares: tuple[float, ...] = option((5, 10, 25, 50, 100), "percent of the training entities that fine-tuning asks about")
    seeds: tuple[int, ...] = option((1,), "seeds of training, and of which entities are taken")


def main(config: KnowledgeCurveOptions) -> None:
    if not (ATLAS / "data" / "manifest.json").exists():
        raise UserError(f"{ATLAS}: the demo's data are not there; `make demo` prepares them")
    results = []
    for seed in config.seeds:
        for steps in config.steps:
            base = config.out / f"base-{steps}-{seed}"
            if not (base / "checkpoints" / "last").exists():
                script(
                    "train.py",
                    "config/demo_pretrain.toml",
                    f"--max_steps={steps}",
                    f"--eval_interval={steps}",
                    f"--seed={seed}",
                    "--out_dir",
                    base,
                    "--overwrite",
                )
            for share in config.shares if steps == config.steps[-1] else (100.0,):
                results.append(one(config, base, steps, share, seed))
                print(json.dumps(results[-1]), flush=True)
    draw(results, config)


def one(config: KnowledgeCurveOptions, base: Path, steps: int, share: float, seed: int) -> dict[str, Any]:
    """Fine-tune a base model on a share of the entities, and ask the test questions."""
    questions = config.out / f"qa-{share:g}-{seed}.jsonl"
    rows = some_entities(share, seed)
    questions.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    chat = config.out / f"chat-{steps}-{share:g}-{seed}"
    printed = chat / "printed.txt"
    if not printed.exists():
        out = script(
            "finetune.py",
            "config/demo_finetune.toml",
            f"--seed={seed}",
            "--init_from",
            base,
            "--data",
            questions,
            "--out_dir",
            chat,
            "--overwrite",
        )
        printed.write_text(out, encoding="utf-8")
    out = printed.read_text(encoding="utf-8")
    held_out = float(re.findall(r"held-out exact match (\d\.\d+)", out)[-1])
    guessed = float(re.findall(r"guessed: exact match (\d\.\d+)", out)[-1])
    shots = chat / "few_shot.json"
    if share == 100 and not shots.exists():
        script(
            "evaluate.py",
            "--checkpoint",
            base,
            "--questions",
            ATLAS / "qa_test.jsonl",
            "--shots_data",
            ATLAS / "qa_train.jsonl",
            "--json",
            shots,
        )
    few_shot = next(iter(json.loads(shots.read_text())[0]["results"].values()))["exact match"] if shots.exists() else None
    result = {"steps": steps, "share": share, "seed": seed, "questions": len(rows), "held_out": held_out}
    return result | {"guessed": guessed, "few_shot": few_shot}


def some_entities(share: float, seed: int) -> list[dict[str, Any]]:
    """The training questions about a share of the entities that there are questions about."""
    spec = importlib.util.spec_from_file_location("atlas", ROOT / "data" / "atlas.py")
    atlas = importlib.util.module_from_spec(spec)
    sys.modules["atlas"] = atlas  # dataclasses look their module up
    spec.loader.exec_module(atlas)
    entity_of = {row["question"]: fact.entity.names[0] for fact in atlas.read_facts() for row in fact.ask()}
    rows = [json.loads(line) for line in (ATLAS / "qa_train.jsonl").read_text(encoding="utf-8").splitlines()]
    entities = sorted({entity_of[row["question"]] for row in rows})
    taken = set(random.Random(seed).sample(entities, round(share / 100 * len(entities))))
    return [row for row in rows if entity_of[row["question"]] in taken]


def script(*words: object) -> str:
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{words[0]} failed: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


def draw(results: list[dict[str, Any]], config: KnowledgeCurveOptions) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)

    def curve(axes: Any, key: str, value: str, rows: list[dict[str, Any]], style: str, label: str) -> None:
        places = sorted({row[key] for row in rows if row[value] is not None})
        means = [100 * statistics.mean(row[value] for row in rows if row[key] == place) for place in places]
        axes.plot(places, means, style, label=label, markersize=5, linewidth=1.3)

    whole = [row for row in results if row["share"] == 100]
    most = [row for row in results if row["steps"] == max(config.steps)]
    curve(left, "steps", "held_out", whole, "C0o-", "fine-tuned, told in pretraining")
    curve(left, "steps", "few_shot", whole, "C1s--", "base model, four examples shown")
    curve(left, "steps", "guessed", whole, "C2x:", "fine-tuned, never told: guessed")
    left.set_xlabel("steps of pretraining")
    left.set_ylabel("held-out exact match (%)")
    curve(right, "share", "held_out", most, "C0o-", f"after {max(config.steps):,} steps of pretraining")
    curve(right, "share", "guessed", most, "C2x:", "never told: guessed")
    right.set_xlabel("entities asked about in fine-tuning (%)")
    for axes, key in ((left, "steps"), (right, "share")):
        axes.set_xscale("log")
        places = sorted({row[key] for row in (whole if key == "steps" else most)})
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.minorticks_off()
        axes.set_ylim(0, 102)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(config.plot, dpi=120)


if __name__ == "__main__":
    run(main, parse(KnowledgeCurveOptions, doc=__doc__))
