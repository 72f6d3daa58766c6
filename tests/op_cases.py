"""Every public op with float32 inputs, for the contracts that hold for all of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from localmamba import ops

GRID = (5, 7)
BATCH, LENGTH, CHANNELS, STATES, RANK, REDUCED = 2, 35, 18, 5, 2, 6
DIRECTIONS = ["h", "v_flip", "w2"]


def op_cases(device: str) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Returns each op and its arguments by name; dtypes are explicit."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(device)

    index = ops.scan_index(torch.empty(0, device=device), DIRECTIONS, *GRID)
    directions, steps = index.shape
    of_channel, rows = (directions, CHANNELS), (BATCH, directions, LENGTH)
    x, y, z = (
        random(BATCH, LENGTH, CHANNELS),
        random(*rows, CHANNELS),
        random(BATCH, LENGTH, CHANNELS),
    )
    scan = {
        "u": x,
        "dt": random(*rows, CHANNELS),
        "A": -random(*of_channel, STATES).exp(),
        "B": random(*rows, STATES),
        "C": random(*rows, STATES),
        "D": random(*of_channel),
        "dt_bias": random(*of_channel),
        "index": index,
    }
    steps_scan = {
        **scan,
        "u": random(BATCH, directions, steps, CHANNELS),
        "dt": random(BATCH, directions, steps, CHANNELS),
        "B": random(BATCH, directions, steps, STATES),
        "C": random(BATCH, directions, steps, STATES),
        "z": z,
        "length": LENGTH,
    }
    conv = {"weight": random(*of_channel, 4), "bias": random(*of_channel)}
    norm = {"weight": random(CHANNELS), "bias": random(CHANNELS)}
    branches = {
        "x": x,
        "x_proj": random(directions, RANK + 2 * STATES, CHANNELS),
        "dt_weight": random(*of_channel, RANK),
        "dt_bias": random(*of_channel),
        "A": scan["A"],
        "D": scan["D"],
        "index": index,
        "conv_weight": conv["weight"],
        "conv_bias": conv["bias"],
    }
    scattn = {
        "pool_weight": random(CHANNELS),
        "pool_bias": random(CHANNELS),
        "reduce_weight": random(REDUCED, CHANNELS),
        "reduce_bias": random(REDUCED),
        "select_weight": random(CHANNELS, REDUCED),
        "select_bias": random(CHANNELS),
        "norm_weight": norm["weight"],
        "norm_bias": norm["bias"],
    }
    stream = {
        "residual": random(BATCH, LENGTH, CHANNELS),
        **norm,
        "cos": random(1, LENGTH, CHANNELS),
        "sin": random(1, LENGTH, CHANNELS),
        "scale": random(BATCH),
    }
    combine = {
        "channel_weights": random(BATCH, directions, CHANNELS),
        "token_weights": random(*rows),
        "z": z,
        "norm_weight": norm["weight"],
        "norm_bias": norm["bias"],
    }
    image = {"x": random(BATCH, *GRID, CHANNELS), "weight": random(CHANNELS, 1, 3, 3)}
    return {
        "selective_scan": (ops.selective_scan, scan),
        "selective_scan in scan order": (ops.selective_scan, steps_scan),
        "s6_branches": (ops.s6_branches, branches),
        "causal_conv": (ops.causal_conv, {"x": x, **conv, "index": index}),
        "depthwise_conv": (ops.depthwise_conv, {**image, "bias": norm["bias"]}),
        "residual_norm": (ops.residual_norm, {"hidden": x, **stream}),
        "token_norm": (ops.token_norm, {"x": x, "weight": norm["weight"]}),
        "layer norm": (ops.token_norm, {"x": x, **norm}),
        "pool_directions": (ops.pool_directions, {"y": y, "z": z, **norm}),
        "combine_directions": (ops.combine_directions, {"y": y, **combine}),
        "sum of directions": (ops.combine_directions, {"y": y}),
        "scattn_combine": (ops.scattn_combine, {"y": y, "z": z, **scattn}),
    }


NAMES = (
    "selective_scan", "selective_scan in scan order", "s6_branches", "causal_conv",
    "depthwise_conv", "residual_norm", "token_norm", "layer norm", "pool_directions",
    "combine_directions", "sum of directions", "scattn_combine",
)  # fmt: skip
"""The keys of `op_cases`."""


CONSTANTS = {"cos", "sin", "scale"}
"""Arguments without gradients."""


def results(op: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Returns the outputs of an op and the gradients of its floating arguments, by name."""
    leaves = {
        name: x.detach().clone().requires_grad_(name not in CONSTANTS)
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for name, x in arguments.items()
    }
    outputs = op(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum(x.float().square().sum() for x in outputs).backward()
    found = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
    for name, x in leaves.items():
        if isinstance(x, Tensor) and x.requires_grad:
            found[f"gradient of {name}"] = x.grad
    return found


def check_default_dtype(name: str, device: str, default: torch.dtype) -> None:
    """Checks that an op of float32 tensors computes the same under another default dtype."""
    assert torch.get_default_dtype() == torch.float32
    expected = results(*op_cases(device)[name])
    torch.set_default_dtype(default)
    try:
        found = results(*op_cases(device)[name])
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.keys() == expected.keys()
    for key, x in expected.items():
        assert found[key].dtype == x.dtype, key
        torch.testing.assert_close(
            found[key], x, rtol=0.0, atol=0.0, msg=lambda m, k=key: f"{k}: {m}"
        )
