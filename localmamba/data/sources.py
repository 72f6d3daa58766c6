"""A data set from what the user names: `digits`, `fashion-mnist` or a folder."""

from collections.abc import Sequence
from pathlib import Path

from localmamba.data.examples import Source
from localmamba.data.folders import load_folder
from localmamba.data.named import load_digits, load_fashion_mnist
from localmamba.data.settings import ImageSettings

DATA_NAMES = ("digits", "fashion-mnist")
"""Data sets known by name; anything else is taken as a folder."""


def load_source(
    data: str, settings: ImageSettings | None = None, classes: Sequence[str] | None = None
) -> Source:
    """Loads a data set.

    Args:
        data: `digits`, `fashion-mnist` or a folder of images (see `load_folder`).
        settings: See there.
        classes: For a trained model: its classes, whose order gives the labels.

    Raises:
        ValueError: If there is no such data, the folder cannot be used or its classes are not among
            those given; the message says what is allowed.
    """
    settings = settings or ImageSettings()
    if data == "digits":
        source = load_digits()
    elif data == "fashion-mnist":
        source = load_fashion_mnist(settings.data_root)
    else:
        folder = _existing_folder(data)
        return load_folder(folder, settings.held_out, settings.split_seed, classes)
    if classes is not None and tuple(classes) != source.classes:
        raise ValueError(
            f"{data} has the classes {', '.join(source.classes)}; the model was trained on "
            f"{', '.join(classes[:10])}{', ...' if len(classes) > 10 else ''}"
        )
    return source


def _existing_folder(data: str) -> Path:
    folder = Path(data).expanduser()
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ValueError(
            f"data {data!r} {what}; allowed: {', '.join(DATA_NAMES)}, or a folder of images"
        )
    return folder


def check_trainable(source: Source) -> None:
    """ValueError unless there are a training part, a held-out part and at least two classes."""
    if "train" not in source.splits:
        raise ValueError(
            f"{source.name} has {', '.join(source.splits)} but no train folder of class folders"
        )
    if len(source.classes) < 2:
        raise ValueError(
            f"{source.name} holds one class only ({source.classes[0]}); at least two are needed"
        )
    if not len(source.split(source.watched)):
        raise ValueError(
            f"{source.name} has too few images to hold some out; a class needs at least two"
        )
