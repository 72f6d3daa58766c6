"""Checkpoints: safetensors whose metadata describe the model."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from localmamba._files import write_atomically
from localmamba.data import InputSpec
from localmamba.tasks.building import build_model

KEY = "localmamba"


@dataclass(frozen=True)
class Card:
    """Description of a model, in the metadata of its checkpoint.

    Attributes:
        model: timm's name of the model.
        arguments: Arguments of `timm.create_model`.
        classes: Class names, in the order of the outputs.
        input: Size, channels and normalisation of the input.
        data: Name or folder of the training data.
        held_out: Share of that folder's images that was held out, if the folder was not split.
        split_seed: Seed of that split.
        metrics: Metrics on the held-out images.
    """

    model: str
    arguments: dict[str, Any]
    classes: tuple[str, ...]
    input: InputSpec
    data: str = ""
    held_out: float = 0.2
    split_seed: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def from_json(cls, text: str) -> "Card":
        """Reads `json.dumps(asdict(card))`."""
        content = json.loads(text)
        spec = content["input"] | {key: tuple(content["input"][key]) for key in ("mean", "std")}
        return cls(**{**content, "input": InputSpec(**spec), "classes": tuple(content["classes"])})


def save_checkpoint(path: Path, model: nn.Module, card: Card) -> None:
    """Writes a model and its description."""
    state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    write_atomically(path, save(state, metadata={KEY: json.dumps(asdict(card))}))


def load_checkpoint(path: str | Path) -> tuple[nn.Module, Card]:
    """Reads a model that `save_checkpoint` wrote, in evaluation mode; runs no code of the file.

    Raises:
        ValueError: If the file is missing, of another kind or cut short.
    """
    if not Path(path).is_file():
        raise ValueError(
            f"no checkpoint {str(path)!r}; `localmamba train` writes model.safetensors"
        )
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no safetensors file, or cut short ({error})") from None
    if KEY not in metadata:
        raise ValueError(
            f"{path} does not say which model it is; only checkpoints of `localmamba train` do "
            "(weights of the paper: localmamba.load_released)"
        )
    card = Card.from_json(metadata[KEY])
    model = build_model(card.model, card.arguments)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit {card.model}: {error}") from None
    return model.eval(), card
