"""The Triton kernels on a CPU, in Triton's interpreter, against the float64 reference.

Whether Triton interprets is decided when a kernel is decorated, so each file of kernels' tests runs
in a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FOLDER = Path(__file__).with_name("interpreted")


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*_kernels.py")), ids=lambda file: file.stem)
def test_interpreted(file):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", file, "--quiet", "--tb=short", "-p", "no:cacheprovider"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
