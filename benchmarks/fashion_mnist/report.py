"""Writes docs/results/fashion_mnist.md, its figures and JSON from the results of study.py.

    PYTHONPATH=. python benchmarks/fashion_mnist/report.py runs/study/results.jsonl [--seeds 5]

Every number in the page comes from the records.
"""

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np
from arms import ARMS, BASELINE, KEEP, Setup
from matplotlib.figure import Figure
from records import as_line, read_records
from scipy.stats import ttest_1samp

from localmamba.figures.directions import draw_directions
from localmamba.figures.probabilities import draw_probabilities
from localmamba.figures.style import FAINT, INK, save_figure
from localmamba.ops import CANDIDATES
from localmamba.search import STRATEGIES, agreement

ALPHA = 0.05

Records = dict[tuple[str, str], dict[int, dict]]
"""(kind, arm or strategy) -> seed -> record."""


class Test(NamedTuple):
    """Two-sided paired t-test: mean and deviation of the differences, p, number of seeds."""

    gap: float
    deviation: float
    p: float
    seeds: int


def read(path: Path) -> Records:
    """Reads a results file; ValueError unless all records have one setup."""
    records: Records = defaultdict(dict)
    for record in read_records(path):
        records[record["kind"], record["what"]][record["seed"]] = record
    setups = {json.dumps(record["setup"], sort_keys=True) for record in every(records)}
    if len(setups) != 1:
        raise ValueError(f"{path} holds runs of {len(setups)} setups; one is needed")
    return records


def every(records: Records) -> Iterator[dict]:
    """Iterates over all records."""
    return (record for found in records.values() for record in found.values())


def machines(records: Iterable[dict]) -> str:
    """Lists the distinct devices and versions of records."""
    texts = (
        ", ".join(
            value if key == "device" else f"{key} {value}"
            for key, value in record["machine"].items()
        )
        for record in records
    )
    return "; ".join(dict.fromkeys(texts))


def accuracies(records: Records, arm: str) -> dict[int, float]:
    """Returns test accuracy in percent by seed."""
    return {
        seed: 100 * record["test_accuracy"]
        for seed, record in sorted(records.get(("train", arm), {}).items())
    }


def compare(records: Records, arm: str, other: str = BASELINE.name) -> Test | None:
    """Tests an arm against another over common seeds; None for fewer than two."""
    ours, theirs = accuracies(records, arm), accuracies(records, other)
    seeds = sorted(set(ours) & set(theirs))
    if arm == other or len(seeds) < 2:
        return None
    gaps = [ours[seed] - theirs[seed] for seed in seeds]
    if len(set(gaps)) == 1:
        return Test(mean(gaps), 0.0, math.nan, len(seeds))
    p = ttest_1samp(gaps, 0.0).pvalue
    return Test(mean(gaps), stdev(gaps), float(p), len(seeds))


