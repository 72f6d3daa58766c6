"""A scan order is checked once at the public functions: a wrong one is a ValueError of one line."""

import re
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from localmamba.ops import causal_conv, s6_branches, scan_index, selective_scan

LENGTH, CHANNELS, STATES, RANK = 6, 4, 2, 1


def call_causal_conv(index: Tensor) -> Tensor:
    directions, like = index.shape[0], {"dtype": torch.float32, "device": index.device}
    x = torch.ones(1, LENGTH, CHANNELS, **like)
    weight = torch.ones(directions, CHANNELS, 3, **like)
    return causal_conv(x, weight, torch.ones(directions, CHANNELS, **like), index)


def call_selective_scan(index: Tensor) -> Tensor:
    directions, like = index.shape[0], {"dtype": torch.float32, "device": index.device}
    u = torch.ones(1, LENGTH, CHANNELS, **like)
    dt = torch.ones(1, directions, LENGTH, CHANNELS, **like)
    A = -torch.ones(directions, CHANNELS, STATES, **like)
    B = torch.ones(1, directions, LENGTH, STATES, **like)
    return selective_scan(u, dt, A, B, B, index=index)


def call_s6_branches(index: Tensor) -> Tensor:
    directions, like = index.shape[0], {"dtype": torch.float32, "device": index.device}
    x = torch.ones(1, LENGTH, CHANNELS, **like)
    x_proj = torch.ones(directions, RANK + 2 * STATES, CHANNELS, **like)
    dt_weight = torch.ones(directions, CHANNELS, RANK, **like)
    A = -torch.ones(directions, CHANNELS, STATES, **like)
    D = torch.ones(directions, CHANNELS, **like)
    return s6_branches(x, x_proj, dt_weight, D, A, D, index)


OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "causal_conv": call_causal_conv,
    "selective_scan": call_selective_scan,
    "s6_branches": call_s6_branches,
}
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)

WRONG = {
    "missing": ([0, 1, 2, 4, 5, -1], "token 3 nowhere in direction 1"),
    "twice": ([0, 1, 2, 3, 4, 5, 5], "token 5 2 times in direction 1"),
    "twice, one missing": ([0, 1, 2, 3, 5, 5], "token 4 nowhere in direction 1"),
    "too large": ([0, 1, 2, 3, 4, 6], "token 6 at step 5 of direction 1"),
    "far too large": ([0, 1, 2, 3, 4, 2**31 - 1], "token 2147483647 at step 5 of direction 1"),
    "negative": ([-2, 0, 1, 2, 3, 4, 5], "token -2 at step 0 of direction 1"),
    "short": ([0, 1, 2, 3, 4], "token 5 nowhere in direction 1"),
    "padding alone": ([-1] * 6, "token 0 nowhere in direction 1"),
}


def two_directions(row: list[int]) -> list[list[int]]:
    """A right direction 0 where the length allows it, and `row` as direction 1."""
    right = (list(range(LENGTH)) + [-1] * len(row))[: max(len(row), 1)]
    return [right, row]


@every_op
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("row", "fault"), WRONG.values(), ids=WRONG)
def test_a_wrong_index(op: Callable, dtype: torch.dtype, row, fault: str) -> None:
    index = torch.tensor(two_directions(row), dtype=dtype)
    if len(row) < LENGTH:
        fault = fault.replace("direction 1", "direction 0")
    message = re.escape(
        f"index must name each of the {LENGTH} tokens once in every row and -1 at padding, "
        f"got {fault}"
    )
    for _ in range(2):  # a wrong index is not taken for checked
        with pytest.raises(ValueError, match=f"^{message}$"):
            op(index)


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int16, torch.uint8], ids=str)
def test_a_wrong_dtype(op: Callable, dtype: torch.dtype) -> None:
    index = torch.arange(LENGTH).to(dtype)[None]
    with pytest.raises(ValueError, match=f"^index must be int32 or int64, got {dtype}$"):
        op(index)


