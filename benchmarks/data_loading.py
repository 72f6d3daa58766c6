"""Images per second of decoding, augmentation and loading, beside the rate of a model's training.

    python benchmarks/data_loading.py --output DIR [--images 2000] [--workers 1 2 4 8 16]

Writes JPEG files of about 500 x 375 pixels and 110 kB, the size of ImageNet's, from random
textures; the same again as tar shards. Times, for a training at 224 x 224 with random crops and
RandAugment:

    steps     what one image costs in one thread: Pillow, torchvision on the CPU and on the GPU
              (nvJPEG), crop, RandAugment; 12 megapixels with and without decoding at half the size
    loading   the batches of `ImageData`, by reader and number of workers
    model     forward and backward pass of the bare model on one batch, on a GPU

Writes DIR/data_loading.csv.
"""

import argparse
import io
import os
import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torchvision.io import decode_jpeg

from localmamba.benchmark import Setting, describe_machine, measure
from localmamba.data import Augmentation, Encoded, ImageSettings, InputSpec, load_source, open_image
from localmamba.data.images import draft_side
from localmamba.data.module import ImageData
from localmamba.data.transforms import train_transform
from localmamba.tasks.run_folder import write_csv

SPEC = InputSpec(224, 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
RECIPE = Augmentation(
    crop_scale=(0.08, 1.0), auto_augment="rand-m9-mstd0.5-inc1", hflip=0.5, erasing=0.25
)
CROP = Augmentation(crop_scale=(0.08, 1.0))
CLASSES = 10
SECONDS = 8
"""Time of one measurement, about."""

Row = dict[str, str | float]


def texture(seed: int, width: int = 500, height: int = 375) -> Image.Image:
    """Returns noise of all wavelengths, as steep as that of photographs."""
    random = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 128.0)
    for octave in range(8):
        rows, columns = height >> octave or 1, width >> octave or 1
        noise = random.normal(0, 16 * 1.15**octave, (rows, columns, 3))
        layers = [
            Image.fromarray(noise[..., c].astype(np.float32)).resize((width, height), Image.BICUBIC)
            for c in range(3)
        ]
        pixels += np.stack(layers, axis=-1)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image) -> bytes:
    """Returns the image as a JPEG file of quality 90."""
    content = io.BytesIO()
    image.save(content, "JPEG", quality=90)
    return content.getvalue()


def write_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg(texture(seed)))


def write_sets(folder: Path, count: int, console: Console) -> dict[str, str]:
    """Writes the images as files and as shards; returns `--data` of each reader."""
    files = [folder / "files" / "train" / f"c{i % CLASSES}" / f"{i}.jpg" for i in range(count)]
    missing = [(path, i) for i, path in enumerate(files) if not path.is_file()]
    with ProcessPoolExecutor() as pool:
        made = pool.map(write_image, *zip(*missing, strict=True), chunksize=16) if missing else ()
        for _ in track(made, "writing images", total=len(missing), console=console):
            pass
    (folder / "shards").mkdir(exist_ok=True)
    for first in range(0, count, 1000):
        with tarfile.open(folder / "shards" / f"train-{first // 1000:04d}.tar", "w") as tar:
            for i in range(first, min(first + 1000, count)):
                parts = {"cls": str(i % CLASSES).encode(), "jpg": files[i].read_bytes()}
                for suffix, content in parts.items():
                    member = tarfile.TarInfo(f"{i:06d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    sizes = [path.stat().st_size for path in files]
    console.print(f"{count} images of {np.mean(sizes) / 1e3:.0f} kB")
    return {"folder": str(folder / "files"), "shards": f"wds/{folder / 'shards'}"}


def rate(call: Callable[[int], object], batch: int = 1) -> float:
    """Returns images per second of a call for the i-th image or batch, in one thread."""
    call(0)
    start = time.perf_counter()
    calls = 0
    while time.perf_counter() - start < SECONDS / 4:
        call(calls)
        calls += 1
    return batch * calls / (time.perf_counter() - start)


def steps(contents: list[bytes]) -> Iterator[Row]:
    """Times what happens to one image."""
    torch.set_num_threads(1)
    images = [open_image(Encoded("", content)) for content in contents]
    tensors = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in contents]

    def row(step: str, images_per_second: float) -> Row:
        return {"part": "step", "name": step, "workers": "", "images_per_second": images_per_second}

    n = len(contents)
    yield row("open_image (Pillow)", rate(lambda i: open_image(Encoded("", contents[i % n]))))
    yield row("decode_jpeg on the CPU (torchvision)", rate(lambda i: decode_jpeg(tensors[i % n])))
    if torch.cuda.is_available():

        def on_gpu(_: int) -> None:
            decode_jpeg(tensors, device="cuda")
            torch.cuda.synchronize()

        yield row(f"decode_jpeg on the GPU (nvJPEG), batches of {n}", rate(on_gpu, n))
    for name, augmentation in (("crop and resize", CROP), ("crop, resize, RandAugment", RECIPE)):
        transform = train_transform(SPEC, augmentation)
        yield row(name, rate(lambda i, transform=transform: transform(images[i % n])))
    photograph = Encoded("", jpeg(texture(0).resize((4000, 3000), Image.BICUBIC)))
    side = draft_side(SPEC.size, RECIPE.crop_scale or (1.0, 1.0), RECIPE.crop_ratio)
    yield row("open_image of 4000 x 3000", rate(lambda _: open_image(photograph)))
    yield row("open_image of 4000 x 3000, draft", rate(lambda _: open_image(photograph, side)))


