"""S6 parameters, SCAttn, norms, positions, patch embedding and merging, each alone."""

import copy

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localmamba.layers import (
    AxialRotary,
    LayerNorm,
    PatchEmbed,
    PatchMerging,
    RMSNorm,
    S6Branches,
    SCAttn,
    resize_table,
)
from localmamba.layers.precision import saturate


def test_s6_starts_as_mamba_does() -> None:
    s6 = S6Branches(4, 32, d_state=8, dt_rank=3, conv_width=4)
    torch.testing.assert_close(s6.A_log.exp(), torch.arange(1.0, 9).expand(4, 32, 8))
    assert (s6.D == 1).all()
    dt = F.softplus(s6.dt_bias)
    assert dt.min() > 0.9e-3
    assert dt.max() < 0.11
    assert s6.dt_weight.abs().max() <= 3**-0.5
    assert 0.01 < s6.x_proj.std() < 0.03


def test_each_direction_has_a_matrix_of_its_own() -> None:
    """In the release all directions of a block shared one storage until moved to a GPU."""
    s6 = S6Branches(3, 4, d_state=2)
    loaded = torch.arange(24.0).view(3, 4, 2)
    s6.load_state_dict({**s6.state_dict(), "A_log": loaded})
    torch.testing.assert_close(s6.A_log.detach(), loaded)
    assert len({s6.A_log[k].data_ptr() for k in range(3)}) == 3


@pytest.mark.parametrize("gated", [False, True])
def test_scattn_weights_are_the_papers(gated: bool) -> None:
    attn = SCAttn(16, kind="channel+spatial").double()
    y = torch.randn(2, 3, 5, 16, dtype=torch.float64)
    z = torch.randn(2, 5, 16, dtype=torch.float64) if gated else None
    channel, token = attn(y, z)
    normed = attn.norm(y if z is None else y * F.silu(z)[:, None])
    pooled = F.gelu(attn.global_reduce(normed.mean(2)))
    torch.testing.assert_close(channel, attn.channel_select(pooled).sigmoid())
    local = F.gelu(attn.local_reduce(normed))
    joined = torch.cat((local, pooled[:, :, None].expand_as(local)), dim=-1)
    torch.testing.assert_close(token, attn.spatial_select(joined).sigmoid()[..., 0])


def test_scattn_channel_has_no_token_weights() -> None:
    attn = SCAttn(16)
    channel, token = attn(torch.randn(2, 3, 5, 16))
    assert channel.shape == (2, 3, 16)
    assert token is None
    assert not any("local" in name or "spatial" in name for name in attn.state_dict())


def test_rms_norm_keeps_the_weights_dtype() -> None:
    x = torch.randn(2, 5, 8)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(RMSNorm(8)(x), expected)
    assert RMSNorm(8).bfloat16()(x).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(5, 8), (2, 5, 8), (2, 3, 5, 8), (0, 3, 8)], ids=str)
def test_layer_norm_is_pytorchs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    norm, truth = LayerNorm(8, dtype=dtype), nn.LayerNorm(8, dtype=dtype)
    for parameter in truth.parameters():
        nn.init.normal_(parameter)
    norm.load_state_dict(truth.state_dict())
    x = torch.randn(shape, dtype=dtype)
    assert_same_answers_and_gradients(norm, truth, x)
    assert isinstance(norm, nn.LayerNorm), "who sorts parameters by their layer finds it"


def assert_same_answers_and_gradients(layer: nn.Module, truth: nn.Module, x: Tensor) -> None:
    found, wanted = ([], [])
    for module, results in ((layer, found), (truth, wanted)):
        inputs = [x.clone().requires_grad_(), *module.parameters()]
        y = module(inputs[0])
        results.extend((y, *torch.autograd.grad(y.square().sum(), inputs)))
    for result, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("norm", [LayerNorm(8), RMSNorm(8)], ids=["layer", "rms"])
