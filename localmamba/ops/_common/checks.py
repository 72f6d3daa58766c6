"""Checks of arguments: one-line errors. TorchScript compiles these functions too."""

from typing import Optional

import torch
from torch import Tensor


def check_shape(name: str, x: Optional[Tensor], expected: list[int]) -> None:
    """Raises a `ValueError` if x is given and has another shape."""
    if x is not None and list(x.shape) != expected:
        raise ValueError(f"{name} must be {expected}, got {list(x.shape)}")


def check_together(
    name: str, x: Optional[Tensor], other_name: str, other: Optional[Tensor]
) -> None:
    """Raises a `ValueError` if one is given without the other."""
    if (x is None) != (other is None):
        given = name if other is None else other_name
        raise ValueError(f"{name} and {other_name} must be given together, got {given} alone")


def check_index(index: Tensor, length: int) -> None:
    """Raises a `ValueError` unless every row of an index is a scan order of `length` tokens.

    Kernels trust an index: they would read out of bounds at a token that does not exist, and leave
    the row of a token that is missing unwritten. An index is checked once, and again after changes
    in place; the check waits for the device. Those of `scan_index` are known to be right. Programs
    that `torch.compile`, `torch.export` or TorchScript made do not check: there, an index that is
    made by hand must be right.

    Args:
        index: [K, P], each token once in every row, `PADDING` elsewhere.
        length: Tokens L.
    """
    if not (torch.jit.is_scripting() or torch.compiler.is_compiling()):
        _check_index_once(index, length)


def mark_checked(index: Tensor, length: int) -> None:
    """Records that an index holds scan orders of `length` tokens."""
    if not (torch.jit.is_scripting() or torch.compiler.is_compiling()):
        _mark_checked(index, length)


def _state(index: Tensor, length: int) -> tuple[int, int]:
    """What a check holds for; inference tensors do not count their changes."""
    return length, -1 if index.is_inference() else index._version


@torch.jit.unused
def _mark_checked(index: Tensor, length: int) -> None:
    # An attribute that only this module knows.
    index._checked_scan_orders = _state(index, length)  # type: ignore[attr-defined]


@torch.jit.unused
def _check_index_once(index: Tensor, length: int) -> None:
    if getattr(index, "_checked_scan_orders", None) == _state(index, length) or index.is_meta:
        return
    if index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"index must be int32 or int64, got {index.dtype}")
    padding = index.shape[1] - length
    if padding >= 0:
        ordered, _ = index.detach().long().sort(dim=1)
        tokens = torch.arange(-padding, length, device=index.device).clamp(min=-1)
        if bool((ordered == tokens).all()):
            _mark_checked(index, length)
            return
    raise ValueError(
        f"index must name each of the {length} tokens once in every row and -1 at padding, got "
        + _first_fault(index.tolist(), length)
    )


@torch.jit.unused
def _first_fault(rows: list[list[int]], length: int) -> str:
    for k, row in enumerate(rows):
        for step, token in enumerate(row):
            if not -1 <= token < length:
                return f"token {token} at step {step} of direction {k}"
        for token in range(length):
            if (times := row.count(token)) != 1:
                found = f"{times} times" if times else "nowhere"
                return f"token {token} {found} in direction {k}"
    return "no tokens"
