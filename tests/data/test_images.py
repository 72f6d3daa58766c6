"""Images: values of every kind, one line for what cannot be read, bad files in a training."""

import csv
import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, TiffImagePlugin

from localmamba.data import (
    Augmentation,
    Encoded,
    Examples,
    ImageSettings,
    InputSpec,
    Source,
    open_image,
)
from localmamba.data.images import draft_side
from localmamba.data.module import ImageData
from localmamba.data.transforms import eval_transform, train_transform

GRAY = InputSpec(size=8, channels=1, mean=(0.5,), std=(0.25,))
RGB = InputSpec(size=16, channels=3, mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.2), crop_pct=0.8)
RAMP = np.linspace(0, 1, 12 * 8).reshape(8, 12)
GREEN = (30, 160, 60)


def encoded(image: Image.Image, format: str, **options) -> Encoded:
    content = io.BytesIO()
    image.save(content, format, **options)
    return Encoded(f"x.{format.lower()}", content.getvalue())


def assert_ramp(image: Image.Image, tolerance: float = 0.51) -> None:
    assert image.mode == "L"
    assert np.abs(np.asarray(image) - RAMP * 255).max() <= tolerance


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_by_its_range(format):
    values = np.round(RAMP * 65535).astype(np.uint16)
    assert_ramp(open_image(encoded(Image.fromarray(values), format)))


def test_16_bit_pgm():
    values = np.round(RAMP * 65535).astype(">u2")
    assert_ramp(open_image(Encoded("x.pgm", b"P5 12 8 65535\n" + values.tobytes())))


def test_12_bit_tiff():
    row = bytes.fromhex("000fff" * 6)  # 0, 4095, 0, 4095, ...
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    image = Image.fromarray(np.zeros((8, 12), dtype=np.uint16))
    content = bytearray(encoded(image, "TIFF", tiffinfo=tags).content)
    entry = content.index(struct.pack("<HHI", 258, 3, 1))
    content[entry + 8 : entry + 10] = struct.pack("<H", 12)
    start = struct.unpack_from("<I", content, content.index(struct.pack("<H", 273)) + 8)[0]
    content[start : start + 18] = row
    pixels = np.asarray(open_image(Encoded("x.tif", bytes(content))))
    assert pixels[0].tolist() == [0, 255] * 6


def test_float_grey_is_scaled_from_0_to_1():
    image = Image.fromarray(RAMP.astype(np.float32))
    assert_ramp(open_image(encoded(image, "TIFF")))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (RAMP.astype(np.float32) * 200, "float gray from 0 to 200; allowed: 0 to 1"),
        (RAMP.astype(np.float32) * np.nan, "float gray from nan to nan"),
        (RAMP.astype(np.int32) * 100000, "integer gray from 0 to 100000; allowed: 0 to 65535"),
        (RAMP.astype(np.int32) - 5, "integer gray from -5 to"),
    ],
    ids=["float", "nan", "wide", "negative"],
)
def test_grey_of_another_range_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        open_image(encoded(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize(
    ("mode", "format", "tolerance"),
    [
        ("RGB", "PNG", 0), ("RGBA", "PNG", 0), ("P", "PNG", 8), ("CMYK", "TIFF", 2),
        ("YCbCr", "TIFF", 3), ("RGBX", "TIFF", 0),
    ],
)  # fmt: skip
def test_color_of_every_mode(mode, format, tolerance):
    image = Image.new("RGB", (12, 8), GREEN).convert(mode, palette=Image.Palette.ADAPTIVE)
    found = open_image(encoded(image, format))
    assert found.mode == "RGB"
    assert np.abs(np.asarray(found).astype(int) - GREEN).max() <= tolerance


def test_lab():
    to_lab = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
    )
    image = ImageCms.applyTransform(Image.new("RGB", (12, 8), GREEN), to_lab)
    found = np.asarray(open_image(encoded(image, "TIFF"))).astype(int)
    assert np.abs(found - GREEN).max() <= 3


def test_transparent_palette():
    image = Image.new("P", (12, 8))
    image.putpalette([*GREEN, 200, 0, 0])
    image.putpixel((0, 0), 1)
    found = open_image(encoded(image, "PNG", transparency=bytes([255, 0])))
    assert found.getpixel((5, 5)) == GREEN
    assert found.getpixel((0, 0)) == (200, 0, 0)


@pytest.mark.parametrize("mode", ["LA", "PA"])
def test_grey_with_alpha(mode):
    image = Image.new("LA", (12, 8), (77, 128))
    if mode == "PA":
        image = image.convert("PA")
    found = np.asarray(open_image(encoded(image, "PNG" if mode == "LA" else "TIFF"))).astype(int)
    assert np.abs(found - 77).max() <= 6


def test_one_bit():
    found = open_image(encoded(Image.fromarray(RAMP > 0.5), "PNG"))
    assert found.mode == "L"
    assert np.array_equal(np.asarray(found), (RAMP > 0.5) * 255)


@pytest.mark.parametrize("format", ["GIF", "PNG", "TIFF", "WEBP"])
def test_first_frame(format):
    frames = [Image.new("RGB", (12, 8), color) for color in (GREEN, (200, 0, 0))]
    options = {} if format == "TIFF" else {"duration": 100}
    options |= {"lossless": True} if format == "WEBP" else {}
    content = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    found = np.asarray(open_image(content)).astype(int)
    assert np.abs(found - GREEN).max() <= 1


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (12, 8))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    found = open_image(encoded(image, "PNG", exif=exif))
    assert found.size == (8, 12)
    assert found.getpixel((7, 0)) == (255, 255, 255)


