"""Vectors of sixteen float32 values inside Numba functions.

Numba leaves vector instructions to LLVM's loop vectorizer, which gives up on the scan's loops (many
arrays that might overlap, sums kept across an outer loop). Here a vector is a type of its own, as
wide as an AVX-512 register; LLVM splits it where registers are narrower. Addresses are integers.
Errors of the functions at the end are relative, measured against float64.
"""

import inspect
import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, overload, register_model

from .numba_jit import inline

LANES = 16
"""Values in a vector."""

VECTOR_BYTES = 4 * LANES

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453

_FLOAT, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_FLOATS, _INTS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_I32, LANES)


class VectorType(types.Type):
    """Numba's type of a vector."""

    def __init__(self) -> None:
        super().__init__(name=f"float32x{LANES}")


vector_type = VectorType()


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: Any):
        super().__init__(manager, numba_type, _FLOATS)


def _instruction(result: Any, *parameters: Any) -> Callable[[Callable[..., Any]], Any]:
    """Makes a Numba function of one that emits LLVM IR: (builder, *values) -> value.

    Args:
        result: Numba's type of the result.
        parameters: Numba's types of the arguments, to which numbers are cast.
    """

    def decorate(emit: Callable[..., Any]) -> Any:
        def typed(typing_context: Any, *arguments: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
                value = emit(builder, *values)
                return context.get_dummy_value() if result is types.void else value

            return result(*parameters), generate

        # Numba binds arguments by the signature, which must not be variadic; typeshed's functions
        # have no __signature__.
        names = list(inspect.signature(emit).parameters)
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        typed.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter(name, kind) for name in ("typing_context", *names[1:])]
        )
        typed.__name__, typed.__doc__ = emit.__name__, emit.__doc__
        return intrinsic(typed)

    return decorate


def _pointer(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _load(builder: Any, address: Any, kind: Any) -> Any:
    value = builder.load(_pointer(builder, address, kind))
    value.align = 4  # that of a float: rows start anywhere
    return value


def _loader(numba_type: Any, kind: Any) -> Any:
    @_instruction(numba_type, types.intp)
    def load_value(builder, address):
        return _load(builder, address, kind)

    return load_value


def _storer(numba_type: Any, kind: Any) -> Any:
    @_instruction(types.void, types.intp, numba_type)
    def store_value(builder, address, value):
        builder.store(value, _pointer(builder, address, kind)).align = 4

    return store_value


load_vector, store_vector = _loader(vector_type, _FLOATS), _storer(vector_type, _FLOATS)
load_float, store_float = _loader(types.float32, _FLOAT), _storer(types.float32, _FLOAT)
load_int = _loader(types.int32, _I32)


def _intrinsic_of(builder: Any, name: str, result: Any, *parameters: Any) -> Any:
    """An LLVM intrinsic on vectors, such as `fmuladd`."""
    kind = ir.FunctionType(result, parameters)
    return builder.module.declare_intrinsic(f"llvm.{name}.v{LANES}f32", fnty=kind)


@_instruction(vector_type, types.float32)
def splat(builder, value):
    """A vector of one repeated number."""
    undefined = ir.Constant(_FLOATS, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_INTS, [0] * LANES))


@_instruction(types.float32, vector_type, types.intp)
def lane(builder, vector, position):
    """One number of a vector."""
    return builder.extract_element(vector, position)


@_instruction(vector_type, vector_type, types.intp, types.float32)
def with_lane(builder, vector, position, value):
    """The vector with one number replaced."""
    return builder.insert_element(vector, value, position)


