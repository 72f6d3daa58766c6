"""Deterministic weights and inputs for the parity fixtures in this folder.

A fixture names every tensor of a released checkpoint layout (name -> shape) and
the outputs that the released implementation gives for weights made by `fill`
and the image made by `image`.  So a fixture is a few kilobytes, not a checkpoint.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np


def _normal(name: str, shape) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).standard_normal(shape)


def fill(name: str, shape) -> np.ndarray:
    """The float32 value of the tensor `name`: same name and shape, same value."""
    x, leaf = _normal(name, shape), name.rsplit(".", 1)[-1]
    if leaf.startswith("A_log") or leaf in ("A_logs", "A_b_log"):
        x = np.log(np.arange(1, shape[-1] + 1)) + 0.1 * x
    elif leaf in ("D", "D_b", "Ds") or leaf.startswith("D_"):
        x = 1 + 0.2 * x
    elif leaf in ("dt_projs_bias",) or (leaf == "bias" and ".dt_proj" in name):
        x = -3 + 0.7 * x  # softplus: about 0.02 to 0.2
    elif leaf == "bias":
        x = 0.1 * x
    elif len(shape) == 1:  # norm scales
        x = 1 + 0.1 * x
    elif leaf in ("pos_embed", "cls_token"):
        x = 0.3 * x
    elif leaf != "weights":  # linear and convolution kernels; `weights` are scan logits
        kernel = len(shape) > 2 and leaf == "weight"
        fan_in = math.prod(shape[2:]) * shape[1] if kernel else shape[-1]
        x = x / math.sqrt(fan_in)
    return np.ascontiguousarray(x, dtype=np.float32)


def image(size, batch: int = 2) -> np.ndarray:
    """The float32 input of shape (batch, 3, *size)."""
    return np.ascontiguousarray(_normal(f"image{tuple(size)}", (batch, 3, *size)), dtype=np.float32)


def load(path) -> tuple[dict, dict]:
    """A fixture and its state dict of NumPy arrays (without buffers that the model computes)."""
    fixture = json.loads(Path(path).read_text())
    return fixture, {k: fill(k, s) for k, s in fixture["state_dict"].items()}
