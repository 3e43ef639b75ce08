"""Look inside a model: its tokens, vectors, attention, and where its answers come from.

    python look.py tokens --checkpoint out/run --text "understanding" --beside out/other
    python look.py embeddings --checkpoint out/run --word Monday --analogy king man woman
    python look.py attention --checkpoint out/run --text "The currency of Brazil:"
    python look.py positions --checkpoint out/run --data out/mine --beside out/run_without_positions
    python look.py lens --checkpoint out/chat --question "What is the currency of Brazil?" --answer "Brazilian real"
    python look.py knowledge --checkpoint out/chat --question "What is the currency of Brazil?" --answer "Brazilian real" \\
        --subject Brazil --other Japan
    python look.py diff out/base out/chat --questions qa_test.jsonl
    python look.py runs out/run out/other
    python look.py report out/run

Each prints what it finds, and writes pictures into --out; with --html also a page on which one can point and click.
`look.py COMMAND --help` lists the options of a command.
"""

import sys

from papagaio.errors import run
from papagaio.inside.options import COMMANDS, OutputOptions
from papagaio.options import parse_command

if __name__ == "__main__":  # a wrong option is refused before torch is imported, which takes a second or two
    OPTIONS = parse_command(COMMANDS, sys.argv[1:], __doc__)

from model import GPT, GPTConfig
from papagaio.inside import attention, diff, drawing, embeddings, knowledge, lens, page, positions, report, runs, tokens
from papagaio.runs.checkpoint import model_maker

LOOKS = {
    "tokens": tokens.look,
    "embeddings": embeddings.look,
    "attention": attention.look,
    "positions": positions.look,
    "lens": lens.look,
    "knowledge": knowledge.look,
    "diff": diff.look,
    "runs": runs.look,
    "report": report.look,
}


def main(config: OutputOptions) -> None:
    name = next(name for name, options in COMMANDS.items() if options is type(config))
    found = LOOKS[name](config, model_maker(GPT, GPTConfig))
    print("\n".join(found.lines))
    config.out.mkdir(parents=True, exist_ok=True)
    paths = [config.out / f"{picture}.png" for picture in found.pictures]
    for path, picture in zip(paths, found.pictures.values(), strict=True):
        drawing.save(picture, path)
    if config.html:
        paths.append(config.out / f"{name}.html")
        parts = [*found.parts, *map(page.picture, paths[:-1])]
        page.write(paths[-1], f"look.py {name}", "\n".join(found.lines), parts)
    for path in paths:
        print(path, file=sys.stderr)


if __name__ == "__main__":
    run(main, OPTIONS)
