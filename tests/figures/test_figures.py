"""Figures contain the cells, paths, lines and texts of their data."""

import numpy as np
import pytest

pytest.importorskip("matplotlib")

import matplotlib
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from localmamba.benchmark import Result, Setting
from localmamba.figures.benchmarks import draw_benchmark
from localmamba.figures.confusion import draw_confusion
from localmamba.figures.curves import draw_curves
from localmamba.figures.directions import draw_directions
from localmamba.figures.probabilities import draw_probabilities
from localmamba.figures.scans import draw_scans
from localmamba.figures.style import PALE, order_candidates, save_figure
from localmamba.ops import CANDIDATES, scan_order


def test_candidates_are_ordered_as_in_the_paper():
    mixed = ["w7_flip", "hilbert", "v", "w2x7", "h_flip", "w10", "w7", "h", "w2", "h"]
    assert order_candidates(mixed) == (
        ["h", "h_flip", "v", "w2", "w2x7", "w7", "w7_flip", "w10", "hilbert"]
    )


def test_directions_fill_one_cell_for_each_choice():
    table = [["h", "w2_flip"], ["v", "w2_flip"], ["h", "w7"]]
    axes = draw_directions(table, candidates=CANDIDATES).axes[0]
    cells = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    filled = [cell for cell in cells if to_hex(cell.get_facecolor()).upper() != PALE]
    where = {(round(c.get_x() + 0.44), CANDIDATES[round(c.get_y() + 0.42)]) for c in filled}
    assert len(cells) == 3 * len(CANDIDATES)
    assert where == {(x, name) for x, row in enumerate(table) for name in row}
    assert sum(cell.get_hatch() is not None for cell in filled) == 2
    assert {"0", "2"} <= {text.get_text() for text in axes.texts}


@pytest.mark.parametrize("name", ["h", "v_flip", "w3", "w2x3_flip", "hilbert"])
def test_scan_path_visits_the_tokens_in_order(name):
    axes = draw_scans([name], (5, 7)).axes[0]
    (path,) = [c for c in axes.collections if len(c.get_segments()) == 34]
    assert isinstance(path, LineCollection)
    points = [path.get_segments()[0][0], *(segment[1] for segment in path.get_segments())]
    tokens = [int(y) * 7 + int(x) for x, y in points]
    index = scan_order(name, (5, 7)).index
    assert tokens == index[index >= 0].tolist()


def test_scan_of_unknown_direction_is_refused():
    with pytest.raises(ValueError, match="unknown direction"):
        draw_scans(["sideways"], (4, 4))


@pytest.mark.parametrize("candidates", [CANDIDATES, [f"w{k}" for k in range(1, 31)]])
def test_probabilities_draw_a_line_for_each_candidate(candidates, tmp_path):
    history = np.random.default_rng(0).random((4, 3, len(candidates)))
    kept = [list(candidates[:2])] * 3
    figure = draw_probabilities(history, candidates, kept)
    for layer, axes in enumerate(figure.axes[:3]):
        lines = {line.get_label(): line for line in axes.lines}
        for index, name in enumerate(candidates):
            assert np.allclose(lines[name].get_ydata(), history[:, layer, index])
            assert (lines[name].get_linewidth() > 1) == (name in kept[layer])
    paths = save_figure(figure, tmp_path / "new" / "probabilities")
    assert [path.suffix for path in paths] == [".png", ".svg"]
    assert all(path.stat().st_size > 1000 for path in paths)


def test_a_bar_that_is_missing_is_no_zero():
    def result(model, mode):
        return Result(Setting(model, mode, "cpu", "float32", 1, 32), milliseconds=10.0)

    measured = [result("test_vit", "inference"), result("test_resnet", "inference")]
    figure = draw_benchmark([*measured, result("test_vit", "training")])
    shown = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert shown == [["100", "100"], ["100", "not measured"]]


@pytest.mark.parametrize("title", ["pay $5", r"$\frac{$", "r[/un]_$x$"])
def test_titles_are_drawn_as_they_are(title, tmp_path):
    with matplotlib.rc_context({"text.usetex": True}):  # a user's setting, on a machine without TeX
        figures = [
            draw_directions([["h", "v"]], title),
            draw_probabilities(np.ones((1, 1, 2)), ["h", "v"], [["h"]], title),
            draw_curves(
                {title: [{"epoch": 1, "train_loss": 1, "val_loss": 1, "val_accuracy": 0.5}]}, title
            ),
        ]
        for i, figure in enumerate(figures):
            save_figure(figure, tmp_path / str(i))
    texts = [text.get_text() for text in figures[2].axes[1].get_legend().get_texts()]
    assert texts == [f"{title}: 50.00 %"]


def test_confusion_of_few_classes_has_a_number_for_each_pair(tmp_path):
    matrix = np.array([[3, 1, 0], [0, 400, 1], [0, 0, 0]])
    figure = draw_confusion(matrix, ["cat, Felis catus", "$dog", "a" * 99], "title")
    axes = figure.axes[0]
    texts = {(round(t.get_position()[1]), round(t.get_position()[0])): t for t in axes.texts}
    shown = {place: text.get_text() for place, text in texts.items()}
    assert shown == {(0, 0): "75", (0, 1): "25", (1, 1): "100", (1, 2): "<1"}
    ticks = [tick.get_text() for tick in axes.get_yticklabels()]
    assert ticks == ["cat", "$dog", "a" * 23 + "…"]
    save_figure(figure, tmp_path / "confusion")


def test_confusion_of_many_classes_loses_no_error(tmp_path):
    generator = np.random.default_rng(0)
    matrix = np.diag(np.full(1000, 47)) + (generator.random((1000, 1000)) < 0.003)
    matrix[123, 321] = 40
    figure = draw_confusion(matrix, [f"n{i}" for i in range(1000)])
    errors, _, pairs, recall = figure.axes  # the second is the color bar
    cells = errors.images[0].get_array()
    assert cells.shape == (100, 100)
    assert cells.sum() == matrix.sum() - matrix.trace()
    assert cells[12, 32] >= 40
    assert pairs.get_yticklabels()[0].get_text() == "n123 → n321"
    assert sum(bar.get_height() for bar in recall.patches) == 1000
    save_figure(figure, tmp_path / "confusion")
