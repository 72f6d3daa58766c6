"""Hugging Face data sets in parquet files on the disk."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from localmamba.data.examples import Examples, Source
from localmamba.data.images import Encoded, UnreadableImageError
from localmamba.data.splits import class_names, group_by_split, match_labels, split_whole

if TYPE_CHECKING:
    from datasets import Dataset


class TableImages:
    """Images in a column of a table.

    Args:
        table: The column alone, undecoded.
        rows: int [n], rows of the images.
        title: Name for messages.
    """

    def __init__(self, table: "Dataset", rows: np.ndarray, title: str):
        self.table = table
        self.rows = rows
        self.title = title

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Encoded:
        (cell,) = self.table[int(self.rows[index])].values()
        content = cell.get("bytes") if isinstance(cell, dict) else cell
        if not isinstance(content, bytes):
            # A path could be of any file of the machine.
            raise UnreadableImageError(
                f"cannot read {self.name(index)}: the bytes of the image are not in the table"
            )
        return Encoded(self.name(index), content)

    def name(self, index: int) -> str:
        """Returns the split and the row."""
        return f"{self.title}:{self.rows[index]}"

    def subset(self, indices: Sequence[int] | np.ndarray) -> "TableImages":
        """Selects images by index, in the given order."""
        return TableImages(self.table, self.rows[indices], self.title)


def load_hugging_face(
    path: str, held_out: float, split_seed: int, classes: Sequence[str] | None = None
) -> Source:
    """Loads a folder of parquet files, as the Hugging Face Hub has them.

    `datasets` converts them once to Arrow files in its cache (HF_HOME moves it), which are read at
    any position. Nothing is downloaded.

    Args:
        path: Folder of parquet files, at any depth, named after their split, as
            train-00000-of-00001.parquet, with a column of images and one of labels (ClassLabel,
            integers or text).
        held_out: Fraction of each class held out if there is neither val nor test.
        split_seed: Seed of that split.
        classes: Class names in label order, of a trained model.

    Raises:
        ValueError: If there are no such files, or their columns or classes are others.
    """
    from datasets import Image, load_dataset

    title, folder = f"hfds/{path}", Path(path)
    files = group_by_split(sorted(folder.rglob("*.parquet")))
    if not files:
        raise ValueError(f"{title} is not a local folder of parquet files")
    names = classes
    splits: dict[str, Examples] = {}
    for split, paths in files.items():
        try:
            table = load_dataset("parquet", data_files=list(map(str, paths)), split="train")
        except Exception as error:  # a dozen kinds, with the cause below
            cause = " ".join(str(error.__cause__ or error).split())
            raise ValueError(f"cannot read {title}: {cause}") from None
        image, label = _find_columns(table.features, title)
        labels, found = _read_labels(table, label)
        names = names or found
        labels = match_labels(labels, found, names, title)
        if len(labels) and labels.max() < 0:
            continue  # a test split whose labels are kept secret
        column = table.select_columns([image])
        if isinstance(column.features[image], Image):
            column = column.cast_column(image, Image(decode=False))
        images = TableImages(column, np.arange(len(labels)), f"{folder}:{split}")
        splits[split] = Examples(images, labels)
    if any(len(part) and part.labels.min() < 0 for part in splits.values()):
        raise ValueError(f"{title} has negative labels")
    classes = class_names(title, splits, names)
    return Source(f"hfds/{folder.resolve()}", classes, 3, split_whole(splits, held_out, split_seed))


def _find_columns(features: Mapping[str, Any], title: str) -> tuple[str, str]:
    """Returns the columns of images and labels: by type, else by name."""
    from datasets import ClassLabel, Image

    found = []
    for name, kind in (("image", Image), ("label", ClassLabel)):
        typed = [column for column, feature in features.items() if isinstance(feature, kind)]
        candidates = [name] if name in features else typed
        if len(candidates) != 1:
            raise ValueError(
                f"{title} has the columns {', '.join(features)}; needed: one of images ('image' or "
                "of type Image) and one of labels ('label' or of type ClassLabel)"
            )
        found += candidates
    return found[0], found[1]


def _read_labels(table: "Dataset", column: str) -> tuple[np.ndarray, Sequence[str] | None]:
    """Returns labels, int64 [n], and class names if there are any."""
    values = np.asarray(table.with_format("numpy")[column])
    if values.dtype.kind in "iu":
        return values.astype(np.int64), getattr(table.features[column], "names", None)
    if values.dtype.kind not in "UOT":
        raise ValueError(f"column {column!r} is of {values.dtype}; allowed: integers, text")
    names, labels = np.unique(values.astype(str), return_inverse=True)
    return labels.astype(np.int64), names.tolist()
