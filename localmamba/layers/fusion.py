"""Tells when a fused op may stand in for the modules whose parameters it reads."""

from torch import nn


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling a module does no more than an op that is given its parameters.

    False for another class (adapters, quantized and parametrized layers, modules sharded by FSDP2),
    with hooks (pruning has them too), with a `forward` set on the instance (accelerate), and with
    parameters in a wrapper tensor (torchao). The caller then calls the module.

    TorchScript takes no modules as arguments: call this from a method marked `torch.jit.unused`,
    after `torch.jit.is_scripting() or`.

    Args:
        module: A module whose parameters a fused op takes.
        kind: The class for which that op is written.
    """
    state = module.__dict__
    if (
        type(module) is not kind
        or "forward" in state
        or state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    ):
        return False
    for parameter in state["_parameters"].values():
        if type(parameter) is not nn.Parameter and hasattr(parameter, "__tensor_flatten__"):
            return False
    return True
