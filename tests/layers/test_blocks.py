"""Blocks and stochastic depth: its law, and a plain form of a block given what was drawn."""

import copy

import pytest
import timm.layers
import torch
from torch import Tensor, nn

from localmamba.layers import DropPath, LocalVimBlock, LocalVMambaBlock
from localmamba.models.localvmamba import Stage


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_factors_have_the_law_of_stochastic_depth(rate: float) -> None:
    torch.manual_seed(0)
    factors = DropPath(rate).factors(torch.empty(100_000, 2))
    assert factors.shape == (100_000,)
    assert factors.unique().tolist() == pytest.approx([0, 1 / (1 - rate)])
    variance = rate / (1 - rate)
    assert factors.mean().item() == pytest.approx(1, abs=5 * (variance / 100_000) ** 0.5)
    assert factors.var().item() == pytest.approx(variance, rel=0.05)


@pytest.mark.parametrize("scale_by_keep", [False, True])
@pytest.mark.parametrize("rate", [0.4, 1.0])
def test_factors_are_what_timm_multiplies_by(rate: float, scale_by_keep: bool) -> None:
    drop, x = DropPath(rate, scale_by_keep), torch.randn(50, 3, 2, dtype=torch.float64)
    torch.manual_seed(1)
    scaled = x * drop.factors(x)[:, None, None]
    for same in (drop, timm.layers.DropPath(rate, scale_by_keep)):
        torch.manual_seed(1)
        assert torch.equal(scaled, same(x))


def test_nothing_is_dropped_in_evaluation_or_at_rate_0() -> None:
    x = torch.randn(3, 2)
    assert DropPath(0.5).eval().factors(x) is None
    assert DropPath(0.0).factors(x) is None


def make_block(block_class: type[nn.Module], rate: float, dim: int = 8) -> nn.Module:
    """A seeded block in float64, in training mode."""
    torch.manual_seed(int(10 * rate))
    return block_class(dim, d_state=2, drop_path=rate, dtype=torch.float64)


GRID = {LocalVimBlock: (3, 4), LocalVMambaBlock: ()}
"""What a block takes after hidden tokens and residual."""


def block_inputs(block_class: type[nn.Module], images: int = 6) -> tuple[Tensor, Tensor]:
    shape = (images, 12, 8) if block_class is LocalVimBlock else (images, 3, 4, 8)
    return torch.randn(2, *shape, dtype=torch.float64).unbind()


@pytest.mark.parametrize("block_class", GRID, ids=lambda c: c.__name__)
def test_a_block_is_its_plain_form_given_the_factors(block_class: type[nn.Module]) -> None:
    block, grid = make_block(block_class, 0.5), GRID[block_class]
    hidden, residual = (x.requires_grad_() for x in block_inputs(block_class))
    torch.manual_seed(3)
    factors = block.drop_path.factors(residual)
    assert 0 < (factors == 0).sum() < 6
    stream = residual + factors.view(-1, *[1] * (hidden.dim() - 1)) * hidden
    expected = block.mixer(block.norm(stream), *grid), stream
    torch.manual_seed(3)
    actual = block(hidden, residual, *grid)
    torch.testing.assert_close(actual, expected)
    wanted, found = (
        torch.autograd.grad(out.square().sum() + stream.sum(), (hidden, residual))
        for out, stream in (expected, actual)
    )
    torch.testing.assert_close(found, wanted)
    assert not found[0][factors == 0].any()


@pytest.mark.parametrize("block_class", GRID, ids=lambda c: c.__name__)
def test_the_first_block_drops_nothing(block_class: type[nn.Module]) -> None:
    block, grid = make_block(block_class, 0.5), GRID[block_class]
    hidden, _ = block_inputs(block_class)
    out, stream = block(hidden, None, *grid)
    assert torch.equal(stream, hidden)
    assert torch.equal(out, copy.deepcopy(block).eval()(hidden, None, *grid)[0])


def make_stage(*rates: float) -> Stage:
    """The first rate is that of the first block's output, as a stage's user thinks of it."""
    blocks = [make_block(LocalVMambaBlock, rate) for rate in (0.0, *rates[:-1])]
    return Stage(4, 8, True, blocks, rates[-1], dtype=torch.float64)


def test_a_stage_drops_what_each_of_its_blocks_puts_out() -> None:
    stage, x = make_stage(0.2, 0.5, 0.4), torch.randn(8, 5, 4, 4, dtype=torch.float64)
    torch.manual_seed(5)
    expected = stage.downsample(x)
    for block, drop in zip(
        stage.blocks, [*(b.drop_path for b in stage.blocks[1:]), stage.drop_path], strict=True
    ):
        expected = expected + drop(block.mixer(block.norm(expected)))
    torch.manual_seed(5)
    torch.testing.assert_close(stage(x), expected)
    torch.testing.assert_close(make_stage(1.0, 1.0)(x), make_stage(1.0, 1.0).downsample(x))


@pytest.mark.parametrize("block_class", GRID, ids=lambda c: c.__name__)
def test_dropping_compiles_whole_and_scripts(block_class: type[nn.Module]) -> None:
    block, grid = make_block(block_class, 0.5), GRID[block_class]
    inputs = [x.requires_grad_() for x in block_inputs(block_class)]
    programs = (
        block,
        torch.compile(block, fullgraph=True, backend="aot_eager"),
        torch.jit.script(block),
        torch.fx.symbolic_trace(block) if grid == () else block,
    )
    results = []
    for program in programs:
        torch.manual_seed(7)
        out, stream = program(*inputs, *grid)
        gradients = torch.autograd.grad(out.square().sum() + stream.sum(), inputs)
        results.append((out, stream, *gradients))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])
