"""Supernets: made from a model, registered in timm, and the start of a final model."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from timm.models import generate_default_cfgs, register_model
from torch import nn

from ..layers import DirectionalMixer
from ..models import LocalVim, LocalVMamba, localvim, localvmamba
from ..models.base import pretrained_cfg
from ..models.loading import PACKAGE_ARGUMENTS
from ..models.localvim import create_localvim
from ..models.localvmamba import create_localvmamba
from ..models.released import RECORD
from ..ops import CANDIDATES
from .mixers import SUPERNET_MIXERS, SupernetMixer

Model = TypeVar("Model", bound=nn.Module)


def make_supernet(model: Model, weighted: bool = True) -> Model:
    """Turns a model into a supernet, in place: its directions become candidates.

    Each mixer gets the supernet's class (as `fully_shard` of PyTorch does with modules), so
    parameters, hooks and references stay; with `weighted`, state dicts gain `alpha` of each mixer.

    Args:
        model: A model of this package, or any with its mixers.
        weighted: Whether the branches are added with weights softmax(alpha).

    Returns:
        The model.

    Raises:
        ValueError: If it has no mixer, or one of a class that has no supernet.

    Example:
        >>> model = timm.create_model("localvim_demo", directions=["h", "v", "w2", "w4"])
        >>> make_supernet(model).blocks[0].mixer.alpha.shape
        torch.Size([4])
    """
    mixers = _directional_mixers(model)
    if not mixers:
        raise ValueError("a search needs a model of this package: no mixer with directions found")
    for mixer in mixers:
        if not isinstance(mixer, SupernetMixer):
            kind = type(mixer)
            if kind not in SUPERNET_MIXERS:
                raise ValueError(f"there is no supernet mixer for {kind.__name__}")
            mixer.__class__ = SUPERNET_MIXERS[kind]
            assert isinstance(mixer, SupernetMixer)
            mixer.become_supernet()
        mixer.set_weighted(weighted)
    return model


def find_mixers(model: nn.Module) -> list[SupernetMixer]:
    """Returns the mixers of a supernet, in the order of its blocks.

    Raises:
        ValueError: If the model has none, or they do not have the same candidates.
    """
    mixers = [module for module in model.modules() if isinstance(module, SupernetMixer)]
    if not mixers:
        raise ValueError("the model is no supernet; localmamba.search.make_supernet makes one")
    if any(mixer.directions != mixers[0].directions for mixer in mixers):
        raise ValueError("a supernet has the same candidate directions in every block")
    return mixers


def _directional_mixers(model: nn.Module) -> list[DirectionalMixer]:
    return [module for module in model.modules() if isinstance(module, DirectionalMixer)]


@torch.no_grad()
def start_from_supernet(model: nn.Module, supernet: nn.Module) -> list[str]:
    """Copies the weights of a supernet into a final model: branches by the name of the direction.

    A supernet with `alpha` adds its branches after a LayerNorm, the final model without: there the
    copy is a start, not the same function. Without `alpha` it is the same function.

    Args:
        model: Model to train, with directions that are among the supernet's candidates.
        supernet: A trained supernet of the same width and depth.

    Returns:
        Names of the parameters that keep their initial values: those of the head, if the number of
        classes differs.

    Raises:
        ValueError: If the two do not fit.
    """
    ours, theirs = _directional_mixers(model), _directional_mixers(supernet)
    if len(ours) != len(theirs):
        raise ValueError(f"a model of {len(ours)} blocks, a supernet of {len(theirs)}")
    source = supernet.state_dict()
    rows = {id(a): _positions(a, b) for a, b in zip(ours, theirs, strict=True)}
    for name, module in model.named_modules():
        if isinstance(module, DirectionalMixer):
            for key in module.branches.state_dict(prefix=f"{name}.branches."):
                source[key] = source[key][rows[id(module)]]
    target = {k: v for k, v in model.state_dict().items() if not k.endswith(RECORD)}
    fits = {k for k, v in target.items() if k in source and source[k].shape == v.shape}
    left = [key for key in target if key not in fits]
    foreign = [key for key in left if "head" not in key.split(".")]
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


def _shape(state: dict[str, Any], key: str) -> str:
    return str(list(state[key].shape)) if key in state else "absent"


PACKAGE_ARGUMENTS["search"] = make_supernet

default_cfgs = generate_default_cfgs(
    {
        "localvim_search": pretrained_cfg(),
        "localvim_demo_search": pretrained_cfg(size=8, num_classes=10, crop_pct=1.0),
        "localvmamba_tiny_search": pretrained_cfg(**localvmamba.HEAD),
        "localvmamba_small_search": pretrained_cfg(**localvmamba.HEAD),
        "localvmamba_demo_search": pretrained_cfg(**localvmamba.DEMO_HEAD),
    }
)

HIERARCHICAL: dict[str, Any] = {"embed_dims": (32, 64, 128, 256), "directions": CANDIDATES}


def _supernet_of(model_class: Callable[..., Model]) -> Callable[..., Model]:
    def build(**arguments: Any) -> Model:
        return make_supernet(model_class(**arguments))

    return build


def _local_vim(
    variant: str, pretrained: bool, arguments: dict[str, Any], overrides: dict[str, Any]
) -> LocalVim:
    arguments = {"directions": CANDIDATES, **arguments, **overrides}
    return create_localvim(variant, pretrained, _supernet_of(LocalVim), **arguments)


def _local_vmamba(
    variant: str, pretrained: bool, arguments: dict[str, Any], overrides: dict[str, Any]
) -> LocalVMamba:
    arguments = {**HIERARCHICAL, **arguments, **overrides}
    return create_localvmamba(variant, pretrained, _supernet_of(LocalVMamba), **arguments)


@register_model
def localvim_search(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """The supernet of LocalVim: width 128, all candidate directions in every block."""
    return _local_vim("localvim_search", pretrained, {"embed_dim": 128}, kwargs)


@register_model
def localvim_demo_search(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """The supernet of `localvim_demo`: width 24."""
    arguments = {**localvim.DEMO, "embed_dim": 24}
    return _local_vim("localvim_demo_search", pretrained, arguments, kwargs)


@register_model
def localvmamba_tiny_search(pretrained: bool = False, **kwargs: Any) -> LocalVMamba:
    """The supernet of LocalVMamba-T: widths 32 to 256, all candidates in every block."""
    return _local_vmamba("localvmamba_tiny_search", pretrained, {}, kwargs)


@register_model
def localvmamba_small_search(pretrained: bool = False, **kwargs: Any) -> LocalVMamba:
    """The supernet of LocalVMamba-S: widths 32 to 256, all candidates in every block."""
    arguments = {"depths": localvmamba.SMALL}
    return _local_vmamba("localvmamba_small_search", pretrained, arguments, kwargs)


@register_model
def localvmamba_demo_search(pretrained: bool = False, **kwargs: Any) -> LocalVMamba:
    """The supernet of `localvmamba_demo`: widths 24, 48, 96."""
    arguments = {**localvmamba.DEMO, "embed_dims": (24, 48, 96)}
    return _local_vmamba("localvmamba_demo_search", pretrained, arguments, kwargs)
