"""What every custom op of this package needs besides its kernel."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.library import CustomOpDef

_LIBRARY = torch.library.Library("localmamba", "IMPL")


def _register_rule(op: CustomOpDef, change: Callable[[list, torch.dtype], list]) -> None:
    """Under autocast, runs an op on `change(arguments, autocast's dtype)`."""

    def rule_for(device_type: str):
        def rule(*args):
            changed = change(list(args), torch.get_autocast_dtype(device_type))
            with torch.autocast(device_type, enabled=False):
                return op._opoverload(*changed)

        return rule

    name = op._qualname.removeprefix("localmamba::")
    _LIBRARY.impl(name, rule_for("cuda"), "AutocastCUDA")
    _LIBRARY.impl(name, rule_for("cpu"), "AutocastCPU")


def register_autocast(op: CustomOpDef, activations: Sequence[int]) -> None:
    """Under autocast, casts the arguments at these positions and leaves parameters as they are.

    A, D and the biases lose what makes the scan stable when they are rounded to 8 bits; the kernels
    take inputs of mixed dtypes, so only activations follow autocast.
    """

    def cast(args, dtype):
        for i in activations:
            if isinstance(args[i], Tensor):
                args[i] = args[i].to(dtype)
        return args

    _register_rule(op, cast)


def register_autocast_dtype(op: CustomOpDef, argument: int) -> None:
    """Under autocast, makes its dtype the argument at this position: the dtype of the result."""

    def cast(args, dtype):
        args[argument] = dtype
        return args

    _register_rule(op, cast)


def present(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """The tensors that are not None: an op cannot return None, so gradients travel like this."""
    return [x for x in tensors if x is not None]


def restore(gradients: Sequence[Tensor], inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The inverse of `present`: None again where the input is None."""
    found = iter(gradients)
    return [None if x is None else next(found) for x in inputs]


def empty_gradients(inputs: Sequence[Tensor | None]) -> list[Tensor]:
    """What an op that returns `present` gradients looks like to the tracer."""
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in present(inputs)]


def contiguous(gradients: Sequence[Tensor | None]) -> list[Tensor]:
    """`present` gradients in the memory layout that `empty_gradients` promises."""
    return [x.contiguous() for x in present(gradients)]
