"""Opens malformed and odd images: read, refused or crashed, for this package and its peers.

    python benchmarks/faults/images.py --output DIR [--pillow pillow-13.0.0.tar.gz] [--train]

Files: those of Pillow's own test suite (its source package, fetched with pip if none is given) and
generated ones. Each is opened in a process of its own, with a time limit, by `open_image`, by the
loader of torchvision's ImageFolder and by timm's ImageDataset. Writes DIR/images.csv and prints a
table by kind. With --train, a training over all of them with --bad_images skip, whose
bad_images.csv has to name those that were refused.
"""

import argparse
import csv
import io
import logging
import multiprocessing
import resource
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from localmamba.data.images import UnreadableImageError, open_image

PILLOW = "13.0.0"
SECONDS = 20
"""Time limit for one file."""
MEMORY = 8 * 2**30
"""Address space of the process that opens files, in bytes."""


FORMATS = {
    "jpg": "JPEG", "png": "PNG", "gif": "GIF", "tif": "TIFF", "webp": "WEBP", "bmp": "BMP",
}  # fmt: skip
MODES = (
    ("I;16", "png"), ("I", "tif"), ("F", "tif"), ("1", "png"), ("LA", "png"), ("CMYK", "jpg"),
    ("CMYK", "tif"), ("LAB", "tif"), ("YCbCr", "jpg"), ("PA", "tif"), ("P", "gif"),
)  # fmt: skip


