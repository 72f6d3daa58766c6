"""The two mixers and their base: against a plain form, and in other networks."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localmamba.layers import SS2D, LocalVimMixer
from localmamba.layers.mixer import DirectionalMixer
from localmamba.ops import scan_order, selective_scan

FOUR = ["h", "v_flip", "w2", "w3_flip"]
GRIDS = [(4, 6), (5, 3), (1, 7)]


def make(mixer_class: type[DirectionalMixer], **kwargs) -> DirectionalMixer:
    """A float64 mixer with nothing left at 0 or 1."""
    torch.manual_seed(0)
    mixer = mixer_class(16, **{"directions": FOUR, **kwargs}, d_state=4).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return mixer


def scan_alone(mixer: DirectionalMixer, k: int, u: Tensor) -> Tensor:
    """The selective scan of branch k over tokens in scan order, [B, P, D]."""
    s6 = mixer.branches
    rank, states = s6.dt_weight.shape[2], s6.A_log.shape[2]
    dt, B, C = (u @ s6.x_proj[k].T).split([rank, states, states], dim=-1)
    parts = (u, dt @ s6.dt_weight[k].T, -s6.A_log[k].exp(), B, C, s6.D[k], s6.dt_bias[k])
    u, dt, A, B, C, D, bias = (p.unsqueeze(1) if p.dim() == 3 else p[None] for p in parts)
    return selective_scan(u, dt, A, B, C, D, None, bias)[:, 0]


def in_order(x: Tensor, name: str, grid: tuple[int, int], token: int) -> tuple[Tensor, list[int]]:
    """Tokens as a direction reads them, zeros at padding; and where each token went."""
    steps = list(scan_order(name, grid).index)
    if token >= 0:
        steps = [s + (s >= token) for s in steps]
        steps.insert(token, token)
    rows = [x[:, s] if s >= 0 else torch.zeros_like(x[:, 0]) for s in steps]
    return torch.stack(rows, dim=1), [steps.index(i) for i in range(x.shape[1])]


def attend(mixer: DirectionalMixer, y: Tensor) -> Tensor:
    """SCAttn as the paper writes it, for one direction [B, L, D]."""
    attn = mixer.attn
    if attn is None:
        return y
    normed = attn.norm(y)
    pooled = F.gelu(attn.global_reduce(normed.mean(1, keepdim=True)))
    out = y * torch.sigmoid(attn.channel_select(pooled))
    if attn.spatial_select is not None:
        local = F.gelu(attn.local_reduce(normed))
        joined = torch.cat((local, pooled.expand(-1, y.shape[1], -1)), dim=-1)
        out = out * torch.sigmoid(attn.spatial_select(joined))
    return out


def plain_local_vim(mixer: LocalVimMixer, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """LocalVimMixer, one direction after another."""
    token = grid[0] * grid[1] // 2 if mixer.class_token else -1
    x, z = mixer.in_proj(x).chunk(2, dim=-1)
    total = torch.zeros_like(x)
    for k, name in enumerate(mixer.directions):
        u, places = in_order(x, name, grid, token)
        weight = mixer.branches.conv_weight[k][:, None]
        u = F.pad(u.transpose(1, 2), (weight.shape[2] - 1, 0))
        u = F.silu(F.conv1d(u, weight, mixer.branches.conv_bias[k], groups=x.shape[2]))
        y = scan_alone(mixer, k, u.transpose(1, 2))[:, places]
        total = total + attend(mixer, y * F.silu(z))
    return mixer.out_proj(total * mixer.scale)


def plain_ss2d(mixer: SS2D, x: Tensor) -> Tensor:
    """SS2D, one direction after another. Padding has u = dt = B = C = 0, which zeros give."""
    grid = (x.shape[1], x.shape[2])
    x, z = mixer.in_proj(x).chunk(2, dim=-1)
    x = F.silu(mixer.conv(x.permute(0, 3, 1, 2))).flatten(2).transpose(1, 2)
    total = torch.zeros_like(x)
    for k, name in enumerate(mixer.directions):
        u, places = in_order(x, name, grid, -1)
        total = total + attend(mixer, scan_alone(mixer, k, u)[:, places])
    return mixer.out_proj(mixer.norm(total).unflatten(1, grid) * F.silu(z))


@pytest.mark.parametrize("scattn", ["channel", "channel+spatial", None])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("token", [False, True], ids=["", "class_token"])
def test_local_vim_mixer_is_its_plain_form(scattn, grid, token) -> None:
    mixer = make(LocalVimMixer, scattn=scattn, class_token=token, merge="mean" if token else "sum")
    x = torch.randn(2, grid[0] * grid[1] + token, 16, dtype=torch.float64)
    torch.testing.assert_close(mixer(x, *grid), plain_local_vim(mixer, x, grid))


@pytest.mark.parametrize("scattn", ["channel", "channel+spatial", None])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_ss2d_is_its_plain_form(scattn, grid) -> None:
    mixer = make(SS2D, scattn=scattn)
    x = torch.randn(2, *grid, 16, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), plain_ss2d(mixer, x))


def without_directions(mixer: DirectionalMixer) -> dict[str, Tensor]:
    """The weights alone, for a mixer with other directions."""
    return dict(mixer.named_parameters())


def test_weights_of_other_directions_are_refused() -> None:
    state = SS2D(16, directions=["h", "w2"]).state_dict()
    SS2D(16, directions=["h", "w2"]).load_state_dict(state)
    with pytest.raises(ValueError, match="for the directions h, w2, this layer has w2, h") as e:
        SS2D(16, directions=["w2", "h"]).load_state_dict(state)
    assert "\n" not in str(e.value)
    del state["_extra_state"]
    with pytest.raises(RuntimeError, match="_extra_state"):
        SS2D(16, directions=["h", "w2"]).load_state_dict(state)


def test_a_transposed_grid_swaps_rows_and_columns() -> None:
    mixer = make(LocalVimMixer, directions=["h", "v", "v_flip"])
    turned = make(LocalVimMixer, directions=["v", "h", "h_flip"])
    turned.load_state_dict(without_directions(mixer), strict=False)
    x = torch.randn(1, 3, 5, 16, dtype=torch.float64)
    y = mixer(x.flatten(1, 2), 3, 5).unflatten(1, (3, 5))
    y_turned = turned(x.transpose(1, 2).flatten(1, 2), 5, 3).unflatten(1, (5, 3))
    torch.testing.assert_close(y_turned.transpose(1, 2), y)


class Foreign(nn.Module):
    """Someone else's network: convolutions around a mixer, any image size."""

    def __init__(self, mixer_class: type[DirectionalMixer]):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, 4)
        self.mixer = mixer_class(16)
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image).permute(0, 2, 3, 1)
        if isinstance(self.mixer, SS2D):
            x = x + self.mixer(x)
        else:
            height, width = x.shape[1], x.shape[2]
            y = self.mixer(x.flatten(1, 2), height, width)
            x = x + y.unflatten(1, (height, width))
        return self.head(x.permute(0, 3, 1, 2))


