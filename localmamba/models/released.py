"""Released checkpoints, in their own layout, into the models of this package."""

from torch import Tensor, nn


def checkpoint_filter_fn(state_dict: dict[str, Tensor], _model: nn.Module) -> dict[str, Tensor]:
    """timm's hook between a released file and a model."""
    return state_dict
