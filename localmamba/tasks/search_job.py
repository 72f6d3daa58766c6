"""Everything that decides what a search comes to."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from localmamba.data import Augmentation, ImageSettings
from localmamba.ops import CANDIDATES
from localmamba.search import DEFAULT_STRATEGY, SearchSettings, check_keep, find_strategy
from localmamba.tasks import job
from localmamba.tasks.settings import Hardware, TrainingSettings, join_groups, split_groups

GROUPS = {"search": SearchSettings, **job.GROUPS}


@dataclass(frozen=True)
class SearchJob:
    """A search: with which supernet, on what, how.

    Attributes:
        data: `digits`, `fashion-mnist` or a folder.
        model: timm's name of a supernet.
        candidates: Directions that every block may have.
        strategy: A name in `localmamba.search.STRATEGIES`.
        model_args: Further arguments of the model.
        chunk_size: Directions of a block that are computed at a time, and again in the backward
            pass, which takes longer and saves memory with many candidates; 0 for all.
        checkpointing: Whether blocks are run again in the backward pass, to save memory.
        seed: Of initial weights, order of images, augmentation and all that the strategy draws.
        search: See there.
        images: See there.
        augmentation: See there.
        training: See there.
        hardware: See there.
    """

    data: str
    model: str
    candidates: Sequence[str] = CANDIDATES
    strategy: str = DEFAULT_STRATEGY
    model_args: dict[str, Any] = field(default_factory=dict)
    chunk_size: int = 0
    checkpointing: bool = False
    seed: int = 0
    search: SearchSettings = field(default_factory=SearchSettings)
    images: ImageSettings = field(default_factory=ImageSettings)
    augmentation: Augmentation = field(default_factory=Augmentation)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    hardware: Hardware = field(default_factory=Hardware)

    def __post_init__(self) -> None:
        check_keep(self.candidates, self.search.keep)
        find_strategy(self.strategy)
        if self.chunk_size < 0:
            raise ValueError(f"chunk_size must be at least 0, got {self.chunk_size}")
        if self.training.ema:
            raise ValueError("a search keeps no running average of the weights: ema must be 0")
        if self.hardware.devices > 1 or self.hardware.precision == "16-mixed":
            raise ValueError("a search runs on one device, with precision 32 or bf16-mixed")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "SearchJob":
        """The job of a flat table of settings, as recipes and config.yaml have it.

        Raises:
            ValueError: If a setting is unknown or `data` or `model` is missing.
        """
        settings = split_groups(config, GROUPS)
        try:
            return cls(**settings)
        except TypeError as error:
            raise ValueError(f"settings of a search: {error}") from None

    def config(self) -> dict[str, Any]:
        """The inverse of `from_config`."""
        return join_groups(self, GROUPS)

    def settings(self) -> dict[str, Any]:
        """What of it the directions depend on, on whatever machine: for their file."""
        elsewhere = {"model", "candidates", "strategy", "seed", "epochs", "workers", "data_root"}
        elsewhere |= set(asdict(self.hardware)) - {"precision"}
        return {key: value for key, value in self.config().items() if key not in elsewhere}
