"""Checkpoints of the command line as models, and scan directions as part of a state dict."""

import copy
import json
import random
from pathlib import Path

import pytest
import timm
import torch
from model_cases import demo, demo_image
from safetensors.torch import load_file, save_file
from timm.utils import ModelEmaV2, ModelEmaV3

import localmamba
from localmamba.models.loading import CHECKSUM, FILE, KEY, checksum

CARD = {
    "model": "localvim_demo",
    "arguments": {"num_classes": 2, "in_chans": 1, "directions": ["h", "v"]},
    "classes": ["cat[adult]", "кот"],
    "input": {"size": 8, "channels": 1, "mean": [0.286], "std": [0.353], "crop_pct": 0.9},
}


def write(path: Path, drop: str = "nothing", **changes) -> torch.nn.Module:
    """Writes a checkpoint as the command line does; returns its model."""
    model = demo("localvim_demo", **CARD["arguments"])
    state = {name: x for name, x in model.state_dict().items() if not name.endswith(drop)}
    text = json.dumps({**CARD, **changes})
    save_file(state, path, metadata={KEY: text, CHECKSUM: checksum(text, state)})
    return model


@pytest.mark.parametrize("drop", ["nothing", "_extra_state"], ids=["new", "old"])
@torch.no_grad()
def test_a_file_or_folder_is_the_model_again(tmp_path: Path, drop: str) -> None:
    model, x = write(tmp_path / FILE, drop), torch.randn(2, 1, 8, 8)
    for path in (tmp_path, tmp_path / FILE, str(tmp_path)):
        again = localmamba.load(path)
        assert not again.training
        assert torch.equal(again(x), model(x))
    assert again.classes == ("cat[adult]", "кот")
    config = timm.data.resolve_model_data_config(again)
    assert (config["mean"], config["std"]) == ((0.286,), (0.353,))
    assert (config["input_size"], config["crop_pct"]) == ((1, 8, 8), 0.9)
    assert again.pretrained_cfg["label_names"] == ["cat[adult]", "кот"]
    assert torch.equal(copy.deepcopy(again)(x), model(x))


def test_the_shipped_weights_load() -> None:
    model = localmamba.load(Path(__file__).parents[2] / "examples" / "fashion_mnist")
    assert len(model.classes) == model.num_classes == 10
    assert model.pretrained_cfg["mean"] != timm.get_pretrained_cfg("localvim_demo").mean


def test_what_is_no_checkpoint_is_said_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / FILE
    write(path, model="localvim_dmeo")
    messages = {"unknown model 'localvim_dmeo'; did you mean: localvim_demo": path}
    write(tmp_path / "other", arguments={**CARD["arguments"], "directions": ["v", "h"]})
    messages["for the directions h, v, this layer has v, h"] = tmp_path / "other"
    wider = {**CARD["arguments"], "embed_dim": 16}
    write(tmp_path / "wider", arguments=wider)
    messages["does not fit localvim_demo"] = tmp_path / "wider"
    write(tmp_path / "poor", input={"size": 8})
    messages["has a broken description of its model .its input lacks channels, mean, std"] = (
        tmp_path / "poor"
    )
    (tmp_path / "cut").write_bytes(path.read_bytes()[:-100])
    messages["is no safetensors file, or cut short"] = tmp_path / "cut"
    save_file({"x": torch.zeros(1)}, tmp_path / "bare")
    messages["does not say which model it is"] = tmp_path / "bare"
    messages["no checkpoint"] = tmp_path / "absent"
    for message, source in messages.items():
        with pytest.raises(ValueError, match=message) as caught:
            localmamba.load(source)
        assert "\n" not in str(caught.value)


