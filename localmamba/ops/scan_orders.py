"""Scan orders: the order in which a direction reads the tokens of a grid.

A direction is a name, such as `h`, `v_flip` or `w7` (paper section 4.1 and figure 1; `snake`,
`diagonal` and `hilbert` are additions). Tokens are numbered row by row. A new direction is one
function:

    @register_direction("z{k}")
    def z_order(height, width, k):
        "One line for `list_directions`."
        return ...  # integer array [P]: a token at each step, each token once, PADDING elsewhere
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ._common.checks import mark_checked
from ._common.registration import define_function

Grid = tuple[int, int]

PADDING = -1
"""Marks a step that reads no token."""

CANDIDATES = ("h", "h_flip", "v", "v_flip", "w2", "w2_flip", "w7", "w7_flip")
"""The paper's eight candidate directions, in its order."""

FLIP = "_flip"


@dataclass(frozen=True)
class ScanOrder:
    """The order in which a direction reads a grid.

    Attributes:
        name: The direction.
        grid: (H, W).
        index: int32 [P], the token read at each step or `PADDING`; P >= L = H * W.
        inverse: int32 [L], the step at which each token is read.
    """

    name: str
    grid: Grid
    index: np.ndarray
    inverse: np.ndarray


@dataclass(frozen=True)
class _Direction:
    template: str
    pattern: re.Pattern[str]
    make: Callable[..., np.ndarray]
    tile: Callable[..., Grid] | None


_DIRECTIONS: dict[str, _Direction] = {}


