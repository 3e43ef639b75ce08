"""Scripts in processes of their own that are forked from one which has imported torch already: a tenth of a second, not two.

They run as `python train.py ...` does, by runpy, with their own standard streams and exit status.
"""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[1]
# What most runs import.
PRELOADED = (
    *("pytest", "forked", "torch", "torch._dynamo", "safetensors.torch", "pydantic", "tiktoken", "tqdm", "tomli_w", "filelock"),
    *("pyarrow", "matplotlib.figure", "finetune"),
)

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(list(PRELOADED))


def start(argv: list[str], streams: tuple[str, str, str], first: Callable[[], None] | None = None) -> BaseProcess:
    """Run a script; `streams` are the files that its standard input comes from and its two outputs go to.

    `first`, a function at the top of a module, is called in the process before.
    """
    process = server.Process(target=_as_script, args=(argv, streams, dict(os.environ), first))
    path = os.pathsep.join((str(ROOT / "tests"), str(ROOT)))
    with mock.patch.dict(os.environ, PYTHONPATH=path):  # for the server, which the first call starts
        process.start()
    return process


def _as_script(
    argv: list[str], streams: tuple[str, str, str], environment: dict[str, str], first: Callable[[], None] | None
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for number, name in enumerate(streams):
        os.dup2(os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    os.chdir(ROOT)
    script = Path(argv[0]).resolve()
    sys.argv = argv
    sys.path[0] = str(script.parent)
    if first is not None:
        first()
    runpy.run_path(str(script), run_name="__main__")
