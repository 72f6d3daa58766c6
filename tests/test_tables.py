"""Tables 1 and 2: exact parameters, multiply-adds by the paper's rule and by the complete one."""

import csv
from functools import cache

import pytest

from localmamba.cli.tables import PAPER, Counts, PaperRow, count_row, rounds_to, tables
from localmamba.complexity import abstract_model, count_multiply_adds, count_parameters

OURS = [row for row in PAPER if row.model.startswith(("local", "vim", "vmamba"))]
THEIRS = [row for row in PAPER if row not in OURS]

counts_of = cache(count_row)


def name_of(row: PaperRow) -> str:
    return row.name


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("localvim_tiny", 7_994_152),
        ("localvim_tiny_nosearch", 7_994_152),
        ("localvim_small", 27_783_784),
        ("localvmamba_tiny", 25_527_160),
        ("localvmamba_small", 49_748_536),
    ],
)
def test_parameters_are_exact(model: str, parameters: int) -> None:
    assert count_parameters(abstract_model(model)) == parameters


@pytest.mark.parametrize("row", OURS, ids=name_of)
def test_paper_rule_gives_the_papers_figures(row: PaperRow) -> None:
    assert rounds_to(counts_of(row).as_paper / 1e9, row.flops)


@pytest.mark.parametrize("row", THEIRS, ids=name_of)
def test_timm_models_are_those_of_the_paper(row: PaperRow) -> None:
    counts = counts_of(row)
    assert counts.all / 1e9 == pytest.approx(float(row.flops), rel=0.04)
    assert counts.parameters / 1e6 == pytest.approx(float(row.parameters), rel=0.05)


@pytest.mark.parametrize(
    ("model", "printed"), [("localvim_tiny", "1.75"), ("localvim_small", "5.5")]
)
def test_honest_count_of_localvim(model: str, printed: str) -> None:
    assert rounds_to(count_multiply_adds(abstract_model(model), 224) / 1e9, printed)


def localvim_by_hand(width: int, tokens: int, directions: int, times: int) -> int:
    """Counts a LocalVim block with `times` runs of convolution, x_proj and dt_proj."""
    inner, rank, states, taps = 2 * width, width // 16, 16, 4
    projections = tokens * (3 * width * inner)  # in_proj and out_proj
    per_direction = tokens * inner * (taps + rank + 2 * states + rank)
    scan = tokens * inner * (5 * states + 2)
    attention = directions * 2 * inner * (inner // 8)
    return projections + times * per_direction + directions * scan + attention


@pytest.mark.parametrize(("rule", "times"), [("paper", 1), ("all", 4)])
def test_localvim_count_is_the_sum_of_its_parts(rule: str, times: int) -> None:
    width, tokens = 192, 14 * 14
    stem_and_head = tokens * 16 * 16 * 3 * width + width * 1000
    expected = stem_and_head + 20 * localvim_by_hand(width, tokens, 4, times)
    assert count_multiply_adds(abstract_model("localvim_tiny_nosearch"), 224, rule) == expected


def vmamba_block_by_hand(
    width: int, tokens: int, per_state: int, per_channel: int, norm: int
) -> int:
    """Counts a VMamba block with `norm` operations per value of its two layer norms."""
    inner, rank, states = 2 * width, width // 16, 16
    projections = tokens * 3 * width * inner
    conv = tokens * inner * 9
    per_direction = tokens * inner * (rank + 2 * states + rank)
    scan = tokens * inner * (per_state * states + per_channel)
    return projections + conv + 4 * (per_direction + scan) + norm * tokens * (width + inner)


@pytest.mark.parametrize(("rule", "scan", "norm"), [("paper", (9, 1), 5), ("all", (5, 2), 0)])
def test_vmamba_count_is_the_sum_of_its_parts(rule: str, scan: tuple, norm: int) -> None:
    stages = [(96, 56, 2), (192, 28, 2), (384, 14, 9), (768, 7, 2)]
    stem = 56 * 56 * (48 * 96 + norm * 96)
    head = norm * 49 * 768 + 768 * 1000
    merging = sum(
        (side * side) * (4 * c * 2 * c + norm * 4 * c)
        for c, side in ((96, 28), (192, 14), (384, 7))
    )
    blocks = sum(n * vmamba_block_by_hand(c, side * side, *scan, norm) for c, side, n in stages)
    counted = count_multiply_adds(abstract_model("vmamba_tiny"), 224, rule)
    assert counted == stem + blocks + merging + head


def test_honest_count_takes_padding() -> None:
    """Windows of 2 pad a grid of 7 x 7 to 64 steps for all directions of a block."""
    padded, bare = (
        count_multiply_adds(abstract_model("localvim_tiny_nosearch"), size) for size in (112, 128)
    )
    head = 192 * 1000
    stem = 16 * 16 * 3 * 192
    for count, tokens, steps in ((padded, 49, 64), (bare, 64, 64)):
        inner, taps, rank, states = 384, 4, 12, 16
        per_step = inner * (taps + rank + 2 * states + rank + 5 * states + 2)
        block = tokens * 3 * 192 * inner + 4 * steps * per_step + 4 * 2 * inner * (inner // 8)
        assert count == head + tokens * stem + 20 * block


def test_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown counting rule 'mine'; known: all, paper"):
        count_multiply_adds(abstract_model("deit_tiny_patch16_224"), 224, "mine")


def test_unknown_model_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown model 'localvim_huge'"):
        abstract_model("localvim_huge")


@pytest.mark.parametrize(
    ("value", "printed", "agrees"),
    [(1.483, "1.5", True), (1.55, "1.5", False), (17.95, "18", True), (5.75, "5.7", False)],
)
def test_rounding_follows_the_printed_figure(value: float, printed: str, agrees: bool) -> None:
    assert rounds_to(value, printed) == agrees


def test_command_prints_and_writes(capsys: pytest.CaptureFixture, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("localmamba.cli.tables.count_row", lambda _: Counts(7_994_152, 1, 2))
    tables(csv=tmp_path / "tables" / "all.csv")
    shown = capsys.readouterr().out
    assert "Table 1" in shown
    assert all(row.name in shown for row in PAPER)
    with (tmp_path / "tables" / "all.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == [row.model for row in PAPER]
    assert rows[0]["parameters"] == "7994152"
    assert {"paper_flops_g", "paper_top1"} <= set(rows[0])
