"""Registration of custom ops: kernels, fake, autograd, autocast, functional transforms, FLOPs.

An op is a forward and a backward function in PyTorch's dispatcher, each with a schema, a kernel, a
fake and a reference. `define_op` registers what `torch.library.custom_op` would, with less time in
Python for every call; the measured difference and the private functions that make it stand in
docs/architecture.md, and where a release of PyTorch lacks them, the public path serves.

The reference, differentiable PyTorch, computes what the kernels do not: float64, devices without
kernels, forward-mode derivatives, and derivatives of the backward op.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from .backends import has_kernels

AutocastRule = Callable[[list[Any], torch.dtype], list[Any]]
"""Arguments of an op and autocast's dtype -> the arguments that the op then gets."""

_SetupContext = Callable[[Any, tuple[Any, ...], Any], None]

_LIBRARY = torch.library.Library("localmamba", "DEF")

_AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}

try:
    _BELOW_AUTOGRAD = torch._C._after_autograd_keyset
    _below_autograd = torch._C._AutoDispatchBelowAutograd
    _any_requires_grad = torch._C._any_requires_grad
    _exclude_keys = torch._C._ExcludeDispatchKeyGuard
    _apply = super(torch.autograd.Function, torch.autograd.Function).apply
    _AUTOCAST_SETS = {
        key: torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
        for key in _AUTOCAST_KEYS.values()
    }
    forward_ad._current_level  # noqa: B018
    torch.ops.aten.neg.default._handle.redispatch_boxed  # noqa: B018
    PRIVATE_DISPATCH = True
    """Whether this PyTorch has the private functions of the shorter path."""
except AttributeError:
    PRIVATE_DISPATCH = False

# Without this one, PyTorch raises an error in the transforms that differentiate.
_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


