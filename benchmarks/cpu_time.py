"""CPU time of models, and of checkouts of this repository, in turn: for a machine that is not idle.

    python benchmarks/cpu_time.py deit_tiny_patch16_224 localvim_tiny localvim_tiny@OTHER_CHECKOUT

Every model runs in a process of its own, on one thread; ratios are medians over rounds.
"""

import argparse
import os
import subprocess
import sys
import time
from statistics import median


def serve(name: str, size: int, batch: int, training: bool) -> None:
    """Runs a step for each line read and writes the CPU time that it took, in milliseconds."""
    import timm
    import torch

    import localmamba  # noqa: F401 - registers the models

    torch.set_num_threads(1)
    model = timm.create_model(name, **({} if "vmamba" in name else {"img_size": size}))
    model.train(training)
    images, labels = torch.randn(batch, 3, size, size), torch.randint(1000, (batch,))

    def step() -> None:
        with torch.set_grad_enabled(training):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        if training:
            loss.backward()

    step()
    step()
    print(flush=True)
    for _ in sys.stdin:
        start = time.process_time()
        step()
        print((time.process_time() - start) * 1e3, flush=True)


def measure(models: list[str], rounds: int, arguments: list[str]) -> list[list[float]]:
    """Returns the times of every model, [models][rounds]."""
    children = []
    for model in models:
        name, _, checkout = model.partition("@")
        environment = dict(os.environ)
        if checkout:
            environment["PYTHONPATH"] = checkout
        command = [sys.executable, __file__, "--serve", name, *arguments]
        pipe = subprocess.PIPE
        child = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        child.stdout.readline()
        children.append(child)
    times: list[list[float]] = [[] for _ in children]
    for i in range(rounds):
        for k in range(len(children))[:: 1 if i % 2 else -1]:
            children[k].stdin.write("\n")
            children[k].stdin.flush()
            times[k].append(float(children[k].stdout.readline()))
    for child in children:
        child.communicate()
    return times


def main() -> None:
    """Prints medians and ratios to the first model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--size", default=224, type=int)
    parser.add_argument("--batch", default=1, type=int)
    parser.add_argument("--training", action="store_true")
    parser.add_argument("--rounds", default=20, type=int)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.models[0], args.size, args.batch, args.training)
        return
    shared = [f"--size={args.size}", f"--batch={args.batch}", *["--training"] * args.training]
    times = measure(args.models, args.rounds, shared)
    for model, row in zip(args.models, times, strict=True):
        ratio = median(y / x for x, y in zip(times[0], row, strict=True))
        print(f"{model}: {median(row):.1f} ms, {ratio:.3f} of {args.models[0]}'s")


if __name__ == "__main__":
    main()