@pytest.mark.parametrize("mixer_class", [LocalVimMixer, SS2D])
def test_in_a_foreign_network_on_any_grid(mixer_class) -> None:
    net = Foreign(mixer_class)
    for size in [(16, 16), (12, 44), (36, 8)]:
        out = net(torch.randn(2, 3, *size))
        assert out.shape == (2, 2, size[0] // 4, size[1] // 4)
        out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("mixer_class", [LocalVimMixer, SS2D])
@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.bfloat16, 1.0), (torch.bfloat16, 300.0), (torch.float16, 30.0)]
)
def test_autocast_is_finite_where_float32_is(mixer_class, dtype, scale) -> None:
    torch.manual_seed(0)
    mixer = mixer_class(16, directions=FOUR)
    with torch.no_grad():
        mixer.in_proj.weight.mul_(scale)
        mixer.out_proj.weight.mul_(scale)
    x = torch.randn(2, 4, 5, 16) * scale
    arguments = (x,) if mixer_class is SS2D else (x.flatten(1, 2), 4, 5)
    assert mixer(*arguments).isfinite().all()
    with torch.autocast("cpu", dtype):
        out = mixer(*arguments)
    assert out.isfinite().all()
    if dtype == torch.bfloat16:  # in float16, gradients are the loss scaler's business
        out.float().mean().backward()
        assert all(p.grad.isfinite().all() for p in mixer.parameters())


@pytest.mark.parametrize(
    ("make_or_run", "message"),
    [
        (lambda: LocalVimMixer(16, ["h", "w0"]), "sizes must be at least 1"),
        (lambda: LocalVimMixer(16, ["sideways"]), "unknown direction 'sideways'"),
        (lambda: LocalVimMixer(16, []), "at least one"),
        (lambda: SS2D(16, "h"), "must be a list of names"),
        (lambda: SS2D(16, scattn="spatial"), "scattn must be one of"),
        (lambda: LocalVimMixer(16, merge="max"), "merge must be one of"),
        (lambda: LocalVimMixer(16)(torch.zeros(1, 12, 16), 3, 5), "3 x 5 grid must be"),
        (lambda: LocalVimMixer(16)(torch.zeros(1, 15, 8), 3, 5), r"\[B, 15, 16\]"),
        (lambda: SS2D(16)(torch.zeros(1, 15, 16)), r"\[B, H, W, 16\]"),
    ],
)
def test_bad_input_says_what_is_allowed(make_or_run, message) -> None:
    with pytest.raises(ValueError, match=message):
        make_or_run()