class Op:
    """A custom op: one schema, its kernel for every device, and the rules for PyTorch's modes.

    Args:
        schema: Arguments have no default values and are no lists of tensors; the first one is a
            tensor.
        kernel: Computes the results where `has_kernels`; makes new, contiguous tensors.
        fake: Shapes, dtypes and strides of the results, for tracing.
        reference: The same results in differentiable PyTorch, on any device, in any floating dtype.
        dispatch_on: Position of the tensor whose device and dtype choose between both.
    """

    def __init__(
        self,
        schema: str,
        kernel: Callable[..., Any],
        fake: Callable[..., Any],
        reference: Callable[..., Any],
        dispatch_on: int = 0,
    ):
        self.name = schema.split("(")[0]
        self.schema, self.kernel, self.fake = schema, kernel, fake
        self.reference, self.dispatch_on = reference, dispatch_on
        self.packets: list[torch._ops.OpOverloadPacket] = []
        self.overload = self._define(self.name)

    def _define(self, name: str) -> torch._ops.OpOverload:
        """Defines an op of this schema, without gradients."""
        schema = name + self.schema.removeprefix(self.name)
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, self.kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"localmamba::{name}", self.fake, lib=_LIBRARY)
        packet = getattr(torch.ops.localmamba, name)
        batched = partial(self._batched, packet.default)
        torch.library.register_vmap(f"localmamba::{name}", batched, lib=_LIBRARY)
        self.packets.append(packet)
        return packet.default

    def __call__(self, *args: Any) -> Any:
        return self.overload(*args)

    @staticmethod
    def _batched(
        overload: Callable[..., Any], info: Any, in_dims: Sequence[int | None], *args: Any
    ) -> tuple[Any, Any]:
        """Calls the op once for each element of the batch that `torch.vmap` maps over."""
        results = [
            overload(
                *(
                    x if dim is None else x.select(dim, i)
                    for x, dim in zip(args, in_dims, strict=True)
                )
            )
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = [torch.stack(parts) for parts in zip(*results, strict=True)]
        kind = type(results[0])
        return kind(stacked), kind([0] * len(stacked))

    def register_autograd(
        self, backward: Callable[..., Sequence[Tensor | None]], setup_context: _SetupContext
    ) -> None:
        """Registers the gradients, as `torch.library.register_autograd` takes them.

        Where the kernels do not serve, for forward-mode derivatives and inside the transforms of
        `torch.func` that differentiate, the reference runs, which PyTorch differentiates by itself.
        """
        if not PRIVATE_DISPATCH:
            self._register_public_autograd(backward, setup_context)
            return
        redispatch = self.overload._handle.redispatch_boxed

        def forward(ctx: Any, keys: Any, *args: Any) -> Any:
            with _below_autograd():
                output = redispatch(keys & _BELOW_AUTOGRAD, *args)
            setup_context(ctx, args, output)
            return tuple(output) if isinstance(output, list) else output

        def gradients(ctx: Any, *douts: Tensor | None) -> tuple[Tensor | None, ...]:
            return None, *backward(ctx, *douts)

        methods = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
        formula = type(self.name, (torch.autograd.Function,), methods)
        # mypy does not know that a class made by `type` is a subclass of its bases.
        apply = super(torch.autograd.Function, formula).apply  # type: ignore[misc]
        reference, dispatch_on = self.reference, self.dispatch_on

        def rule(keys: Any, *args: Any) -> Any:
            if (
                forward_ad._current_level >= 0
                or _transforms_active()
                or not has_kernels(args[dispatch_on])
            ):
                return reference(*args)
            if torch.is_grad_enabled() and _any_requires_grad(*args):
                return apply(keys, *args)
            with _below_autograd():
                return redispatch(keys & _BELOW_AUTOGRAD, *args)

        _LIBRARY.impl(self.name, rule, "Autograd", with_keyset=True)

    def _register_public_autograd(
        self, backward: Callable[..., Sequence[Tensor | None]], setup_context: _SetupContext
    ) -> None:
        """Registers the same through public functions: a second op has the gradients."""
        inner = self._define(f"{self.name}_kernels")
        reference, dispatch_on = self.reference, self.dispatch_on

        def gradients(ctx: Any, *douts: Any) -> tuple[Tensor | None, ...]:
            return tuple(backward(ctx, *douts))

        torch.library.register_autograd(
            inner.name(), gradients, setup_context=setup_context, lib=_LIBRARY
        )

        def rule(*args: Any) -> Any:
            dual = any(
                isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None
                for x in args
            )
            if dual or _transforms_active() or not has_kernels(args[dispatch_on]):
                return reference(*args)
            return inner(*args)

        _LIBRARY.impl(self.name, rule, "Autograd")

    def register_backward(
        self,
        kernel: Callable[..., Sequence[Tensor | None]],
        reference: Callable[..., Sequence[Tensor | None]],
        tensors: int,
    ) -> None:
        """Registers gradients that an op of its own computes, `<name>_backward`.

        That op takes the gradient of the first output, the other outputs, which are kept for it,
        and the arguments. Its own derivatives are those of its reference.

        Args:
            kernel: Computes the gradients of the first arguments, None where one is not given.
            reference: The same in differentiable PyTorch.
            tensors: Number of these arguments.
        """
        arguments, _, outputs = self.schema.removeprefix(f"{self.name}(").partition(") -> ")
        kept = outputs.count("Tensor") - 1
        others = "".join(f"Tensor output{i}, " for i in range(1, kept + 1))
        backward = Op(
            f"{self.name}_backward(Tensor dout, {others}{arguments}) -> Tensor[]",
            kernel=lambda *args: contiguous(kernel(*args)),
            fake=lambda *args: empty_gradients(args[1 + kept :][:tensors]),
            reference=present_gradients(reference),
            dispatch_on=1 + kept,
        )

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            save_arguments(ctx, (*output[1:], *inputs) if kept else inputs)
            ctx.set_materialize_grads(False)

        def gradients(ctx: Any, dout: Tensor | None, *_: Tensor | None) -> list[Tensor | None]:
            saved = saved_arguments(ctx)
            given = saved[kept:]
            found: list[Tensor | None] = [None] * len(given)
            if dout is not None:
                found[:tensors] = restore(backward(dout, *saved), given[:tensors])
            return found

        self.register_autograd(gradients, setup_context)
        backward.register_second_derivative()

    def register_second_derivative(self) -> None:
        """Registers the derivatives of a backward op, computed through its reference."""

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            del output
            save_arguments(ctx, inputs)

        def backward(ctx: Any, *dgradients: Any) -> list[Tensor | None]:
            if isinstance(dgradients[0], Sequence):  # as torch.library.register_autograd gives them
                dgradients = tuple(dgradients[0])
            args = saved_arguments(ctx)
            wanted = [i for i, x in enumerate(args) if isinstance(x, Tensor) and x.requires_grad]

            def outputs(*tensors: Tensor) -> list[Tensor]:
                for i, x in zip(wanted, tensors, strict=True):
                    args[i] = x
                return list(self.reference(*args))

            found = vjp(outputs, [args[i] for i in wanted], list(dgradients))
            result: list[Tensor | None] = [None] * len(args)
            for i, gradient in zip(wanted, found, strict=True):
                result[i] = gradient
            return result

        self.register_autograd(backward, setup_context)

    def register_autocast(self, rule: AutocastRule) -> None:
        """Registers what autocast does to the arguments; inside the op autocast is off."""
        for device_type, key in _AUTOCAST_KEYS.items():
            _LIBRARY.impl(self.name, self._autocast_kernel(rule, device_type, key), key)

    def _autocast_kernel(
        self, rule: AutocastRule, device_type: str, key: str
    ) -> Callable[..., Any]:
        overload = self.overload
        if not PRIVATE_DISPATCH:

            def public(*args: Any) -> Any:
                args = tuple(rule(list(args), torch.get_autocast_dtype(device_type)))
                with torch.autocast(device_type, enabled=False):
                    return overload(*args)

            return public
        keys = _AUTOCAST_SETS[key]

        def private(*args: Any) -> Any:
            args = tuple(rule(list(args), torch.get_autocast_dtype(device_type)))
            with _exclude_keys(keys):
                return overload(*args)

        return private

    def register_flops(self, formula: Callable[..., int]) -> None:
        """Registers FLOPs from the shapes of the arguments, for `torch.utils.flop_counter`."""

        def counted(*shapes: Any, out_shape: Any) -> int:
            del out_shape
            return formula(*shapes)

        register_flop_formula(self.packets)(counted)


def save_arguments(ctx: Any, arguments: Sequence[Any]) -> None:
    """Saves arguments of an op, tensors and others, in the context of its backward pass."""
    ctx.others = [None if isinstance(x, Tensor) else x for x in arguments]
    ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in arguments))


