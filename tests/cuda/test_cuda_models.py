"""Whole models: a GPU in float32 answers and learns as a CPU in float64, and as the release."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from ops.helpers import random, relative_error
from parity import fill
from torch import Tensor, nn

import localmamba

DEMOS = {"localvim_demo": (9, 7), "localvmamba_demo": (37, 26)}
"""Small models, and images of no convenient size: neither square nor divisible."""

FIXTURES = (
    "localvim_tiny",
    "localvim_tiny_midcls",
    "localvmamba_tiny",
    "localvmamba_tiny_backbone",
)

each_demo = pytest.mark.parametrize("name", DEMOS)


def demo(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A small model in training mode, images and labels."""
    torch.manual_seed(0)
    model = timm.create_model(name).train()
    return model, random(4, 3, *DEMOS[name]), torch.arange(4)


def gradients(model: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Of the mean cross entropy, by name of the parameter."""
    loss = F.cross_entropy(model(x), labels)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@each_demo
@torch.no_grad()
@pytest.mark.usefixtures("poisoned_memory")
def test_answers_as_on_a_cpu_in_float64(name):
    model, x, _ = demo(name)
    truth = copy.deepcopy(model).double().eval()(x.double())
    assert relative_error(model.eval().cuda()(x.cuda()).cpu(), truth) < 1e-5


@each_demo
def test_learns_as_on_a_cpu_in_float64(name):
    model, x, labels = demo(name)
    truths = gradients(copy.deepcopy(model).double(), x.double(), labels)
    results = gradients(model.cuda(), x.cuda(), labels.cuda())
    errors = {n: relative_error(results[n].cpu(), truth) for n, truth in truths.items()}
    assert not {n: error for n, error in errors.items() if not error < 1e-4}


@each_demo
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_answers_under_autocast(name, dtype):
    model, x, _ = demo(name)
    truth = copy.deepcopy(model).double().eval()(x.double())
    with torch.autocast("cuda", dtype):
        y = model.eval().cuda()(x.cuda())
    assert relative_error(y.cpu(), truth) < {torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]


@each_demo
def test_compiles_whole(name):
    """Without a graph break, forward and backward."""
    model, x, labels = demo(name)
    model, x, labels = model.cuda(), x.cuda(), labels.cuda()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = gradients(compiled, x, labels)
    for n, expected in gradients(model, x, labels).items():
        assert relative_error(results[f"_orig_mod.{n}"], expected) < 1e-4, n


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Deterministic algorithms; cuBLAS would raise for want of a setting, so that it only warns."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("autocast", "tolerance"), [(None, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
@each_demo
def test_trains_as_cuda_graphs(name, autocast, tolerance):
    """As docs/performance.md advises: one launch for the forward pass, one for the backward."""
    model, x, labels = demo(name)
    x, labels = x.cuda(), labels.cuda()
    with torch.autocast("cuda", autocast, enabled=autocast is not None, cache_enabled=False):
        truths = gradients(copy.deepcopy(model).cuda(), x, labels)
        graphed = torch.cuda.make_graphed_callables(model.cuda(), (torch.zeros_like(x),))
        results = gradients(graphed, x, labels)
    errors = {n: relative_error(results[n], truth) for n, truth in truths.items()}
    assert not {n: error for n, error in errors.items() if not error < tolerance}


@pytest.mark.parametrize("d_state", [8, 16])
def test_more_sequences_than_a_grid_axis_holds(d_state):
    """Many small maps, such as windows of images: 80,000 sequences, at once or in twenty calls."""
    torch.manual_seed(0)
    mixer = localmamba.LocalVimMixer(16, d_state=d_state).cuda()
    x = torch.randn(20_000, 4, 16, device="cuda", requires_grad=True)
    whole = mixer(x, 2, 2)
    (found,) = torch.autograd.grad(whole.square().sum(), x)
    parts = torch.cat([mixer(part, 2, 2) for part in x.split(1000)])
    (expected,) = torch.autograd.grad(parts.square().sum(), x)
    assert relative_error(whole, parts) < 1e-6
    assert relative_error(found, expected) < 1e-6


@each_demo
@pytest.mark.usefixtures("deterministic")
@pytest.mark.filterwarnings("ignore:Deterministic behavior was enabled")
def test_two_runs_are_equal_bit_by_bit(name):
    model, x, labels = demo(name)
    model, x, labels = model.cuda(), x.cuda(), labels.cuda()
    with torch.autocast("cuda", torch.bfloat16):
        first, second = (gradients(model, x, labels) for _ in range(2))
    for n, gradient in first.items():
        assert torch.equal(gradient, second[n]), n


@pytest.mark.parametrize("name", FIXTURES)
@torch.no_grad()
def test_answers_as_the_release(name):
    """On made-up weights, see tests/parity/README.md."""
    fixture, weights = fill.load(Path(fill.__file__).with_name(f"{name}.json"))
    backbone = name.endswith("_backbone")
    make = localmamba.create_backbone if backbone else timm.create_model
    model = make(name.removesuffix("_backbone"))
    weights = {key: torch.from_numpy(x) for key, x in weights.items()}
    model = localmamba.load_released(model, weights).eval().cuda()
    x = torch.from_numpy(fill.image(fixture["image_size"], fixture["batch"]))[:1]
    output = model(x.cuda())
    if backbone:
        for feature, truth in zip(output, fixture["features"], strict=True):
            values = feature.flatten()[truth["index"]].cpu()
            assert relative_error(values, torch.tensor(truth["value"])) < 1e-4
    else:
        logits = torch.tensor(fixture["logits"]).view(fixture["logits_shape"])
        assert relative_error(output.cpu(), logits[:1]) < 1e-4
