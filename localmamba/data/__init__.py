"""Image data sets: loading by name or from a folder, validation, augmentation, batching.

Imports nothing else from localmamba.
"""

from localmamba.data.examples import Examples, Source
from localmamba.data.images import Encoded, open_image
from localmamba.data.settings import Augmentation, ImageSettings, InputSpec
from localmamba.data.sources import DATA_NAMES, check_trainable, load_source
from localmamba.data.splits import stratified_split

__all__ = [
    "DATA_NAMES",
    "Augmentation",
    "Encoded",
    "Examples",
    "ImageSettings",
    "InputSpec",
    "Source",
    "check_trainable",
    "load_source",
    "open_image",
    "stratified_split",
]
