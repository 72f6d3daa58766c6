"""Jobs: everything that decides the result of a training or a search."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from inspect import signature
from typing import Any, ClassVar, Self, TypeVar

from localmamba.data import Augmentation, ImageSettings
from localmamba.ops import CANDIDATES
from localmamba.search import DEFAULT_STRATEGY, SearchSettings, check_keep, find_strategy
from localmamba.tasks.settings import Hardware, Saving, TrainingSettings

ELSEWHERE = {
    "device", "devices", "device_batch", "threads", "deterministic", "launch", "workers",
    "data_root", "bad_images", "bad_share", "save_steps",
}  # fmt: skip
"""Settings that may differ between the machines on which a run is started and resumed."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Job:
    """Settings of a run on images; the command line has its fields as options.

    Attributes:
        data: digits, fashion-mnist, or a folder of images: train/ and val/ (or test/) with a folder
            for each class in them, or just a folder for each class, which is then split; or
            hfds/FOLDER with parquet files of Hugging Face; or wds/FOLDER or
            wds/a-{000..146}.tar, WebDataset shards.
        model: timm's name, of a model here or of timm's own, such as localvim_tiny or
            deit_tiny_patch16_224; for a search of a supernet, such as localvim_search.
        model_args: Further arguments of the model, such as '{embed_dim: 96}'.
        seed: Seed of the initial weights, the order of images, augmentation and a search's draws.
        images: Images and batches.
        augmentation: Augmentation of the training images.
        training: Optimizer and schedule.
        hardware: Device, number of devices, precision.
        saving: When the state of the run is saved.
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
    saving: Saving = field(default_factory=Saving)

    def __post_init__(self) -> None:
        if self.hardware.parallel == "fsdp" and self.training.ema:
            raise ValueError(
                f"ema runs with parallel ddp; with fsdp it must be 0, got {self.training.ema}"
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Makes a job from a flat table of settings, as recipes and config.yaml have it.

        Raises:
            ValueError: If a setting is unknown, or `data` or `model` is missing.
        """
        try:
            return from_flat(cls, config)
        except TypeError as error:
            raise ValueError(f"settings of a {cls.kind}: {error}") from None

    def config(self) -> dict[str, Any]:
        """Returns the flat table of settings; the inverse of `from_config`."""
        content = asdict(self)
        groups = [content.pop(f.name) for f in fields(self) if is_dataclass(f.type)]
        return {key: value for part in (content, *groups) for key, value in part.items()}


def from_flat(kind: Callable[..., T], table: Mapping[str, Any]) -> T:
    """Makes a dataclass from a flat table of its fields and those of its nested dataclasses.

    Lists, which YAML has in place of tuples, become tuples.
    """
    rest = {key: tuple(v) if isinstance(v, list) else v for key, v in table.items()}
    for name, parameter in signature(kind).parameters.items():
        group = parameter.annotation
        if isinstance(group, type) and is_dataclass(group):
            names = [f.name for f in fields(group) if f.name in rest]
            rest[name] = from_flat(group, {key: rest.pop(key) for key in names})
    return kind(**rest)


@dataclass(frozen=True, kw_only=True)
class TrainingJob(Job):
    """Settings of a training.

    Attributes:
        directions: Scan directions of a Local model: a list for every block, a table with a row for
            each, or a JSON file, as `localmamba search` writes it.
        pretrained: Whether to start from weights that timm fetches; not with start_from.
        start_from: Checkpoint to start from: of the same model or of its supernet, as this package
            writes it, or as released. The head starts anew if the classes are others in number.
    """

    kind = "training"

    directions: list[list[str]] | list[str] | str | None = None
    pretrained: bool = False
    start_from: str | None = None


@dataclass(frozen=True, kw_only=True)
class SearchJob(Job):
    """Settings of a search; `model` is a supernet.

    Attributes:
        candidates: Directions to choose from, such as h v w3 w2x7 hilbert_flip; the paper's eight
            by default.
        strategy: Name of the search strategy.
        chunk_size: Directions of a block that run at a time, and again in the backward pass, which
            costs time and saves memory; 0 for all at once.
        checkpointing: Whether blocks are run again in the backward pass, to save memory.
        search: Settings of the strategy.
    """

    kind = "search"

    candidates: tuple[str, ...] = CANDIDATES
    strategy: str = DEFAULT_STRATEGY
    chunk_size: int = 0
    checkpointing: bool = False
    search: SearchSettings = field(default_factory=SearchSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hardware.parallel != "ddp":
            raise ValueError(f"a search runs with parallel ddp, got {self.hardware.parallel}")
        check_keep(self.candidates, self.search.keep)
        find_strategy(self.strategy)
        if self.chunk_size < 0:
            raise ValueError(f"chunk_size must be at least 0, got {self.chunk_size}")
        if self.training.skip_nonfinite:
            raise ValueError("a search skips no steps: skip_nonfinite must be 0")
        if self.hardware.precision == "16-mixed":
            raise ValueError("a search runs with precision 32 or bf16-mixed, got 16-mixed")
        launch = self.hardware.launch
        if launch != "eager" and not find_strategy(self.strategy).fixed_paths:
            raise ValueError(
                f"launch {launch}: {self.strategy} draws its paths anew; allowed: eager"
            )
        if launch == "graph" and (self.chunk_size or self.checkpointing):
            raise ValueError("launch graph: not with chunk_size and checkpointing")

    def settings(self) -> dict[str, Any]:
        """Returns the settings for the file of the choice, which names the other ones itself."""
        others = {"model", "candidates", "strategy", "seed", "epochs", *ELSEWHERE}
        return {key: value for key, value in self.config().items() if key not in others}