def test_damage_of_any_kind_is_one_line(tmp_path: Path) -> None:
    """Flipped bits in the header, the description and the weights, cuts, extensions."""
    path = tmp_path / FILE
    write(path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    rng = random.Random(0)
    damaged = [whole[: rng.randrange(len(whole))] for _ in range(5)]
    damaged += [whole + bytes(5), b""]
    for start, end in [(0, header)] * 40 + [(header, len(whole))] * 20:
        content = bytearray(whole)
        content[rng.randrange(start, end)] ^= 1 << rng.randrange(8)
        damaged.append(bytes(content))
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=FILE) as caught:
            localmamba.load(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": 3}, "model is of the wrong type, int"),
        ({"licence": "x"}, "the description holds an unknown 'licence'"),
        ({"classes": ["a"]}, "num_classes does not fit 1 class names"),
        ({"classes": ["a", 1]}, "classes holds values of the wrong type"),
        ({"classes": []}, "have to be above 0"),
        ({"input": {**CARD["input"], "channels": 3}}, "mean does not fit 3 channels"),
        ({"input": {**CARD["input"], "size": 10**9}}, r"1e\+09 is out of range"),
        ({"input": {**CARD["input"], "std": [0]}}, "std have to be above 0"),
        ({"input": {**CARD["input"], "interpolation": "magic"}}, "interpolation has to be one of"),
        ({"model": "hf-hub:someone/something"}, "unknown model"),
        ({"arguments": {"pretrained": True}}, "arguments pretrained are not for checkpoints"),
        ({"arguments": {"checkpoint_path": "/etc/x"}}, "checkpoint_path are not for checkpoints"),
        ({"arguments": {"directions": "/etc/x"}}, "directions have to be lists, not a file"),
        ({"arguments": {"embed_dim": "wide"}}, "localvim_demo: "),
        ({"arguments": {"channeds": 3}}, "unexpected keyword argument 'channeds'"),
        ({"arguments": {"depth": 10**5}}, "many more tensors than it holds"),
        ({"arguments": {"embed_dim": 10**5}}, "does not fit localvim_demo, which has more weights"),
        ({"arguments": {"depth": 10**12}}, r"1e\+12 is out of range"),
    ],
)
def test_a_description_that_lies_is_one_line(tmp_path: Path, changes: dict, message: str) -> None:
    path = tmp_path / FILE
    if "arguments" in changes:
        changes = {"arguments": {**CARD["arguments"], **changes["arguments"]}}
    write(path, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        localmamba.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_file_without_a_checksum_loads_with_a_warning(tmp_path: Path) -> None:
    model = demo("localvim_demo", **CARD["arguments"])
    save_file(model.state_dict(), tmp_path / FILE, metadata={KEY: json.dumps(CARD)})
    with pytest.warns(UserWarning, match="holds no checksum"):
        localmamba.load(tmp_path)


@pytest.mark.parametrize("name", ["localvim_demo", "localvmamba_demo"])
def test_weights_for_other_directions_are_refused(name: str, tmp_path: Path) -> None:
    model = demo(name, directions=["h", "w2"])
    other = demo(name, directions=["h", "v"])
    save_file(model.state_dict(), tmp_path / FILE)
    state = load_file(tmp_path / FILE)
    demo(name, directions=["h", "w2"]).load_state_dict(state)
    for load in (other.load_state_dict, lambda state: localmamba.load_released(other, state)):
        before = {key: x.clone() for key, x in other.state_dict().items()}
        with pytest.raises(ValueError, match="for the directions h, w2, this layer has h, v"):
            load(state)
    assert all(torch.equal(x, before[key]) for key, x in other.state_dict().items())
    weights = {key: x for key, x in state.items() if not key.endswith("_extra_state")}
    with pytest.raises(RuntimeError, match="Missing key"):
        demo(name, directions=["h", "w2"]).load_state_dict(weights)
    localmamba.load_released(other, weights)


@pytest.mark.parametrize("ema_class", [ModelEmaV2, ModelEmaV3])
def test_averages_and_compiled_models_keep_directions(ema_class: type) -> None:
    model = demo("localvmamba_demo")
    ema = ema_class(model, decay=0.9)
    for _ in range(3):
        ema.update(model)
    model.load_state_dict(ema.module.state_dict())
    compiled = torch.compile(model, backend="aot_eager")
    compiled(demo_image("localvmamba_demo"))
    state = {k.removeprefix("_orig_mod."): x for k, x in compiled.state_dict().items()}
    demo("localvmamba_demo").load_state_dict(state)


def test_timm_reads_its_own_files(tmp_path: Path) -> None:
    """With another number of classes and as features, directions are checked as well."""
    torch.save(demo("localvim_demo").state_dict(), tmp_path / "a.pth")
    source = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "a.pth")}}
    for kwargs in ({}, {"num_classes": 3}, {"num_classes": 0}, {"features_only": True}):
        timm.create_model("localvim_demo", **source, **kwargs)
        with pytest.raises(ValueError, match=r"this layer has h, v$"):
            timm.create_model("localvim_demo", directions=["h", "v"], **source, **kwargs)
