"""`localmamba tables`: reproduces the sizes of tables 1 and 2 of the paper.

Accuracies are the paper's; no model is trained here.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from localmamba.cli.reports import make_console
from localmamba.complexity import abstract_model, count_multiply_adds, count_parameters
from localmamba.layers import LocalVimBlock, LocalVMambaBlock
from localmamba.models import LocalVim, LocalVMamba


@dataclass(frozen=True)
class PaperRow:
    """A row of the paper's table 2, as printed.

    Attributes:
        name: Name in the paper.
        model: Name in timm.
        parameters: Number of parameters in millions.
        flops: Multiply-adds in billions.
        top1: ImageNet-1K accuracy in %.
        size: Side of the images in pixels.
    """

    name: str
    model: str
    parameters: str
    flops: str
    top1: str
    size: int = 224


PAPER = (
    PaperRow("RegNetY-4G", "regnety_040", "21", "4.0", "80.0"),
    PaperRow("RegNetY-8G", "regnety_080", "39", "8.0", "81.7"),
    PaperRow("RegNetY-16G", "regnety_160", "84", "16.0", "82.9"),
    PaperRow("ViT-B/16", "vit_base_patch16_384", "86", "55.4", "77.9", 384),
    PaperRow("ViT-L/16", "vit_large_patch16_384", "307", "190.7", "76.5", 384),
    PaperRow("DeiT-Ti", "deit_tiny_patch16_224", "6", "1.3", "72.2"),
    PaperRow("DeiT-S", "deit_small_patch16_224", "22", "4.6", "79.8"),
    PaperRow("DeiT-B", "deit_base_patch16_224", "86", "17.5", "81.8"),
    PaperRow("Swin-T", "swin_tiny_patch4_window7_224", "29", "4.5", "81.3"),
    PaperRow("Swin-S", "swin_small_patch4_window7_224", "50", "8.7", "83.0"),
    PaperRow("Swin-B", "swin_base_patch4_window7_224", "88", "15.4", "83.5"),
    PaperRow("Vim-Ti", "vim_tiny", "7", "1.5", "73.1"),
    PaperRow("Vim-S", "vim_small", "26", "5.1", "80.3"),
    PaperRow("LocalVim-T*", "localvim_tiny_nosearch", "8", "1.5", "75.8"),
    PaperRow("LocalVim-T", "localvim_tiny", "8", "1.5", "76.2"),
    PaperRow("LocalVim-S*", "localvim_small_nosearch", "28", "4.8", "81.0"),
    PaperRow("LocalVim-S", "localvim_small", "28", "4.8", "81.2"),
    PaperRow("VMamba-T", "vmamba_tiny", "22", "5.6", "82.2"),
    PaperRow("VMamba-S", "vmamba_small", "44", "11.2", "83.5"),
    PaperRow("VMamba-B", "vmamba_base", "75", "18", "83.7"),
    PaperRow("LocalVMamba-T", "localvmamba_tiny", "26", "5.7", "82.7"),
    PaperRow("LocalVMamba-S", "localvmamba_small", "50", "11.4", "83.7"),
)

WIDE = 110
"""Minimum terminal width to show the models' names in timm."""

TABLE_1 = ("LocalVim-T", "LocalVim-S", "LocalVMamba-T", "LocalVMamba-S")


@dataclass(frozen=True)
class Counts:
    """Counts of a model.

    Attributes:
        parameters: Number of parameters.
        as_paper: Multiply-adds by the paper's rule.
        all: Multiply-adds of everything that runs.
    """

    parameters: int
    as_paper: int
    all: int


def count_row(row: PaperRow) -> Counts:
    """Counts the model of a row on the meta device."""
    model = abstract_model(row.model)
    return Counts(
        count_parameters(model),
        count_multiply_adds(model, row.size, "paper"),
        count_multiply_adds(model, row.size, "all"),
    )


