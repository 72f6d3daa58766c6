"""The models against what the released code answers, for made-up weights (README.md here)."""

from functools import cache
from pathlib import Path

import fill
import pytest
import timm
import torch
from torch import Tensor, nn

import localmamba

FIXTURES = sorted(path.stem for path in Path(__file__).parent.glob("*.json"))
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}
"""Of the norm of the difference over the norm of the truth."""


@cache
def read(name: str) -> tuple[dict, dict]:
    return fill.load(Path(__file__).parent / f"{name}.json")


def new_model(name: str) -> nn.Module:
    """The model of a fixture, a backbone or a classifier."""
    if name.endswith("_backbone"):
        return localmamba.create_backbone(name.removesuffix("_backbone"))
    return timm.create_model(name)


def released_model(name: str, dtype: torch.dtype) -> nn.Module:
    """The model of a fixture with the weights of the fixture."""
    model = new_model(name)
    weights = {key: torch.from_numpy(x) for key, x in read(name)[1].items()}
    return localmamba.load_released(model.to(dtype), weights).eval()


def images(name: str, dtype: torch.dtype) -> Tensor:
    """The first image of a fixture: images do not see each other."""
    fixture, _ = read(name)
    return torch.from_numpy(fill.image(fixture["image_size"], fixture["batch"]))[:1].to(dtype)


def relative(value: Tensor, truth: list[float]) -> float:
    """Norm of the difference over the norm of the truth."""
    expected = torch.tensor(truth, dtype=torch.float64)
    return ((value.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", FIXTURES)
@torch.no_grad()
def test_answers_as_the_release(name: str, dtype: torch.dtype) -> None:
    fixture, _ = read(name)
    output = released_model(name, dtype)(images(name, dtype))
    if "logits" in fixture:
        first = fixture["logits"][: fixture["logits_shape"][1]]
        assert relative(output[0], first) < TOLERANCE[dtype]
        return
    assert len(output) == len(fixture["features"])
    for feature, truth in zip(output, fixture["features"], strict=True):
        assert list(feature.shape) == truth["shape"]
        values = feature.flatten()[truth["index"]]
        assert relative(values, truth["value"]) < TOLERANCE[dtype]
        spread = torch.stack((feature.double().mean(), feature.double().std()))
        assert relative(spread, [truth["mean"], truth["std"]]) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", FIXTURES)
def test_has_as_many_parameters(name: str) -> None:
    with torch.device("meta"):
        model = new_model(name)
    assert sum(p.numel() for p in model.parameters()) == read(name)[0]["num_parameters"]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("localvim_tiny", 7_994_152),
        ("localvim_tiny_nosearch", 7_994_152),
        ("localvim_small", 27_783_784),
        ("localvim_small_nosearch", 27_783_784),
        ("localvmamba_tiny", 25_527_160),
        ("localvmamba_small", 49_748_536),
    ],
)
def test_has_the_parameters_of_the_paper(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == parameters


@torch.no_grad()
def test_one_wrong_direction_shows() -> None:
    """The fixtures see what they should: a direction swapped in one block moves the result."""
    name = "localvim_tiny"
    table = localmamba.searched_directions(name)
    table[7] = ["h", *table[7][1:]]
    model = timm.create_model(name, directions=table)
    weights = {key: torch.from_numpy(x) for key, x in read(name)[1].items()}
    output = localmamba.load_released(model, weights).eval()(images(name, torch.float32))
    assert relative(output[0], read(name)[0]["logits"][:1000]) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("name", ["localvim_tiny", "localvim_tiny_midcls"])
def test_resizing_at_loading_is_resizing_at_each_image(name: str) -> None:
    """A model made for another size and one that meets it later answer alike, rotary tables too."""
    weights = {key: torch.from_numpy(x) for key, x in read(name)[1].items()}
    x = torch.randn(1, 3, 80, 112, dtype=torch.float64)
    made = timm.create_model(name, img_size=(80, 112)).double().eval()
    met = timm.create_model(name).double().eval()
    answers = [localmamba.load_released(model, weights)(x) for model in (made, met)]
    torch.testing.assert_close(*answers)
    met.set_input_size((80, 112))
    torch.testing.assert_close(met(x), answers[0])
    again = timm.create_model(name, img_size=(80, 112)).double().eval()
    again.load_state_dict(made.state_dict())
    torch.testing.assert_close(again(x), answers[0])
