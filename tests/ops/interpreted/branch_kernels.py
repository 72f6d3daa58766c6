"""What goes with the scan in a block's branches, in Triton's interpreter: layouts and sums."""

import pytest
import torch
from kernel_cases import DTYPES

from localmamba.ops.selective_scan import cuda as kernels
from localmamba.ops.selective_scan.scan_sums import ParameterSums, sum_blocks

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rank", "columns"), [(1, 8), (6, 8), (8, 8), (12, 16)])
def test_weights_are_padded_with_zeros(rank, columns, dtype):
    x_proj, dt_weight = torch.randn(3, rank + 10, 20), torch.randn(3, 20, rank)
    x_out, dt_out = kernels.align_weights(x_proj.mT.contiguous().mT, dt_weight, dtype)
    zeros = torch.zeros(3, columns - rank, 20)
    expected = torch.cat((x_proj[:, :rank], zeros, x_proj[:, rank:]), dim=1)
    # The interpreter cuts off where a GPU rounds.
    rounding = {"rtol": 2.0**-7 if dtype == torch.bfloat16 else 2.0**-10, "atol": 1e-7}
    torch.testing.assert_close(x_out, expected.to(dtype), **rounding)
    torch.testing.assert_close(dt_out[..., :rank], dt_weight.to(dtype), **rounding)
    assert torch.equal(dt_out[..., rank:], torch.zeros(3, 20, columns - rank, dtype=dtype))


@pytest.mark.parametrize("rows", [1, 32, 45])
def test_sums_over_blocks_of_channels(rows):
    x = torch.randn(3, 2, 5, rows, 32)
    buffer = torch.full((2, rows, 3, 40), 7.0)
    sum_blocks(x, buffer.transpose(1, 2)[..., 8:])
    assert torch.allclose(buffer.transpose(1, 2)[..., 8:], x.sum(2).transpose(0, 1), atol=1e-5)
    assert torch.equal(buffer[..., :8], torch.full((2, rows, 3, 8), 7.0))


def test_sums_of_parameters():
    A, bias = torch.empty(3, 4, 2), torch.empty(3, 4)
    sums = ParameterSums(5, [A, None, bias], A.device)
    dA, none, dbias = sums.partial()
    dA.normal_()
    dbias.normal_()
    assert none is None
    total_A, none, total_bias = sums.total()
    assert none is None
    assert torch.allclose(total_A, dA.sum(0).view_as(A), atol=1e-6)
    assert torch.allclose(total_bias, dbias.sum(0).view_as(bias), atol=1e-6)
    assert total_A.is_contiguous()
    assert total_bias.is_contiguous()
