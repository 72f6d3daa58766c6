"""Scan orders: properties of every direction on odd grids, small orders by hand, bad input."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from helpers import assert_matches_reference, scan_inputs
from hypothesis import given, settings
from hypothesis import strategies as st

from localmamba.ops import (
    CANDIDATES,
    PADDING,
    check_directions,
    list_directions,
    register_direction,
    scan_index,
    scan_order,
    scan_orders,
    selective_scan,
)
from localmamba.ops.scan_orders import index_table, padded_length
from localmamba.ops.selective_scan.reference import selective_scan_reference

SIZES = st.integers(1, 12)
GRIDS = st.tuples(SIZES, SIZES)
TEMPLATES = ("h", "v", "w{k}", "w{h}x{w}", "snake", "diagonal", "hilbert")
BASES = st.builds(
    lambda template, k, h, w: template.format(k=k, h=h, w=w),
    st.sampled_from(TEMPLATES),
    *[st.integers(1, 9)] * 3,
)
NAMES = st.builds(lambda base, flip: base + flip, BASES, st.sampled_from(("", "_flip")))

P = PADDING
BY_HAND = {
    ("h", (2, 3)): [0, 1, 2, 3, 4, 5],
    ("h_flip", (2, 3)): [5, 4, 3, 2, 1, 0],
    ("v", (2, 3)): [0, 3, 1, 4, 2, 5],
    ("v_flip", (2, 3)): [5, 2, 4, 1, 3, 0],
    ("w2", (4, 4)): [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15],
    ("w2", (3, 5)): [
        *(0, 1, 5, 6), *(2, 3, 7, 8), *(4, P, 9, P),
        *(10, 11, P, P), *(12, 13, P, P), *(14, P, P, P),
    ],
    ("w2_flip", (3, 3)): [P, P, P, 8, P, P, 7, 6, P, 5, P, 2, 4, 3, 1, 0],
    ("w1x3", (2, 4)): [0, 1, 2, 3, P, P, 4, 5, 6, 7, P, P],
    ("w3x1", (2, 2)): [0, 2, P, 1, 3, P],
    ("w7", (1, 2)): [0, 1, *[P] * 47],
    ("snake", (3, 3)): [0, 1, 2, 5, 4, 3, 6, 7, 8],
    ("diagonal", (2, 3)): [0, 1, 3, 2, 4, 5],
    ("hilbert", (2, 2)): [0, 2, 3, 1],
}  # fmt: skip


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Directions registered in a test are gone after it."""
    monkeypatch.setattr(scan_orders, "_DIRECTIONS", dict(scan_orders._DIRECTIONS))
    caches = (scan_orders._parse, scan_order, index_table, scan_orders._index_tensor)
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize(("name", "grid"), BY_HAND, ids=lambda x: str(x).replace(" ", ""))
def test_order_by_hand(name: str, grid: tuple[int, int]) -> None:
    assert scan_order(name, grid).index.tolist() == BY_HAND[name, grid]


def test_candidates_are_the_papers() -> None:
    assert CANDIDATES == ("h", "h_flip", "v", "v_flip", "w2", "w2_flip", "w7", "w7_flip")


def test_every_template_is_tested() -> None:
    assert set(list_directions()) == set(TEMPLATES)
    assert all(list_directions().values()), "each says what it does"


@given(NAMES, GRIDS)
def test_reads_every_token_once(name: str, grid: tuple[int, int]) -> None:
    order = scan_order(name, grid)
    tokens = order.index[order.index != PADDING]
    assert sorted(tokens) == list(range(grid[0] * grid[1]))
    assert (order.index >= PADDING).all()
    assert order.index.size == padded_length(name, grid)
    assert order.index.dtype == order.inverse.dtype == np.int32


@given(NAMES, GRIDS)
def test_inverse_inverts(name: str, grid: tuple[int, int]) -> None:
    order = scan_order(name, grid)
    assert (order.index[order.inverse] == np.arange(grid[0] * grid[1])).all()


@given(BASES, GRIDS)
def test_flip_is_the_reverse(base: str, grid: tuple[int, int]) -> None:
    forward, backward = scan_order(base, grid), scan_order(base + "_flip", grid)
    assert (forward.index == backward.index[::-1]).all()


