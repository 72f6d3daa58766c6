"""Features: the residual stream of plain models, stages of hierarchical ones, dense backbones."""

import pytest
import timm
import torch
from model_cases import demo, demo_image

import localmamba


@pytest.mark.parametrize("class_token", [False, True])
@torch.no_grad()
def test_plain_features_are_the_normalized_stream(class_token: bool) -> None:
    pool = "token" if class_token else "avg"
    model = demo("localvim_demo", class_token=class_token, global_pool=pool)
    x = demo_image("localvim_demo")
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 63 + class_token, 32)
    final, maps = model.forward_intermediates(x, indices=[1, 3])
    torch.testing.assert_close(final, tokens)
    kept = torch.cat((tokens[:, :31], tokens[:, 32:]), dim=1) if class_token else tokens
    torch.testing.assert_close(maps[1].flatten(2).transpose(1, 2), kept)
    assert maps[0].shape == (2, 32, 9, 7)
    raw = model.forward_intermediates(x, [1], norm=False, intermediates_only=True)[0]
    normed = model.norm(raw.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(maps[0], normed)
    lists = model.forward_intermediates(x, [1], output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(lists[0].transpose(1, 2).unflatten(2, (9, 7)), maps[0])


@torch.no_grad()
def test_pooling_of_plain_models() -> None:
    model = demo("localvim_demo", class_token=True, global_pool="token")
    tokens = model.forward_features(demo_image("localvim_demo"))
    pooled = model.forward_head(tokens, pre_logits=True)
    torch.testing.assert_close(pooled, tokens[:, 31])
    model.reset_classifier(0, "avg")
    torch.testing.assert_close(model.forward_head(tokens), tokens.mean(1))
    model.reset_classifier(3)
    assert model.global_pool == "avg"
    with pytest.raises(ValueError, match="global_pool must be one of 'avg', ''"):
        demo("localvim_demo", global_pool="token")


@pytest.mark.parametrize(
    ("name", "levels"),
    [("localvim_demo", 4), ("localvmamba_demo", 3), ("localvmamba_demo_search", 3)],
)
@torch.no_grad()
def test_features_only_gives_maps_of_the_full_model(name: str, levels: int) -> None:
    model, x = demo(name), demo_image(name)
    getter = demo(name, features_only=True)
    getter.model.load_state_dict(model.state_dict(), strict=False)
    maps = getter(x)
    expected = model.forward_intermediates(x, intermediates_only=True)
    assert len(maps) == levels
    sizes = zip(getter.feature_info.channels(), getter.feature_info.reduction(), strict=True)
    for y, truth, (channels, stride) in zip(maps, expected, sizes, strict=True):
        torch.testing.assert_close(y, truth)
        assert y.shape[1:] == (channels, -(-x.shape[2] // stride), -(-x.shape[3] // stride))
    last = demo(name, features_only=True, out_indices=(-2,))
    assert last.feature_info.channels() == [getter.feature_info.channels()[-2]]


@pytest.mark.parametrize("name", ["localvim_demo", "localvmamba_demo"])
def test_unknown_output_format(name: str) -> None:
    with pytest.raises(ValueError, match="output_fmt must be NCHW or N"):
        demo(name).forward_intermediates(demo_image(name), output_fmt="CHW")


@torch.no_grad()
def test_plain_backbone_taps_what_mixers_put_out() -> None:
    model, x = demo("localvim_demo"), demo_image("localvim_demo")
    outputs = []
    for block in model.blocks:
        block.mixer.register_forward_hook(lambda _, __, y: outputs.append(y))
    model(x)
    backbone = localmamba.DenseBackbone(demo("localvim_demo"), out_indices=[0, 2]).eval()
    assert len(backbone.model.blocks) == 3
    maps = backbone(x)
    assert (backbone.channels(), backbone.reduction()) == ([32, 32], [1, 1])
    for i, y in enumerate(maps):
        expected = backbone.norms[i](outputs[2 * i]).transpose(1, 2).unflatten(2, (9, 7))
        torch.testing.assert_close(y, expected)


def test_backbone_trains_every_parameter() -> None:
    for name in ("localvim_demo", "localvmamba_demo"):
        backbone = localmamba.create_backbone(name)
        backbone.set_grad_checkpointing()
        sum(y.square().mean() for y in backbone(demo_image(name))).backward()
        assert all(p.grad is not None for p in backbone.parameters())


def test_backbone_refuses_what_does_not_exist() -> None:
    with pytest.raises(ValueError, match="out_indices must be between 0 and 3"):
        localmamba.create_backbone("localvim_demo", out_indices=[1, 4])
    with pytest.raises(ValueError, match="must be a LocalVim or a LocalVMamba"):
        localmamba.DenseBackbone(timm.create_model("test_vit"))


@pytest.mark.parametrize("name", ["localvim_demo", "localvmamba_demo"])
def test_images_of_the_wrong_kind(name: str) -> None:
    model = demo(name)
    with pytest.raises(ValueError, match=r"images must be \[B, 3, height, width\]"):
        model(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match="images must be"):
        model(torch.zeros(3, 8, 8))
