"""Which scan kernel serves which inputs: CUDA C++ for the common case, Triton for all the rest."""

from .._common.triton_common import as_int32
from . import triton_scan_backward, triton_scan_forward, warp_scan
from .align import align_weights

__all__ = ["align_weights", "scan_backward", "scan_forward"]


def scan_forward(u, dt, A, B, C, D, z, dt_bias, index, length, softplus, save):
    index = as_int32(index)
    if warp_scan.serves(u, dt, A, B, C, z):
        return warp_scan.scan_forward(u, dt, A, B, C, D, dt_bias, index, length, softplus, save)
    return triton_scan_forward.scan_forward(
        u, dt, A, B, C, D, z, dt_bias, index, length, softplus, save
    )


def scan_backward(dy, u, dt, A, B, C, D, z, dt_bias, index, length, softplus, states, dBC=None):
    index = as_int32(index)
    if states.shape[2] == 0:  # the forward pass was told not to keep any
        _, states = scan_forward(u, dt, A, B, C, D, z, dt_bias, index, length, softplus, save=True)
    if warp_scan.serves(u, dt, A, B, C, z):
        du, ddt, dA, dB, dC, dD, ddt_bias = warp_scan.scan_backward(
            dy, u, dt, A, B, C, D, dt_bias, index, length, softplus, states, dBC
        )
        return du, ddt, dA, dB, dC, dD, None, ddt_bias
    return triton_scan_backward.scan_backward(
        dy, u, dt, A, B, C, D, z, dt_bias, index, length, softplus, states, dBC
    )
