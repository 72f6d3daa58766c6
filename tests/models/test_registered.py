"""The same questions to every registered model."""

import pytest
import timm
import torch
from model_cases import NAMES
from safetensors.torch import load, save
from timm.models import group_parameters

import localmamba

EXPECTED = [
    "localvim_tiny",
    "localvim_small",
    "localvim_tiny_nosearch",
    "localvim_small_nosearch",
    "localvim_tiny_midcls",
    "localvmamba_tiny",
    "localvmamba_small",
    "vim_tiny",
    "vim_small",
    "vim_tiny_midcls",
    "vim_small_midcls",
    "vmamba_tiny",
    "vmamba_small",
    "vmamba_base",
    "localvim_search",
    "localvmamba_tiny_search",
    "localvmamba_small_search",
    "localvim_demo",
    "localvim_demo_search",
    "localvmamba_demo",
    "localvmamba_demo_search",
]


def test_the_registered_names() -> None:
    assert sorted(NAMES) == sorted(EXPECTED)


@pytest.mark.parametrize("name", NAMES)
def test_arguments_arrive(name: str) -> None:
    """Entry points of the release dropped `num_classes`; here every argument counts or raises."""
    with torch.device("meta"):
        model = timm.create_model(
            name, num_classes=7, in_chans=1, drop_path_rate=0.5, drop_rate=0.1
        )
        with pytest.raises(TypeError):
            timm.create_model(name, number_of_classes=7)
    assert model.get_classifier().out_features == 7
    assert model.patch_embed.proj.in_channels == 1
    rates = [m.drop_prob for m in model.modules() if isinstance(m, timm.layers.DropPath)]
    assert max(rates) == 0.5
    assert min(rates) == 0
    assert [r for r in rates if r > 0] == sorted(r for r in rates if r > 0)
    assert model(torch.empty(2, 1, 48, 80, device="meta")).shape == (2, 7)


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_and_groups_know_every_parameter(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    undecayed = model.no_weight_decay()
    names = dict(model.named_parameters())
    assert undecayed <= set(names)
    assert all(
        key in undecayed
        for key in names
        if key.endswith((".A_log", ".D", ".alpha", "pos_embed", "cls_token"))
    )
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert set(groups) == set(names)
    assert len(set(groups.values())) >= len(model.feature_info) + 2


@pytest.mark.parametrize(
    ("name", "depths"),
    [
        ("localvim_tiny", [20]),
        ("vim_small_midcls", [24]),
        ("localvmamba_tiny", [2, 2, 9, 2]),
        ("localvmamba_small", [2, 2, 27, 2]),
    ],
)
def test_depth_of_drop_path(name: str, depths: list[int]) -> None:
    """Block i drops what i - 1 put out, the first of a stage nothing; the end drops the last."""
    with torch.device("meta"):
        model = timm.create_model(name, drop_path_rate=0.2)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, timm.layers.DropPath)]
    outputs = torch.linspace(0, 0.2, sum(depths)).split(depths)
    expected = [rate for stage in outputs for rate in [0.0, *stage.tolist()]]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("name", ["localvim_demo", "localvmamba_demo", "localvim_demo_search"])
def test_same_seed_same_model_and_round_trip(name: str) -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(timm.create_model(name).eval())
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[key], second[key]) for key in first)
    torch.manual_seed(4)
    other = timm.create_model(name).eval()
    other.load_state_dict(load(save(models[0].state_dict())))
    x = torch.randn(1, 3, *timm.get_pretrained_cfg(name).input_size[1:])
    assert torch.equal(other(x), models[0](x))


def test_searched_tables_are_the_releases() -> None:
    for name, rows in (("localvim_tiny", 20), ("localvmamba_tiny", 15), ("localvmamba_small", 33)):
        table = localmamba.searched_directions(name)
        assert len(table) == rows
        assert all(len(set(row)) == 4 for row in table)
        with torch.device("meta"):
            model = timm.create_model(name)
        mixers = [m for m in model.modules() if isinstance(m, localmamba.layers.DirectionalMixer)]
        assert [mixer.directions for mixer in mixers] == table
    with pytest.raises(ValueError, match="no released directions for 'vim_tiny'"):
        localmamba.searched_directions("vim_tiny")


@pytest.mark.parametrize("name", ["localvim_demo", "localvmamba_tiny"])
def test_scattn_can_be_left_out_by_name(name: str) -> None:
    """timm drops arguments that are None."""
    names = timm.create_model(name, scattn="none").state_dict()
    assert not any(".attn." in name for name in names)
