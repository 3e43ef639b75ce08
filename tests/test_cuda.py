"""Training on a GPU: checked without one on pretended tensors, and on a real one if there is one (marked gpu)."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_the_training_step_on_pretended_cuda_tensors() -> None:
    """Devices, dtypes and shapes for every preset; one graph when compiled; few operations in the loss."""
    command = [sys.executable, "tests/pretended_cuda.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