def test_damaged_exif_does_not_matter():
    jpeg = encoded(Image.new("RGB", (12, 8), GREEN), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert open_image(jpeg).size == (12, 8)


def bomb(width: int = 20_000, height: int = 10_000) -> Encoded:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", body), chunk(b"IEND", b"")]
    return Encoded("scan.png", b"\x89PNG\r\n\x1a\n" + b"".join(parts))


JPEG = encoded(
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)), "JPEG"
)
PNG = encoded(Image.fromarray(np.uint8(RAMP * 255)), "PNG")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (Encoded("e.jpg", b""), "cannot read e.jpg: the file is empty"),
        (Encoded("t.png", b"hello"), "cannot read t.png: not an image, or a damaged header"),
        (Encoded("c.jpg", JPEG.content[:5000]), "cannot read c.jpg: image file is truncated"),
        (Encoded("c.png", PNG.content[:-30]), "cannot read c.png: "),
        (
            bomb(),
            "scan.png: Image size .200000000 pixels. exceeds limit of 178956970 pixels; scale",
        ),
        (
            encoded(Image.new("L", (1, 500)), "PNG"),
            "1 x 500 pixels; a side may be 256 times the other at most",
        ),
        (encoded(Image.new("RGB", (8, 8)), "EPS"), "EPS, which would run Ghostscript"),
    ],
    ids=["empty", "text", "cut jpeg", "cut png", "bomb", "strip", "eps"],
)
def test_what_cannot_be_read_is_one_line(tmp_path, file, message):
    with pytest.raises(ValueError, match=message) as error:
        open_image(file)
    assert "\n" not in str(error.value)
    path = tmp_path / file.name
    path.write_bytes(file.content)
    with pytest.raises(ValueError, match=message.replace("read ", "read .*")):
        open_image(path)


def test_missing_files_folders_and_pipes(tmp_path):
    with pytest.raises(ValueError, match=r"no such file: .*none\.png"):
        open_image(tmp_path / "none.png")
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path, tmp_path / "pipe.png"):
        with pytest.raises(ValueError, match="not a file"):
            open_image(path)


@pytest.mark.parametrize(
    "error", [MemoryError, struct.error, EOFError, OverflowError, IndexError, TypeError, KeyError,
              NotImplementedError, SyntaxError, RecursionError, UnicodeError, ZeroDivisionError],
)  # fmt: skip
def test_every_exception_of_a_decoder_names_the_file(monkeypatch, error):
    def fail(*_args):
        raise error

    monkeypatch.setattr(Image.Image, "load", fail)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    with pytest.raises(ValueError, match=r"cannot read x\.png: "):
        open_image(PNG)


def test_warnings_of_pillow_are_silent():
    large = bomb(10_000, 10_000)  # above half of the limit: Pillow warns
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        with pytest.raises(ValueError, match="truncated"):
            open_image(large)
    assert found == []


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("spec", [GRAY, RGB], ids=["gray", "rgb"])
def test_transforms_take_grey_and_color(mode, spec):
    everything = Augmentation(
        crop_scale=(0.3, 1.0), color_jitter=0.3, auto_augment="rand-m9-mstd0.5"
    )
    for transform in (eval_transform(spec), train_transform(spec, everything)):
        out = transform(Image.new(mode, (30, 23)))
        assert out.shape == (spec.channels, spec.size, spec.size)
        assert out.dtype == torch.uint8


def test_large_jpegs_are_decoded_at_a_smaller_size_that_every_crop_allows():
    side = draft_side(224, (0.08, 1.0), (3 / 4, 4 / 3))
    assert side == 915
    smooth = Image.linear_gradient("L").resize((4000, 3000)).convert("RGB")
    jpeg = encoded(smooth, "JPEG", quality=95)
    small = open_image(jpeg, side)
    assert small.size == (2000, 1500)
    whole = np.asarray(smooth.resize(small.size, Image.Resampling.BOX)).astype(int)
    assert np.abs(np.asarray(small) - whole).max() <= 3
    assert open_image(jpeg).size == (4000, 3000)


