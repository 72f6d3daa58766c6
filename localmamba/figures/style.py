"""Style of the figures: settings, colors distinguishable by color-blind readers, saving.

Figures are made by `Figure` without pyplot, so that no global state changes and no window opens.
"""

import re
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

FLIP = "_flip"
INK, FAINT, PALE = "#222222", "#8C8C8C", "#EDEDED"

styled = matplotlib.rc_context(
    {
        "text.parse_math": False,  # names of files and classes may contain a dollar sign
        "text.usetex": False,
        "text.color": INK,
        "figure.titlesize": 12,
        "axes.titlesize": 10,
        "axes.titlecolor": INK,
        "axes.labelsize": 9,
        "axes.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "xtick.color": FAINT,
        "xtick.labelcolor": "black",
        "ytick.color": FAINT,
        "ytick.labelcolor": "black",
        "legend.fontsize": 8,
        "legend.frameon": False,
    }
)
"""Decorator of the functions that draw a figure: applies these settings of matplotlib."""

# Okabe and Ito's palette: the paper's four families first, the others in turn.
_FAMILIES = {"h": "#0072B2", "v": "#E69F00", "w2": "#009E73", "w7": "#D55E00"}
_OTHERS = ("#CC79A7", "#56B4E9", "#7F6A00", "#5B4FA2", "#A1253A", "#4D7A1F")
PALETTE = (*_FAMILIES.values(), *_OTHERS)
"""Colors of models and runs, in their order."""


def family(direction: str) -> str:
    """Returns a direction without its flip: `w7_flip` -> `w7`."""
    return direction.removesuffix(FLIP)


def colors(candidates: list[str]) -> dict[str, str]:
    """Assigns a color to each family of directions; those of the paper's four are fixed."""
    others = [name for name in dict.fromkeys(map(family, candidates)) if name not in _FAMILIES]
    return _FAMILIES | {name: _OTHERS[i % len(_OTHERS)] for i, name in enumerate(others)}


def order_candidates(names: list[str]) -> list[str]:
    """Sorts distinct names: rows, columns, windows by size, others; flips after directions."""

    def key(name: str) -> tuple[int, list[int], str, bool]:
        base = family(name)
        sizes = [int(size) for size in re.findall(r"\d+", base)]
        rank = {"h": 0, "v": 1}.get(base, 2 if re.fullmatch(r"w\d+(x\d+)?", base) else 3)
        return rank, sizes, base, name.endswith(FLIP)

    return sorted(set(names), key=key)


@styled
def save_figure(figure: Figure, stem: str | Path) -> list[Path]:
    """Writes `<stem>.png` and `<stem>.svg`.

    Args:
        figure: Figure to save.
        stem: Path without suffix; missing folders are created.

    Returns:
        Both paths.
    """
    stem = Path(stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=150, facecolor="white", bbox_inches="tight")
    return paths
