"""WebDataset shards: tar files of images and labels, read at any position and never unpacked.

The headers of all shards are read once, which gives the place of every image. Order, augmentation
and resuming are then those of files in a folder.
"""

import json
import os
import re
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from localmamba.data.examples import Examples, Source
from localmamba.data.images import MAX_FILE, Encoded, UnreadableImageError
from localmamba.data.splits import (
    class_names,
    group_by_split,
    join_names,
    match_labels,
    split_whole,
)

INFO = "_info.json"
"""timm's description of a folder of shards."""
CLASSES = "classes.txt"
"""Class names beside the shards, one a line, in label order."""

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")
LABEL_KEY = "cls"
MAX_LABEL = 20
"""Digits of a label, at most."""
MAX_SHARDS = 100_000

BRACES = re.compile(r"\{(?:(\d{1,9})\.\.(\d{1,9})|([^{}]*,[^{}]*))\}")
KEY = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")
"""WebDataset's key of a member, `a/b` of `a/b.seg.png`, and the rest."""


class ShardImages:
    """Images in tar files.

    Args:
        shards: The tar files.
        names: Name of each image in its shard.
        places: int64 [n, 3]: index of the shard, first byte, size.
    """

    def __init__(self, shards: Sequence[Path], names: Sequence[str], places: np.ndarray):
        self.shards = shards
        self.names = names
        self.places = places

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Encoded:
        shard, first, size = self.places[index].tolist()
        name = self.name(index)
        if size > MAX_FILE:
            raise UnreadableImageError(f"cannot read {name}: {size} bytes; allowed: {MAX_FILE}")
        try:
            # Opened each time: there may be more shards than a process may have open files.
            with self.shards[shard].open("rb") as file:
                content = os.pread(file.fileno(), size, first)
        except OSError as error:
            raise UnreadableImageError(f"cannot read {name}: {error.strerror}") from None
        return Encoded(name, content)

    def name(self, index: int) -> str:
        """Returns the shard and the name in it."""
        return f"{self.shards[self.places[index, 0]]}:{self.names[index]}"

    def subset(self, indices: Sequence[int] | np.ndarray) -> "ShardImages":
        """Selects images by index, in the given order."""
        return ShardImages(self.shards, [self.names[i] for i in indices], self.places[indices])


def load_shards(
    path: str, held_out: float, split_seed: int, classes: Sequence[str] | None = None
) -> Source:
    """Loads WebDataset shards of images (jpg, jpeg, png, webp) and labels (cls).

    Args:
        path: A folder with timm's _info.json, or with tar files, of which those named after a split
            (as train-0000.tar) are its shards; or a pattern such as a/train-{000..146}.tar. Shards
            without a split are split here, and kept whole as the split `all`.
        held_out: Fraction of each class held out if there is neither val nor test.
        split_seed: Seed of that split.
        classes: Class names in label order, of a trained model; by default the lines of classes.txt
            beside the shards, or the labels.

    Raises:
        ValueError: If there are no shards, one is damaged, or one is not what WebDataset writes.
    """
    shards = _list_shards(path)
    folder = next(iter(shards.values()))[0].parent
    splits = {split: read_shards(paths) for split, paths in shards.items()}
    title, own = f"wds/{path}", None
    if (folder / CLASSES).is_file():
        lines = (folder / CLASSES).read_text(encoding="utf-8").split("\n")
        own = [name.strip() for name in lines if name.strip()]
    names = class_names(title, splits, own or classes)
    if classes is not None:
        names = tuple(classes)
        splits = {
            split: replace(part, labels=match_labels(part.labels, own, names, title))
            for split, part in splits.items()
        }
    splits = split_whole(splits, held_out, split_seed)
    return Source(f"wds/{Path(path).resolve()}", names, 3, splits)


def read_shards(shards: Sequence[Path]) -> Examples:
    """Reads the headers of shards, and their labels.

    Raises:
        ValueError: If one is not a whole tar file of images and labels.
    """
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        found = list(pool.map(_read_shard, shards))
    rows = [(i, *sample) for i, samples in enumerate(found) for sample in samples]
    places = np.array([(i, first, size) for i, _, first, size, _ in rows], dtype=np.int64)
    labels = np.array([row[-1] for row in rows], dtype=np.int64)
    return Examples(ShardImages(shards, [row[1] for row in rows], places.reshape(-1, 3)), labels)


