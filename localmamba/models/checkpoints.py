"""Reads tensors from checkpoint files. No pickled code is run."""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

EMA_KEYS = ("state_dict_ema", "model_ema", "ema_model", "ema")
PLAIN_KEYS = ("state_dict", "model")
PREFIXES = ("module.", "_orig_mod.")
SEGMENTOR = "backbone."

# Training states also hold command line arguments and NumPy scalars, which are safe to unpickle.
_SCALAR = np.float64(0).__reduce__()[0]
_INERT: list[Any] = [
    argparse.Namespace,
    np.dtype,
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    *(type(np.dtype(name)) for name in ("float32", "float64", "int32", "int64", "bool")),
]


def read_checkpoint(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """Reads a checkpoint file (.safetensors, or one of `torch.save`) into CPU memory.

    Raises:
        ValueError: If there is no such file, or it is not a checkpoint of tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no checkpoint file at {str(path)!r}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals(_INERT):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, Exception) as error:  # a broken pickle may raise anything
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"{str(path)!r} is not a readable checkpoint: {reason}") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{str(path)!r} holds a {type(content).__name__}, not named tensors")
    return content


def find_tensors(content: Mapping[str, Any], ema: bool | None = None) -> dict[str, Tensor]:
    """Finds the state dict in a checkpoint and strips the prefixes of wrappers.

    From the checkpoint of a detector or segmentor it takes the backbone.

    Args:
        content: A state dict, or a checkpoint that holds some.
        ema: Whether to take averaged weights; None takes them where there are any.

    Raises:
        ValueError: If there are no tensors, or no averaged ones though asked for.
    """
    averaged = [content[key] for key in EMA_KEYS if isinstance(content.get(key), Mapping)]
    plain = [content[key] for key in PLAIN_KEYS if isinstance(content.get(key), Mapping)]
    if ema and not averaged:
        raise ValueError(f"the checkpoint holds no averaged weights ({', '.join(EMA_KEYS)})")
    found = ([] if ema is False else averaged) + plain + [content]
    tensors = {
        str(name): torch.as_tensor(value)
        for name, value in found[0].items()
        if isinstance(value, (Tensor, np.ndarray))
    }
    if not tensors:
        raise ValueError(f"the checkpoint holds no tensors, only {', '.join(map(str, content))}")
    for prefix in PREFIXES:
        while all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    if any(name.startswith(SEGMENTOR) for name in tensors):
        tensors = {
            name.removeprefix(SEGMENTOR): value
            for name, value in tensors.items()
            if name.startswith(SEGMENTOR)
        }
    return tensors