def write_files(folder: Path, count: int = 40) -> Source:
    paths = []
    for i in range(count):
        paths.append(str(folder / f"{i:02d}.png"))
        Image.fromarray(np.full((8, 8, 3), 5 * i, np.uint8)).save(paths[-1])
    examples = Examples(paths, np.arange(count) % 2)
    return Source("files", ("a", "b"), 3, {"train": examples, "val": examples.subset(range(8))})


def image_data(source: Source, **settings) -> ImageData:
    settings = {"batch_size": 8, "workers": 0, "bad_images": "skip", "bad_share": 0.15, **settings}
    spec = InputSpec(size=8, channels=3, mean=(0.0,) * 3, std=(1.0,) * 3)
    return ImageData(source, spec, ImageSettings(**settings))


def listed(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_bad_files_are_left_out_and_listed(tmp_path):
    source = write_files(tmp_path)
    (tmp_path / "03.png").write_bytes(b"")
    (tmp_path / "20.png").write_text("hello")
    data = image_data(source)
    with pytest.warns(UserWarning, match=r"left out 2 of 40 images of 'train'.*03\.png"):
        assert len(data.dataset("train")) == 38
    with pytest.warns(UserWarning, match=r"left out 1 of 8 images of 'val'"):
        assert len(data.dataset("val")) == 7
    data.bad.path = tmp_path / "bad_images.csv"
    header, *rows = listed(data.bad.path)
    assert header == ["split", "file", "cause"]
    assert [(split, Path(file).name) for split, file, _ in rows] == [
        ("train", "03.png"), ("train", "20.png"), ("val", "03.png"),
    ]  # fmt: skip


def test_more_bad_files_than_their_share_are_an_error(tmp_path):
    source = write_files(tmp_path)
    for i in range(5):
        (tmp_path / f"{i:02d}.png").write_bytes(b"")
    message = r"5 of 40 images .* more than the share of 0.1 that --bad_share allows: .*00\.png"
    with pytest.raises(ValueError, match=message):
        image_data(source, bad_share=0.1).dataset("train")
    with pytest.warns(UserWarning, match="left out 5"):
        image_data(source, bad_share=0.2).dataset("train")


def test_bad_files_stop_the_run_by_default(tmp_path):
    source = write_files(tmp_path)
    (tmp_path / "03.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1 of 40 images .*03\.png.*; remove them, or leave"):
        image_data(source, bad_images="error").setup("fit")


@pytest.mark.parametrize("workers", [0, 2])
def test_files_that_become_bad_in_training_are_replaced(tmp_path, workers):
    source = write_files(tmp_path)

    def epoch(data: ImageData) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = zip(*data.train_dataloader(), strict=True)
        return torch.cat(images)[:, 0, 0, 0].long(), torch.cat(labels)

    before, _ = epoch(image_data(source, workers=workers))
    data = image_data(source, workers=workers)
    data.setup("fit")
    data.bad.path = tmp_path / "bad_images.csv"
    for i in (7, 8):
        (tmp_path / f"{i:02d}.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="left out"):
        after, labels = epoch(data)
    replaced = (before == 5 * 7) | (before == 5 * 8)
    assert torch.equal(after, torch.where(replaced, 5 * 9, before))
    assert torch.equal(labels, after // 5 % 2)
    assert {Path(row[1]).name for row in listed(data.bad.path)[1:]} == {"07.png", "08.png"}
    with pytest.raises(ValueError, match=r"1 of 8 images of 'val' cannot be read: .*07\.png"):
        list(data.val_dataloader())


@pytest.mark.parametrize("policy", ["error", "unchecked"])
def test_files_that_become_bad_in_training_stop_it_in_one_line(tmp_path, policy):
    data = image_data(write_files(tmp_path), workers=1, bad_images=policy)
    data.setup("fit")
    (tmp_path / "07.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1 of 40 images .*07\.png: the file is empty") as error:
        list(data.train_dataloader())
    assert "\n" not in str(error.value)


def test_a_resumed_run_leaves_out_the_images_that_it_left_out(tmp_path):
    source = write_files(tmp_path)
    good = (tmp_path / "03.png").read_bytes()
    (tmp_path / "03.png").write_bytes(b"")
    data = image_data(source)
    with pytest.warns(UserWarning, match="left out"):
        data.setup("fit")
    expected = list(data.train_dataloader())
    state = {"batches_done": 0, "passes": 1, "images": 40, "left_out": [3]}
    (tmp_path / "03.png").write_bytes(good)
    again = image_data(source)
    again.setup("fit")
    again.load_state_dict(state)
    for (a, _), (b, _) in zip(expected, again.train_dataloader(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="has 40 training images; it had 41"):
        again.load_state_dict({**state, "images": 41})
