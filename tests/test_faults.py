"""A short form of the campaign of faults, benchmarks/faults/campaign.py."""

import os
from pathlib import Path

import pytest

pytest.importorskip("lightning")

FAULTS = Path(__file__).parents[1] / "benchmarks" / "faults"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its runs")
def test_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FAULTS)
    import campaign

    found = campaign.run(3, 0, 0, 20, 0, None)
    killed, damaged = found["SIGKILL, train"], found["damaged files"]
    assert killed["resumed to the end"] == killed["bit-equal"] == killed["runs"] == 1
    assert damaged["refused with one line, exit 2"] == 20
