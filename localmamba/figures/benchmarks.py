"""Throughput of models: bars at one image size, lines over several."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from localmamba.benchmark import Result

from .style import FAINT, PALETTE, styled


@styled
def draw_benchmark(results: Sequence[Result], caption: str = "") -> Figure:
    """Draws throughput, a panel per mode.

    Args:
        results: Measurements; failed ones are skipped.
        caption: Caption, with device and versions.

    Returns:
        Bars of images per second if there is one image size; else lines over the size of tokens of
        16 x 16 pixels per second, constant if cost is linear in the number of pixels.

    Raises:
        ValueError: If every measurement failed.
    """
    good = [result for result in results if not result.error]
    if not good:
        raise ValueError("nothing to draw: every measurement failed")
    modes = list(dict.fromkeys(result.setting.mode for result in good))
    one_size = len({result.setting.size for result in results}) == 1
    models = list(dict.fromkeys(result.setting.model for result in good))
    height = 1.6 + 0.32 * len(models) if one_size else 4.2
    figure = Figure(figsize=(5.2 * len(modes), height), layout="constrained")
    panels = figure.subplots(1, len(modes), squeeze=False, sharey=one_size)[0]
    for mode, axes in zip(modes, panels, strict=True):
        shown = [result for result in good if result.setting.mode == mode]
        (_draw_bars if one_size else _draw_lines)(axes, shown, models)
        axes.set_title(mode)
    if not one_size:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    figure.supxlabel(caption, fontsize=7, color=FAINT)
    return figure


def _draw_bars(axes: Axes, results: list[Result], models: list[str]) -> None:
    rates = {result.setting.model: result.images_per_second for result in results}
    values = [rates.get(model, 0.0) for model in models]
    bars = axes.barh(models, values, color=[_color(model, models) for model in models])
    labels = [f"{value:,.0f}" if value else "not measured" for value in values]
    axes.bar_label(bars, labels, fontsize=8, padding=3)
    axes.margins(x=0.15)
    if not axes.yaxis_inverted():
        axes.invert_yaxis()
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("images / s")


def _draw_lines(axes: Axes, results: list[Result], models: list[str]) -> None:
    for model in models:
        points = sorted(
            (r.setting.size, r.tokens_per_second) for r in results if r.setting.model == model
        )
        sizes, rates = [size for size, _ in points], [rate for _, rate in points]
        axes.plot(sizes, rates, "o-", ms=4, label=model, color=_color(model, models))
    axes.set_xticks(sorted({result.setting.size for result in results}))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("image side in pixels")
    axes.set_ylabel("tokens of 16 x 16 pixels / s")
    axes.yaxis.set_major_formatter("{x:,.0f}")


def _color(model: str, models: list[str]) -> str:
    return PALETTE[models.index(model) % len(PALETTE)]