@_instruction(vector_type, vector_type)
def rotate_every_two(builder, vector):
    """Each pair of neighbors (a, b) as (-b, a)."""
    lanes = ir.Constant(_INTS, [i ^ 1 for i in range(LANES)])
    signs = ir.Constant(_FLOATS, [-1.0, 1.0] * (LANES // 2))
    return builder.fmul(builder.shuffle_vector(vector, vector, lanes), signs)


@_instruction(types.float32, vector_type)
def total(builder, vector):
    """The sum of a vector's numbers, in a fixed order."""
    reduce = _intrinsic_of(builder, "vector.reduce.fadd", _FLOAT, _FLOAT, _FLOATS)
    return builder.call(reduce, [ir.Constant(_FLOAT, 0.0), vector], fastmath=("reassoc",))


def _add_pair(builder: Any, x: Any, y: Any, bit: int) -> Any:
    """Lanes with `bit` clear continue x, the others y; each adds the number of its partner."""
    keep = [i + (LANES if i & bit else 0) for i in range(LANES)]
    move = [(i ^ bit) + (LANES if i & bit else 0) for i in range(LANES)]
    return builder.fadd(
        *(builder.shuffle_vector(x, y, ir.Constant(_INTS, lanes)) for lanes in (keep, move))
    )


@_instruction(vector_type, types.intp)
def row_totals(builder, address):
    """The totals of `LANES` vectors that stand one after another, as one vector."""
    offsets = [ir.Constant(_I64, i * VECTOR_BYTES) for i in range(LANES)]
    sums = [_load(builder, builder.add(address, at), _FLOATS) for at in offsets]
    bit = 1
    while len(sums) > 1:
        sums = [_add_pair(builder, *sums[i : i + 2], bit) for i in range(0, len(sums), 2)]
        bit *= 2
    return sums[0]


def _choice(comparison: str) -> Any:
    @_instruction(vector_type, vector_type, vector_type)
    def choose(builder, x, bound):
        return builder.select(builder.fcmp_ordered(comparison, x, bound), bound, x)

    return choose


maximum, minimum = _choice("<"), _choice(">")
"""The larger and the smaller of x and a bound; a NaN in x stays."""


@_instruction(types.boolean, vector_type, vector_type)
def all_below(builder, x, bound):
    """Whether every number of x is below the bound's; a NaN is not."""
    below = builder.bitcast(builder.fcmp_ordered("<", x, bound), ir.IntType(LANES))
    return builder.icmp_unsigned("==", below, ir.Constant(below.type, 2**LANES - 1))


@_instruction(vector_type, vector_type, vector_type, vector_type)
def fma(builder, x, y, z):
    """x y + z, rounded once where the processor can."""
    return builder.call(_intrinsic_of(builder, "fmuladd", _FLOATS, *3 * [_FLOATS]), [x, y, z])


@_instruction(vector_type, vector_type)
def exponent_bits(builder, x):
    """The float whose exponent field is the low 8 bits of x, read as an integer."""
    bits = builder.bitcast(x, _INTS)
    return builder.bitcast(builder.shl(bits, ir.Constant(_INTS, [23] * LANES)), _FLOATS)


@_instruction(types.void)
def noinline(builder):
    """Keeps LLVM from inlining the function that calls this.

    A kernel's innermost loops need nearly all registers for their constants, which they get only in
    a function of their own.
    """
    builder.function.attributes.add("noinline")


@_instruction(types.int64, types.intp)
def atomic_add(builder, counter):
    """Adds one to the integer at an address and returns what it was before."""
    pointer = _pointer(builder, counter, _I64)
    return builder.atomic_rmw("add", pointer, ir.Constant(_I64, 1), "monotonic")


def _overload_operator(symbol: Callable[..., Any], name: str) -> None:
    """Lets vectors, and a vector and a number, stand on both sides of an operator."""

    @_instruction(vector_type, vector_type, vector_type)
    def operate(builder, x, y):
        # "contract": a product and a sum may become one fused operation.
        return getattr(builder, name)(x, y, flags=("contract",))

    @overload(symbol)
    def typed(x, y):
        left, right = isinstance(x, VectorType), isinstance(y, VectorType)
        if left and right:
            return lambda x, y: operate(x, y)
        if left and isinstance(y, types.Number):
            return lambda x, y: operate(x, splat(y))
        if right and isinstance(x, types.Number):
            return lambda x, y: operate(splat(x), y)
        return None


_overload_operator(operator.add, "fadd")
_overload_operator(operator.sub, "fsub")
_overload_operator(operator.mul, "fmul")
_overload_operator(operator.truediv, "fdiv")


@overload(abs)
def _abs(x):
    return (lambda x: maximum(x, splat(0.0) - x)) if isinstance(x, VectorType) else None


_ROUND = 1.5 * 2**23 + 127
"""Added to x, it leaves round(x) + 127, the exponent field of 2^round(x), in the lowest bits."""


@inline
def _power(rounded, f):
    """2^(round(x) + f) from x + _ROUND and what was rounded away, f in [-0.5, 0.5]."""
    p = f * 0.0013264616 + 0.0096715110
    p = p * f + 0.0555073408
    p = p * f + 0.2402224213
    p = p * f + 0.6931469775
    p = p * f + 1.0
    return p * exponent_bits(rounded)


@inline
def exp2(x):
    """2^x to 1e-7; exactly 1 at 0, exactly 0 below -127, infinite above 128; a NaN stays."""
    x = minimum(maximum(x, splat(-127.0)), splat(128.0))
    rounded = x + _ROUND
    return _power(rounded, x - (rounded - _ROUND))


@inline
def exp2_of_product(x, y):
    """2^(x y)."""
    return exp2(x * y)


@inline
def exp2_of_small_product(x, y):
    """2^(x y) where |x y| is at most 126; a NaN stays."""
    rounded = fma(x, y, splat(_ROUND))
    return _power(rounded, fma(x, y, splat(_ROUND) - rounded))


@inline
def exp(x):
    """e^x."""
    return exp2(x * LOG2E)


@inline
def softplus(x):
    """log(1 + e^x), to 1e-6 also where it is tiny."""
    e = exp(splat(0.0) - abs(x))
    s = e / (e + 2.0)  # log(1 + e) = 2 atanh(s), s in [0, 1/3]
    w = s * s
    p = w * 0.1400676454 + 0.1400072200
    p = p * w + 0.2001077700
    p = p * w + 0.3333320800
    p = p * w + 1.0
    return maximum(x, splat(0.0)) + s * p * 2.0


@inline
def sigmoid(x):
    """1 / (1 + e^-x); the derivative of `softplus`."""
    return splat(1.0) / (exp(splat(0.0) - x) + 1.0)


@inline
def silu(x):
    """x sigmoid(x)."""
    return x * sigmoid(x)


@inline
def silu_grad(x):
    """The derivative of `silu`."""
    gate = sigmoid(x)
    return gate * (x * (splat(1.0) - gate) + 1.0)
