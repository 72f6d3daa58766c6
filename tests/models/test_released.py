"""Checkpoints of the release: what is found in files, what is refused, and in which words."""

import argparse
import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from model_cases import as_released, demo, demo_image
from safetensors.torch import save_file

import localmamba
from localmamba.models.layouts import LOCALVIM, LOCALVMAMBA, OWN, VIM, VMAMBA

VIM_LIKE = {"directions": ["h", "h_flip"], "scattn": None}
CASES = {
    "localvim": ("localvim_demo", LOCALVIM, {}),
    "supernet": ("localvim_demo_search", LOCALVIM, {}),
    "class_token": ("localvim_demo", LOCALVIM, {"class_token": True}),
    "vim": ("localvim_demo", VIM, VIM_LIKE),
    "localvmamba": ("localvmamba_demo", LOCALVMAMBA, {}),
    "localvmamba_supernet": ("localvmamba_demo_search", LOCALVMAMBA, {}),
    "vmamba": ("localvmamba_demo", VMAMBA, VIM_LIKE),
    "own": ("localvim_demo", OWN, {}),
}


def weights(name: str, layout=LOCALVIM, **kwargs) -> dict[str, torch.Tensor]:
    return (
        as_released(demo(name, **kwargs), layout) if layout is not OWN else demo(name).state_dict()
    )


def other(name: str, **kwargs) -> torch.nn.Module:
    torch.manual_seed(1)
    return timm.create_model(name, **kwargs).eval()


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_every_layout_loads(case: str) -> None:
    name, layout, kwargs = CASES[case]
    model = localmamba.load_released(other(name, **kwargs), weights(name, layout, **kwargs))
    x = demo_image(name)
    torch.testing.assert_close(model(x), demo(name, **kwargs)(x), rtol=0, atol=0)


def prefixed(state: dict, prefix: str) -> dict:
    return {prefix + key: x for key, x in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": prefixed(s, "module."), "args": argparse.Namespace(lr=1e-3)},
        lambda s: {"model": s, "top1": np.float64(76.2), "optimizer": {"state": {}}},
        lambda s: {"state_dict": {**prefixed(s, "backbone."), "decode_head.w": torch.ones(1)}},
        lambda s: prefixed(s, "_orig_mod."),
    ],
)
@pytest.mark.parametrize("suffix", [".ckpt", ".pth"])
def test_found_beside_training_state(tmp_path: Path, wrap, suffix: str) -> None:
    path = tmp_path / f"released{suffix}"
    torch.save(wrap(weights("localvim_demo")), path)
    model = localmamba.load_released(other("localvim_demo"), path)
    torch.testing.assert_close(model.head.weight, demo("localvim_demo").head.weight)


def test_safetensors_and_numpy(tmp_path: Path) -> None:
    state = weights("localvmamba_demo", LOCALVMAMBA)
    save_file({key: x.contiguous() for key, x in state.items()}, tmp_path / "a.safetensors")
    arrays = {key: x.numpy() for key, x in state.items()}
    for source in (str(tmp_path / "a.safetensors"), arrays):
        model = localmamba.load_released(other("localvmamba_demo"), source)
        torch.testing.assert_close(model.norm.weight, demo("localvmamba_demo").norm.weight)


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema", "ema_model"])
def test_averaged_weights_are_preferred_unless_refused(key: str) -> None:
    state = weights("localvim_demo")
    averaged = {**state, "head.bias": state["head.bias"] + 1}
    both = {"model": state, key: averaged}
    for ema, expected in ((None, 1), (True, 1), (False, 0)):
        model = localmamba.load_released(other("localvim_demo"), both, ema=ema)
        assert (model.head.bias == expected).all()
    with pytest.raises(ValueError, match="holds no averaged weights"):
        localmamba.load_released(other("localvim_demo"), {"model": state}, ema=True)


def test_names_everything_that_does_not_fit() -> None:
    state = weights("localvim_demo")
    del state["layers.1.mixer.A_log_2"], state["norm_f.weight"]
    state["layers.0.norm.bias"] = torch.zeros(1)
    state["layers.2.mixer.D_0"] = torch.zeros(5)
    model = other("localvim_demo")
    before = {key: x.clone() for key, x in model.state_dict().items()}
    with pytest.raises(ValueError, match="does not fit") as caught:
        localmamba.load_released(model, state)
    message = str(caught.value)
    assert "missing layers.1.mixer.A_log_2, norm_f.weight" in message
    assert "left over layers.0.norm.bias" in message
    assert "wrong shape layers.2.mixer.D_0 [5] (needs [64])" in message
    assert "\n" not in message
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())


@pytest.mark.parametrize("name", ["localvim_demo", "localvmamba_demo"])
def test_another_number_of_classes_names_the_head(name: str) -> None:
    layout = LOCALVIM if name == "localvim_demo" else LOCALVMAMBA
    state = weights(name, layout)
    with pytest.raises(ValueError, match=r"head.weight \[10, \d+\] \(needs \[4, \d+\]\)"):
        localmamba.load_released(other(name, num_classes=4), state)
    model = localmamba.load_released(other(name, num_classes=0), state)
    torch.testing.assert_close(model.norm.weight, demo(name).norm.weight)