def register_direction(
    template: str, tile: Callable[..., Grid] | None = None
) -> Callable[[Callable[..., np.ndarray]], Callable[..., np.ndarray]]:
    """Registers a function (height, width, **integers) -> integer array [P] as a direction.

    Its reverse is registered as `<template>_flip`.

    Args:
        template: Name; each `{k}` in it stands for a positive integer, passed by that keyword.
        tile: For a direction that pads: from the same integers, the (h, w) of which H and W are
            padded to multiples.
    """
    if template in _DIRECTIONS:
        raise ValueError(f"direction {template!r} is registered already")
    pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>[0-9]+)", re.escape(template))

    def register(make: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        _DIRECTIONS[template] = _Direction(template, re.compile(pattern), make, tile)
        return make

    return register


def list_directions() -> dict[str, str]:
    """Returns the registered directions and a line on each; each has a `_flip` too."""
    return {name: (d.make.__doc__ or "").strip().split("\n")[0] for name, d in _DIRECTIONS.items()}


@lru_cache(maxsize=4096)
def _parse(name: str) -> tuple[_Direction, dict[str, int]]:
    base = name.removesuffix(FLIP) if isinstance(name, str) else ""
    for direction in _DIRECTIONS.values():
        if match := direction.pattern.fullmatch(base):
            sizes = {key: int(value) for key, value in match.groupdict().items()}
            if any(size < 1 for size in sizes.values()):
                raise ValueError(f"direction {name!r}: sizes must be at least 1")
            return direction, sizes
    known = ", ".join(_DIRECTIONS)
    raise ValueError(f"unknown direction {name!r}; known: {known}, each also with {FLIP!r}")


def check_directions(names: Iterable[str]) -> list[str]:
    """Returns the names as a list; raises ValueError if one is unknown or there is none."""
    if isinstance(names, str):
        raise ValueError(f"directions must be a list of names, not the string {names!r}")
    names = list(names)
    for name in names:
        _parse(name)
    if not names:
        raise ValueError("directions must name at least one scan direction")
    return names


def padded_length(name: str, grid: Grid) -> int:
    """Returns the number of steps P of a direction on a grid, whose sizes may be symbolic."""
    direction, sizes = _parse(name)
    height, width = grid
    if direction.tile is None:
        return height * width
    rows, columns = direction.tile(**sizes)
    return (height + rows - 1) // rows * rows * ((width + columns - 1) // columns * columns)


@lru_cache(maxsize=1024)
def scan_order(name: str, grid: Grid) -> ScanOrder:
    """Returns the order in which direction `name` reads a grid of (H, W) tokens.

    Raises:
        ValueError: If the name is unknown, the grid is empty, or the registered function does not
            read every token exactly once.
    """
    direction, sizes = _parse(name)
    height, width = grid
    if height < 1 or width < 1:
        raise ValueError(f"a grid needs at least one row and one column, got {height} x {width}")
    index = np.asarray(direction.make(height, width, **sizes), dtype=np.int32)
    if name.endswith(FLIP):
        index = index[::-1]
    steps = np.flatnonzero(index != PADDING)
    tokens = index[steps]
    if index.size != padded_length(name, grid) or not np.array_equal(
        np.sort(tokens), np.arange(height * width)
    ):
        raise ValueError(
            f"direction {name!r} must take {padded_length(name, grid)} steps on a {height} x "
            f"{width} grid and read every token once"
        )
    inverse = np.empty(height * width, dtype=np.int32)
    inverse[tokens] = steps
    index = np.ascontiguousarray(index)
    index.flags.writeable = inverse.flags.writeable = False
    return ScanOrder(name, (height, width), index, inverse)


@lru_cache(maxsize=1024)
def index_table(directions: tuple[str, ...], grid: Grid, class_token: int = -1) -> np.ndarray:
    """Returns the orders of K directions as int32 [K, P]; shorter orders end in `PADDING`.

    Args:
        directions: K names.
        grid: (H, W).
        class_token: Position of a class token in the sequence of H * W + 1 tokens, which every
            direction reads at that same step; -1 for none.
    """
    rows = []
    for name in directions:
        row = scan_order(name, grid).index
        if class_token >= 0:
            row = np.insert(row + (row >= class_token), class_token, class_token)
        rows.append(row)
    table = np.full((len(rows), max(map(len, rows))), PADDING, dtype=np.int32)
    for k, row in enumerate(rows):
        table[k, : len(row)] = row
    table.flags.writeable = False
    return table


@lru_cache(maxsize=1024)
def _index_tensor(
    directions: tuple[str, ...], grid: Grid, class_token: int, device: torch.device
) -> Tensor:
    return torch.from_numpy(index_table(directions, grid, class_token).copy()).to(device)


def _scan_index(like: Tensor, directions: str, height: int, width: int, class_token: int) -> Tensor:
    # A copy: compiled programs reuse the memory of an op's result.
    names = tuple(directions.split(","))
    return _index_tensor(names, (height, width), class_token, like.device).clone()


def _scan_index_fake(
    like: Tensor, directions: str, height: int, width: int, class_token: int
) -> Tensor:
    names = directions.split(",")
    length: int | torch.SymInt = padded_length(names[0], (height, width))
    for name in names[1:]:
        length = torch.sym_max(length, padded_length(name, (height, width)))
    extra = 1 if class_token >= 0 else 0
    return like.new_empty((len(names), length + extra), dtype=torch.int32)


define_function(
    "scan_index(Tensor like, str directions, SymInt height, SymInt width, SymInt class_token) "
    "-> Tensor",
    _scan_index,
    _scan_index_fake,
)


def scan_index(
    like: Tensor, directions: list[str], height: int, width: int, class_token: int = -1
) -> Tensor:
    """Returns `index_table` as an int32 tensor [K, P] on the device of `like`; traceable."""
    index = torch.ops.localmamba.scan_index(like, ",".join(directions), height, width, class_token)
    mark_checked(index, height * width + (1 if class_token >= 0 else 0))
    return index


def _tokens(height: int, width: int) -> np.ndarray:
    return np.arange(height * width, dtype=np.int32).reshape(height, width)


@register_direction("h")
def horizontal(height: int, width: int) -> np.ndarray:
    """Row by row."""
    return _tokens(height, width).ravel()


@register_direction("v")
def vertical(height: int, width: int) -> np.ndarray:
    """Column by column."""
    return _tokens(height, width).T.ravel()


def _windows(height: int, width: int, tile_height: int, tile_width: int) -> np.ndarray:
    pad = ((0, -height % tile_height), (0, -width % tile_width))
    tokens = np.pad(_tokens(height, width), pad, constant_values=PADDING)
    rows, columns = tokens.shape[0] // tile_height, tokens.shape[1] // tile_width
    windows = tokens.reshape(rows, tile_height, columns, tile_width)
    return windows.transpose(0, 2, 1, 3).ravel()


@register_direction("w{k}", tile=lambda k: (k, k))
def square_windows(height: int, width: int, k: int) -> np.ndarray:
    """Windows of k x k, row by row, and row by row inside each."""
    return _windows(height, width, k, k)


@register_direction("w{h}x{w}", tile=lambda h, w: (h, w))
def windows(height: int, width: int, h: int, w: int) -> np.ndarray:
    """Windows of h rows and w columns, row by row, and row by row inside each."""
    return _windows(height, width, h, w)


@register_direction("snake")
def snake(height: int, width: int) -> np.ndarray:
    """Row by row, every other row backwards, so that each step moves to a neighbor."""
    tokens = _tokens(height, width)
    tokens[1::2] = tokens[1::2, ::-1].copy()
    return tokens.ravel()


@register_direction("diagonal")
def diagonal(height: int, width: int) -> np.ndarray:
    """Anti-diagonal by anti-diagonal, each from top right to bottom left."""
    row, column = np.indices((height, width))
    return np.lexsort((row.ravel(), (row + column).ravel())).astype(np.int32)


@register_direction("hilbert")
def hilbert(height: int, width: int) -> np.ndarray:
    """The Hilbert curve of the smallest power-of-two square around the grid, cut to the grid."""
    y, x = (axis.ravel() for axis in np.indices((height, width)))
    distance = np.zeros(height * width, dtype=np.int64)
    side = 1 << (max(height, width) - 1).bit_length()
    half = side // 2
    while half:
        right, lower = (x & half) > 0, (y & half) > 0
        distance += half * half * ((3 * right) ^ lower)
        # The two upper quadrants are transposed, the right one of them also mirrored.
        mirror = right & ~lower
        x, y = np.where(mirror, side - 1 - x, x), np.where(mirror, side - 1 - y, y)
        x, y = np.where(lower, x, y), np.where(lower, y, x)
        half //= 2
    return np.argsort(distance).astype(np.int32)
