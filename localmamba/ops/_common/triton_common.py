"""Launches of Triton kernels, launch sizes from the hardware, and shared device functions."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
FP16_MAX = tl.constexpr(65504.0)

_VARIANTS = 1024
"""Variants kept for a kernel; then the dictionary is cleared."""

_ALIGNMENT = 16
"""Triton specializes on pointers that are multiples of so many bytes."""

LAUNCHES_COMPILED = hasattr(getattr(triton.compiler, "CompiledKernel", None), "__getitem__")
"""Whether this Triton can launch what `kernel[grid](...)` returned, as its tutorials do."""


def variant(arguments: tuple[Any, ...], constants: dict[str, Any]) -> tuple[Any, ...]:
    """Returns what Triton may specialize on: numbers by value, tensors by dtype and alignment."""
    found: list[Any] = []
    for x in arguments:
        if isinstance(x, Tensor):
            found += (x.get_device(), x.dtype, x.data_ptr() % _ALIGNMENT == 0)
        else:
            found += (type(x), x)
    return (*found, *constants.items())


class Kernel:
    """A `triton.jit` function whose repeated launches take less time in Python.

    Before each launch Triton inspects every argument to find what it compiled for the like: more
    time than a short PyTorch call takes. A model calls a kernel with the same numbers step after
    step, so the compiled kernel is found by the numbers themselves. Used like the function,
    `kernel[grid](...)`: arguments that are not constants first and by position, constants by name.
    Off a GPU (in the interpreter) and in a Triton without this way, Triton launches.
    """

    def __init__(self, function: Any):
        self.function = function
        self.compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **constants: self._launch(grid, arguments, constants)

    def _launch(
        self, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]
    ) -> None:
        on_gpu = any(isinstance(x, Tensor) and x.is_cuda for x in arguments)
        if not (on_gpu and LAUNCHES_COMPILED):
            self.function[grid](*arguments, **constants)
            return
        key = variant(arguments, constants)
        found = self.compiled.get(key)
        if found is not None:
            kernel, by_position = found
            kernel[(*grid, 1, 1)[:3]](*arguments, *by_position)
            return
        if len(self.compiled) >= _VARIANTS:
            self.compiled.clear()
        kernel = self.function[grid](*arguments, **constants)
        names = self.function.arg_names[len(arguments) :]
        self.compiled[key] = kernel, tuple(constants[name] for name in names)


class Hardware(NamedTuple):
    """Properties of a GPU that launch sizes depend on, by PyTorch's names.

    The defaults, those of an H100 and an H200, serve the interpreter and a PyTorch that lacks a
    property.
    """

    multi_processor_count: int = 132
    warp_size: int = 32
    regs_per_multiprocessor: int = 65536


_SCHEDULERS = 4
"""Warp schedulers of an SM, from Volta on; no property tells it."""


@cache
def hardware(device: int) -> Hardware:
    """Returns the properties of a GPU; the defaults for -1, the CPU."""
    if device < 0:
        return Hardware()
    found: Any = torch.cuda.get_device_properties(device)
    known = {name: getattr(found, name) for name in Hardware._fields if hasattr(found, name)}
    return Hardware(**known)


@cache
def _wave_size(device: int) -> int:
    return _SCHEDULERS * hardware(device).multi_processor_count


def wave_size(x: Tensor) -> int:
    """Returns how many warps the GPU of x issues from at once: fewer leave it partly idle."""
    return _wave_size(x.get_device())


@cache
def register_limit(device: int, warps: int, programs: int) -> int:
    """Returns the registers per thread with which an SM holds so many programs of so many warps."""
    gpu = hardware(device)
    limit = gpu.regs_per_multiprocessor // (programs * warps * gpu.warp_size)
    return min(limit // 8 * 8, 255)  # registers are allocated by eights


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. On the host Triton's own takes longer than a short PyTorch call."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below n; faster on the host than Triton's own."""
    return 1 << (n - 1).bit_length()


def unit_stride(x: Tensor) -> Tensor:
    """x itself when its last axis is contiguous, else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def optional_contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, contiguous; None stays."""
    return [x if x is None else x.contiguous() for x in tensors]


def as_int32(index: Tensor | None) -> Tensor | None:
    """Scan orders as the kernels read them: int32, contiguous."""
    return index if index is None else index.to(torch.int32).contiguous()


def sequence_strides(*tensors: Tensor) -> list[int]:
    """Strides of batch, direction and step of [B, L, D] (shared by directions) or [B, K, T, D]."""
    shared = ((x.stride(0), 0, x.stride(1)) if x.dim() == 3 else x.stride()[:3] for x in tensors)
    return [stride for strides in shared for stride in strides]


