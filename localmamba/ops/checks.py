"""What public functions ask of their arguments: errors of one line. TorchScript reads these too."""

from typing import Optional

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