def shown_p(p: float) -> str:
    """Formats p with three digits; empty if all differences are equal."""
    if math.isnan(p):
        return ""
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def accuracy_table(records: Records) -> list[str]:
    """Builds the table of accuracies, a row per arm."""
    lines = [
        "| arm | test accuracy, % | deviation | seeds | against rows | p, paired | parameters |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for arm in ARMS:
        values = list(accuracies(records, arm.name).values())
        if not values:
            continue
        test = compare(records, arm.name)
        gap = "" if test is None else f"{test.gap:+.2f} ± {test.deviation:.2f}"
        p = "" if test is None else shown_p(test.p)
        deviation = f"{stdev(values):.2f}" if len(values) > 1 else ""
        first = next(iter(records["train", arm.name].values()))
        lines.append(
            f"| {arm.label} | {mean(values):.2f} | {deviation} | {len(values)} | {gap} | "
            f"{p} | {first['parameters']:,} |"
        )
    return lines


def significance(records: Records) -> list[str]:
    """Lists arms that differ from rows only, without and with Bonferroni correction."""
    tests = {arm.label: test for arm in ARMS if (test := compare(records, arm.name))}
    if not tests:
        return []

    def below(limit: float) -> str:
        return "; ".join(f"{label} ({t.gap:+.2f})" for label, t in tests.items() if t.p < limit)

    count = len(tests)
    comparisons = "1 comparison" if count == 1 else f"{count} comparisons"
    return [
        f"Of {comparisons} with rows only (two-sided paired t-test over seeds), p < {ALPHA}: "
        f"{below(ALPHA) or 'none'}. p < {ALPHA} / {count} (Bonferroni): "
        f"{below(ALPHA / count) or 'none'}.",
        "",
    ]


def search_table(records: Records) -> list[str]:
    """Builds the table of strategies: agreement between seeds, entropy, search time."""
    chance = f"{KEEP / len(CANDIDATES):g} at random"
    lines = [
        f"| strategy | seeds | agreement of seeds ({chance}) | entropy | seconds of a search |",
        "| --- | --- | --- | --- | --- |",
    ]
    for what in STRATEGIES:
        found = records.get(("search", what), {})
        if not found:
            continue
        tables = [record["directions"] for record in found.values()]
        agree = f"{agreement(tables):.2f}" if len(tables) > 1 else ""
        undecided = mean(record["entropy"] for record in found.values())
        seconds = mean(record["seconds"] for record in found.values())
        lines.append(f"| `{what}` | {len(found)} | {agree} | {undecided:.3f} | {seconds:.0f} |")
    return lines


def cost_table(records: Records) -> list[str]:
    """Builds the table of costs, a row per measurement."""
    labels = {arm.name: f"training: {arm.label}" for arm in ARMS}
    baseline = records.get(("cost", BASELINE.name), {}).get(0)
    lines = ["| step | ms | over rows only | memory, GB |", "| --- | --- | --- | --- |"]
    for what in (*labels, *STRATEGIES):
        record = records.get(("cost", what), {}).get(0)
        if record is None:
            continue
        time, memory = record["milliseconds"], record.get("memory_bytes")
        ratio = f"{time / baseline['milliseconds']:.2f}" if baseline else ""
        shown = "" if memory is None else f"{memory / 1e9:.2f}"
        label = labels.get(what, f"search: `{what}`")
        lines.append(f"| {label} | {time:.1f} | {ratio} | {shown} |")
    return lines


def draw_accuracies(records: Records) -> Figure:
    """Draws a dot per run and a bar at the mean of each arm."""
    arms = [arm for arm in ARMS if accuracies(records, arm.name)]
    figure = Figure(figsize=(8, 0.42 * len(arms) + 1.2), layout="constrained")
    axes = figure.subplots()
    for y, arm in enumerate(arms):
        values = list(accuracies(records, arm.name).values())
        axes.plot(values, [y] * len(values), "o", color="#0072B2", alpha=0.6, ms=5, mew=0)
        axes.plot(mean(values), y, "|", color=INK, ms=16, mew=2)
    rows = accuracies(records, BASELINE.name).values()
    if rows:
        axes.axvline(mean(rows), color=FAINT, lw=0.8, ls=":", zorder=0)
    axes.set_yticks(range(len(arms)), [arm.label.replace("`", "") for arm in arms], fontsize=9)
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.set_xlabel("test accuracy, %: a dot for each seed, a bar at the mean", fontsize=9)
    axes.tick_params(axis="x", labelsize=9)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


def write_figures(records: Records, folder: Path) -> list[str]:
    """Writes the figures that the records allow; returns Markdown lines that show them."""
    figures = {"accuracy": draw_accuracies(records)}
    found = records.get(("search", "softmax"), {})
    if found:
        first = found[min(found)]
        table = first["directions"]
        figures["directions"] = draw_directions(table, "searched, seed 0", CANDIDATES)
        history = np.array(first["history"])
        figures["probabilities"] = draw_probabilities(history, CANDIDATES, table)
    lines = []
    for name, figure in figures.items():
        save_figure(figure, folder / f"fashion_mnist_{name}")
        lines += [f"![{name}](fashion_mnist_{name}.png)", ""]
    return lines


def verdict(records: Records) -> list[str]:
    """Compares the searched model with rows only and with no search."""
    lines = []
    for other, label in (
        (BASELINE.name, "rows only"),
        ("both_channel", "the same model without search"),
    ):
        test = compare(records, "searched", other)
        if test is not None:
            word = "better than" if test.gap > 0 else "not better than"
            p = f", p {shown_p(test.p)} (paired t-test)" if shown_p(test.p) else ""
            lines.append(
                f"- The searched model is {word} {label} in the mean over {test.seeds} seeds: "
                f"{test.gap:+.2f} points{p}."
            )
    return [*lines, ""] if lines else []


def unfinished(records: Records, seeds: int) -> list[str]:
    """Lists missing runs, and counts runs of seeds beyond the first `seeds`."""
    trained = {seed for (kind, _), found in records.items() if kind == "train" for seed in found}
    expected = {seed for seed in trained if seed < seeds}
    lacking = {
        arm.label: sorted(expected - set(records.get(("train", arm.name), {}))) for arm in ARMS
    }
    parts = [f"{label} (seed {', '.join(map(str, s))})" for label, s in lacking.items() if s]
    further = sum(record["seed"] >= seeds for record in every(records))
    lines = [f"Not run: {'; '.join(parts)}.", ""] if parts else []
    if further:
        lines += [f"The file also holds {further} runs of further seeds, not used here.", ""]
    return lines


def first_seeds(records: Records, seeds: int) -> Records:
    """Selects the records of the first `seeds` seeds."""
    return {
        key: {seed: record for seed, record in found.items() if seed < seeds}
        for key, found in records.items()
    }


def describe(records: Records) -> list[str]:
    """Describes device, versions and sizes."""
    setup = next(every(records))["setup"]
    tokens = 28 // setup["patch"]
    rest = ", ".join(f"{name} {value}" for name, value in setup.items() if name not in WORDED)
    return [
        f"{setup['images']:,} training images and all 10,000 test images of 28 x 28 pixels, in "
        f"patches of {setup['patch']}: {tokens} x {tokens} tokens. LocalVim of {setup['depth']} "
        f"blocks, width {setup['width']}. {setup['epochs']} epochs for every arm, evaluated after "
        f"the last; {setup['search_epochs']} epochs for every search, which is made anew for each "
        f"seed and keeps {KEEP} of {len(CANDIDATES)} directions. {rest}. bfloat16 autocast; images "
        "are mirrored and shifted by up to 2 pixels.",
        "",
        f"Machine: {machines(every(records))}.",
        "",
    ]


WORDED = ("images", "patch", "depth", "width", "epochs", "search_epochs", "cost_batch")
"""Sizes that the text of `describe` and `page` mentions."""


def options(setup: dict) -> str:
    """Returns the options of study.py that differ from the defaults."""
    usual = asdict(Setup())
    changed = {key: value for key, value in setup.items() if value != usual[key]}
    return "".join(f" --{key.replace('_', '-')} {value}" for key, value in changed.items())


def page(records: Records, figures: list[str], notes: list[str]) -> str:
    """Builds the page; `notes` list missing runs."""
    setup = next(every(records))["setup"]
    seeds = max((len(found) for (kind, _), found in records.items() if kind == "train"), default=0)
    measured = [
        record
        for (kind, _), found in records.items()
        if kind == "cost"
        for record in found.values()
    ]
    return "\n".join(
        [
            "# Fashion-MNIST: the ablation of table 5, and the search",
            "",
            "Written by `benchmarks/fashion_mnist/report.py` from `fashion_mnist.jsonl`.",
            "",
            *describe(records),
            *verdict(records),
            *accuracy_table(records),
            "",
            "The first three arms (rows only, windows only, rows and windows) have no SCAttn, the "
            "others `channel` if nothing else is said. Deviations are of the seeds; after ±, of "
            "the differences between runs of one seed.",
            "",
            *significance(records),
            *notes,
            *figures,
            "## The searches",
            "",
            "Agreement: the share of a layer's directions that two seeds have in common. Entropy: "
            "of a layer's probabilities at the end, 1 if all are equal. Seconds: others ran on the "
            "same GPU.",
            "",
            *search_table(records),
            "",
            "## What SCAttn and search cost",
            "",
            f"A step on {min(setup['cost_batch'], setup['images']):,} images, weights and, in a "
            f"search, alpha; alone on the machine ({machines(measured)}). Memory: the most that is "
            "allocated in a step, with weights and optimiser.",
            "",
            *cost_table(records),
            "",
            "## Commands",
            "",
            "```",
            "python benchmarks/fashion_mnist/prepare.py",
            "PYTHONPATH=. python benchmarks/fashion_mnist/study.py --output runs/study"
            f" --seeds {seeds}{options(setup)}",
            "PYTHONPATH=. python benchmarks/fashion_mnist/report.py runs/study/results.jsonl",
            "```",
            "",
        ]
    )


def main(results: Path, folder: Path, seeds: int = sys.maxsize) -> None:
    """Writes the page, its figures and the records."""
    records = read(results)
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(as_line(record) for record in every(records))
    (folder / "fashion_mnist.jsonl").write_text(lines)
    used = first_seeds(records, seeds)
    text = page(used, write_figures(used, folder), unfinished(records, seeds))
    (folder / "fashion_mnist.md").write_text(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("docs/results"))
    parser.add_argument("--seeds", type=int, default=sys.maxsize, help="number of seeds to use")
    arguments = parser.parse_args()
    if not read_records(arguments.results):
        parser.error(f"no records in {arguments.results}")
    main(arguments.results, arguments.folder, arguments.seeds)
