"""Checks of arguments: one-line errors. TorchScript compiles these functions too."""

from typing import Optional

import torch
from torch import Tensor


def check_shape(name: str, x: Optional[Tensor], expected: list[int]) -> None:  # noqa: UP045
    """Raises a `ValueError` if x is given and has another shape."""
    if x is not None and list(x.shape) != expected:
        raise ValueError(f"{name} must be {expected}, got {list(x.shape)}")


def check_together(
    name: str,
    x: Optional[Tensor],  # noqa: UP045
    other_name: str,
    other: Optional[Tensor],  # noqa: UP045
) -> None:
    """Raises a `ValueError` if one is given without the other."""
    if (x is None) != (other is None):
        given = name if other is None else other_name
        raise ValueError(f"{name} and {other_name} must be given together, got {given} alone")


def check_index(index: Tensor, length: int) -> None:
    """Raises a `ValueError` unless an index is made of scan orders of `length` tokens.

    Kernels trust an index: one that names a token out of bounds would make them read there, and
    one that leaves a token out would leave its row of a result unwritten. An index is looked at
    once, which waits for the device; those of `scan_index` are known to be right. Programs that
    `torch.compile`, `torch.export` or TorchScript made do not look.

    Args:
        index: [K, P], each token once in every row, `PADDING` elsewhere.
        length: Tokens L.
    """
    if torch.jit.is_scripting() or torch.compiler.is_compiling():
        return
    _check_index_once(index, length)


@torch.jit.unused
def _check_index_once(index: Tensor, length: int) -> None:
    if getattr(index, "_checked_scan_orders", None) == _state(index, length):
        return
    if index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"index must be int32 or int64, got {index.dtype}")
    ordered, _ = index.detach().long().sort(dim=1)
    tokens = torch.arange(length, device=index.device)
    padding = index.shape[1] - length
    if padding < 0 or not bool(
        (ordered[:, :padding] == -1).all() & (ordered[:, padding:] == tokens).all()
    ):
        raise ValueError(
            f"index must name each of the {length} tokens once in every row and -1 at padding"
        )
    mark_checked(index, length)


def mark_checked(index: Tensor, length: int) -> None:
    """Records that an index holds scan orders of `length` tokens."""
    index._checked_scan_orders = _state(index, length)  # type: ignore[attr-defined]


def _state(index: Tensor, length: int) -> tuple[int, int]:
    """What a check holds for: writes in place count, but not those to an inference tensor."""
    return length, 0 if index.is_inference() else index._version
