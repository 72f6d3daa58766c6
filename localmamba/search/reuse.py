"""A final model that starts from the weights of the supernet in which its directions were found."""

import torch
from torch import nn

from ..layers import DirectionalMixer

_ALLOWED = ("head",)
"""The part that may differ: the classes."""


@torch.no_grad()
def start_from_supernet(model: nn.Module, supernet: nn.Module) -> list[str]:
    """Copies into a model what its supernet learnt: shared layers as they are, branches by name.

    The softmax supernet adds its branches after a LayerNorm, the final model without: there the
    copy is a start, not the same function. A path of `single_path` is the same function.

    Args:
        model: What is to be trained, with directions that the supernet has as candidates.
        supernet: A trained supernet of the same width and depth.

    Returns:
        The names of the parameters that keep their own initial values: of the head, if the classes
        differ.

    Raises:
        ValueError: If the two do not fit.
    """
    ours = [m for m in model.modules() if isinstance(m, DirectionalMixer)]
    theirs = [m for m in supernet.modules() if isinstance(m, DirectionalMixer)]
    if len(ours) != len(theirs):
        raise ValueError(f"a model of {len(ours)} blocks, a supernet of {len(theirs)}")
    source = supernet.state_dict()
    rows = {id(a): _positions(a, b) for a, b in zip(ours, theirs, strict=True)}
    for name, module in model.named_modules():
        if isinstance(module, DirectionalMixer):
            for key in module.branches.state_dict(prefix=f"{name}.branches."):
                source[key] = source[key][rows[id(module)]]
    target = {k: v for k, v in model.state_dict().items() if not k.endswith("_extra_state")}
    fits = {k for k, v in target.items() if k in source and source[k].shape == v.shape}
    left = [key for key in target if key not in fits]
    foreign = [key for key in left if not set(_ALLOWED) & set(key.split("."))]
    if foreign:
        raise ValueError(
            f"the supernet's weights do not fit: {foreign[0]} is {_shape(source, foreign[0])} "
            f"there, {_shape(target, foreign[0])} here; the two need one width and depth"
        )
    for key in fits:
        target[key].copy_(source[key])
    return left


def _positions(mixer: DirectionalMixer, candidates: DirectionalMixer) -> list[int]:
    missing = set(mixer.directions) - set(candidates.directions)
    if missing:
        raise ValueError(f"the supernet has no {' '.join(sorted(missing))} among its candidates")
    return [candidates.directions.index(name) for name in mixer.directions]


def _shape(state: dict, key: str) -> str:
    return str(list(state[key].shape)) if key in state else "absent"
