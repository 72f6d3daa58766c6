"""The CPU kernels and threads: same numbers for any count, several callers, forked children."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import random, results_and_gradients, scan_inputs
from torch import Tensor

from localmamba.ops import (
    causal_conv,
    combine_directions,
    pool_directions,
    scan_index,
    selective_scan,
)
from localmamba.ops._common import numba_jit

GRID, TOKENS, CHANNELS = (7, 8), 56, 66
"""Two blocks of channels, two chunks of steps."""

Case = tuple[Callable[..., Tensor], dict]


@pytest.fixture
def share_all_work(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Even small work goes to several threads."""
    monkeypatch.setattr(numba_jit, "_WORTH_SHARING", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def cases(batch: int = 2) -> list[Case]:
    """Every op with inputs for it."""
    index = scan_index(torch.empty(0), ["h", "v_flip", "w9"], *GRID)
    x, y = random(batch, TOKENS, CHANNELS), random(batch, 3, TOKENS, CHANNELS)
    weight, bias = random(3, CHANNELS, 4), random(3, CHANNELS)
    merge = {"y": y, "channel_weights": random(batch, 3, CHANNELS), "z": x}
    return [
        (selective_scan, scan_inputs(index, TOKENS, batch, CHANNELS, 5, True)),
        (selective_scan, scan_inputs(index, TOKENS, batch, CHANNELS, 5, False)),
        (causal_conv, {"x": x, "weight": weight, "bias": bias, "index": index}),
        (pool_directions, {"y": y, "z": x, "weight": bias[0].clone(), "bias": bias[1].clone()}),
        (
            combine_directions,
            merge | {"norm_weight": bias[0].clone(), "norm_bias": bias[1].clone()},
        ),
    ]


def run(given: list[Case]) -> list[Tensor]:
    """The results and gradients of all cases."""
    return [
        x
        for op, inputs in given
        for x in results_and_gradients(op, inputs, dy=torch.tensor(1.0)).values()
    ]


def same(results: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(results, others, strict=True))


@pytest.mark.usefixtures("share_all_work")
def test_same_numbers_for_any_number_of_threads() -> None:
    given = cases()
    torch.set_num_threads(1)
    alone = run(given)
    for count in (2, 5, 2, 1):
        torch.set_num_threads(count)
        assert same(run(given), alone), f"{count} threads"


@pytest.mark.usefixtures("share_all_work")
def test_several_callers_at_once() -> None:
    expected = run(cases())
    with ThreadPoolExecutor(4) as callers:
        for results in callers.map(run, [cases() for _ in range(12)]):
            assert same(results, expected)


def _forked(queue, given: list[Case], expected: list[Tensor]) -> None:
    queue.put(same(run(given), expected))


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork"
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("share_all_work")
def test_a_forked_child_has_threads_of_its_own() -> None:
    """PyTorch's own ops may hang there, so that the inputs are made before."""
    given = cases()
    expected = run(given)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_forked, args=(queue, given, expected))
    child.start()
    child.join(30)
    alive = child.is_alive()
    child.kill()
    assert not alive, "the child hangs"
    assert child.exitcode == 0
    assert queue.get()


@pytest.mark.usefixtures("share_all_work")
def test_an_error_in_a_helper_is_the_callers() -> None:
    def kernel(*_: int) -> None:
        raise RuntimeError("in the kernel")

    with pytest.raises(RuntimeError, match="in the kernel"):
        numba_jit.run(kernel, tasks=4, operations=1, scratch=1)
