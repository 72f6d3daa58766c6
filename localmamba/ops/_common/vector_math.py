"""Functions of vectors. Errors are relative, measured against float64."""

from .jit import inline
from .vectors import at_least, at_most, exponent_bits, fma, splat

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453

# Added to x, it leaves round(x) + 127, the exponent field of 2^round(x), in the lowest bits.
_ROUND = 1.5 * 2**23 + 127


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
    x = at_most(at_least(x, splat(-127.0)), splat(128.0))
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
def magnitude(x):
    """|x|."""
    return at_least(x, splat(0.0) - x)


@inline
def softplus(x):
    """log(1 + e^x), to 1e-6 also where it is tiny."""
    e = exp(splat(0.0) - magnitude(x))
    s = e / (e + 2.0)  # log(1 + e) = 2 atanh(s), s in [0, 1/3]
    w = s * s
    p = w * 0.1400676454 + 0.1400072200
    p = p * w + 0.2001077700
    p = p * w + 0.3333320800
    p = p * w + 1.0
    return at_least(x, splat(0.0)) + s * p * 2.0


@inline
def sigmoid(x):
    """1 / (1 + e^-x); the derivative of `softplus`."""
    return splat(1.0) / (exp(splat(0.0) - x) + 1.0)


@inline
def silu(x):
    """x sigmoid(x)."""
    return x * sigmoid(x)


@inline
def silu_slope(x):
    """The derivative of `silu`."""
    gate = sigmoid(x)
    return gate * (x * (splat(1.0) - gate) + 1.0)
