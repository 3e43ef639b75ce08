"""Who imports whom: the arrows of the house, read from the sources."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = {path.stem for path in ROOT.glob("*.py")} - {"model"}
LAZY = {
    "wandb",
    "prompt_toolkit",
    "matplotlib",
    "babel",
    "transformers",
    "datasets",
    "huggingface_hub",
    "tokenizers",
    "rustbpe",
    "pooch",
}


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found.add((node.module or "").split(".")[0])
    return found


def test_the_package_imports_no_script_and_no_model() -> None:
    for path in (ROOT / "papagaio").glob("*.py"):
        assert not imports(path) & (SCRIPTS | {"model", "data", "config"}), path


def test_model_needs_torch_alone() -> None:
    assert imports(ROOT / "model.py") - set(sys.stdlib_module_names) == {"torch"}


def test_the_only_arrow_between_scripts_is_finetune_to_train() -> None:
    arrows = {(script, other) for script in SCRIPTS for other in imports(ROOT / f"{script}.py") & SCRIPTS}
    assert arrows == {("finetune", "train")}


def test_nothing_imports_data_or_config() -> None:
    for path in [*ROOT.glob("*.py"), *ROOT.glob("papagaio/*.py"), *ROOT.glob("data/*.py")]:
        assert not imports(path) & {"data", "config", "prepare", "atlas", "python_docs", "shakespeare"}, path


def test_heavy_libraries_are_imported_where_they_are_used() -> None:
    for path in [*ROOT.glob("*.py"), *ROOT.glob("papagaio/*.py"), *ROOT.glob("data/*.py")]:
        assert not imports(path, top_level_only=True) & LAZY, path


@pytest.mark.parametrize(
    ("command", "message"),
    [
        *((f"{name} --no_such_option=1", "--no_such_option=1: no such option") for name in ("train.py", "finetune.py")),
        *(
            (f"{name} --no_such_option=1", "--no_such_option=1: no such option")
            for name in ("sample.py", "chat.py", "evaluate.py")
        ),
        ("data/prepare.py --no_such_option=1", "--no_such_option=1: no such option"),
        ("train.py --data=x --out_dir=y --n_embd=30 --n_head=4", "n_embd 30 is not divisible by n_head 4"),
        ("finetune.py --init_from=x --data=nowhere.jsonl --out_dir=y", "nowhere.jsonl: no such file"),
        ("evaluate.py --checkpoint=x --questions=nowhere.jsonl", "nowhere.jsonl: no such file"),
    ],
)
def test_options_are_refused_before_torch_is_imported(command: str, message: str) -> None:
    command = [sys.executable, "-X", "importtime", *command.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"error: {message}" in done.stderr
    assert "pydantic" in done.stderr
    assert not any(line.split("|")[-1].strip() == "torch" for line in done.stderr.splitlines())


@pytest.mark.parametrize("script", ["train.py", "finetune.py", "sample.py", "chat.py", "evaluate.py", "data/prepare.py"])
def test_help_lists_the_options_on_standard_output(script: str) -> None:
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "default: " in done.stdout
    assert done.stderr == ""


def test_no_pickle_and_no_exec_anywhere() -> None:
    for path in [*ROOT.glob("*.py"), *ROOT.glob("papagaio/*.py"), *ROOT.glob("data/*.py")]:
        assert not imports(path) & {"pickle", "joblib", "dill", "shelve", "marshal"}, path
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in {"exec", "eval", "torch.load", "torch.save"}, path
