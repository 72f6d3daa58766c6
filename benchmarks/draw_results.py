"""Draws the GPU figures of docs/performance.md from the CSVs in docs/results.

    python benchmarks/draw_results.py [FOLDER]

FOLDER is where to write the figures; docs/images by default.
"""

import sys
from pathlib import Path

from localmamba.benchmark import Result, read_csv
from localmamba.figures.benchmarks import draw_benchmark
from localmamba.figures.style import save_figure

DOCS = Path(__file__).parents[1] / "docs"

FIGURES = {
    "h200_graph": ("h200_graph", "h200_same_tokens"),
    "h200_same_batch": ("h200_same_batch",),
    "h200_same_tokens": ("h200_same_tokens",),
}
"""Tables of each figure; a second one fills in measurements that the first lacks."""


def _added(results: list[Result], more: list[Result]) -> list[Result]:
    """Returns measurements in `more` that `results` lacks, of its models, batch and size."""
    models = {result.setting.model for result in results}
    like = results[0].setting
    there = {(result.setting.model, result.setting.mode) for result in results}
    return [
        result
        for result in more
        if (result.setting.batch, result.setting.size) == (like.batch, like.size)
        and result.setting.model in models
        and (result.setting.model, result.setting.mode) not in there
    ]


def main(folder: Path) -> None:
    for name, tables in FIGURES.items():
        results, machine = read_csv(DOCS / "results" / f"{tables[0]}.csv")
        for table in tables[1:]:
            results += _added(results, read_csv(DOCS / "results" / f"{table}.csv")[0])
        dtype = results[0].setting.dtype
        caption = ", ".join([dtype, *(f"{key} {value}" for key, value in machine.items())])
        print(*save_figure(draw_benchmark(results, caption), folder / name))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS / "images")
