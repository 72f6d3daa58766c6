"""Writes docs/results/fashion_mnist.md, its figures and records from the output of study.py.

    PYTHONPATH=. python benchmarks/fashion_mnist/report.py runs/study.jsonl [docs/results]

Every number in the page comes from the records.
"""

import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from arms import ARMS, ARMS_OF, KEEP, SETUPS, Trial, as_line, read_records
from matplotlib.figure import Figure
from scipy.stats import t
from trials import AUGMENTATION, HELD_OUT

from localmamba.figures.directions import draw_directions
from localmamba.figures.style import FAINT, INK, PALETTE, save_figure, styled
from localmamba.ops import CANDIDATES
from localmamba.search import agreement

Records = dict[Trial, dict[str, Any]]

FASHION, ELPV = SETUPS


class Claim(NamedTuple):
    """A claim that `better` is better than `worse`, and the points that the paper gives for it."""

    text: str
    better: str
    worse: str
    paper: str = ""
    data: str = FASHION


CLAIMS = (
    Claim("columns beside rows help", "cross", "rows"),
    Claim("windows in place of rows help", "windows", "rows", "+1.0"),
    Claim("windows beside rows help", "both", "rows", "+2.1"),
    Claim("the same, with SCAttn", "both_scattn", "rows_scattn"),
    Claim("SCAttn helps rows and windows", "both_scattn", "both", "+0.6"),
    Claim("SCAttn helps rows", "rows_scattn", "rows"),
    Claim("SCAttn helps rows and columns", "cross_scattn", "cross"),
    Claim("windows and SCAttn help rows", "both_scattn", "rows", "+2.7"),
    Claim("windows and SCAttn help rows, on photographs", "both_scattn", "rows", data=ELPV),
    Claim("a search is better than four at random", "searched", "random"),
    Claim("a search is better than rows and windows, SCAttn", "searched", "both_scattn", "+0.4"),
    Claim("a search is better than rows and columns, SCAttn", "searched", "cross_scattn"),
    Claim("a search with SCAttn is better than rows and columns", "searched", "cross"),
    Claim("all eight are better than the searched four", "all", "searched"),
)
"""The paper's points: tables 2 and 5, ImageNet-1K, LocalVim-T."""


class Estimate(NamedTuple):
    """A mean and half its 95 % interval, by Student's t over seeds; NaN for a single seed."""

    mean: float
    half: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.half:.2f}" if self.seeds > 1 else f"{self.mean:.2f}"

    @property
    def verdict(self) -> str:
        """Tells whether a difference is of one sign in the whole interval."""
        if self.mean - self.half > 0:
            return "stands"
        return "the opposite" if self.mean + self.half < 0 else "undecided"


def estimate(values: Iterable[float]) -> Estimate:
    """Estimates a mean."""
    values = list(values)
    n = len(values)
    half = float(t.ppf(0.975, n - 1)) * stdev(values) / n**0.5 if n > 1 else float("nan")
    return Estimate(mean(values), half, n)


def accuracies(records: Records, data: str, arm: str) -> dict[int, float]:
    """Returns test accuracy in percent by seed."""
    return {
        trial.seed: 100 * record["accuracy"]
        for trial, record in sorted(records.items(), key=lambda item: item[0].seed)
        if (trial.data, trial.arm) == (data, arm)
    }


def difference(records: Records, data: str, better: str, worse: str) -> Estimate | None:
    """Estimates the difference of two arms, paired by seed; None without two common seeds."""
    one, other = accuracies(records, data, better), accuracies(records, data, worse)
    gaps = [one[seed] - other[seed] for seed in one if seed in other]
    return estimate(gaps) if len(gaps) > 1 else None


def signed(gap: Estimate) -> str:
    """Formats a difference."""
    return f"{gap.mean:+.2f} ± {gap.half:.2f}"


