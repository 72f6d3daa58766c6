"""Checkpoints: safetensors whose metadata describe the model."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import nn

from localmamba._files import write_atomically
from localmamba.data import InputSpec
from localmamba.models.loading import CHECKSUM, KEY, checksum, load_with_card


@dataclass(frozen=True)
class Card:
    """Description of a model, in the metadata of its checkpoint.

    Attributes:
        model: timm's name of the model.
        arguments: Arguments of `timm.create_model`.
        classes: Class names, in the order of the outputs.
        input: Size, channels and normalization of the input.
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
    def from_dict(cls, content: Mapping[str, Any]) -> "Card":
        """The inverse of `asdict(card)`, also after JSON made its tuples lists."""
        spec = content["input"] | {key: tuple(content["input"][key]) for key in ("mean", "std")}
        return cls(**{**content, "input": InputSpec(**spec), "classes": tuple(content["classes"])})


def save_checkpoint(path: Path, model: nn.Module, card: Card) -> None:
    """Writes a model, its description and a checksum of both; equal models give equal files."""
    state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    text = json.dumps(asdict(card))
    content = save(state, metadata={KEY: text, CHECKSUM: checksum(text, state)})
    write_atomically(path, _with_sorted_header(content))


def _with_sorted_header(content: bytes) -> bytes:
    """Returns a safetensors file whose metadata are sorted; the library's order is random."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned
    return len(text).to_bytes(8, "little") + text + content[start:]


def load_checkpoint(path: str | Path) -> tuple[nn.Module, Card]:
    """Loads a model as `localmamba.load` does, with its card."""
    model, content = load_with_card(path)
    return model, Card.from_dict(content)
