"""Launch sizes from the properties of made-up GPUs."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from localmamba.ops._common import partials, triton_common
from localmamba.ops.depthwise_conv import cuda as depthwise_conv
from localmamba.ops.residual_norm.cuda import row_tile

GPUS = {
    "H100": (132, 528),
    "A100": (108, 432),
    "L4": (58, 232),
    "RTX 4090": (128, 512),
    "laptop": (20, 80),
}
"""SMs, and warps that the SMs' four schedulers issue from at once."""


class OnGPU(torch.Tensor):
    """A tensor that says it is on GPU 0."""

    def get_device(self) -> int:
        return 0


def on_gpu(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype).as_subclass(OnGPU)


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """Returns a function that sets the properties of GPU 0."""

    def forget() -> None:
        for function in (
            triton_common.hardware,
            triton_common._wave_size,
            triton_common.register_limit,
        ):
            function.cache_clear()

    def set_properties(**properties: int) -> None:
        forget()
        found = SimpleNamespace(**properties)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)

    yield set_properties
    forget()


@pytest.mark.parametrize("name", GPUS)
def test_a_wave_is_four_warps_an_sm(name: str, pretend) -> None:
    sms, wave = GPUS[name]
    pretend(multi_processor_count=sms, warp_size=32, regs_per_multiprocessor=65536)
    assert triton_common.wave_size(on_gpu(1)) == wave


def test_defaults_are_those_of_an_h100(pretend) -> None:
    """On a CPU (the interpreter), and for properties that a PyTorch lacks."""
    assert triton_common.wave_size(torch.empty(1)) == 528
    pretend(multi_processor_count=20)
    assert triton_common.hardware(0) == (20, 32, 65536)
    pretend()
    assert triton_common.hardware(0) == triton_common.hardware(-1) == (132, 32, 65536)


def test_properties_are_asked_once(pretend, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(multi_processor_count=58)
    x = on_gpu(1)
    triton_common.wave_size(x)
    monkeypatch.delattr(torch.cuda, "get_device_properties")
    assert triton_common.wave_size(x) == 232


@pytest.mark.parametrize(
    ("registers", "limit"), [(65536, 168), (131072, 255), (32768, 80)], ids=str
)
def test_registers_of_three_programs_of_four_warps(registers: int, limit: int, pretend) -> None:
    pretend(multi_processor_count=132, regs_per_multiprocessor=registers)
    found = triton_common.register_limit(0, warps=4, programs=3)
    assert found == limit
    assert found * 3 * 4 * 32 <= registers


@pytest.mark.parametrize("name", GPUS)
def test_launches_fill_the_gpu(name: str, pretend) -> None:
    """As far as the work reaches: units of one row until there are two waves of seven rows."""
    sms, wave = GPUS[name]
    pretend(multi_processor_count=sms)
    for batch in (1, 8, 64, 512):
        launch = depthwise_conv._launch(on_gpu(batch, 14, 14, 192), 3)
        assert launch.rows == (7 if batch * 2 * 2 * 3 >= 2 * wave else 1)
        view = partials._view(torch.Size([batch, 64, 192]), (1,))
        rows, columns = partials._tile(view, wave)
        programs = batch * -(-192 // columns)
        assert programs >= wave // 2 or columns == partials._NARROWEST or columns == 256
        assert rows * columns <= partials._TILE
    launch = triton_common.scan_launch(1, 4, 96, 16, 64, wave)
    assert launch.segments * 12 >= min(64 * 12, 2 * wave)


H100_LAUNCHES = {
    (1, 14, 14, 192, 3): (1, 64, 2, 14, 3, 28, 4),
    (128, 14, 14, 192, 3): (7, 64, 2, 2, 3, 512, 4),
    (128, 14, 14, 192, 5): (1, 64, 2, 14, 3, 3584, 4),
    (8, 56, 56, 96, 3): (1, 64, 7, 56, 2, 3136, 4),
}
"""Rows, channels, strips, bands, channel blocks, units and warps that were measured to be fast."""


@pytest.mark.parametrize("shape", H100_LAUNCHES, ids=str)
def test_launches_on_an_h100(shape: tuple[int, ...], pretend) -> None:
    pretend(multi_processor_count=132, warp_size=32, regs_per_multiprocessor=65536)
    *size, taps = shape
    assert depthwise_conv._launch(on_gpu(*size), taps) == H100_LAUNCHES[shape]


@pytest.mark.parametrize("channels", [6, 96, 192, 384, 768, 1536])
def test_tiles_of_a_row_do_not_depend_on_the_gpu(channels: int) -> None:
    """They fill the registers of lanes, which every GPU has the same number of."""
    tile = row_tile(channels)
    assert tile.tiles * tile.width >= channels
    assert tile.rows * tile.width <= max(512, tile.width)


def test_triton_launches_compiled_kernels() -> None:
    """Fails where a release of Triton changes what `triton_common.Kernel` relies on.

    That is `kernel[grid](...)` of a compiled kernel and the names of a function's arguments;
    without the first, launches go through Triton and take longer.
    """
    assert triton_common.LAUNCHES_COMPILED
    assert partials.sum_partials_kernel.function.arg_names[:3] == ["x", "out", "rows"]
