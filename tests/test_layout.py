"""Who may import whom, read from the sources; and what the scripts do before torch is imported."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PATHS = [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("papagaio/**/*.py")]
LAZY = {
    *("wandb", "prompt_toolkit", "matplotlib", "babel", "transformers", "datasets", "huggingface_hub", "tokenizers"),
    *("rustbpe", "pooch", "gguf", "jinja2", "sklearn", "scipy", "librosa", "soundfile", "PIL"),
}


def module_name(path: Path) -> str:
    """papagaio/runs/saver.py -> papagaio.runs.saver; a package's __init__.py has the package's name."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in PATHS}
SCRIPTS = {path.stem for path in ROOT.glob("*.py")} - {"model"}
# data/*.py are scripts: inside of their folder they would import one another by these names.
RECIPES = {path.stem for path in ROOT.glob("data/*.py")}


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """The modules that a file imports, by their full names; those inside functions too, unless top_level_only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            full = {f"{node.module}.{name.name}" for name in node.names}
            found |= full & MODULES.keys() | ({node.module} if full - MODULES.keys() else set())
    return found


def packages(path: Path, top_level_only: bool = False) -> set[str]:
    return {name.split(".")[0] for name in imports(path, top_level_only)}


def test_the_imports_of_a_file_are_seen(tmp_path: Path) -> None:
    text = "import os.path\nfrom papagaio import runtime, no_module\ndef f():\n    from papagaio.runs import saver\n"
    (tmp_path / "a.py").write_text(text)
    assert imports(tmp_path / "a.py") == {"os.path", "papagaio.runtime", "papagaio", "papagaio.runs.saver"}
    assert packages(tmp_path / "a.py", top_level_only=True) == {"os", "papagaio"}


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {name: imports(path) & MODULES.keys() - {"papagaio"} for name, path in MODULES.items()}
    assert sum(map(len, graph.values())) > 100, "the imports are found"
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail("a circle: " + " is imported by ".join(error.args[1]))


def test_the_package_imports_no_script_and_no_model() -> None:
    for name, path in MODULES.items():
        if name.startswith("papagaio"):
            assert not packages(path) & (SCRIPTS | RECIPES | {"model", "data", "config"}), name


def test_model_needs_torch_alone() -> None:
    assert packages(ROOT / "model.py") - set(sys.stdlib_module_names) == {"torch"}


def test_model_is_read_in_twenty_minutes() -> None:
    assert len((ROOT / "model.py").read_text(encoding="utf-8").splitlines()) <= 350


def test_the_only_arrow_between_scripts_is_finetune_to_train() -> None:
    arrows = {(script, other) for script in SCRIPTS for other in packages(ROOT / f"{script}.py") & SCRIPTS}
    assert arrows == {("finetune", "train")}


def test_nothing_imports_data_or_config() -> None:
    for name, path in MODULES.items():
        assert not packages(path) & {"data", "config", *RECIPES}, name


def test_heavy_libraries_are_imported_where_they_are_used() -> None:
    for name, path in MODULES.items():
        assert not packages(path, top_level_only=True) & LAZY, name


@pytest.mark.parametrize(
    "name",
    ["papagaio.errors", "papagaio.files", *(name for name in MODULES if name.startswith("papagaio") and "options" in name)],
)
def test_options_are_checked_without_torch(name: str) -> None:
    """Whatever these modules import, and what that imports, is not torch."""
    seen: set[str] = set()
    left = [name]
    while left:
        found = imports(MODULES[left.pop()])
        assert "torch" not in {module.split(".")[0] for module in found}
        left += found & MODULES.keys() - seen
        seen |= found


@pytest.mark.parametrize(
    ("command", "message"),
    [
        *(
            (f"{name} --no_such_option=1", "--no_such_option=1: no such option")
            for name in (
                *("train.py", "finetune.py", "sample.py", "chat.py", "serve.py", "evaluate.py", "export.py", "look.py"),
                "data/prepare.py",
            )
        ),
        ("serve.py --checkpoint=x --host=0.0.0.0", "host 0.0.0.0: other machines reach this address"),
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


@pytest.mark.parametrize(
    "script",
    ["train.py", "finetune.py", "sample.py", "chat.py", "serve.py", "evaluate.py", "export.py", "look.py", "data/prepare.py"],
)
def test_help_lists_the_options_on_standard_output(script: str) -> None:
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "default: " in done.stdout
    assert done.stderr == ""


def test_no_pickle_and_no_exec_anywhere() -> None:
    for name, path in MODULES.items():
        assert not packages(path) & {"pickle", "joblib", "dill", "shelve", "marshal"}, name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in {"exec", "eval", "torch.load", "torch.save"}, name