@every_op
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_a_right_index_made_by_hand(op: Callable, dtype: torch.dtype) -> None:
    """With padding anywhere, and not contiguous."""
    rows = [[5, -1, 4, 3, -1, 2, 1, 0], [0, 1, 2, 3, 4, 5, -1, -1]]
    index = torch.tensor(rows, dtype=dtype)
    assert torch.equal(op(index), op(index.T.contiguous().T))
    assert op(index).isfinite().all()


class Syncs(TorchDispatchMode):
    """Counts the reads of a tensor's value, each of which waits for a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += 1
        return func(*args, **(kwargs or {}))


@every_op
def test_a_second_call_does_not_wait_for_the_device(op: Callable) -> None:
    index = torch.arange(LENGTH)[None].int()
    with Syncs() as first:
        op(index)
    with Syncs() as second:
        op(index)
    assert (first.count, second.count) == (1, 0)


@every_op
def test_an_index_of_scan_index_is_not_checked(op: Callable) -> None:
    index = scan_index(torch.empty(0), ["h", "w2_flip"], 2, 3)
    with Syncs() as syncs:
        op(index)
    assert syncs.count == 0


@every_op
@pytest.mark.parametrize("made", ["by hand", "scan_index"])
def test_changes_in_place_are_seen(op: Callable, made: str) -> None:
    index = torch.arange(LENGTH)[None].int()
    if made == "scan_index":
        index = scan_index(torch.empty(0), ["h"], 2, 3)
    op(index)
    index[0, 0] = 1
    with pytest.raises(ValueError, match="got token 0 nowhere in direction 0"):
        op(index)
    index[0, 0] = 0
    op(index)


@every_op
def test_an_index_for_another_length(op: Callable) -> None:
    """What is known of an index holds for its number of tokens alone."""
    with pytest.raises(ValueError, match="got token 6 at step 6 of direction 0"):
        op(scan_index(torch.empty(0), ["h"], 2, 4))


@pytest.fixture
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@every_op
@pytest.mark.usefixtures("inference")
def test_inference_tensors(op: Callable) -> None:
    """They have no version counter: they are checked once."""
    op(scan_index(torch.empty(0), ["h"], 2, 3))
    index = torch.arange(LENGTH)[None]
    op(index)
    with Syncs() as syncs:
        op(index)
    assert syncs.count == 0
    with pytest.raises(ValueError, match="got token 4 2 times in direction 0"):
        op(index.clamp(max=4))


@every_op
def test_inference_tensors_outside_inference_mode(op: Callable) -> None:
    with torch.inference_mode():
        index = scan_index(torch.empty(0), ["h"], 2, 3)
    op(index)


@every_op
def test_meta_tensors(op: Callable) -> None:
    """They have no values."""
    assert op(torch.arange(LENGTH, device="meta")[None].int()).is_meta


def test_torchscript() -> None:
    scripted = torch.jit.script(scan_index)
    index = scripted(torch.empty(0), ["h", "v"], 2, 3, -1)
    assert torch.equal(index, scan_index(torch.empty(0), ["h", "v"], 2, 3))
    torch.jit.script(causal_conv)


@every_op
def test_compiled_programs_do_not_check(op: Callable) -> None:
    index = torch.arange(LENGTH)[None]
    compiled = torch.compile(op, backend="eager", fullgraph=True)
    assert torch.equal(compiled(index), op(index))


def test_vmap_gives_one_index() -> None:
    """The grid is the same for the whole batch."""
    x = torch.arange(12, dtype=torch.float32).view(2, 1, LENGTH, 1)

    def first_tokens(x: Tensor) -> Tensor:
        index = scan_index(x, ["h_flip"], 2, 3)
        return causal_conv(x, torch.ones(1, 1, 1), torch.zeros(1, 1), index)

    expected = torch.stack([first_tokens(image) for image in x])
    assert torch.equal(torch.vmap(first_tokens)(x), expected)
