"""Python frames and files between a model's forward and its kernels, and in a whole forward.

Runs on a CPU, where every kernel is launched by a function `run` of localmamba/ops:

    python benchmarks/walk.py
"""

import sys
from collections import Counter
from types import FrameType
from typing import Any

import timm
import torch

import localmamba  # noqa: F401 - registers the models

MODELS = {"localvim_tiny": 64, "localvmamba_tiny": 64}
"""Models and image sizes."""


def ours(frame: FrameType) -> bool:
    return "/localmamba/" in frame.f_code.co_filename


def place(frame: FrameType) -> str:
    return frame.f_code.co_filename.rpartition("/localmamba/")[2]


class Walk:
    """A profile function that follows calls inside a model's forward.

    Attributes:
        launches: By kernel, the frames of its first launch: outermost first, `forward` left out.
        calls: Calls of Python functions by file, those of localmamba.
        others: Calls of other Python functions.
    """

    def __init__(self, forward: Any):
        self.forward = forward.__code__
        self.launches: dict[str, list[FrameType]] = {}
        self.calls: Counter[str] = Counter()
        self.others = 0

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call":
            return
        if not ours(frame):
            self.others += 1
            return
        self.calls[place(frame)] += 1
        if frame.f_code.co_name == "run" and place(frame).startswith("ops/"):
            kernel = frame.f_locals["kernel"]
            name = getattr(kernel, "_name", None) or kernel.__name__
            if name not in self.launches:
                self.launches[name] = list(self.stack(frame))[::-1]

    def stack(self, frame: FrameType | None) -> Any:
        while frame is not None and frame.f_code is not self.forward:
            yield frame
            frame = frame.f_back


def main() -> None:
    """Prints the walk of each model."""
    for name, size in MODELS.items():
        model = timm.create_model(name).eval()
        walk = Walk(type(model).forward)
        images = torch.randn(1, 3, size, size)
        with torch.no_grad():
            model(images)
            sys.setprofile(walk)
            model(images)
            sys.setprofile(None)
        print(f"{name}, PyTorch {torch.__version__}: in a forward {sum(walk.calls.values())} calls")
        print(f"of functions in {len(walk.calls)} files of localmamba, {walk.others} of others")
        for kernel, frames in walk.launches.items():
            files = list(dict.fromkeys(place(f) for f in frames if ours(f)))
            total = f"{len(frames)} frames, {sum(map(ours, frames))} of them in {len(files)} files"
            print(f"  {kernel}: {total}: {' > '.join(files)}")


if __name__ == "__main__":
    main()
