"""Tools that reach a model through its modules: hooks, adapters, pruning, quantization, offload.

A fused op reads the parameters of modules that it stands in for. Where a tool changes such a
module, its own forward must run.
"""

import copy
from collections.abc import Callable, Iterator

import accelerate
import peft
import pytest
import timm
import torch
import torch.distributed as dist
import torchao.quantization
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, prune

from localmamba.layers import DropPath, SCAttn
from localmamba.layers.fusion import is_plain

VIM = {"directions": ["h", "h_flip"], "scattn": "none"}
CASES = {
    "localvim": ("localvim_demo", {}),
    "localvim_spatial": ("localvim_demo", {"scattn": "channel+spatial"}),
    "localvmamba": ("localvmamba_demo", {}),
    "vim": ("localvim_demo", {**VIM, "class_token": True, "merge": "mean"}),
    "vmamba": ("localvmamba_demo", {**VIM, "directions": ["h", "v", "h_flip", "v_flip"]}),
}
IMAGES = torch.randn(2, 3, 12, 8, generator=torch.Generator().manual_seed(0))


def make(case: str, **kwargs) -> nn.Module:
    """A seeded small model in evaluation mode, with norms that are not the identity."""
    name, arguments = CASES[case]
    torch.manual_seed(0)
    model = timm.create_model(name, **arguments, **kwargs).eval()
    for module in model.modules():
        if "Norm" in type(module).__name__:
            for parameter in module.parameters():
                nn.init.normal_(parameter, 1.0, 0.2)
    return model


@pytest.fixture(params=CASES)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return make(request.param)


def leaves(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if not list(m.children())}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model(IMAGES).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def forward_hook(module: nn.Module, call: Callable[[], None]) -> None:
    module.register_forward_hook(lambda *_: call())


def forward_pre_hook(module: nn.Module, call: Callable[[], None]) -> None:
    module.register_forward_pre_hook(lambda *_: call())


def backward_hook(module: nn.Module, call: Callable[[], None]) -> None:
    module.register_full_backward_hook(lambda *_: call())


def backward_pre_hook(module: nn.Module, call: Callable[[], None]) -> None:
    module.register_full_backward_pre_hook(lambda *_: call())


def instance_forward(module: nn.Module, call: Callable[[], None]) -> None:
    original = module.forward

    def forward(*args):
        call()
        return original(*args)

    module.forward = forward


HOOKS = [forward_hook, forward_pre_hook, backward_hook, backward_pre_hook, instance_forward]


def first_drop_path(name: str) -> bool:
    """The first block of a stage has no previous output to drop."""
    return name.endswith("blocks.0.drop_path")


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.__name__)
def test_hooks_fire_on_every_module_and_change_nothing(
    model: nn.Module, hook: Callable[[nn.Module, Callable[[], None]], None]
) -> None:
    expected, truth = model(IMAGES), gradients(model)
    fired = set()
    backward = hook in (backward_hook, backward_pre_hook)
    watched = {
        name: module
        for name, module in model.named_modules()
        if name
        and not isinstance(module, nn.ModuleList)
        and not first_drop_path(name)
        # PyTorch calls backward hooks of modules that return tensors; tables have no gradient.
        and not (backward and name == "rope")
    }
    for name, module in watched.items():
        hook(module, lambda name=name: fired.add(name))
    torch.testing.assert_close(model(IMAGES), expected)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, truth[name], msg=lambda m, n=name: f"{n}: {m}")
    assert fired == set(watched)


def test_hooks_fire_in_a_compiled_model() -> None:
    model = make("localvmamba")
    expected = model(IMAGES)
    torch._dynamo.reset()
    for name in ("patch_embed.proj", "stages.0.blocks.0.mixer.conv"):
        module = model.get_submodule(name)
        module.register_forward_hook(lambda _, __, y: 2 * y)
    doubled = model(IMAGES)
    assert not torch.allclose(doubled, expected)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IMAGES), doubled)


@pytest.mark.parametrize("case", ["localvim", "localvmamba"])
def test_drop_path_with_a_hook_drops_the_same(case: str) -> None:
    model = make(case, drop_path_rate=0.5).train()
    torch.manual_seed(3)
    expected = model(IMAGES)
    for module in model.modules():
        if isinstance(module, DropPath):
            module.register_forward_hook(lambda *_: None)
    torch.manual_seed(3)
    torch.testing.assert_close(model(IMAGES), expected)


