"""The command line: `localmamba COMMAND`.

Each command is a module `localmamba/cli/<name>.py`, imported on use, with a typed function of that
name. `localmamba.cli.parser` turns its parameters into options and its docstring into the help.
"""

import importlib
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata

from localmamba._signals import Stopped, handled, stop
from localmamba.tasks.processes import find_launcher, report_error, run_processes

COMMANDS = {
    "demo": "search, train and compare on handwritten digits, about 3 minutes on a CPU",
    "search": "search the scan directions of every layer on your images",
    "train": "train a classifier",
    "evaluate": "evaluate a checkpoint on held-out images",
    "predict": "classify image files with a checkpoint",
    "show": "draw scan orders, directions and searches",
    "tables": "reproduce the paper's tables of parameters and FLOPs",
    "bench": "measure speed and memory of models on this machine",
}

HELP = """usage: localmamba COMMAND ...

Visual state space models: search scan directions, train, evaluate, use.

commands:
{commands}

localmamba COMMAND --help lists options and examples. To start:

  localmamba demo
  localmamba search --data PHOTOS --model localvim_search
  localmamba train --data PHOTOS --model localvim_tiny --directions runs/.../directions.json
  localmamba predict new.jpg --checkpoint runs/.../model.safetensors

PHOTOS is a folder with a folder of images per class, or with train/ and val/ of that form.
"""

FAILED, INVALID = 1, 2
"""Exit codes after an error in the code and after invalid input."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; invalid input gives one line on stderr.

    Args:
        argv: Arguments; by default those of the process.

    Returns:
        The exit code: 0, 2 after invalid input, 128 + its number after a signal (130 after Ctrl-C,
        138 after SIGUSR1, 143 after SIGTERM), or that of the command.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_help(), end="")
        return 0 if argv else INVALID
    if argv[0] == "--version":
        print(f"localmamba {metadata.version('localmamba')}")
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        return _fail("localmamba", f"unknown command {name!r}; known: {', '.join(COMMANDS)}")
    try:
        with handled(stop), _one_line_warnings(name):
            return _run(name, rest) or 0
    except Stopped as signal:
        return _fail(f"localmamba {name}", str(signal), signal.code)
    except (ValueError, OSError, MissingExtraError) as error:
        return _fail(f"localmamba {name}", str(error) or type(error).__name__)
    except Exception:
        if find_launcher() is None:
            raise
        report_error(traceback.format_exc())
        return FAILED


class MissingExtraError(Exception):
    """A library that only some commands need is not installed."""


def _run(name: str, argv: list[str]) -> int | None:
    from localmamba.cli.parser import parse

    try:
        function: Callable[..., int | None]
        function = getattr(importlib.import_module(f"localmamba.cli.{name}"), name)
        arguments = parse(name, function, argv)
        hardware = getattr(arguments.get("job"), "hardware", arguments.get("hardware"))
        if hardware is not None and hardware.devices > 1 and find_launcher() is None:
            command = [sys.executable, "-m", "localmamba.cli", name, *argv]
            return run_processes(command, hardware.devices)
        return function(**arguments)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("localmamba"):
            raise
        raise MissingExtraError(
            f"{error.name} is not installed; pip install 'localmamba[train]'"
        ) from error


def _help() -> str:
    return HELP.format(commands="\n".join(f"  {n:10}{text}" for n, text in COMMANDS.items()))


def _fail(prefix: str, message: str, code: int = INVALID) -> int:
    """Prints one line on stderr; of a worker process's traceback its last line."""
    lines = message.strip().splitlines() or [""]
    text = lines[-1] if "Traceback" in message else " ".join(line.strip() for line in lines)
    report_error(f"{prefix}: {text}\n")
    return code


@contextmanager
def _one_line_warnings(name: str) -> Iterator[None]:
    def show(message: Warning | str, *_: object) -> None:
        print(f"localmamba {name}: warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        # The other parameters are not read.
        warnings.showwarning = show  # type: ignore[assignment]
        yield
