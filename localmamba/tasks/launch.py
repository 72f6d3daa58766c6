"""Ways to launch the kernels of a training step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from localmamba.tasks.settings import Hardware
from localmamba.tasks.trainer import pick_device

Loss = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]
"""(model, images, targets) -> loss."""

WARM_UP_STEPS = 3
"""Steps before a graph is captured: kernels are compiled, workspaces allocated."""


class Eager:
    """Launches kernels from Python.

    Args:
        model: Images -> logits.
        loss: Loss of a batch.
    """

    def __init__(self, model: nn.Module, loss: Loss):
        self.model, self.loss = model, loss

    def forward(self, images: Tensor, targets: Tensor, trainer: Trainer) -> Tensor:
        """Returns the loss of a batch of a training step."""
        del trainer
        return self.loss(self.model, images, targets)

    def backward(self, loss: Tensor, trainer: Trainer) -> None:
        """Adds the gradients of that loss to `grad`, as Lightning has scaled it."""
        del trainer
        loss.backward()


class Compiled(Eager):
    """Launches a model that torch.compile has compiled; evaluation runs it eagerly."""

    def __init__(self, model: nn.Module, loss: Loss):
        super().__init__(model, loss)
        self.compiled = torch.compile(model, dynamic=False)

    def forward(self, images: Tensor, targets: Tensor, trainer: Trainer) -> Tensor:
        """Returns the loss of a batch of a training step."""
        del trainer
        return self.loss(self.compiled, images, targets)


class Graphed(Eager):
    """Replays forward and backward pass as one CUDA graph, captured at the first batch.

    Evaluation runs the model eagerly. Random numbers of a replay follow the generator's seed and
    offset, as in an eager step. Hooks on parameters do not run.
    """

    def __init__(self, model: nn.Module, loss: Loss):
        super().__init__(model, loss)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.gradients: list[tuple[nn.Parameter, Tensor]] = []
        self.replay: Callable[[], None] | None = None

    def forward(self, images: Tensor, targets: Tensor, trainer: Trainer) -> Tensor:
        """Returns the loss of a batch; its gradients wait for `backward`."""
        if self.replay is None:
            self.images, self.targets = images.clone(), targets.clone()
            with _unchanged(self.model, images.device):
                self.replay = capture(lambda: self._step(trainer))
        self.images.copy_(images)
        self.targets.copy_(targets)
        self.replay()
        return self.output.clone()

    def backward(self, loss: Tensor, trainer: Trainer) -> None:
        """Adds the gradients of the last replay to `grad`."""
        del loss
        sums = [parameter.grad for parameter, _ in self.gradients if parameter.grad is not None]
        if sums:
            torch._foreach_add_(sums, [gradient for _, gradient in self.gradients])
            return
        for parameter, gradient in self.gradients:
            # The next replay writes into `gradient`.
            keep = trainer.accumulate_grad_batches == 1
            parameter.grad = gradient if keep else gradient.clone()

    def _step(self, trainer: Trainer) -> None:
        """Computes `output` and `gradients` from `images` and `targets`."""
        kept = [parameter.grad for parameter in self.parameters]
        _set_gradients(self.parameters, [None] * len(kept))
        kind = self.images.device.type
        # Lightning's autocast is entered once around many steps: casts of weights that it has
        # cached would be those of the warm-up.
        with torch.autocast(
            kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), False
        ):
            loss = self.loss(self.model, self.images, self.targets)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        with torch.autocast(kind, enabled=False):
            scaled = loss if scaler is None else scaler.scale(loss)
            (scaled / trainer.accumulate_grad_batches).backward()
        self.output = loss.detach()
        self.gradients = [(p, p.grad) for p in self.parameters if p.grad is not None]
        _set_gradients(self.parameters, kept)


LAUNCHERS: dict[str, type[Eager]] = {"eager": Eager, "compile": Compiled, "graph": Graphed}


def check_launch(hardware: Hardware, devices: int) -> None:
    """Raises ValueError if the device, or the number of devices, does not allow the launch."""
    launch = hardware.launch
    if launch == "graph" and pick_device(hardware.device).type != "cuda":
        raise ValueError("launch graph needs a GPU; allowed on a CPU: eager, compile")
    if launch == "graph" and devices > 1:
        raise ValueError(f"launch graph runs on one device; allowed on {devices}: eager, compile")


def capture(step: Callable[[], None]) -> Callable[[], None]:
    """Captures a step as a CUDA graph, after a few eager ones, and returns its replay.

    Raises:
        ValueError: If the step has something that no graph can hold.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_STEPS):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # The thread that pins batches calls CUDA meanwhile.
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            step()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"launch graph: no CUDA graph can hold this model ({reason})") from error
    return graph.replay


@contextmanager
def _unchanged(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Restores random number generators and buffers, which the steps of a capture change."""
    before = [buffer.clone() for buffer in model.buffers()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    for buffer, value in zip(model.buffers(), before, strict=True):
        buffer.copy_(value)


def _set_gradients(parameters: list[nn.Parameter], gradients: list[Tensor | None]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
