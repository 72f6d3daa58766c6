"""The checkpoint that ships with the examples."""

from pathlib import Path

import pytest

pytest.importorskip("lightning")

from localmamba.cli import main

EXAMPLE = Path(__file__).parents[1] / "examples" / "fashion_mnist"


@pytest.mark.parametrize("name", ["ankle_boot", "bag", "trouser"])
def test_example_knows_its_images(name, capsys):
    image = EXAMPLE / f"{name}.png"
    checkpoint = str(EXAMPLE / "model.safetensors")
    assert main(["predict", str(image), "--checkpoint", checkpoint, "--top", "1"]) == 0
    assert name.replace("_", " ").capitalize() in capsys.readouterr().out
