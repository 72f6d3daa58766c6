"""Contracts of the public ops on a GPU: a checked index, direct launches."""

from collections.abc import Callable

import pytest
import torch
from ops.test_index import OPS, WRONG, two_directions

pytest.importorskip("triton")

from localmamba.ops import token_norm
from localmamba.ops._common import nvrtc, triton_common


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@pytest.mark.parametrize("row", [row for row, _ in WRONG.values()], ids=WRONG)
def test_a_wrong_index(op: Callable, row: list[int]) -> None:
    index = torch.tensor(two_directions(row), dtype=torch.int32, device="cuda")
    with pytest.raises(ValueError, match="index must name each of the 6 tokens once in every row"):
        op(index)
    torch.cuda.synchronize()


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_a_checked_index_does_not_synchronize(op: Callable) -> None:
    index = torch.arange(6, device="cuda")[None].int()
    op(index)
    torch.cuda.set_sync_debug_mode("error")
    try:
        op(index)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_hardware_is_read_from_the_device() -> None:
    x = torch.empty(1, device="cuda")
    properties = torch.cuda.get_device_properties(x.get_device())
    assert triton_common.wave_size(x) == 4 * properties.multi_processor_count
    assert triton_common.hardware(x.get_device()) == (
        properties.multi_processor_count,
        properties.warp_size,
        properties.regs_per_multiprocessor,
    )


def test_direct_launches_give_what_triton_s_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where a release of Triton changes how a compiled kernel is launched."""
    x, weight = torch.randn(2, 37, 96, device="cuda"), torch.randn(96, device="cuda")
    direct = [token_norm(x, weight) for _ in range(2)][1]
    monkeypatch.setattr(triton_common, "LAUNCHES_COMPILED", False)
    assert torch.equal(token_norm(x, weight), direct)


def test_the_private_look_up_of_the_stream_is_there_and_agrees() -> None:
    assert nvrtc._current_stream is not nvrtc._public_stream
    with torch.cuda.stream(torch.cuda.Stream()):
        device = torch.cuda.current_device()
        assert nvrtc._current_stream(device) == nvrtc._public_stream(device) > 0