def loading(data: str, workers: int, batch_size: int) -> float:
    """Returns images per second of the training batches, after the first ones."""
    settings = ImageSettings(batch_size=batch_size, workers=workers, bad_images="unchecked")
    module = ImageData(load_source(data, settings), SPEC, settings, RECIPE)
    loader = module.train_dataloader()

    def batches() -> Iterator[torch.Tensor]:
        while True:
            for images, _ in loader:
                yield images

    stream = batches()
    for _ in islice(stream, 2 * max(workers, 1)):  # what workers have ready at the start
        pass
    start, images = time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS:
        images += len(next(stream))
    seconds = time.perf_counter() - start
    stream.close()
    return images / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--models", nargs="*", default=["localvim_tiny", "localvim_small"])
    arguments = parser.parse_args()
    console = Console()
    arguments.output.mkdir(parents=True, exist_ok=True)
    sources = write_sets(arguments.output, arguments.images, console)
    contents = [jpeg(texture(i)) for i in range(64)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = list(track(steps(contents), "one thread", console=console))
    settings = [(reader, n) for n in arguments.workers for reader in sources]
    for reader, workers in track(settings, "loading", console=console):
        images_per_second = loading(sources[reader], workers, arguments.batch_size)
        rows.append({"part": "loading", "name": reader, "workers": workers,
                     "images_per_second": images_per_second})  # fmt: skip
    for model in arguments.models if device == "cuda" else ():
        for launch in ("eager", "graph"):
            setting = Setting(model, "train", device, "bfloat16", arguments.batch_size, 224, launch)
            rows.append({"part": "model", "name": f"{model}, {launch}", "workers": "",
                         "images_per_second": measure(setting).images_per_second})  # fmt: skip
    table = Table("part", "name", "workers", "images/s", "ms an image")
    for row in rows:
        value = float(row["images_per_second"])
        row["images_per_second"] = round(value, 1)
        table.add_row(*(str(row[key]) for key in ("part", "name", "workers")),
                      f"{value:.0f}", f"{1e3 / value:.3f}")  # fmt: skip
    console.print(table)
    machine = describe_machine(device) | {
        "cores": str(len(os.sched_getaffinity(0))),
        **{name: metadata.version(name) for name in ("pillow", "torchvision")},
    }
    console.print(", ".join(f"{key} {value}" for key, value in machine.items()))
    write_csv(arguments.output / "data_loading.csv", [{**row, **machine} for row in rows])


if __name__ == "__main__":
    main()
