"""README.md and docs/: links and paths exist, options exist, and every command line in them parses."""

import importlib
import re
import shlex
import shutil
import sys
import tomllib
from pathlib import Path

import pytest

from papagaio.errors import UserError
from papagaio.options import Options, read_options

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "bench"))  # whose scripts import each other
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPT = re.compile(r"\b(?:(?:data|bench)/)?\w+\.py\b")
OTHER_PROGRAMS = {  # options of Slurm, torchrun and lm_eval
    *("model", "model_args", "tasks"),
    *("signal", "job_name", "nodes", "ntasks_per_node", "gpus_per_node", "cpus_per_task", "time", "requeue", "open_mode"),
    *("kill_on_bad_exit", "standalone", "nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint", "max_restarts"),
}
WITH_COMMANDS = ("export.py", "look.py")  # whose first word is a command
USER_FILES = re.compile(
    r"[\w./-]+\.(?:jsonl|csv|txt|toml|tiktoken|md|Q4_1\.gguf)"
)  # files of the user's that a command line may name


def options_of(script: str, command: str = "") -> type[Options]:
    """The options class of `data/prepare.py` and the like; of a script without options, a class without any. Of a script with
    commands that of a command, or a class with the options of all."""
    module = importlib.import_module(script.removesuffix(".py").removeprefix("bench/").replace("/", "."))
    if script in WITH_COMMANDS:
        return module.COMMANDS[command] if command else type("All", tuple(module.COMMANDS.values()), {})
    classes = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Options)]
    elsewhere = {("data/prepare.py", "PrepareOptions"), ("serve.py", "ServeOptions")}
    own = (c for c in classes if c.__module__ == module.__name__ or (script, c.__name__) in elsewhere)
    return next(own, Options)


def code_lines(text: str) -> list[str]:
    """The lines of all code blocks, with lines that end in a backslash joined to the next."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(script, arguments) of each `python X.py ...` in the code blocks: `$`, pipes, redirections and comments are cut off."""
    found = []
    for line in code_lines(text):
        if not re.match(r"(\$ |\w.*\| )?(\.venv/bin/)?python \S+\.py\b", line):
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|<>;&")
        lexer.whitespace_split = True
        words = list(lexer)
        words = words[next(i for i, word in enumerate(words) if word.endswith("python")) + 1 :]
        end = next((i for i, word in enumerate(words) if set(word) <= set("|<>;&")), len(words))
        found.append((words[0], words[1:end]))
    return found


def anchors(path: Path) -> set[str]:
    """The names by which GitHub's links find the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


COMMANDS = sorted({shlex.join([s, *words]) for page in PAGES for s, words in commands(page.read_text(encoding="utf-8"))})


def test_commands_are_found_in_code_blocks() -> None:
    text = "python a.py\n```\n$ .venv/bin/python a.py --x 'a b' # c\necho 1 | python b.py - < c.txt\n```\n"
    assert commands(text) == [("a.py", ["--x", "a b"]), ("b.py", ["-"])]
    assert len(COMMANDS) > 40


def test_readme_is_short_and_names_every_page() -> None:
    text = PAGES[0].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_pictures_and_paths_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in link:
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.is_file(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {link}"
    for path in re.findall(r"(?<![\w./-])(?:papagaio|config|data|bench|tests|docs)/[\w/]+\.(?:py|toml|md|png)\b", text):
        assert (ROOT / path).is_file(), f"{page.name}: {path}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_belong_to_a_script_that_the_page_names(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    scripts = {name for name in SCRIPT.findall(text) if (ROOT / name).is_file() and name != "model.py"}
    known = {field.rstrip("_") for name in scripts for field in options_of(name).model_fields} | OTHER_PROGRAMS | {"help"}
    named = {name.replace("-", "_") for name in re.findall(r"(?<![\w-])--([a-z][\w-]*)", text)}
    assert sorted(named - known) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_command_lines_parse(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All names and types are right. The files of the user's that a line or its TOML file names are made, and empty."""
    script, *words = shlex.split(command)
    options = options_of(script, words[0] if words else "")
    shutil.copytree(ROOT / "config", tmp_path / "config")
    monkeypatch.chdir(tmp_path)
    values = [tomllib.loads(Path(word).read_text(encoding="utf-8")) for word in words if word.startswith("config/")]
    for name in USER_FILES.findall(" ".join([*words, *map(str, values)])):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    if script in WITH_COMMANDS:  # as options.parse_command does
        words = words[1:] if words[1].startswith("-") else ["--source", *words[1:]]
    read_options(options, words)


def test_a_wrong_option_in_a_command_line_is_seen() -> None:
    with pytest.raises(UserError, match="no such option"):
        read_options(options_of("train.py"), ["--data=x", "--out_dir=y", "--no_such_option=1"])
    with pytest.raises(UserError, match="max_steps=many"):
        read_options(options_of("train.py"), ["--data=x", "--out_dir=y", "--max_steps=many"])