def device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Makes the device of x the one on which kernels launch."""
    if x.is_cuda:
        return torch.cuda.device(x.get_device())
    return torch.autograd.profiler.record_function("")


@triton.jit
def program_2d(first):
    """The position of a program in a grid [second, first] that is launched as one axis.

    CUDA takes at most 65,535 programs along every axis of a grid but the first.
    """
    i = tl.program_id(0)
    return i % first, (i // first).to(tl.int64)


@triton.jit
def program_3d(first, second):
    """The position of a program in a grid [third, second, first]."""
    i = tl.program_id(0)
    return i % first, i // first % second, (i // (first * second)).to(tl.int64)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) to 3e-7 relative: a division takes more instructions than a root."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -LOG2E))
    return root * root


@triton.jit
def silu_grad(x, gate):
    """d SiLU / dx, with gate = sigmoid(x)."""
    return gate * (1.0 + x * (1.0 - gate))


@triton.jit
def softplus(x):
    """log(1 + exp(x)) to 3e-7 relative, for small steps too, where 1 + exp(x) would round."""
    q = tl.exp2(-tl.abs(x) * LOG2E)
    p = -0.008574676204479785 * q + 0.0442141923369347
    p = p * q - 0.10785367917003512
    p = p * q + 0.17757023992166363
    p = p * q - 0.24499611724493794
    p = p * q + 0.33276176571502103
    p = p * q - 0.49997449384834663
    p = p * q + 0.9999998102178483
    return tl.where(x > 0.0, x, 0.0) + p * q


@triton.jit
def store(pointers, x, mask):
    """Stores float32 outputs as the pointers' dtype; float16 saturates instead of overflowing.

    Gradients must not: an infinity is what tells a gradient scaler to take a smaller scale.
    """
    if pointers.dtype.element_ty == tl.float16:
        x = tl.where(x > FP16_MAX, FP16_MAX, tl.where(x < -FP16_MAX, -FP16_MAX, x))
    tl.store(pointers, x.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def step_size(dt, bias, SOFTPLUS: tl.constexpr):
    """delta of one step from the raw dt and its bias."""
    dt += bias
    if SOFTPLUS:
        dt = softplus(dt)
    return dt


@triton.jit
def sequence_of(K, channels, BD: tl.constexpr):
    """A scan's program's block of channels, image * K + direction, image and direction."""
    i_d, i_bk = program_2d(tl.cdiv(channels, BD))
    return i_d, i_bk, i_bk // K, i_bk % K


@triton.jit
def state_tile(i_d, channels, n_states, BD: tl.constexpr, BN: tl.constexpr):
    """Offsets of channels [BD], of states [BN] and of both [BN, BD], and their masks."""
    o_d = i_d * BD + tl.arange(0, BD)
    o_n = tl.arange(0, BN)
    m_d, m_n = o_d < channels, o_n < n_states
    o_state = o_n[:, None] * channels + o_d[None, :]
    return o_d, o_n, o_state, m_d, m_n, m_d[None, :] & m_n[:, None]


@triton.jit
def load_decay(A, i_k, o_state, m_dn, channels, n_states):
    """A of a direction, as exponents of 2, [BN, BD]."""
    p_A = A + i_k * n_states * channels + o_state
    return tl.load(p_A, mask=m_dn, other=0.0).to(tl.float32) * LOG2E


@triton.jit
def load_vector(pointer, i_k, o_d, m_d, channels, THERE: tl.constexpr, BD: tl.constexpr):
    """A direction's vector over channels, [BD]; 0 where there is none."""
    b_x = tl.zeros([BD], tl.float32)
    if THERE:
        b_x = tl.load(pointer + i_k * channels + o_d, mask=m_d, other=0.0).to(tl.float32)
    return b_x


class Launch(NamedTuple):
    """How a scan is cut into programs, from its shape alone."""

    channels: int
    """Channels of a program (a power of two)."""
    states: int
    """N rounded up to a power of two."""
    warps: int
    segments: int
    """Parts of the sequence that run side by side; 1 where there are enough sequences."""
    segment_chunks: int
    """Kept-state chunks of a segment."""


@lru_cache(maxsize=256)
def scan_launch(
    batch: int, directions: int, channels: int, states: int, chunks: int, wave: int
) -> Launch:
    """Many sequences: one program each. Few long ones: time is cut into segments as well."""
    block = min(32, next_power_of_2(channels))
    states = next_power_of_2(states)
    programs = batch * directions * cdiv(channels, block)
    segments = 1
    if 0 < programs < 2 * wave and chunks > 1:
        segments = min(chunks, cdiv(8 * wave, programs))
    segment_chunks = max(cdiv(chunks, segments), 1)
    return Launch(
        channels=block,
        states=states,
        warps=max(1, states // 16),
        segments=cdiv(chunks, segment_chunks),
        segment_chunks=segment_chunks,
    )