def test_norms_answer_in_the_dtype_of_autocast(norm: nn.Module) -> None:
    x = torch.randn(2, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype == torch.bfloat16
    assert norm(x).dtype == torch.float32
    assert copy.deepcopy(norm).bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_a_table_on_its_own_grid_is_itself() -> None:
    table = torch.randn(1, 12, 4)
    assert resize_table(table, (3, 4), 3, 4) is table


@pytest.mark.parametrize("grid", [(7, 9), (2, 3), (1, 8)], ids=str)
def test_resizing_a_table_is_pytorchs_bicubic(grid: tuple[int, int]) -> None:
    table = torch.randn(1, 12, 4, dtype=torch.float64, requires_grad=True)
    image = table.unflatten(1, (3, 4)).permute(0, 3, 1, 2)
    expected = F.interpolate(image, size=grid, mode="bicubic").flatten(2).transpose(1, 2)
    found = resize_table(table, (3, 4), *grid)
    torch.testing.assert_close(found, expected)
    gradient = torch.randn_like(found)
    torch.testing.assert_close(
        torch.autograd.grad(found, table, gradient), torch.autograd.grad(expected, table, gradient)
    )


@pytest.mark.parametrize("grid", [(7, 9), (4, 3), (3, 4)], ids=str)
def test_a_class_token_stays_in_the_middle(grid: tuple[int, int]) -> None:
    table = torch.randn(1, 13, 4)
    resized = resize_table(table, (3, 4), *grid, class_token=True)
    middle = grid[0] * grid[1] // 2
    torch.testing.assert_close(resized[:, middle], table[:, 6])
    tokens = torch.cat((table[:, :6], table[:, 7:]), dim=1)
    others = torch.cat((resized[:, :middle], resized[:, middle + 1 :]), dim=1)
    torch.testing.assert_close(others, resize_table(tokens, (3, 4), *grid))


def test_rotary_half_by_row_half_by_column() -> None:
    rotary = AxialRotary(8, (3, 5))
    cos = rotary.cos.unflatten(1, (3, 5))
    assert (cos[..., :4] == cos[:, :, :1, :4]).all()
    assert (cos[..., 4:] == cos[:, :1, :, 4:]).all()
    torch.testing.assert_close(cos[0, :, 0, 0], torch.cos(torch.arange(3) / 3 * 14))
    torch.testing.assert_close(rotary.cos**2 + rotary.sin**2, torch.ones(1, 15, 8))


def test_rotary_needs_pairs_on_both_axes() -> None:
    with pytest.raises(ValueError, match="divisible by 4"):
        AxialRotary(6, (2, 2))


def test_patch_merging_pads_odd_sides() -> None:
    merge = PatchMerging(4, 8)
    x = torch.randn(1, 5, 3, 4)
    torch.testing.assert_close(merge(x), merge(F.pad(x, (0, 0, 0, 1, 0, 1))))
    assert merge(x).shape == (1, 3, 2, 8)
    first = torch.cat((x[0, 0, 0], x[0, 1, 0], x[0, 0, 1], x[0, 1, 1]))
    torch.testing.assert_close(merge(x)[0, 0, :1], merge.reduction(merge.norm(first[None])))


def test_saturated_values_pass_no_gradient() -> None:
    """A gradient as if nothing had been cut off would be too large by as much as was."""
    x = torch.tensor([1.0, 65472.0, 65504.0, -65504.0, torch.inf], dtype=torch.float16)
    x.requires_grad_()
    y = saturate(x)
    y.sum(dtype=torch.float32).backward()
    assert y.tolist() == [1.0, 65472.0, 65504.0, -65504.0, 65504.0]
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]


class StridedMerging(nn.Module):
    """VMamba's patch merging: four strided slices, joined."""

    def __init__(self, like: PatchMerging):
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(16, dtype=torch.float64), like.reduction
        self.norm.load_state_dict(like.norm.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        corners = (x[:, ::2, ::2], x[:, 1::2, ::2], x[:, ::2, 1::2], x[:, 1::2, 1::2])
        return self.reduction(self.norm(torch.cat(corners, dim=-1)))


@pytest.mark.parametrize("grid", [(4, 6), (5, 3), (1, 1)], ids=str)
def test_patch_merging_is_vmambas(grid: tuple[int, int]) -> None:
    merge = PatchMerging(4, 8, dtype=torch.float64)
    for parameter in merge.norm.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 4, *grid, dtype=torch.float64).permute(0, 2, 3, 1)
    assert_same_answers_and_gradients(merge, StridedMerging(merge), x)


@pytest.mark.parametrize("norm", [None, LayerNorm], ids=["", "norm"])
@pytest.mark.parametrize("size", [(8, 12), (7, 5), (1, 9)], ids=str)
def test_patch_embedding_is_timms(size: tuple[int, int], norm: type | None) -> None:
    embed = PatchEmbed(None, 4, 3, 6, norm, dtype=torch.float64)
    truth = timm.layers.PatchEmbed(
        None, 4, 3, 6, norm and nn.LayerNorm, output_fmt="NHWC", dynamic_img_pad=True,
        dtype=torch.float64,
    )  # fmt: skip
    truth.load_state_dict(embed.state_dict())
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    for x in (images, images.to(memory_format=torch.channels_last)):
        assert_same_answers_and_gradients(embed, truth, x)


@pytest.mark.parametrize(
    "layer", [LayerNorm(3), RMSNorm(3), PatchMerging(3, 5)], ids=lambda layer: type(layer).__name__
)
def test_norms_and_merging_script_trace_compile_and_export(layer: nn.Module) -> None:
    x = torch.randn(2, 5, 4, 3)
    expected = layer(x)
    batch = torch.export.Dim("batch")
    for run in (
        torch.jit.script(layer),
        torch.fx.symbolic_trace(layer),
        torch.compile(layer, fullgraph=True, backend="aot_eager"),
        torch.export.export(layer, (x,), dynamic_shapes=({0: batch},)).module(),
    ):
        torch.testing.assert_close(run(x), expected)
        torch.testing.assert_close(run(x[:1]), expected[:1])
