"""Sixteen float32 values as one value inside Numba functions.

Numba leaves vector instructions to LLVM's loop vectoriser, which gives up on the scan's loops (many
arrays that might overlap, sums kept across an outer loop). Here a vector is a type of its own, as wide
as an AVX-512 register; LLVM splits it where registers are narrower. Addresses are plain integers.
"""

import operator

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, overload, register_model

LANES = 16
"""Values in a vector."""

VECTOR_BYTES = 4 * LANES

_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INTS = ir.VectorType(ir.IntType(32), LANES)
_CONTRACT = ("contract",)  # a product and a sum may become one fused operation


class VectorType(types.Type):
    """Numba's type of a vector."""

    def __init__(self):
        super().__init__(name=f"float32x{LANES}")


vector_type = VectorType()


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, numba_type):
        super().__init__(manager, numba_type, _FLOATS)


def _pointer(builder, address, kind):
    return builder.inttoptr(address, kind.as_pointer())


def _load(builder, address, kind):
    # The alignment of a float: rows start anywhere.
    value = builder.load(_pointer(builder, address, kind))
    value.align = 4
    return value


def _loader(numba_type, kind):
    @intrinsic
    def load_value(typing_context, address):  # noqa: ARG001
        def generate(context, builder, signature, arguments):  # noqa: ARG001
            return _load(builder, arguments[0], kind)

        return numba_type(types.intp), generate

    return load_value


def _storer(numba_type, kind):
    @intrinsic
    def store_value(typing_context, address, value):  # noqa: ARG001
        def generate(context, builder, signature, arguments):  # noqa: ARG001
            builder.store(arguments[1], _pointer(builder, arguments[0], kind)).align = 4
            return context.get_dummy_value()

        return types.void(types.intp, numba_type), generate

    return store_value


load_vector = _loader(vector_type, _FLOATS)
load_float = _loader(types.float32, ir.FloatType())
load_int = _loader(types.int32, ir.IntType(32))
store_vector = _storer(vector_type, _FLOATS)
store_float = _storer(types.float32, ir.FloatType())


@intrinsic
def splat(typing_context, value):  # noqa: ARG001
    """A vector of one repeated number."""

    def generate(context, builder, signature, arguments):
        value = context.cast(builder, arguments[0], signature.args[0], types.float32)
        undefined = ir.Constant(_FLOATS, ir.Undefined)
        first = builder.insert_element(undefined, value, ir.Constant(ir.IntType(32), 0))
        return builder.shuffle_vector(first, undefined, ir.Constant(_INTS, [0] * LANES))

    return vector_type(value), generate


@intrinsic
def lane(typing_context, vector, position):  # noqa: ARG001
    """One number of a vector."""

    def generate(context, builder, signature, arguments):  # noqa: ARG001
        return builder.extract_element(*arguments)

    return types.float32(vector_type, types.intp), generate


@intrinsic
def with_lane(typing_context, vector, position, value):  # noqa: ARG001
    """The vector with one number replaced."""

    def generate(context, builder, signature, arguments):  # noqa: ARG001
        vector, position, value = arguments
        return builder.insert_element(vector, value, position)

    return vector_type(vector_type, types.intp, types.float32), generate


@intrinsic
def total(typing_context, vector):  # noqa: ARG001
    """The sum of a vector's numbers, in a fixed order."""

    def generate(context, builder, signature, arguments):  # noqa: ARG001
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType(), _FLOATS])
        reduce = builder.module.declare_intrinsic("llvm.vector.reduce.fadd", [_FLOATS], kind)
        zero = ir.Constant(ir.FloatType(), 0.0)
        return builder.call(reduce, [zero, arguments[0]], fastmath=("reassoc",))

    return types.float32(vector_type), generate


def _choice(comparison):
    @intrinsic
    def choose(typing_context, x, bound):  # noqa: ARG001
        def generate(context, builder, signature, arguments):  # noqa: ARG001
            x, bound = arguments
            beyond = builder.fcmp_ordered(comparison, x, bound)
            return builder.select(beyond, bound, x)

        return vector_type(vector_type, vector_type), generate

    return choose


at_least = _choice("<")
"""x where it is not below the bound; a NaN stays."""

at_most = _choice(">")
"""x where it is not above the bound; a NaN stays."""


@intrinsic
def exponent_bits(typing_context, x):  # noqa: ARG001
    """The float whose exponent field is the low 8 bits of x, read as an integer."""

    def generate(context, builder, signature, arguments):  # noqa: ARG001
        bits = builder.bitcast(arguments[0], _INTS)
        shifted = builder.shl(bits, ir.Constant(_INTS, [23] * LANES))
        return builder.bitcast(shifted, _FLOATS)

    return vector_type(vector_type), generate


@intrinsic
def draw(typing_context, counter):  # noqa: ARG001
    """Reads the integer at an address and adds one to it, as one step among all threads."""

    def generate(context, builder, signature, arguments):  # noqa: ARG001
        pointer = _pointer(builder, arguments[0], ir.IntType(64))
        return builder.atomic_rmw("add", pointer, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.intp), generate


def _operation(name):
    @intrinsic
    def operate(typing_context, x, y):  # noqa: ARG001
        def generate(context, builder, signature, arguments):  # noqa: ARG001
            return getattr(builder, name)(*arguments, flags=_CONTRACT)

        return vector_type(vector_type, vector_type), generate

    return operate


def _overload_operator(symbol, operate):
    """Lets vectors, and a vector and a number, stand on both sides of `symbol`."""

    def typed(x, y):
        left, right = isinstance(x, VectorType), isinstance(y, VectorType)
        if left and right:
            return lambda x, y: operate(x, y)
        if left and isinstance(y, types.Number):
            return lambda x, y: operate(x, splat(y))
        if right and isinstance(x, types.Number):
            return lambda x, y: operate(splat(x), y)
        return None

    overload(symbol)(typed)


for _symbol, _name in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _overload_operator(_symbol, _operation(_name))