def saved_arguments(ctx: Any) -> list[Any]:
    """The arguments saved by `save_arguments`; checkpointing unpacks them only once."""
    pairs = zip(ctx.saved_tensors, ctx.others, strict=True)
    return [other if x is None else x for x, other in pairs]


def define_function(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Registers an op without gradients whose result depends on no tensor's values."""
    name = f"localmamba::{schema.split('(')[0]}"
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(schema.split("(")[0], kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=_LIBRARY)

    def batched(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Tensor, None]:
        return kernel(*args), None

    torch.library.register_vmap(name, batched, lib=_LIBRARY)


def cast_activations(positions: Sequence[int]) -> AutocastRule:
    """An autocast rule: casts the arguments at these positions and leaves parameters as they are.

    A, D and the biases lose what makes the scan stable when they are rounded to 8 bits; the kernels
    take inputs of mixed dtypes, so only activations follow autocast.
    """

    def rule(args: list[Any], dtype: torch.dtype) -> list[Any]:
        for i in positions:
            if isinstance(args[i], Tensor):
                args[i] = args[i].to(dtype)
        return args

    return rule


def no_cast(args: list[Any], dtype: torch.dtype) -> list[Any]:
    """An autocast rule: the op computes in the dtypes that it is given."""
    del dtype
    return args


def set_dtype(position: int) -> AutocastRule:
    """An autocast rule: the argument at this position, the dtype of the result, is autocast's."""

    def rule(args: list[Any], dtype: torch.dtype) -> list[Any]:
        args[position] = dtype
        return args

    return rule


def vjp(
    function: Callable[..., Any], inputs: Sequence[Tensor | None], douts: Sequence[Tensor] | Tensor
) -> list[Tensor | None]:
    """Vector-Jacobian products of a differentiable function, differentiable themselves.

    Args:
        function: Takes `inputs`; returns a tensor or a list of tensors.
        inputs: Tensors, or None for optional ones.
        douts: Gradients of the results.

    Returns:
        The gradients of the inputs, None where the input is None.
    """
    given = present(inputs)

    def of_given(*tensors: Tensor) -> Any:
        return function(*restore(tensors, inputs))

    pullback = torch.func.vjp(of_given, *given)[1]
    return restore(pullback(douts), inputs)


def present(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """The tensors that are not None: an op cannot return None in a list of tensors."""
    return [x for x in tensors if x is not None]


def restore(gradients: Sequence[Tensor], inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The inverse of `present`: None again where the input is None."""
    found = iter(gradients)
    return [None if x is None else next(found) for x in inputs]


def empty_gradients(inputs: Sequence[Tensor | None]) -> list[Tensor]:
    """The fake of an op that returns the `present` gradients of its inputs."""
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in present(inputs)]


def contiguous(gradients: Sequence[Tensor | None]) -> list[Tensor]:
    """`present` gradients in the memory layout of `empty_gradients`."""
    return [x.contiguous() for x in present(gradients)]


def in_dtypes(
    gradients: Sequence[Tensor | None], inputs: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients in the dtypes of their inputs, None where the input is None."""
    pairs = zip(gradients, inputs, strict=True)
    return [None if g is None or x is None else g.to(x.dtype) for g, x in pairs]


def present_gradients(
    backward: Callable[..., Sequence[Tensor | None]],
) -> Callable[..., list[Tensor]]:
    """Returns a backward function of a backend as the op that computes `present` gradients."""

    def op(*args: Any) -> list[Tensor]:
        return present(backward(*args))

    return op
