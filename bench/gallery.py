"""Run look.py on the demo's models and on SmolLM2, and write docs/inside.md with the pictures and what one sees in each.

    python bench/gallery.py                  (make gallery: after make demo and make smol)

What is told of each picture stands in docs/inside/gallery.toml, in English and in Portuguese. The runs that are missing under
out/ are trained: the demo's model with a checkpoint every 75 steps, and short ones with each positional encoding.
"""

import contextlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from papagaio.errors import UserError, run
from papagaio.files import write_whole
from papagaio.options import Options, load_toml, option, parse

ROOT = Path(__file__).resolve().parents[1]
PAGE, PICTURES = Path("docs/inside.md"), Path("docs/inside")
NEEDED = {
    "out/atlas/data/manifest.json": "make demo",
    "out/demo_base/checkpoints/last": "make demo",
    "out/demo_chat/checkpoints/last": "make demo",
    "out/smol/base/checkpoints/last": "make smol",
}
POSITIONS = ("rope", "learned", "sinusoidal", "none")
SHORT = ("--max_steps=300", "--eval_interval=50", "--keep=20")
LINES = 24  # of an output that are shown
HEADINGS = {"en": "# Inside a model", "pt": "# Por dentro de um modelo"}


class GalleryOptions(Options):
    """Options of bench/gallery.py."""

    only: tuple[str, ...] = option((), "names of the pictures that are made again; the page is written from all")


def main(config: GalleryOptions) -> None:
    for path, cure in NEEDED.items():
        if not (ROOT / path).exists():
            raise UserError(f"{path}: is not there; {cure} makes it")
    train()
    write_pairs("qa_test", Path("out/look/held_out.txt"))
    write_pairs("qa_left_out", Path("out/look/left_out.txt"))
    _, table = load_toml(ROOT / PICTURES / "gallery.toml")
    outputs = ROOT / "out/look/outputs.json"
    known: dict[str, str] = json.loads(outputs.read_text(encoding="utf-8")) if outputs.exists() else {}
    for name, entry in table["pictures"].items():
        if name not in known or not config.only or name in config.only:
            known[name] = look(name, entry)
            write_whole(outputs, json.dumps(known, ensure_ascii=False))
    write_whole(ROOT / PAGE, "\n".join(part(table, language, known) for language in HEADINGS))


def call(*words: str) -> str:
    """Run a script as a user does; its standard output."""
    print("python", shlex.join(words), file=sys.stderr)
    return subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def train() -> None:
    """The runs that no demo makes."""
    runs = {f"out/gallery_{position}": [f"--position={position}", *SHORT] for position in POSITIONS}
    runs["out/gallery_trace"] = ["--eval_interval=75", "--keep=20"]
    for path, options in runs.items():
        if not (ROOT / path / "checkpoints" / "last").exists():
            call("train.py", "config/demo_pretrain.toml", f"--out_dir={path}", "--overwrite", *options)


def write_pairs(questions: str, path: Path) -> None:
    """Pairs of the demo's questions, country and currency, and both names: those whose entities fine-tuning has not seen
    (qa_test), and those whose facts are not in the corpus (qa_left_out)."""
    rows = [json.loads(line) for line in (ROOT / f"out/atlas/{questions}.jsonl").read_text(encoding="utf-8").splitlines()]
    patterns = {"currency": ("country : currency", r"What is the currency of (.*)\?")}
    for sort in ("territory", "currency", "language"):
        patterns[f"{sort} to Portuguese"] = (f"{sort}, English : Portuguese", r"What is the Portuguese name of (.*)\?")
    lines = []
    for kind, (name, pattern) in patterns.items():
        lines.append(f": {name}")
        found = ((re.fullmatch(pattern, row["question"]), row["answer"]) for row in rows if row["kind"] == kind)
        lines += [f"{match[1]}\t{answer.removesuffix('.')}" for match, answer in found if match]
    (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(ROOT / path, "\n".join(lines) + "\n")


def look(name: str, entry: dict[str, Any]) -> str:
    """Run an entry's command and keep its pictures; returns what it printed."""
    out = ROOT / "out/look" / name
    text = call("look.py", *shlex.split(entry["command"]), "--out", str(out), "--html")
    for picture in entry["pictures"]:
        (out / f"{picture}.png").replace(ROOT / PICTURES / f"{name}_{picture}.png")
    return text


def part(table: dict[str, Any], language: str, known: dict[str, str]) -> str:
    """The page in one language; commands and outputs stand in the English part alone."""
    lines = [HEADINGS[language], "", table["intro"][language].strip(), ""]
    for name, entry in table["pictures"].items():
        lines += [f"## {entry['title'][language]}", "", entry["text"][language].strip(), ""]
        if language == "en":
            printed = known[name].rstrip().splitlines()
            shown = [line for line in printed if re.search(entry.get("lines", ""), line)][:LINES]
            cut = [f"... ({len(printed) - len(shown)} more lines)"] if len(printed) > len(shown) else []
            command = f"python look.py {entry['command'].strip()}"
            lines += ["```", command, "```", "", "```text", *shown, *cut, "```", ""]
        for picture in entry["pictures"]:
            lines += [f"![{entry['title'][language]}](inside/{name}_{picture}.png)", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    with contextlib.chdir(ROOT):
        run(main, parse(GalleryOptions, doc=__doc__))
