"""Everything that decides what a training comes to."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from localmamba.data import Augmentation, ImageSettings
from localmamba.models.directions import DirectionTable
from localmamba.tasks.settings import Hardware, TrainingSettings, join_groups, split_groups

GROUPS = {
    "images": ImageSettings,
    "augmentation": Augmentation,
    "training": TrainingSettings,
    "hardware": Hardware,
}


@dataclass(frozen=True)
class TrainingJob:
    """A training: of which model, on what, how.

    Attributes:
        data: `digits`, `fashion-mnist` or a folder.
        model: timm's name.
        directions: Of a Local model: a table, or a JSON file.
        model_args: Further arguments of the model.
        pretrained: Whether to start from weights that timm fetches.
        start_from: A checkpoint to start from, of the same model or of its supernet.
        seed: Of initial weights, order of images and augmentation.
        images: See there.
        augmentation: See there.
        training: See there.
        hardware: See there.
    """

    data: str
    model: str
    directions: DirectionTable | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    start_from: str | None = None
    seed: int = 0
    images: ImageSettings = field(default_factory=ImageSettings)
    augmentation: Augmentation = field(default_factory=Augmentation)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    hardware: Hardware = field(default_factory=Hardware)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "TrainingJob":
        """The job of a flat table of settings, as recipes and config.yaml have it.

        Raises:
            ValueError: If a setting is unknown or `data` or `model` is missing.
        """
        settings = split_groups(config, GROUPS)
        try:
            return cls(**settings)
        except TypeError as error:
            raise ValueError(f"settings of a training: {error}") from None

    def config(self) -> dict[str, Any]:
        """The inverse of `from_config`."""
        return join_groups(self, GROUPS)
