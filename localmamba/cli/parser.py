"""Command line parsers from typed functions, with jsonargparse.

Each parameter of the function becomes an option of its name, with the help text of the docstring:

- a required list, or a required choice (`Literal`), is a positional argument:
  `localmamba predict a.png b.png`;
- a dataclass becomes a group of options, one per field; a dataclass of dataclasses, such as a job,
  becomes options and groups;
- `Examples:` at the end of the docstring follows the options;
- `--config` takes a YAML file of options, or the name of a recipe (`localmamba.recipes`).
"""

import argparse
import dataclasses
import inspect
import itertools
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, DefaultHelpFormatter

from localmamba.recipes import default_recipe, list_recipes, load_recipe
from localmamba.tasks.job import from_flat

Parameters = Mapping[str, inspect.Parameter]


class _Formatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps line breaks of descriptions and examples; shows defaults but no Python types."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.required and action.option_strings:
            return f"{text} (required)"
        known = action.default is not None and action.default != argparse.SUPPRESS
        return f"{text} (default: %(default)s)" if known and action.option_strings else text


def parse(command: str, function: Callable[..., Any], argv: Sequence[str]) -> dict[str, Any]:
    """Parses the command line into the arguments of a command's function.

    Options override the file of --config, which overrides the recipe: that named by --config, or
    else that of --data. The recipe overrides the defaults of the function.

    Raises:
        ValueError: If an option is unknown, missing or of the wrong type.
        SystemExit: After --help.
    """
    parser = make_parser(command, function)
    # `--batch-size` is `--batch_size`.
    argv = [re.sub(r"(?<=^--)[\w-]+", lambda m: m[0].replace("-", "_"), word) for word in argv]
    argv = _join_lists(argv, _options(function))
    parser.set_defaults(_recipe_defaults(command, argv))
    try:
        given = parser.parse_args(argv)
    except ArgumentError as error:
        raise ValueError(f"{_readable(str(error))} (localmamba {command} --help)") from None
    return {
        name: from_flat(p.annotation, {option: given[option] for option in _options(p.annotation)})
        if _is_dataclass(p)
        else given[name]
        for name, p in _parameters(function).items()
    }


def make_parser(command: str, function: Callable[..., Any]) -> ArgumentParser:
    """Builds the parser of a command."""
    description, examples = _split_docstring(inspect.getdoc(function) or "")
    parameters, options = _parameters(function), _options(function)
    parser = ArgumentParser(
        prog=f"localmamba {command}",
        description=description,
        epilog=examples,
        usage=_usage(command, options),
        exit_on_error=False,
        formatter_class=_Formatter,
    )
    positional: set[str | int] = {n for n, p in parameters.items() if _is_positional(p)}
    others: set[str | int] = {n for n in parameters if n not in positional}
    parser.add_function_arguments(function, skip=others, as_group=False, as_positional=True)
    if "data" in options:
        parser.add_argument("--config", action=_config_action(command), help=_config_help(command))
    for kind in _dataclasses(function):
        nested: set[str | int] = {n for n, p in _parameters(kind).items() if _is_dataclass(p)}
        parser.add_class_arguments(kind, skip=nested, as_group=not nested)
    groups: set[str | int] = {n for n, p in parameters.items() if _is_dataclass(p)}
    parser.add_function_arguments(function, skip=positional | groups, as_group=False)
    for action in parser._actions:
        kind = getattr(action, "_typehint", None)
        if kind is bool:  # a flag without a value is true
            action.nargs, action.const = "?", True
        elif not action.option_strings and typing.get_origin(kind) is list:
            # An attribute of jsonargparse's own actions.
            (action._typehint,) = typing.get_args(kind)  # type: ignore[attr-defined]
            action.nargs, action.metavar = "+", action.dest
    return parser


def _parameters(function: Callable[..., Any]) -> Parameters:
    return inspect.signature(function, eval_str=True).parameters


def _is_dataclass(parameter: inspect.Parameter) -> bool:
    return dataclasses.is_dataclass(parameter.annotation)


