"""Copying, compiling, exporting, checkpointing: the model must answer the same."""

import copy

import pytest
import torch
from model_cases import DEMOS, demo, demo_image


@pytest.mark.parametrize("name", DEMOS)
@torch.no_grad()
def test_copies_scripts_traces_and_exports(name: str) -> None:
    model, x = demo(name), demo_image(name)
    expected = model(x)
    programs = {
        "deepcopy": copy.deepcopy(model),
        "script": torch.jit.script(model),
        "fx": torch.fx.symbolic_trace(model),
        "compile": torch.compile(model, fullgraph=True, backend="aot_eager"),
        "export": torch.export.export(model, (x,)).module(),
    }
    for program, run in programs.items():
        torch.testing.assert_close(run(x), expected, msg=lambda m, p=program: f"{p}: {m}")


@pytest.mark.parametrize("name", ["localvim_demo", "localvmamba_demo"])
@torch.no_grad()
def test_scripted_and_traced_models_take_other_sizes(name: str) -> None:
    model, x = demo(name), demo_image(name)
    other = torch.randn(3, 3, x.shape[3], x.shape[2] + 4)
    for program in (torch.jit.script(model), torch.fx.symbolic_trace(model)):
        torch.testing.assert_close(program(x), model(x))
        torch.testing.assert_close(program(other), model(other))


@pytest.mark.parametrize("name", ["localvim_demo", "localvmamba_demo"])
@torch.no_grad()
def test_exports_with_a_free_batch(name: str) -> None:
    model, x = demo(name), demo_image(name)
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
    more = demo_image(name, batch=5)
    torch.testing.assert_close(program(more), model(more))


def gradients(model: torch.nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a sum of squares, by the name of the parameter."""
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", DEMOS)
def test_compiled_and_checkpointed_gradients_are_the_same(name: str) -> None:
    model, x = demo(name), demo_image(name)
    expected = gradients(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for key, gradient in gradients(compiled, x).items():
        torch.testing.assert_close(gradient, expected[key.removeprefix("_orig_mod.")], msg=key)
    model.set_grad_checkpointing()
    for key, gradient in gradients(model, x).items():
        torch.testing.assert_close(gradient, expected[key], msg=key)


@pytest.mark.parametrize("name", ["localvim_demo", "localvmamba_demo"])
def test_a_seed_drops_the_same_compiled_or_checkpointed(name: str) -> None:
    model, x = demo(name, drop_path_rate=0.5).train(), demo_image(name, batch=6)

    def seeded(program: torch.nn.Module, seed: int = 1) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return gradients(program, x)

    expected = seeded(model)
    weight = "patch_embed.proj.weight"
    assert not torch.allclose(seeded(model, seed=2)[weight], expected[weight])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for key, gradient in seeded(compiled).items():
        torch.testing.assert_close(gradient, expected[key.removeprefix("_orig_mod.")], msg=key)
    model.set_grad_checkpointing()
    for key, gradient in seeded(model).items():
        torch.testing.assert_close(gradient, expected[key], msg=key)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", DEMOS)
@torch.no_grad()
def test_half_precision_stays_near_float32(name: str, dtype: torch.dtype) -> None:
    model, x = demo(name), demo_image(name)
    expected = model(x)
    with torch.autocast("cpu", dtype):
        out = model(x)
    assert (out.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("name", DEMOS)
@torch.no_grad()
def test_a_model_cast_to_bfloat16(name: str) -> None:
    model, x = demo(name), demo_image(name)
    expected = model(x)
    out = model.bfloat16()(x.bfloat16())
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).norm() < 0.1 * expected.norm()


FAMILIES = {
    "localvim": ("localvim_demo", {"patch_size": 2}),
    "localvmamba": ("localvmamba_demo", {}),
    "vim": ("localvim_demo", {"directions": ["h", "h_flip"], "scattn": "none"}),
    "vim_midcls": ("localvim_demo", {"class_token": True, "merge": "mean"}),
    "vmamba": ("localvmamba_demo", {"directions": ["h", "v"], "scattn": "none"}),
}


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_exports_with_free_batch_height_and_width(family: str, padded: bool) -> None:
    """Whether or not the example was padded, the program takes sizes that are and that are not."""
    name, kwargs = FAMILIES[family]
    model, free = demo(name, **kwargs), torch.export.Dim.DYNAMIC
    x = torch.randn(2, 3, 37, 26) if padded else torch.randn(2, 3, 32, 24)
    shapes = ({0: free, 2: free, 3: free},)
    program = torch.export.export(model, (x,), dynamic_shapes=shapes).module()
    for size in ((3, 3, 16, 24), (1, 3, 40, 64), (5, 3, 33, 17)):
        y = torch.randn(size)
        torch.testing.assert_close(program(y), model(y))
