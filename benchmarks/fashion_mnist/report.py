"""From the results of study.py to docs/results/fashion_mnist.md, its figures and its JSON.

    python benchmarks/fashion_mnist/report.py runs/study/results.jsonl [docs/results]

Every figure in the page comes from the records; nothing is typed in.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from arms import ARMS, BASELINE
from matplotlib.figure import Figure
from scipy.stats import ttest_rel

from localmamba.figures.directions import draw_directions
from localmamba.figures.probabilities import draw_probabilities
from localmamba.figures.style import FAINT, INK, save_figure
from localmamba.ops import CANDIDATES
from localmamba.search import agreement

Records = dict[tuple[str, str], dict[int, dict]]
"""(kind, arm or strategy) -> seed -> record."""


def read(path: Path) -> Records:
    """The records of a results file; ValueError if they are of several setups or devices."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    records: Records = defaultdict(dict)
    for record in lines:
        records[record["kind"], record["what"]][record["seed"]] = record
    settings = {json.dumps([line["setup"], line["device"]], sort_keys=True) for line in lines}
    if len(settings) != 1:
        raise ValueError(f"{path} holds {len(settings)} different setups or devices; one is needed")
    return records


def accuracies(records: Records, arm: str) -> dict[int, float]:
    """Test accuracy in per cent by seed."""
    return {
        seed: 100 * record["test_accuracy"]
        for seed, record in sorted(records.get(("train", arm), {}).items())
    }


def against_rows(records: Records, arm: str) -> tuple[float, float] | None:
    """Mean difference to rows only, and p of the paired test, over the seeds that both have."""
    ours, theirs = accuracies(records, arm), accuracies(records, BASELINE.name)
    seeds = sorted(set(ours) & set(theirs))
    if arm == BASELINE.name or len(seeds) < 2:
        return None
    a, b = [ours[s] for s in seeds], [theirs[s] for s in seeds]
    return mean(a) - mean(b), float(ttest_rel(a, b).pvalue)


def accuracy_table(records: Records) -> list[str]:
    """A row for each arm."""
    lines = [
        "| arm | test accuracy, % | deviation | seeds | against rows | p, paired | parameters |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for arm in ARMS:
        values = list(accuracies(records, arm.name).values())
        if not values:
            continue
        test = against_rows(records, arm.name)
        difference, p = ("", "") if test is None else (f"{test[0]:+.2f}", f"{test[1]:.3f}")
        deviation = f"{stdev(values):.2f}" if len(values) > 1 else ""
        first = next(iter(records["train", arm.name].values()))
        lines.append(
            f"| {arm.label} | {mean(values):.2f} | {deviation} | {len(values)} | {difference} | "
            f"{p} | {first['parameters']:,} |"
        )
    return lines


def search_table(records: Records) -> list[str]:
    """A row for each strategy: agreement between seeds, entropy, and the time of a whole search."""
    lines = [
        "| strategy | seeds | agreement (0.5 at random) | entropy | seconds, others beside it |",
        "| --- | --- | --- | --- | --- |",
    ]
    for (kind, what), found in records.items():
        if kind != "search":
            continue
        tables = [record["directions"] for record in found.values()]
        agree = f"{agreement(tables):.2f}" if len(tables) > 1 else ""
        undecided = mean(record["entropy"] for record in found.values())
        seconds = mean(record["seconds"] for record in found.values())
        lines.append(f"| {what} | {len(found)} | {agree} | {undecided:.3f} | {seconds:.0f} |")
    return lines


def cost_table(records: Records) -> list[str]:
    """A row for each measurement that ran alone."""
    labels = {arm.name: f"training, {arm.label}" for arm in ARMS}
    lines = ["| step | ms | memory, GB |", "| --- | --- | --- |"]
    for (kind, what), found in records.items():
        if kind == "cost":
            (record,) = found.values()
            memory = record.get("memory_bytes")
            shown = "" if memory is None else f"{memory / 1e9:.2f}"
            label = labels.get(what, f"search, {what}")
            lines.append(f"| {label} | {record['milliseconds']:.1f} | {shown} |")
    return lines


def draw_accuracies(records: Records) -> Figure:
    """A dot for each run, a bar at the mean of each arm."""
    arms = [arm for arm in ARMS if accuracies(records, arm.name)]
    figure = Figure(figsize=(8, 0.42 * len(arms) + 1.2), layout="constrained")
    axes = figure.subplots()
    for y, arm in enumerate(arms):
        values = list(accuracies(records, arm.name).values())
        axes.plot(values, [y] * len(values), "o", color="#0072B2", alpha=0.6, ms=5)
        axes.plot(mean(values), y, "|", color=INK, ms=16, mew=2)
    axes.axvline(mean(accuracies(records, BASELINE.name).values()), color=FAINT, lw=0.8, ls=":")
    axes.set_yticks(range(len(arms)), [arm.label.replace("`", "") for arm in arms], fontsize=9)
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.set_xlabel("test accuracy, %; a dot for each seed, bars at the means")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def write_figures(records: Records, folder: Path) -> list[str]:
    """Draws what there is records for; the Markdown lines that show it."""
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
    """What the issue asks: searched against rows only and against no search, in the mean."""
    lines = []
    searched = list(accuracies(records, "searched").values())
    for other, label in (("rows", "rows only"), ("both_channel", "the model without search")):
        values = list(accuracies(records, other).values())
        if searched and values:
            gap = mean(searched) - mean(values)
            word = "better than" if gap > 0 else "not better than"
            lines.append(f"- Searched is {word} {label} in the mean: {gap:+.2f} points.")
    return lines


def page(records: Records, figures: list[str]) -> str:
    """The whole page."""
    some = next(iter(next(iter(records.values())).values()))
    settings = ", ".join(f"{key} {value}" for key, value in some["setup"].items())
    return "\n".join(
        [
            "# Fashion-MNIST: the ablation of table 5, and the search",
            "",
            "Written by `benchmarks/fashion_mnist/report.py` from `fashion_mnist.jsonl`.",
            "",
            f"Device: {some['device']}. Settings: {settings}. 28 x 28 images in patches of 2: "
            "14 x 14 tokens. Directions of an arm that searches are searched anew for each seed.",
            "",
            *verdict(records),
            "",
            *accuracy_table(records),
            "",
            "p: two-sided paired t-test over seeds against rows only.",
            "",
            *figures,
            "## The searches",
            "",
            *search_table(records),
            "",
            "## What SCAttn and search cost",
            "",
            "Each measured alone on the device, a training step of one batch.",
            "",
            *cost_table(records),
            "",
            "## Commands",
            "",
            "```",
            "python benchmarks/fashion_mnist/prepare.py",
            "PYTHONPATH=. python benchmarks/fashion_mnist/study.py --output runs/study",
            "python benchmarks/fashion_mnist/report.py runs/study/results.jsonl",
            "```",
            "",
        ]
    )


def main(results: Path, folder: Path) -> None:
    """Writes the page, its figures and the records."""
    records = read(results)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "fashion_mnist.jsonl").write_text(results.read_text())
    (folder / "fashion_mnist.md").write_text(page(records, write_figures(records, folder)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "docs/results"))
