"""A short form of the campaign of faults, benchmarks/faults/campaign.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lightning")

CAMPAIGN = Path(__file__).parents[1] / "benchmarks" / "faults" / "campaign.py"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its runs")
def test_nothing_is_lost(tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    counts = {"train_kills": 3, "search_kills": 0, "full": 0, "damaged": 20, "sent": 0}
    words = [f"--{name}={count}" for name, count in counts.items()]
    # A process of its own: this one may have threads, which do not survive a fork.
    subprocess.run([sys.executable, CAMPAIGN, *words, "--output", output], check=True, timeout=600)
    found = json.loads(output.read_text())
    killed, damaged = found["SIGKILL, train"], found["damaged files"]
    assert killed["resumed to the end"] == killed["bit-equal"] == killed["runs"]
    assert damaged["refused with one line, exit 2"] == 20