def tables(csv: Path | None = None) -> None:
    """Prints the paper's tables 1 and 2 beside the parameters and multiply-adds of this package.

    Args:
        csv: CSV file to write the rows to.

    Examples:
      localmamba tables
      localmamba tables --csv tables.csv
    """
    counted = {row: count_row(row) for row in PAPER}
    console = make_console()
    console.print(_table_1(counted), "")
    console.print(_table_2(counted, with_names=console.width >= WIDE), "")
    console.print(LEGEND, soft_wrap=True)
    if csv is not None:
        _write_csv(counted, csv)
        console.print(f"written to {csv}", soft_wrap=True)


LEGEND = (
    "as paper: multiply-adds by the rule of the paper's tables, which differs between plain and "
    "hierarchical models. all: everything that runs, by one rule for every model. Both rules are "
    "in localmamba/complexity.py. !: does not round to the paper's figure; for other authors' "
    "models the paper quotes their papers. *: without search. Accuracies are the paper's."
)


def rounds_to(value: float, printed: str) -> bool:
    """Whether a value rounds to a printed figure, at its number of decimals."""
    decimals = len(printed.partition(".")[2])
    return f"{value:.{decimals}f}" == printed


def _mark(text: str, value: float, printed: str) -> str:
    return text if rounds_to(value, printed) else f"{text} !"


def _figures(row: PaperRow, counts: Counts) -> list[str]:
    """Returns the cells that both tables share."""
    millions, billions = counts.parameters / 1e6, counts.as_paper / 1e9
    return [
        _mark(f"{counts.parameters:,}", millions, row.parameters),
        row.parameters,
        _mark(f"{billions:.2f}", billions, row.flops),
        row.flops,
        f"{counts.all / 1e9:.2f}",
    ]


FIGURES = ("params", "paper\nM", "as\npaper\nG", "paper\nG", "all\nG")


def _empty_table(title: str, left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0), show_edge=False)
    for name in left:
        table.add_column(name, no_wrap=True, vertical="bottom")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True, vertical="bottom")
    return table


def describe_layout(model: LocalVim | LocalVMamba) -> tuple[str, str]:
    """Returns widths and numbers of blocks, per stage for hierarchical models."""
    stages = list(model.stages) if isinstance(model, LocalVMamba) else [model]
    widths = dict.fromkeys(str(feature["num_chs"]) for feature in model.feature_info)
    blocks = (
        sum(isinstance(m, LocalVimBlock | LocalVMambaBlock) for m in stage.modules())
        for stage in stages
    )
    return " ".join(widths), " ".join(map(str, blocks))


def _table_1(counted: dict[PaperRow, Counts]) -> Table:
    table = _empty_table("Table 1: variants", ("model", "widths", "blocks"), FIGURES)
    for row in (row for row in PAPER if row.name in TABLE_1):
        model = abstract_model(row.model)
        if isinstance(model, LocalVim | LocalVMamba):
            table.add_row(row.name, *describe_layout(model), *_figures(row, counted[row]))
    return table


def _table_2(counted: dict[PaperRow, Counts], with_names: bool) -> Table:
    left = ("model", "in timm") if with_names else ("model",)
    right = ("px", *FIGURES, "paper\ntop-1 %")
    table = _empty_table("Table 2: backbones on ImageNet-1K", left, right)
    for row, counts in counted.items():
        names = (row.name, row.model) if with_names else (row.name,)
        table.add_row(*names, str(row.size), *_figures(row, counts), row.top1)
    return table


def _write_csv(counted: dict[PaperRow, Counts], path: Path) -> None:
    from localmamba.tasks.run_folder import write_csv

    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "name": row.name,
            "model": row.model,
            "size": row.size,
            **asdict(counts),
            "paper_parameters_m": row.parameters,
            "paper_flops_g": row.flops,
            "paper_top1": row.top1,
        }
        for row, counts in counted.items()
    ]
    write_csv(path, rows)
