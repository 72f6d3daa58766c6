"""Jobs: everything that decides the result of a training or a search."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Self

from localmamba.data import Augmentation, ImageSettings
from localmamba.models.directions import DirectionTable
from localmamba.ops import CANDIDATES
from localmamba.search import DEFAULT_STRATEGY, SearchSettings, check_keep, find_strategy
from localmamba.tasks.settings import Hardware, TrainingSettings

ELSEWHERE = {"device", "threads", "deterministic", "workers", "data_root", "bad_images"}
"""Settings that may differ between the machines on which a run is started and resumed."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Settings of a run on images.

    Attributes:
        data: `digits`, `fashion-mnist` or a folder.
        model: timm's name of the model.
        model_args: Further arguments of the model.
        seed: Seed of the initial weights, the order of images, augmentation and a search's draws.
        images: Images and batches.
        augmentation: Augmentation of the training images.
        training: Optimiser and schedule.
        hardware: Device, number of devices, precision.
    """

    kind: ClassVar[str]

    data: str
    model: str
    model_args: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    images: ImageSettings = field(default_factory=ImageSettings)
    augmentation: Augmentation = field(default_factory=Augmentation)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    hardware: Hardware = field(default_factory=Hardware)

    @classmethod
    def _groups(cls) -> dict[str, Any]:
        """The fields that are dataclasses, with their classes."""
        return {f.name: f.default_factory for f in fields(cls) if is_dataclass(f.default_factory)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Makes a job from a flat table of settings, as recipes and config.yaml have it.

        Raises:
            ValueError: If a setting is unknown, or `data` or `model` is missing.
        """
        rest = dict(config)
        for name, group in cls._groups().items():
            values = {f.name: rest.pop(f.name) for f in fields(group) if f.name in rest}
            # YAML has lists where settings have tuples.
            rest[name] = group(
                **{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
            )
        try:
            return cls(**rest)
        except TypeError as error:
            raise ValueError(f"settings of a {cls.kind}: {error}") from None

    def config(self) -> dict[str, Any]:
        """Returns the flat table of settings; the inverse of `from_config`."""
        content = asdict(self)
        groups = [content.pop(name) for name in self._groups()]
        return {key: value for part in (content, *groups) for key, value in part.items()}


@dataclass(frozen=True, kw_only=True)
class TrainingJob(Job):
    """Settings of a training.

    Attributes:
        directions: Scan directions of a Local model: a table, or a JSON file.
        pretrained: Whether to start from weights that timm fetches.
        start_from: Checkpoint to start from, of the same model or of its supernet.
    """

    kind = "training"

    directions: DirectionTable | None = None
    pretrained: bool = False
    start_from: str | None = None


@dataclass(frozen=True, kw_only=True)
class SearchJob(Job):
    """Settings of a search; `model` is a supernet.

    Attributes:
        candidates: Directions that every block may have.
        strategy: A name in `localmamba.search.STRATEGIES`.
        chunk_size: Directions of a block that run at a time, and again in the backward pass, which
            costs time and saves memory; 0 for all at once.
        checkpointing: Whether blocks are run again in the backward pass, to save memory.
        search: Settings of the strategy.
    """

    kind = "search"

    candidates: Sequence[str] = CANDIDATES
    strategy: str = DEFAULT_STRATEGY
    chunk_size: int = 0
    checkpointing: bool = False
    search: SearchSettings = field(default_factory=SearchSettings)

    def __post_init__(self) -> None:
        check_keep(self.candidates, self.search.keep)
        find_strategy(self.strategy)
        if self.chunk_size < 0:
            raise ValueError(f"chunk_size must be at least 0, got {self.chunk_size}")
        if self.hardware.precision == "16-mixed":
            raise ValueError("a search runs with precision 32 or bf16-mixed, got 16-mixed")

    def settings(self) -> dict[str, Any]:
        """Returns the settings for the file of the choice, which names the other ones itself."""
        others = {"model", "candidates", "strategy", "seed", "epochs", *ELSEWHERE}
        return {key: value for key, value in self.config().items() if key not in others}