def _dataclasses(function: Callable[..., Any]) -> Iterator[type]:
    """Yields the dataclasses among the parameters, each followed by those among its fields."""
    for parameter in _parameters(function).values():
        if _is_dataclass(parameter):
            yield parameter.annotation
            yield from _dataclasses(parameter.annotation)


def _options(function: Callable[..., Any]) -> Parameters:
    """Returns the parameters, with the fields of a dataclass in its place."""
    options: dict[str, inspect.Parameter] = {}
    for name, parameter in _parameters(function).items():
        options |= _options(parameter.annotation) if _is_dataclass(parameter) else {name: parameter}
    return options


def _is_positional(parameter: inspect.Parameter) -> bool:
    listed = typing.get_origin(parameter.annotation) in (list, Literal)
    return listed and parameter.default is parameter.empty


def _usage(command: str, options: Parameters) -> str:
    """Usage line with the required arguments only."""
    words = ["localmamba", command]
    for name, parameter in options.items():
        if _is_positional(parameter):
            many = typing.get_origin(parameter.annotation) is list
            words.append(f"{name.upper()}..." if many else name.upper())
        elif parameter.default is parameter.empty:
            words.append(f"--{name} {name.upper()}")
    return " ".join([*words, "[options]"])


def _config_action(command: str) -> type[ActionConfigFile]:
    class ConfigFile(ActionConfigFile):
        """Takes the settings of a recipe; one of ours is read before, see `_recipe_defaults`."""

        def __call__(
            self, parser: Any, cfg: Any, values: Any, option_string: str | None = None
        ) -> None:
            if values not in list_recipes(command):
                text = yaml.safe_dump(load_recipe(command, values))
                # Its method has no annotations.
                super().__call__(parser, cfg, text, option_string)  # type: ignore[no-untyped-call]

    return ConfigFile


def _config_help(command: str) -> str:
    names = ", ".join(list_recipes(command))
    recipes = f"; or a recipe: {names}." if names else "."
    return f"A YAML file of options, such as the config.yaml of a run{recipes}"


def _split_docstring(text: str) -> tuple[str, str]:
    """Returns the text before the sections of a docstring, and its examples."""
    description = re.split(r"\n(?:Args|Returns|Raises|Examples):\n", text)[0].strip()
    found = re.search(r"\nExamples:\n(.*?)(?=\n\S|\Z)", text, re.DOTALL)
    return description, f"examples:\n{found[1].rstrip()}" if found else ""


def _recipe_defaults(command: str, argv: Sequence[str]) -> dict[str, Any]:
    """Loads the recipe named by --config, or else that of --data.

    Its model_args hold for its own model only.
    """
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--data")
    peek.add_argument("--model")
    peek.add_argument("--config")
    given = peek.parse_known_args(list(argv))[0]
    name = default_recipe(command, given.data) if given.data else None
    if given.config in list_recipes(command):
        name = given.config
    settings = load_recipe(command, name) if name else {}
    if given.model and given.model != settings.get("model"):
        settings.pop("model_args", None)
    return settings


def _join_lists(argv: Sequence[str], options: Parameters) -> list[str]:
    """Rewrites `--candidates h v w2` as `--candidates [h,v,w2]`."""
    flags = {f"--{name}" for name, p in options.items() if p.annotation == tuple[str, ...]}
    joined: list[str] = []
    words = list(argv)
    while words:
        joined.append(word := words.pop(0))
        if word in flags:
            values = list(itertools.takewhile(lambda value: not value.startswith("--"), words))
            del words[: len(values)]
            text = ",".join(values)
            joined.append(text if text.startswith("[") else f"[{text}]")
    return joined


def _readable(message: str) -> str:
    """Joins jsonargparse's message into one line, without names of Python types."""
    message = " ".join(message.split())
    message = re.sub(r"<class '(\w+)'>", r"\1", message)
    message = re.sub(r"Parser key \"?([\w.]+)\"?:", r"--\1:", message)
    return message.replace("typing.", "")
