"""Tables of scan directions: as lists, as files, and what is refused."""

import json

import pytest
import timm
import torch

from localmamba.layers import DirectionalMixer
from localmamba.models import resolve_directions

TABLE = [["h", "w3"], ["v"], ["hilbert_flip", "snake", "w2x5"], ["h"]]


def directions_of(model: torch.nn.Module) -> list[list[str]]:
    return [m.directions for m in model.modules() if isinstance(m, DirectionalMixer)]


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: {"directions": t, "model": "x"}])
@pytest.mark.parametrize("name", ["localvim_demo", "localvmamba_demo"])
def test_from_a_file(tmp_path, wrap, name: str) -> None:
    path = tmp_path / "directions.json"
    path.write_text(json.dumps(wrap(TABLE)))
    for source in (path, str(path), TABLE):
        model = timm.create_model(name, directions=source)
        assert directions_of(model) == TABLE


def test_one_row_serves_every_block() -> None:
    assert resolve_directions(["h", "v"], 3) == [["h", "v"]] * 3
    model = timm.create_model("localvim_demo_search", directions=["h", "w4", "w4_flip"])
    assert directions_of(model) == [["h", "w4", "w4_flip"]] * 4
    assert model.blocks[0].mixer.alpha.shape == (3,)


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        (TABLE[:3], "directions has 3 rows for 4 blocks"),
        ([*TABLE[:3], ["sideways"]], "unknown direction 'sideways'"),
        ([*TABLE[:3], ["w0"]], "sizes must be at least 1"),
        ([*TABLE[:3], []], "at least one"),
        ([], "directions has 0 rows"),
        ([*TABLE[:3], "h"], "a list of names, or a list of such lists"),
        ([1, 2, 3, 4], "a list of names, or a list of such lists"),
        ("no/such/file.json", "cannot read directions"),
    ],
)
def test_bad_tables(directions, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        timm.create_model("localvim_demo", directions=directions)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ('{"table": []}', "has no entry 'directions'"),
        ('"h"', "must hold a list"),
        (b"\xff\xfe\x00", "cannot read directions"),
    ],
)
def test_bad_files(tmp_path, content: str | bytes, message: str) -> None:
    path = tmp_path / "directions.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        timm.create_model("localvim_demo", directions=path)
