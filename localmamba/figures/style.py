"""What every figure shares: colours that colour-blind readers tell apart, and how it is saved.

Figures are built on `Figure` itself, not on pyplot: nothing global changes, no window opens.
"""

import re
from pathlib import Path

from matplotlib.figure import Figure

FLIP = "_flip"
INK, FAINT, PALE = "#222222", "#8C8C8C", "#EDEDED"

# Okabe and Ito's palette: the paper's four families first, the others in turn.
_FAMILIES = {"h": "#0072B2", "v": "#E69F00", "w2": "#009E73", "w7": "#D55E00"}
_OTHERS = ("#CC79A7", "#56B4E9", "#7F6A00", "#5B4FA2", "#A1253A", "#4D7A1F")


def family(direction: str) -> str:
    """A direction without its flip: `w7_flip` -> `w7`."""
    return direction.removesuffix(FLIP)


def colours(candidates: list[str]) -> dict[str, str]:
    """A colour for each family among the candidates; the paper's four always look the same."""
    others = [name for name in dict.fromkeys(map(family, candidates)) if name not in _FAMILIES]
    return _FAMILIES | {name: _OTHERS[i % len(_OTHERS)] for i, name in enumerate(others)}


def order_candidates(names: list[str]) -> list[str]:
    """Distinct names: rows, columns, windows by size, the rest; a flip after its direction."""

    def key(name: str) -> tuple:
        base = family(name)
        sizes = [int(size) for size in re.findall(r"\d+", base)]
        rank = {"h": 0, "v": 1}.get(base, 2 if re.fullmatch(r"w\d+(x\d+)?", base) else 3)
        return rank, sizes, base, name.endswith(FLIP)

    return sorted(set(names), key=key)


def save_figure(figure: Figure, stem: str | Path) -> list[Path]:
    """Writes `<stem>.png` and `<stem>.svg`.

    Args:
        figure: What to save.
        stem: The path without its ending; folders are made.

    Returns:
        The two paths.
    """
    stem = Path(stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=150, facecolor="white", bbox_inches="tight")
    return paths
