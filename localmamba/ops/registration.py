"""What every custom op of this package needs besides its kernel."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("localmamba", "DEF")

_BELOW_AUTOGRAD = torch._C._after_autograd_keyset


class Op:
    """A custom op of this package, defined by its schema and one function for all devices.

    The plain form of `torch.library.custom_op`, without the wrapper that the decorator puts around
    every call. The kernels make new tensors; `opcheck` in the tests holds them to it.
    """

    def __init__(self, schema: str, kernel: Callable):
        self.name = schema.split("(")[0]
        self.qualified_name = f"localmamba::{self.name}"
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(self.name, kernel, "CompositeExplicitAutograd")
        self.autocast: Callable[[list, torch.dtype], list] | None = None
        self._register_autocast("cuda", "AutocastCUDA")
        self._register_autocast("cpu", "AutocastCPU")
        self.overload = getattr(torch.ops.localmamba, self.name).default

    def __call__(self, *args):
        return self.overload(*args)

    def _register_autocast(self, device_type: str, key: str) -> None:
        """Inside an op autocast is off; what it does to the arguments is `autocast`'s to say."""
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def rule(*args):
            if self.autocast is not None:
                args = tuple(self.autocast(list(args), torch.get_autocast_dtype(device_type)))
            # What torch.library's own rule does: quicker than to leave autocast and to come back.
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return self.overload(*args)

        _LIBRARY.impl(self.name, rule, key)

    def register_fake(self, function: Callable) -> Callable:
        """Shapes, dtypes and strides of the results, for tracing."""
        torch.library.register_fake(self.qualified_name, function, lib=_LIBRARY)
        return function

    def register_autograd(self, backward: Callable, setup_context: Callable) -> None:
        """The gradient formula and what it needs from the forward pass.

        What `torch.library.register_autograd` does, without what it does at every call for schemas
        with default values, keyword arguments and lists of tensors.

        Raises:
            TypeError: If the schema has one of those.
        """
        for argument in self.overload._schema.arguments:
            lists = argument.type.isSubtypeOf(torch._C.ListType.ofTensors())
            if argument.has_default_value() or argument.kwarg_only or lists:
                raise TypeError(
                    f"{self.name}: arguments with a default value, keyword-only or lists of "
                    f"tensors have no gradients here, got {argument.name}"
                )
        formula = _formula(self, backward, setup_context)

        def rule(keys, *args):
            if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
                return formula.apply(keys, *args)
            with torch._C._AutoDispatchBelowAutograd():
                return self.overload.redispatch(keys & _BELOW_AUTOGRAD, *args)

        _LIBRARY.impl(self.name, rule, "Autograd", with_keyset=True)


def _formula(op: Op, backward: Callable, setup_context: Callable) -> type[torch.autograd.Function]:
    """An op as an autograd function, whose first argument is the dispatch keys of the call."""

    def run(ctx, keys, *args):
        with torch._C._AutoDispatchBelowAutograd():
            output = op.overload.redispatch(keys & _BELOW_AUTOGRAD, *args)
        setup_context(ctx, args, output)
        return output

    def run_backward(ctx, *gradients):
        return None, *backward(ctx, *gradients)

    methods = {"forward": staticmethod(run), "backward": staticmethod(run_backward)}
    return type(op.name, (torch.autograd.Function,), methods)


def define_op(schema: str) -> Callable[[Callable], Op]:
    """Makes the decorated function the custom op with this schema."""
    return lambda kernel: Op(schema, kernel)


def register_autocast(op: Op, activations: Sequence[int]) -> None:
    """Under autocast, casts the arguments at these positions and leaves parameters as they are.

    A, D and the biases lose what makes the scan stable when they are rounded to 8 bits; the kernels
    take inputs of mixed dtypes, so only activations follow autocast.
    """

    def cast(args: list, dtype: torch.dtype) -> list:
        for i in activations:
            if isinstance(args[i], Tensor):
                args[i] = args[i].to(dtype)
        return args

    op.autocast = cast


def register_autocast_dtype(op: Op, argument: int) -> None:
    """Under autocast, makes its dtype the argument at this position: the dtype of the result."""

    def cast(args: list, dtype: torch.dtype) -> list:
        args[argument] = dtype
        return args

    op.autocast = cast


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


def in_dtypes(
    gradients: Sequence[Tensor | None], inputs: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients in the dtypes of their inputs, None where the input is None."""
    pairs = zip(gradients, inputs, strict=True)
    return [None if g is None or x is None else g.to(x.dtype) for g, x in pairs]
