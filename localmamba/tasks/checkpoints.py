"""Checkpoints: weights in safetensors, with all that is needed to use them in its metadata."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import nn

from localmamba.data import InputSpec
from localmamba.models.loading import KEY, load_with_card


@dataclass(frozen=True)
class Card:
    """What a checkpoint says of itself.

    Attributes:
        model: timm's name of the model.
        arguments: Of `timm.create_model`.
        classes: Class names, in the order of the outputs.
        input: What the model takes.
        data: What it was trained on, a name or a folder.
        held_out: Share of that folder's images that was held out, if the folder was not split.
        split_seed: Seed of that split.
        metrics: Of the held-out images.
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
    def from_dict(cls, content: Mapping[str, Any]) -> "Card":
        """The inverse of `asdict(card)`, also after JSON made its tuples lists."""
        spec = content["input"] | {key: tuple(content["input"][key]) for key in ("mean", "std")}
        return cls(**{**content, "input": InputSpec(**spec), "classes": tuple(content["classes"])})


def save_checkpoint(path: Path, model: nn.Module, card: Card) -> None:
    """Writes a model; a reader finds the old file or the new one, never half of one."""
    state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    draft = path.with_name(f".{path.name}.draft")
    draft.write_bytes(save(state, metadata={KEY: json.dumps(asdict(card))}))
    os.replace(draft, path)


def load_checkpoint(path: str | Path) -> tuple[nn.Module, Card]:
    """Loads a model as `localmamba.load` does, with its card."""
    model, content = load_with_card(path)
    return model, Card.from_dict(content)
