"""Sixteen float32 values as one value inside Numba functions.

Numba leaves vector instructions to LLVM's loop vectoriser, which gives up on the scan's loops (many
arrays that might overlap, sums kept across an outer loop). Here a vector is a type of its own, as
wide as an AVX-512 register; LLVM splits it where registers are narrower. Addresses are integers.
"""

import operator

from llvmlite import ir
from numba import types
from numba.core.cgutils import get_or_insert_function
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
    def load_value(typing_context, address):
        def generate(context, builder, signature, arguments):
            return _load(builder, arguments[0], kind)

        return numba_type(types.intp), generate

    return load_value


def _storer(numba_type, kind):
    @intrinsic
    def store_value(typing_context, address, value):
        def generate(context, builder, signature, arguments):
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
def splat(typing_context, value):
    """A vector of one repeated number."""

    def generate(context, builder, signature, arguments):
        value = context.cast(builder, arguments[0], signature.args[0], types.float32)
        undefined = ir.Constant(_FLOATS, ir.Undefined)
        first = builder.insert_element(undefined, value, ir.Constant(ir.IntType(32), 0))
        return builder.shuffle_vector(first, undefined, ir.Constant(_INTS, [0] * LANES))

    return vector_type(value), generate


@intrinsic
def lane(typing_context, vector, position):
    """One number of a vector."""

    def generate(context, builder, signature, arguments):
        return builder.extract_element(*arguments)

    return types.float32(vector_type, types.intp), generate


@intrinsic
def with_lane(typing_context, vector, position, value):
    """The vector with one number replaced."""

    def generate(context, builder, signature, arguments):
        vector, position, value = arguments
        return builder.insert_element(vector, value, position)

    return vector_type(vector_type, types.intp, types.float32), generate


@intrinsic
def quarter_turn(typing_context, vector):
    """Each pair of neighbours (a, b) as (-b, a)."""

    def generate(context, builder, signature, arguments):
        lanes = ir.Constant(_INTS, [i ^ 1 for i in range(LANES)])
        swapped = builder.shuffle_vector(arguments[0], arguments[0], lanes)
        signs = ir.Constant(_FLOATS, [-1.0, 1.0] * (LANES // 2))
        return builder.fmul(swapped, signs)

    return vector_type(vector_type), generate


@intrinsic
def total(typing_context, vector):
    """The sum of a vector's numbers, in a fixed order."""

    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType(), _FLOATS])
        name = f"llvm.vector.reduce.fadd.v{LANES}f32"
        reduce = get_or_insert_function(builder.module, kind, name)
        zero = ir.Constant(ir.FloatType(), 0.0)
        return builder.call(reduce, [zero, arguments[0]], fastmath=("reassoc",))

    return types.float32(vector_type), generate


@intrinsic
def row_totals(typing_context, address):
    """The totals of `LANES` vectors that stand one after another, as one vector."""

    def add_pair(builder, x, y, bit):
        # Lanes with `bit` clear continue x, the others y; each lane takes in its partner's number.
        keep = [lane + (LANES if lane & bit else 0) for lane in range(LANES)]
        move = [(lane ^ bit) + (LANES if lane & bit else 0) for lane in range(LANES)]
        kept, moved = (
            builder.shuffle_vector(x, y, ir.Constant(_INTS, lanes)) for lanes in (keep, move)
        )
        return builder.fadd(kept, moved)

    def generate(context, builder, signature, arguments):
        offsets = [ir.Constant(ir.IntType(64), i * VECTOR_BYTES) for i in range(LANES)]
        sums = [_load(builder, builder.add(arguments[0], at), _FLOATS) for at in offsets]
        bit = 1
        while len(sums) > 1:
            sums = [add_pair(builder, *sums[i : i + 2], bit) for i in range(0, len(sums), 2)]
            bit *= 2
        return sums[0]

    return vector_type(types.intp), generate


def _choice(comparison):
    @intrinsic
    def choose(typing_context, x, bound):
        def generate(context, builder, signature, arguments):
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
def all_below(typing_context, x, bound):
    """Whether every number of x is below the bound's; a NaN is not."""

    def generate(context, builder, signature, arguments):
        below = builder.bitcast(builder.fcmp_ordered("<", *arguments), ir.IntType(LANES))
        return builder.icmp_unsigned("==", below, ir.Constant(below.type, 2**LANES - 1))

    return types.boolean(vector_type, vector_type), generate


@intrinsic
def fma(typing_context, x, y, z):
    """x y + z, rounded once where the processor can."""

    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
        multiply_add = get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{LANES}f32")
        return builder.call(multiply_add, arguments)

    return vector_type(vector_type, vector_type, vector_type), generate


@intrinsic
def exponent_bits(typing_context, x):
    """The float whose exponent field is the low 8 bits of x, read as an integer."""

    def generate(context, builder, signature, arguments):
        bits = builder.bitcast(arguments[0], _INTS)
        shifted = builder.shl(bits, ir.Constant(_INTS, [23] * LANES))
        return builder.bitcast(shifted, _FLOATS)

    return vector_type(vector_type), generate


@intrinsic
def stay_a_function(typing_context):
    """Keeps LLVM from inlining the function that calls this.

    A kernel's innermost loops need nearly all registers for their constants, which they get only in
    a function of their own.
    """

    def generate(context, builder, signature, arguments):
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def draw(typing_context, counter):
    """Reads the integer at an address and adds one to it, as one step among all threads."""

    def generate(context, builder, signature, arguments):
        pointer = _pointer(builder, arguments[0], ir.IntType(64))
        return builder.atomic_rmw("add", pointer, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.intp), generate


def _operation(name):
    @intrinsic
    def operate(typing_context, x, y):
        def generate(context, builder, signature, arguments):
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