def test_another_family_is_told_apart() -> None:
    with pytest.raises(ValueError, match="holds nothing of this model, but"):
        localmamba.load_released(other("localvim_demo"), {"fc.weight": torch.zeros(1)})
    state = weights("localvim_demo", class_token=True)
    with pytest.raises(ValueError, match="left over cls_token"):
        localmamba.load_released(other("localvim_demo"), state)
    with pytest.raises(ValueError, match="must be a LocalVim"):
        localmamba.load_released(torch.nn.Linear(1, 1), {})


class Trap:
    """Runs code when it is unpickled without care."""

    def __reduce__(self):
        return (Path.touch, (Path("sprung"),))


def test_broken_and_hostile_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(weights("localvim_demo"), "whole.ckpt")
    content = Path("whole.ckpt").read_bytes()
    Path("half.ckpt").write_bytes(content[: len(content) // 2])
    Path("half.safetensors").write_bytes(content[:100])
    Path("empty.pth").touch()
    Path("text.pth").write_text("not a checkpoint\nat all")
    Path("trap.pth").write_bytes(pickle.dumps({"state_dict": Trap()}))
    torch.save({"state_dict": {}, "trap": Trap()}, "trap.ckpt")
    torch.save([1, 2], "list.ckpt")
    torch.save({"epoch": 3}, "nothing.ckpt")
    names = [path.name for path in tmp_path.iterdir() if path.name != "whole.ckpt"]
    for name in [*names, "absent.ckpt"]:
        with pytest.raises(ValueError, match=r"checkpoint|tensors") as caught:
            localmamba.load_released(other("localvim_demo"), name)
        assert "\n" not in str(caught.value)
    assert not Path("sprung").exists()


@pytest.mark.parametrize("name", ["localvim_demo", "localvmamba_demo"])
@torch.no_grad()
def test_backbones_take_backbones_and_classifiers(name: str) -> None:
    layout, number = (
        (LOCALVIM, "outnorm_{}") if name == "localvim_demo" else (LOCALVMAMBA, "outnorm{}")
    )
    state = weights(name, layout)
    backbone = localmamba.load_released(localmamba.create_backbone(name, [1, 2]), state)
    assert (backbone.norms[0].weight == 1).all()
    expected = localmamba.DenseBackbone(demo(name), [1, 2])
    x = demo_image(name)
    torch.testing.assert_close(backbone(x), expected(x))
    trunk = {
        key: x for key, x in state.items() if not key.startswith(("head", "norm_f", "classifier"))
    }
    for i, level in enumerate([1, 2]):
        key = number.format(i if name == "localvim_demo" else level)
        channels = backbone.channels()[i]
        trunk |= {
            f"{key}.weight": torch.full((channels,), 2.0),
            f"{key}.bias": torch.ones(channels),
        }
    localmamba.load_released(backbone, trunk)
    assert (backbone.norms[1].weight == 2).all()
    again = localmamba.load_released(
        localmamba.create_backbone(name, [1, 2]), backbone.state_dict()
    )
    torch.testing.assert_close(again(x), backbone(x))
    del trunk[number.format(1) + ".weight"]
    with pytest.raises(ValueError, match="missing outnorm"):
        localmamba.load_released(backbone, trunk)


@pytest.mark.parametrize("class_token", [False, True])
@torch.no_grad()
def test_position_tables_are_resized(class_token: bool) -> None:
    kwargs = {"class_token": class_token}
    state = weights("localvim_demo", **kwargs)
    model = localmamba.load_released(other("localvim_demo", img_size=(5, 11), **kwargs), state)
    x = torch.randn(1, 3, 5, 11)
    torch.testing.assert_close(model(x), demo("localvim_demo", **kwargs)(x))


def test_pretrained_from_a_local_file(tmp_path: Path) -> None:
    """timm's own path: adapts channels and classes, also behind `features_only`."""
    torch.save({"state_dict": weights("localvmamba_demo", LOCALVMAMBA)}, tmp_path / "a.ckpt")
    source = {"file": str(tmp_path / "a.ckpt")}
    expected = demo("localvmamba_demo")
    for kwargs in (
        {},
        {"num_classes": 3, "in_chans": 1},
        {"num_classes": 0},
        {"features_only": True},
    ):
        model = timm.create_model(
            "localvmamba_demo", pretrained=True, pretrained_cfg_overlay=source, **kwargs
        )
        inner = getattr(model, "model", model)
        torch.testing.assert_close(
            inner.stages[2].downsample.reduction.weight,
            expected.stages[2].downsample.reduction.weight,
        )


def test_pretrained_without_internet_or_weights() -> None:
    nowhere = {"url": "http://127.0.0.1:9/local_vim_tiny.ckpt"}
    with pytest.raises(
        RuntimeError, match="cannot fetch the released weights of localvim_tiny"
    ) as e:
        timm.create_model("localvim_tiny", pretrained=True, pretrained_cfg_overlay=nowhere)
    assert "\n" not in str(e.value)
    with pytest.raises(RuntimeError, match="No pretrained weights exist for localvim_small"):
        timm.create_model("localvim_small", pretrained=True)


def test_released_files_are_known() -> None:
    urls = {
        name: timm.get_pretrained_cfg(name).url
        for name in ("localvim_tiny", "localvim_tiny_midcls", "localvmamba_small")
    }
    assert {url.rsplit("/", 1)[1] for url in urls.values()} == {
        "local_vim_tiny.ckpt",
        "local_vim_tiny_middle_cls_token.ckpt",
        "local_vssm_small.ckpt",
    }