def test_plain_models_stay_fused(model: nn.Module) -> None:
    """Copies and moves, compilation for one, leave modules plain."""
    copied = copy.deepcopy(model).double().float().requires_grad_(False)
    for module in copied.modules():
        assert is_plain(module, type(module))
        if isinstance(module, SCAttn):
            assert module._is_plain()


@torch.no_grad()
def randomise(model: nn.Module, part: str) -> None:
    for name, parameter in model.named_parameters():
        if part in name:
            nn.init.normal_(parameter, std=0.3)


@pytest.mark.parametrize("target", ["all-linear", "conv"])
def test_lora_reaches_every_layer_and_merges(model: nn.Module, target: str) -> None:
    convs = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    names = [n for n, m in convs.items() if m.groups == 1]  # peft merges no others
    targets = target if target == "all-linear" else names
    config = peft.LoraConfig(r=2, target_modules=targets, lora_dropout=0.0)
    adapted = peft.get_peft_model(model, config)
    randomise(adapted, "lora_B")
    found = gradients(adapted)
    adapters = [name for name, _ in adapted.named_parameters() if "lora_" in name]
    assert adapters
    for name in adapters:
        assert found[name].abs().sum() > 0, name
    expected = adapted(IMAGES)
    merged = adapted.merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_modules())
    torch.testing.assert_close(merged(IMAGES), expected, rtol=1e-4, atol=1e-4)


def relative(value: Tensor, truth: Tensor) -> float:
    return ((value - truth).norm() / truth.norm()).item()


@torch.no_grad()
def test_dynamic_quantization_stays_near_float(model: nn.Module) -> None:
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not any(type(m) is nn.Linear for m in quantized.modules())
    assert 0 < relative(quantized(IMAGES), model(IMAGES)) < 0.1


@torch.no_grad()
def test_int8_weight_only_stays_near_float(model: nn.Module) -> None:
    expected = model(IMAGES)
    torchao.quantization.quantize_(model, torchao.quantization.Int8WeightOnlyConfig())
    assert 0 < relative(model(IMAGES), expected) < 0.05


def test_global_pruning_survives_two_steps(model: nn.Module) -> None:
    layers = (nn.Linear, nn.Conv2d)
    weights = [(m, "weight") for m in model.modules() if isinstance(m, layers)]
    prune.global_unstructured(weights, prune.L1Unstructured, amount=0.3)
    for _ in range(2):
        found = gradients(model)
        assert all(n in found for n, _ in model.named_parameters())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 1e-3 * parameter.grad
    expected = model(IMAGES)
    for module, name in weights:
        prune.remove(module, name)
    torch.testing.assert_close(model(IMAGES), expected)


def test_weight_norm_trains_and_can_be_removed(model: nn.Module) -> None:
    expected = model(IMAGES)
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    for module in layers:
        parametrizations.weight_norm(module)
    torch.testing.assert_close(model(IMAGES), expected)
    found = gradients(model)
    assert all(name in found for name, _ in model.named_parameters())
    for module in layers:
        nn.utils.parametrize.remove_parametrizations(module, "weight")
    torch.testing.assert_close(model(IMAGES), expected)


@pytest.mark.parametrize("where", ["cpu", "disk"])
@torch.no_grad()
def test_offload_gives_equal_outputs(model: nn.Module, where: str, tmp_path) -> None:
    expected = model(IMAGES)
    if where == "disk":
        accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    else:
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in model.parameters())
    torch.testing.assert_close(model(IMAGES), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def gloo(tmp_path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("gloo")
def test_fsdp2_by_leaf_module(model: nn.Module) -> None:
    expected, truth = model(IMAGES).detach(), gradients(model)
    mesh = init_device_mesh("cpu", (1,))
    for module in leaves(model).values():
        if list(module.parameters()):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    torch.testing.assert_close(model(IMAGES).detach(), expected, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient.full_tensor(), truth[name], rtol=1e-3, atol=1e-4)


def test_functional_call(model: nn.Module) -> None:
    weights = {name: 1.01 * x.detach() for name, x in model.named_parameters()}
    found = torch.func.functional_call(model, weights, IMAGES)
    model.load_state_dict({**model.state_dict(), **weights})
    torch.testing.assert_close(found, model(IMAGES))


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_another_default_dtype_gives_the_same_numbers(model: nn.Module, default) -> None:
    expected, truth = model(IMAGES), gradients(model)
    torch.set_default_dtype(default)
    try:
        out, found = model(IMAGES), gradients(model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(out, expected)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, truth[name], msg=lambda m, n=name: f"{n}: {m}")