def _read_shard(path: Path) -> list[tuple[str, int, int, int]]:
    """Returns name, first byte, size and label of every image of a shard."""
    samples: dict[str, dict[str, Any]] = {}
    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                match = KEY.fullmatch(member.name)
                # Links, devices, folders and sparse files hold no image.
                if match is None or member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    continue
                key, kind = match[1], match[2].lower()
                if member.offset_data + member.size > size:
                    raise ValueError("it is cut short")
                if kind in IMAGE_KEYS:
                    place = (member.name, member.offset_data, member.size)
                    samples.setdefault(key, {}).setdefault("image", place)
                elif kind == LABEL_KEY:
                    samples.setdefault(key, {})["label"] = _read_label(tar, member)
    except (OSError, tarfile.TarError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} is not a shard, an uncompressed tar file: {error}") from None
    if lone := [key for key, found in samples.items() if len(found) < 2]:
        raise ValueError(
            f"{len(lone)} samples of {path} have no label or no image ({join_names(lone, 3)}); "
            f"a sample is KEY.{LABEL_KEY} with KEY.{'|'.join(IMAGE_KEYS)}"
        )
    if not samples:
        raise ValueError(f"{path} holds no images")
    return [(*found["image"], found["label"]) for found in samples.values()]


def _read_label(tar: tarfile.TarFile, member: tarfile.TarInfo) -> int:
    file = tar.extractfile(member)
    text = file.read(MAX_LABEL + 1).decode("ascii", "replace").strip() if file else ""
    if not (text.isdecimal() and len(text) <= MAX_LABEL):
        raise ValueError(f"the label in {member.name} is {text!r}, not a number")
    return int(text)


def _list_shards(path: str) -> dict[str, list[Path]]:
    """Returns the shards of every split."""
    folder = Path(path)
    if not folder.is_dir():
        shards = _expand(path)
        if missing := [str(shard) for shard in shards if not shard.is_file()]:
            raise ValueError(
                f"wds/{path}: {len(missing)} of {len(shards)} shards do not exist: "
                f"{join_names(missing, 3)}; give a local folder of tar files or a pattern"
            )
        return group_by_split(shards)
    if (folder / INFO).is_file():
        return _read_info(folder)
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise ValueError(f"wds/{path} has no tar files")
    return group_by_split(shards)


def _expand(pattern: str) -> list[Path]:
    """Expands {000..146} and {a,b}; returns at most `MAX_SHARDS` paths."""
    names = [pattern]
    while match := BRACES.search(names[0]):
        first, last, words = match.groups()
        span = range(int(first), int(last) + 1) if first else words.split(",")
        if not 0 < len(span) * len(names) <= MAX_SHARDS:
            raise ValueError(f"wds/{pattern} names no shards, or more than {MAX_SHARDS}")
        parts = [str(part).zfill(len(first or "")) for part in span]
        cuts = [BRACES.split(name, maxsplit=1) for name in names]
        names = [cut[0] + part + cut[-1] for cut in cuts for part in parts]
    return [Path(name) for name in names]


def _read_info(folder: Path) -> dict[str, list[Path]]:
    path = folder / INFO
    try:
        entries = json.loads(path.read_text())["splits"]
        patterns = {str(name): entry["filenames"] for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f'{path} is not like {{"splits": {{"train": {{"filenames": ["a-{{00..09}}.tar"]}}}}}}'
        ) from None
    splits: dict[str, list[Path]] = {}
    for name, listed in patterns.items():
        (split,) = group_by_split([Path(name)])
        patterns_of_split = [listed] if isinstance(listed, str) else listed
        shards = [folder / shard for text in patterns_of_split for shard in _expand(str(text))]
        if outside := [s for s in shards if not s.resolve().is_relative_to(folder.resolve())]:
            raise ValueError(f"{path} names {outside[0]}, which is not in its folder")
        if missing := [shard for shard in shards if not shard.is_file()]:
            raise ValueError(f"{path} names {missing[0]}, which does not exist")
        splits[split] = shards
    return splits