@given(st.integers(1, 9), st.integers(1, 9), GRIDS)
def test_windows_are_read_one_after_another(h: int, w: int, grid: tuple[int, int]) -> None:
    index = scan_order(f"w{h}x{w}", grid).index.reshape(-1, h * w)
    rows, columns = index // grid[1], index % grid[1]
    for window, row, column in zip(index, rows, columns, strict=True):
        inside = window != PADDING
        assert len(set(row[inside] // h)) == len(set(column[inside] // w)) == 1
        assert (np.diff(window[inside]) > 0).all(), "row by row inside"
    corners = index[:, 0]
    assert (np.diff(corners) > 0).all(), "windows row by row"


@given(GRIDS)
def test_names_for_the_same_order(grid: tuple[int, int]) -> None:
    height, width = grid
    for one, other in (("w1", "h"), ("w3x3", "w3"), (f"w{height}x1", "v"), (f"w1x{width}", "h")):
        assert (scan_order(one, grid).index == scan_order(other, grid).index).all()


@given(GRIDS)
def test_snake_moves_to_a_neighbor(grid: tuple[int, int]) -> None:
    row, column = np.divmod(scan_order("snake", grid).index, grid[1])
    assert (abs(np.diff(row)) + abs(np.diff(column)) == 1).all()


@pytest.mark.parametrize("side", [1, 2, 4, 8, 16])
def test_hilbert_moves_to_a_neighbor(side: int) -> None:
    row, column = np.divmod(scan_order("hilbert", (side, side)).index, side)
    assert (abs(np.diff(row)) + abs(np.diff(column)) == 1).all()


@given(GRIDS)
def test_diagonal_sums_never_fall(grid: tuple[int, int]) -> None:
    row, column = np.divmod(scan_order("diagonal", grid).index, grid[1])
    assert (np.diff(row + column) >= 0).all()


@given(st.lists(NAMES, min_size=1, max_size=4), GRIDS, st.data())
def test_table_holds_the_orders(
    names: list[str], grid: tuple[int, int], data: st.DataObject
) -> None:
    position = data.draw(st.integers(-1, grid[0] * grid[1]))
    table = index_table(tuple(names), grid, position)
    extra = int(position >= 0)
    assert table.shape == (len(names), extra + max(padded_length(n, grid) for n in names))
    for row, name in zip(table, names, strict=True):
        order = scan_order(name, grid).index
        assert (row[len(order) + extra :] == PADDING).all(), "shorter orders are padded at the end"
        row = row[: len(order) + extra]
        if position >= 0:
            assert row[position] == position, "the class token is read at its own position"
            row = np.delete(row, position)
            row = np.where(row > position, row - 1, row)
        assert (row == order).all()


@given(st.lists(NAMES, min_size=1, max_size=3), GRIDS)
@settings(max_examples=25)
def test_tensor_is_the_table(names: list[str], grid: tuple[int, int]) -> None:
    index = scan_index(torch.empty(0), names, *grid, class_token=0)
    assert index.dtype == torch.int32
    assert (index.numpy() == index_table(tuple(names), grid, 0)).all()


def test_orders_are_cached_and_read_only() -> None:
    order = scan_order("w2", (5, 7))
    assert scan_order("w2", (5, 7)) is order
    with pytest.raises(ValueError, match="read-only"):
        order.index[0] = 1
    scan_index(torch.empty(0), ["w2"], 5, 7).zero_()
    assert scan_index(torch.empty(0), ["w2"], 5, 7)[0, 1] == 1, "a copy was given"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scan_order("x3", (2, 2)), "unknown direction 'x3'; known: h, v, w{k}"),
        (lambda: scan_order("flip", (2, 2)), "unknown direction"),
        (lambda: scan_order("h_flip_flip", (2, 2)), "unknown direction"),
        (lambda: scan_order("w", (2, 2)), "unknown direction"),
        (lambda: scan_order("w-1", (2, 2)), "unknown direction"),
        (lambda: scan_order("w2x", (2, 2)), "unknown direction"),
        (lambda: scan_order("w0", (2, 2)), "sizes must be at least 1"),
        (lambda: scan_order("w2x0_flip", (2, 2)), "sizes must be at least 1"),
        (lambda: scan_order("h", (0, 3)), "at least one row and one column, got 0 x 3"),
        (lambda: scan_order("h", (3, -1)), "at least one row and one column"),
        (lambda: check_directions([]), "at least one scan direction"),
        (lambda: check_directions("h"), "not the string 'h'"),
        (lambda: check_directions(["h", 3]), "unknown direction 3"),
        (lambda: check_directions(["h", "w0"]), "sizes must be at least 1"),
        (lambda: register_direction("h"), "registered already"),
        (lambda: scan_index(torch.empty(0), ["h", "q"], 2, 2), "unknown direction 'q'"),
    ],
)
def test_bad_input_in_one_line(call, message: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        call()
    assert message in str(error.value)


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize(
    "make",
    [lambda h, w: [0] * (h * w), lambda h, w: range(h * w - 1), lambda h, w: range(1, h * w)],
)
def test_a_direction_that_loses_tokens_is_refused(make) -> None:
    register_direction("lossy")(lambda height, width: np.array(make(height, width)))
    with pytest.raises(ValueError, match="read every token once"):
        scan_order("lossy", (2, 3))


@pytest.mark.usefixtures("own_registry")
def test_a_new_direction_is_one_function() -> None:
    @register_direction("columns{k}", tile=lambda k: (1, k))
    def columns(height: int, width: int, k: int) -> np.ndarray:
        """Stripes of k columns, each from top to bottom."""
        tokens = np.full((height, -(-width // k) * k), PADDING)
        tokens[:, :width] = np.arange(height * width).reshape(height, width)
        return tokens.reshape(height, -1, k).transpose(1, 0, 2).ravel()

    assert list_directions()["columns{k}"] == "Stripes of k columns, each from top to bottom."
    index = scan_index(torch.empty(0), ["columns2", "columns2_flip", "h"], 2, 3)
    assert index[0].tolist() == [0, 1, 3, 4, 2, P, 5, P]
    assert index[1].tolist() == [P, 5, P, 2, 4, 3, 1, 0]
    inputs = scan_inputs(index, 6)
    assert_matches_reference(selective_scan, selective_scan_reference, inputs)


class _Order(torch.nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return scan_index(image, ["h", "w2_flip"], image.shape[1], image.shape[2])


def test_export_with_any_grid() -> None:
    side = torch.export.Dim("height", min=2, max=64), torch.export.Dim("width", min=2, max=64)
    program = torch.export.export(
        _Order(), (torch.empty(1, 5, 7),), dynamic_shapes=({1: side[0], 2: side[1]},)
    )
    for grid in ((5, 7), (4, 9), (12, 3)):
        index = program.module()(torch.empty(1, *grid))
        assert (index.numpy() == index_table(("h", "w2_flip"), grid)).all()


def test_operator_contract() -> None:
    torch.library.opcheck(torch.ops.localmamba.scan_index, (torch.empty(2), "h,w2", 5, 7, 3))