def generated(random: np.random.Generator) -> Iterator[tuple[str, str, bytes]]:
    """Yields kind, suffix and content."""
    pixels = random.integers(0, 256, (48, 64, 3), dtype=np.uint8)
    whole = {}
    for suffix, image_format in FORMATS.items():
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, image_format)
        whole[suffix] = content.getvalue()
    for suffix, content in whole.items():
        for _ in range(15):
            flipped = bytearray(content)
            for _ in range(random.integers(1, 9)):
                flipped[random.integers(len(flipped))] ^= 1 << random.integers(8)
            yield "flipped bits", suffix, bytes(flipped)
        for _ in range(10):
            yield "cut", suffix, content[: random.integers(1, len(content))]
        for _ in range(4):
            start = random.integers(len(content) // 2)
            yield "hole of zeros", suffix, content[:start] + bytes(64) + content[start + 64 :]
        yield "bytes behind the end", suffix, content + random.bytes(5000)
        yield "empty", suffix, b""
        yield "text", suffix, b"<html>404 Not Found</html>\n"
        yield "random bytes", suffix, random.bytes(2000)
        yield "header alone", suffix, content[:32]
    for suffix in ("jpg", "png"):
        for other, content in whole.items():
            if other != suffix:
                yield "wrong suffix", suffix, content
    for width, height in (
        (20_000, 10_000),
        (65_535, 65_535),
        (2**31 - 1, 2**31 - 1),
        (100_000, 900),
    ):
        yield "bomb", "png", png_header(width, height)
    yield "bomb", "gif", b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b","
    for width, height in ((1, 60_000), (60_000, 1)):
        content = io.BytesIO()
        Image.new("L", (width, height)).save(content, "PNG")
        yield "strip", "png", content.getvalue()
    for mode, suffix in MODES:
        content = io.BytesIO()
        image = Image.new(mode, (16, 16))
        image.save(content, FORMATS[suffix])
        yield "rare mode", suffix, content.getvalue()


def png_header(width: int, height: int) -> bytes:
    """Returns a PNG of these sides with 1000 bytes of pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    parts = [
        chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)),
        chunk(b"IDAT", zlib.compress(bytes(1000))),
        chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def from_pillow(archive: Path) -> Iterator[tuple[str, str, bytes]]:
    """Yields the files of Pillow's test suite, by kind of name."""
    with tarfile.open(archive) as tar:
        for member in tar:
            path = Path(member.name)
            if "Tests/images" not in member.name or not member.isreg():
                continue
            file = tar.extractfile(member)
            assert file is not None
            start = path.name.partition("-")[0].partition("_")[0]
            odd = start if start in ("crash", "timeout", "oom", "truncated", "broken") else None
            suffix = path.suffix.lstrip(".").lower() or "none"
            kind = f"Pillow: {odd or suffix}"
            yield kind, suffix, file.read()


class Pair:
    """Reader of timm of a file and a good one."""

    def __init__(self, path: Path, good: Path):
        self.paths = (path, good)

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        return self.paths[index].open("rb"), index


def open_ours(path: Path, good: Path) -> str:
    """Returns '' or, as the loader reports it, what is wrong."""
    del good
    try:
        open_image(path)
    except UnreadableImageError as error:
        return f"refused: {error}"
    return ""


def open_timm(path: Path, good: Path) -> str:
    """Returns '' or that timm's data set has taken the next image instead."""
    from timm.data import ImageDataset

    _, index = ImageDataset(str(path.parent), reader=Pair(path, good))[0]
    return "replaced" if index else ""


def open_torchvision(path: Path, good: Path) -> str:
    """Returns ''."""
    from torchvision.datasets.folder import default_loader

    del good
    default_loader(str(path))
    return ""


OPENERS: dict[str, Callable[[Path, Path], str]] = {
    "localmamba": open_ours,
    "torchvision": open_torchvision,
    "timm": open_timm,
}


def serve(name: str, pipe: Connection) -> None:
    """Opens the files whose paths come through a pipe; answers '' or what happened."""
    warnings.simplefilter("ignore")
    logging.disable()
    good = pipe.recv()
    OPENERS[name](good, good)  # imports
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    pipe.send("ready")
    while path := pipe.recv():
        try:
            answer = OPENERS[name](path, good)
        except BaseException as error:
            answer = f"raises {type(error).__name__}"
        pipe.send(answer)


class Opener:
    """A process that opens images; a new one after a crash or a hang.

    Args:
        name: Key of `OPENERS`.
        good: A file that all can open.
    """

    def __init__(self, name: str, good: Path):
        self.name, self.good = name, good
        self.start()

    def start(self) -> None:
        self.pipe, child = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(target=serve, args=(self.name, child), daemon=True)
        self.process.start()
        child.close()
        self.pipe.send(self.good)
        self.pipe.recv()

    def __call__(self, path: Path) -> tuple[str, float]:
        """Returns '' (read), what was raised, `crash` or `hang`; and seconds."""
        start = time.perf_counter()
        self.pipe.send(path)
        try:
            answer = self.pipe.recv() if self.pipe.poll(SECONDS) else "hang"
        except (EOFError, ConnectionError):
            answer = "crash"
        seconds = time.perf_counter() - start
        if answer in ("hang", "crash"):
            self.process.kill()
            self.process.join()
            self.start()
        return answer, seconds


def collect(folder: Path, archive: Path) -> dict[Path, str]:
    """Writes all files; returns their kinds."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    kinds = {}
    random = np.random.default_rng(0)
    for source in (from_pillow(archive), generated(random)):
        for kind, suffix, content in source:
            path = folder / f"{len(kinds):04d}.{suffix}"
            path.write_bytes(content)
            kinds[path] = kind
    return kinds


def table(rows: list[dict[str, str]]) -> str:
    """Returns a row a kind: number, what was read and refused, time; and what peers do."""
    counts = Counter(row["kind"] for row in rows)
    kinds: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        rare = row["kind"].startswith("Pillow") and counts[row["kind"]] < 8
        kinds["Pillow: other formats" if rare else row["kind"]].append(row)
    lines = [
        "| kind | files | read | refused | crash or hang | slowest, s | torchvision raises "
        "| timm raises | timm takes the next |",
        "| --- |" + " ---: |" * 8,
    ]
    for kind, members in [*sorted(kinds.items()), ("all", rows)]:

        def count(name: str, start: str, members: list[dict[str, str]] = members) -> int:
            return sum(row[name].startswith(start) for row in members)

        read = sum(not row["localmamba"] for row in members)
        refused = count("localmamba", "refused")
        cells = [len(members), read, refused, len(members) - read - refused]
        slowest = max(float(row["seconds"]) for row in members)
        peers = [count("torchvision", "r"), count("timm", "raises"), count("timm", "replaced")]
        cells_text = [*map(str, cells), f"{slowest:.2f}", *map(str, peers)]
        lines.append(f"| {' | '.join([kind, *cells_text])} |")
    return "\n".join(lines)


def train(folder: Path, kinds: dict[Path, str], rows: list[dict[str, str]]) -> bool:
    """Trains on the files of the suffixes that a folder may have; compares the list of bad ones."""
    from localmamba.data.folders import IMAGE_SUFFIXES

    data = folder / "classes"
    shutil.rmtree(data, ignore_errors=True)
    refused = set()
    taken = [p for p in kinds if p.suffix.lower() in IMAGE_SUFFIXES]
    answers = {row["file"]: row["localmamba"] for row in rows}
    for i, path in enumerate(taken):
        target = data / f"class{i % 2}" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
        if answers[path.name]:
            refused.add(path.name)
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    words = (
        f"train --data {data} --model localvim_demo --epochs 1 --warmup_epochs 0 --batch_size 32"
    )
    options = f"--bad_images skip --bad_share 0.9 --output {run} --workers 2"
    start = time.perf_counter()
    code = subprocess.call([sys.executable, "-c", "from localmamba.cli import main; main()",
                            *words.split(), *options.split()])  # fmt: skip
    with (run / "bad_images.csv").open(newline="") as file:
        listed = {Path(row["file"]).name for row in csv.DictReader(file)}
    print(
        f"training on {len(taken)} files: exit code {code}, {time.perf_counter() - start:.0f} s, "
        f"{len(listed)} listed, {len(refused)} refused before, differences: "
        f"{sorted(listed ^ refused) or 'none'}"
    )
    return code == 0 and listed == refused


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--pillow", type=Path, help="Pillow's source package")
    parser.add_argument("--train", action="store_true", help="also trains over the files")
    arguments = parser.parse_args()
    console = Console()
    archive = arguments.pillow
    if archive is None:
        words = f"download -q --no-deps --no-binary :all: -d {arguments.output} pillow=={PILLOW}"
        subprocess.check_call([sys.executable, "-m", "pip", *words.split()])
        archive = arguments.output / f"pillow-{PILLOW}.tar.gz"
    kinds = collect(arguments.output / "files", archive)
    good = arguments.output / "good.png"
    Image.new("RGB", (8, 8)).save(good)
    openers = {name: Opener(name, good) for name in OPENERS}
    rows = []
    with (arguments.output / "images.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["file", "kind", *OPENERS, "seconds"])
        writer.writeheader()
        for path, kind in track(kinds.items(), "opening", console=console):
            answers = {name: openers[name](path) for name in OPENERS}
            row = {"file": path.name, "kind": kind, **{name: a for name, (a, _) in answers.items()}}
            rows.append(row | {"seconds": f"{answers['localmamba'][1]:.4f}"})
            writer.writerow(rows[-1])
            file.flush()
    for opener in openers.values():
        opener.pipe.send(None)
    print(table(rows))
    for name in OPENERS:
        found = Counter(row[name].partition(":")[0] or "read" for row in rows)
        print(f"{name}: {', '.join(f'{answer} {n}' for answer, n in found.most_common())}")
    print(", ".join(f"{n} {metadata.version(n)}" for n in ("pillow", "torchvision", "timm")))
    whole = all(row["localmamba"].startswith("refused") for row in rows if row["localmamba"])
    if arguments.train:
        whole &= train(arguments.output, kinds, rows)
    sys.exit(not whole)


if __name__ == "__main__":
    main()
