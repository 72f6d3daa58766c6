"""ImageNet-1K: names of its classes, released models, reassessed labels."""

import json
import pkgutil
import re
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten

import numpy as np
from torch import nn

from localmamba.data import ImageSettings
from localmamba.models import load_released
from localmamba.models.loading import build_model
from localmamba.tasks.building import input_spec
from localmamba.tasks.checkpoints import Card


def wnids() -> tuple[str, ...]:
    """Returns the WordNet ids of the 1000 classes, in the order of the outputs."""
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo("imagenet-1k").label_names())


def describe(classes: Sequence[str]) -> list[str]:
    """Returns the English names of classes that are WordNet ids, and others as they are."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    known = set(info.label_names())
    return [info.label_name_to_description(c) if c in known else c for c in classes]


def class_names(classes: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Returns the names that a data set may have for the classes of a model, label by label.

    ImageNet's classes are called by WordNet id, or by number as the folders of ImageNet-V2 are.
    Sorted as text, numbers are not in the order of the labels: 0, 1, 10, 100.
    """
    ids, numbers = wnids(), tuple(map(str, range(1000)))
    for known, other in ((ids, numbers), (numbers, ids)):
        if set(classes) == set(known):
            translated = dict(zip(known, other, strict=True))
            return [classes, tuple(translated[name] for name in classes)]
    return [classes]


def load_published(name: str, path: Path) -> tuple[nn.Module, Card]:
    """Loads a published checkpoint of an ImageNet model into a model of this package.

    Args:
        name: timm's name of the model, such as localvim_tiny.
        path: The file, in a layout of LocalMamba, Vim or VMamba.

    Raises:
        ValueError: If the file is not there, holds more than tensors or does not fit the model.
    """
    spec = input_spec(name, ImageSettings(), channels=3)
    arguments = {"num_classes": 1000}
    model = build_model(name, arguments)
    try:
        load_released(model, path)
    except ValueError as error:  # it names every tensor that does not fit
        raise ValueError(f"released, as {name}: {shorten(str(error), 300)}") from None
    return model.eval(), Card(name, arguments, wnids(), spec, data="ImageNet-1K")


class RealLabels:
    """Reassessed labels of ImageNet's validation images ("Are we done with ImageNet?", 2020).

    Args:
        path: real.json of google-research/reassessed-imagenet, a list of labels for each image in
            the order of the file names; or `timm`, for the copy that timm brings.
        classes: Classes of the model.

    Raises:
        ValueError: If the file is of another form, or the classes are not ImageNet's.
    """

    def __init__(self, path: str, classes: tuple[str, ...]):
        ids = class_names(classes)
        if len(ids) == 1:
            raise ValueError(
                f"real needs a model of the 1000 classes of ImageNet; this one has {len(classes)}"
            )
        order = wnids() if classes[0] in wnids() else tuple(map(str, range(1000)))
        # Labels of the file -> outputs of the model, which may be sorted as text.
        output = {label: classes.index(name) for label, name in enumerate(order)}
        try:
            content = json.loads(_read(path))
            self.labels = [{output[label] for label in labels} for labels in content]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path} must be a list with a list of labels from 0 to 999 for each validation "
                f"image ({error})"
            ) from None

    def metrics(self, images: Sequence[str], ranked: np.ndarray) -> dict[str, float]:
        """Returns the accuracy by these labels; images that have none are left out.

        Args:
            images: Paths of the images; the names hold their numbers.
            ranked: Predicted classes of each image, best first, [n, k].

        Raises:
            ValueError: If a name is not that of a validation image, or no image has a label.
        """
        hits = []
        for image, predicted in zip(images, ranked.tolist(), strict=True):
            number = re.search(r"ILSVRC2012_val_(\d{8})", Path(image).name)
            if number is None or not 1 <= int(number[1]) <= len(self.labels):
                raise ValueError(
                    f"real needs images called ILSVRC2012_val_00000001 to "
                    f"{len(self.labels):08d}, got {image}"
                )
            if labels := self.labels[int(number[1]) - 1]:
                hits.append((predicted[0] in labels, bool(labels & set(predicted))))
        if not hits:
            raise ValueError("real: none of the images has a reassessed label")
        accuracy, top5 = np.mean(hits, axis=0)
        return {"real_accuracy": accuracy, "real_top5": top5, "real_images": len(hits)}


def _read(path: str) -> bytes:
    if path != "timm":
        return Path(path).read_bytes()
    content = pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json")
    assert content is not None
    return content