def accuracy_table(records: Records, data: str) -> list[str]:
    """Builds the table of accuracies, a row for each arm."""
    lines = [
        "| arm | test accuracy, % | against rows, points | seeds | parameters | train loss |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for arm in ARMS_OF[data]:
        found = accuracies(records, data, arm)
        if not found:
            continue
        runs = [records[Trial(data, arm, seed)] for seed in found]
        gap = difference(records, data, arm, "rows") if arm != "rows" else None
        lines.append(
            f"| {ARMS[arm].label} | {estimate(found.values())} | {signed(gap) if gap else ''} | "
            f"{len(found)} | {runs[0]['parameters']:,} | "
            f"{mean(run['losses'][-1] for run in runs):.3f} |"
        )
    return lines


def claims_table(records: Records) -> list[str]:
    """Builds the table of claims."""
    lines = [
        "| claim | difference here, points | seeds | in the paper | on this data |",
        "| --- | --- | --- | --- | --- |",
    ]
    for claim in CLAIMS:
        gap = difference(records, claim.data, claim.better, claim.worse)
        if gap is not None:
            lines.append(
                f"| {claim.text} | {signed(gap)} | {gap.seeds} | {claim.paper} | {gap.verdict} |"
            )
    return lines


def search_text(records: Records) -> list[str]:
    """Describes what the searches chose."""
    runs = [r for trial, r in records.items() if trial.arm == "searched" and trial.data == FASHION]
    if not runs:
        return []
    found = [run["search"] for run in runs]
    counts = Counter(name for search in found for row in search["directions"] for name in row)
    shares = ", ".join(f"`{c}` {100 * counts[c] / counts.total():.0f} %" for c in CANDIDATES)
    agree = f"Two seeds share {agreement([s['directions'] for s in found]):.2f} of a block's "
    agree += f"directions ({KEEP / len(CANDIDATES):g} at random). "
    return [
        f"{len(runs)} searches of {runs[0]['setup']['search_epochs']} epochs kept {shares}. "
        + (agree if len(runs) > 1 else "")
        + f"Entropy of the probabilities: {mean(s['entropy'] for s in found):.3f}, 1 if all are "
        "equal.",
        "",
        "![directions](fashion_mnist_directions.png)",
        "",
    ]


@styled
def draw_accuracies(records: Records) -> Figure:
    """Draws a dot for each trial, the mean and its interval; a panel for each data set."""
    shown = {
        data: [arm for arm in ARMS_OF[data] if accuracies(records, data, arm)] for data in SETUPS
    }
    shown = {data: arms for data, arms in shown.items() if arms}
    heights = [len(arms) for arms in shown.values()]
    figure = Figure(figsize=(7.5, 0.36 * sum(heights) + 0.9 * len(heights)), layout="constrained")
    panels = figure.subplots(len(shown), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axes, (data, arms) in zip(panels, shown.items(), strict=True):
        for y, arm in enumerate(arms):
            values = list(accuracies(records, data, arm).values())
            axes.plot(values, [y] * len(values), "o", color=PALETTE[0], alpha=0.45, ms=5, mew=0)
            center = estimate(values)
            axes.errorbar(center.mean, y, xerr=center.half, fmt="|", color=INK, ms=12, capsize=3)
        rows = accuracies(records, data, "rows")
        if rows:
            axes.axvline(mean(rows.values()), color=FAINT, lw=0.8, ls=":", zorder=0)
        axes.set_yticks(range(len(arms)), [ARMS[arm].label for arm in arms])
        axes.set_ylim(len(arms) - 0.5, -0.5)
        axes.set_title(data, loc="left")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    panels[-1].set_xlabel("test accuracy, %: a dot for each seed, the mean with its 95 % interval")
    return figure


def write_figures(records: Records, folder: Path) -> None:
    """Writes the figure of accuracies, and that of the first search's directions."""
    save_figure(draw_accuracies(records), folder / "fashion_mnist_accuracy")
    searched = [trial for trial in records if trial.arm == "searched"]
    if searched:
        trial = min(searched, key=lambda trial: trial.seed)
        title = f"searched, seed {trial.seed}"
        figure = draw_directions(records[trial]["directions"], title, CANDIDATES)
        save_figure(figure, folder / "fashion_mnist_directions")


def busy_minutes(records: Records) -> float:
    """Returns the minutes in which at least one trial ran."""
    total = end = 0.0
    for record in sorted(records.values(), key=lambda r: r["ended"] - r["seconds"]):
        start = max(end, record["ended"] - record["seconds"])
        end = max(end, record["ended"])
        total += max(0.0, end - start)
    return total / 60


def describe(records: Records) -> list[str]:
    """Describes sizes, device and versions."""
    machines = Counter(
        ", ".join(v if k == "device" else f"{k} {v}" for k, v in r["machine"].items())
        for r in records.values()
    )
    lines = []
    for data in SETUPS:
        runs = [record for trial, record in records.items() if trial.data == data]
        if runs:
            setup, (train, test) = runs[0]["setup"], runs[0]["images"]
            lines.append(
                f"- `{data}`: {train:,} training and {test:,} test images in patches of "
                f"{setup['patch']}, 14 x 14 tokens; LocalVim of {setup['depth']} blocks, width "
                f"{setup['width']}, 16 states; {setup['epochs']} epochs of batches of "
                f"{setup['batch']}, learning rate {setup['lr']:g}."
            )
    shift, held_out = 100 * AUGMENTATION.shift, 100 * HELD_OUT
    on = "; ".join(f"{machine} ({count} trials)" for machine, count in machines.items())
    return [
        *lines,
        "",
        "AdamW, bfloat16 autocast, label smoothing 0.1, gradients clipped at 1. Images are "
        f"mirrored and shifted by up to {shift:.0f} % of the side. The last weights are evaluated. "
        f"The photographs are split anew by each seed, {held_out:.0f} % for testing.",
        "",
        f"{len(records)} trials in {busy_minutes(records):.0f} minutes, several at the same time: "
        f"{on}.",
        "",
    ]


def page(records: Records) -> str:
    """Builds the page."""
    seeds = 1 + max(trial.seed for trial in records)
    usual = {name: asdict(setup) for name, setup in SETUPS.items()}
    changed = {
        f" --{key.replace('_', '-')} {value}": None
        for trial, record in records.items()
        for key, value in record["setup"].items()
        if value != usual[trial.data][key]
    }
    elpv = accuracy_table(records, ELPV)
    return "\n".join(
        [
            "# Which of the paper's claims stand on Fashion-MNIST",
            "",
            "Written by `benchmarks/fashion_mnist/report.py` from `fashion_mnist.jsonl`.",
            "",
            *claims_table(records),
            "",
            "Differences of test accuracy are paired by seed; after ±, half of the 95 % interval "
            "(Student's t). A claim stands where the whole interval is above 0; there is no "
            "correction for the number of claims. The paper's differences are those of LocalVim-T "
            "on ImageNet-1K (tables 2 and 5).",
            "",
            *describe(records),
            "## Fashion-MNIST",
            "",
            *accuracy_table(records, FASHION),
            "",
            "An arm has four directions in each block (rows alone: twice forward, twice backward), "
            "`all eight` twice as many branches. SCAttn is `channel`. A search is made anew for "
            "each seed, by the paper's strategy (`softmax`). Train loss: of the last epoch, with "
            "label smoothing.",
            "",
            "![accuracy](fashion_mnist_accuracy.png)",
            "",
            *(["## Photographs of solar cells", "", *elpv, ""] if len(elpv) > 2 else []),
            "## The searches",
            "",
            *search_text(records),
            "## Commands",
            "",
            "```",
            "python benchmarks/fashion_mnist/prepare.py",
            "PYTHONPATH=. python benchmarks/fashion_mnist/study.py --output runs/study.jsonl "
            f"--seeds {seeds}{''.join(changed)}",
            "PYTHONPATH=. python benchmarks/fashion_mnist/report.py runs/study.jsonl",
            "```",
            "",
        ]
    )


def main(results: Path, folder: Path) -> None:
    """Writes the page, its figures and the records."""
    records = read_records(results)
    if not records:
        raise SystemExit(f"no records in {results}")
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(as_line(trial, record) for trial, record in records.items())
    (folder / "fashion_mnist.jsonl").write_text(lines)
    write_figures(records, folder)
    (folder / "fashion_mnist.md").write_text(page(records))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "docs/results"))
