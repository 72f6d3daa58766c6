"""From a typed function to a command's parser.

Each argument of the function is an option of its name, with the text of the docstring:

- a required list, or a required choice of words (`Literal`), stands without an option's name:
  `localmamba predict a.png b.png`;
- a dataclass is a group of options, one for each of its fields;
- `Examples:` at the end of the docstring is shown below the options;
- `--config` takes a file of options, or a recipe by name (`localmamba.recipes`).
"""

import argparse
import dataclasses
import inspect
import itertools
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import docstring_parser
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, DefaultHelpFormatter

from localmamba.recipes import default_recipe, find_recipe, list_recipes, load_recipe


class _Formatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of descriptions and examples, and tells defaults but no Python types."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.required and action.option_strings:
            return f"{text} (required)"
        known = action.default is not None and action.default != argparse.SUPPRESS
        return f"{text} (default: %(default)s)" if known and action.option_strings else text


def parse(command: str, function: Callable[..., Any], argv: Sequence[str]) -> dict[str, Any]:
    """The arguments of a command's function from those of the command line.

    What is not given comes from --config, then from the recipe that belongs to --data, then from
    the function's defaults.

    Raises:
        ValueError: If an option is unknown, missing or of the wrong kind.
        SystemExit: After --help.
    """
    parser = make_parser(command, function)
    argv = [re.sub(r"^--[\w-]+", lambda flag: "--" + _dashed(flag[0]), word) for word in argv]
    argv = _join_lists(argv, function)
    parser.set_defaults(_recipe_defaults(command, argv))
    try:
        given = parser.parse_args(argv)
    except ArgumentError as error:
        raise ValueError(f"{_readable(str(error))} (localmamba {command} --help)") from None
    arguments: dict[str, Any] = {}
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        kind = parameter.annotation
        if _is_group(kind):
            fields = dataclasses.fields(kind)
            values = {field.name: given[field.name] for field in fields}
            arguments[name] = kind(**{key: _as_tuple(value) for key, value in values.items()})
        else:
            arguments[name] = given[name]
    return arguments


def make_parser(command: str, function: Callable[..., Any]) -> ArgumentParser:
    """The parser of a command."""
    description, examples = _split_docstring(inspect.getdoc(function) or "")
    texts = _argument_texts(function)
    parameters = inspect.signature(function, eval_str=True).parameters
    parser = ArgumentParser(
        prog=f"localmamba {command}",
        description=description,
        epilog=examples,
        usage=_usage(command, parameters),
        exit_on_error=False,
        formatter_class=_Formatter,
    )
    named: set[str] = set()
    groups: list[type] = []
    for name, parameter in parameters.items():
        kind = parameter.annotation
        if _is_group(kind):
            groups.append(kind)
        elif _is_positional(parameter):
            _add_positional(parser, name, kind, texts.get(name, ""))
        else:
            named.add(name)
    if "data" in named:
        parser.add_argument("--config", action=_config_action(command), help=_config_help(command))
    skipped: set[str | int] = {name for name in parameters if name not in named}
    parser.add_function_arguments(function, skip=skipped, as_group=False)
    for group in groups:
        parser.add_class_arguments(group)
    for action in parser._actions:
        if getattr(action, "_typehint", None) is bool:
            action.nargs, action.const = "?", True
    return parser


def _is_group(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _is_positional(parameter: inspect.Parameter) -> bool:
    words = typing.get_origin(parameter.annotation) in (list, Literal)
    return words and parameter.default is parameter.empty


def _add_positional(parser: ArgumentParser, name: str, kind: Any, text: str) -> None:
    if typing.get_origin(kind) is Literal:
        parser.add_argument(name, type=kind, help=text)
    else:
        parser.add_argument(name, type=typing.get_args(kind)[0], nargs="+", help=text)


def _usage(command: str, parameters: Mapping[str, inspect.Parameter]) -> str:
    """Only what must be given: a list of every option tells nobody anything."""
    words = ["localmamba", command]
    for name, parameter in parameters.items():
        if _is_positional(parameter):
            many = typing.get_origin(parameter.annotation) is list
            words.append(f"{name.upper()}..." if many else name.upper())
        elif parameter.default is parameter.empty and not _is_group(parameter.annotation):
            words.append(f"--{name} {name.upper()}")
    return " ".join([*words, "[options]"])


def _config_action(command: str) -> type[ActionConfigFile]:
    class ConfigFile(ActionConfigFile):
        """Takes the name of a recipe too."""

        def __call__(
            self, parser: Any, cfg: Any, values: Any, option_string: str | None = None
        ) -> None:
            super().__call__(parser, cfg, str(find_recipe(command, values)), option_string)

    return ConfigFile


def _config_help(command: str) -> str:
    names = ", ".join(list_recipes(command))
    return "A YAML file of options, such as the config.yaml of a run" + (
        f"; or a recipe: {names}." if names else "."
    )


def _split_docstring(text: str) -> tuple[str, str]:
    """What stands before the sections of a docstring, and its examples."""
    description = re.split(r"\n(?:Args|Returns|Raises|Examples):\n", text)[0].strip()
    found = re.search(r"\nExamples:\n(.*?)(?=\n\S|\Z)", text, re.DOTALL)
    return description, f"examples:\n{found[1].rstrip()}" if found else ""


def _argument_texts(function: Callable[..., Any]) -> dict[str, str]:
    """What the docstring says of each argument."""
    found = docstring_parser.parse(inspect.getdoc(function) or "").params
    return {entry.arg_name: entry.description or "" for entry in found}


def _recipe_defaults(command: str, argv: Sequence[str]) -> dict[str, Any]:
    """What the recipe that belongs to --data says; arguments of its model are for that model."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--data")
    peek.add_argument("--model")
    given = peek.parse_known_args(list(argv))[0]
    name = default_recipe(command, given.data) if given.data else None
    settings = load_recipe(command, name) if name else {}
    if given.model and given.model != settings.get("model"):
        settings.pop("model_args", None)
    return settings


def _as_tuple(value: Any) -> Any:
    """YAML knows no tuples, and no setting is a list."""
    return tuple(value) if isinstance(value, list) else value


def _join_lists(argv: Sequence[str], function: Callable[..., Any]) -> list[str]:
    """`--candidates h v w2` as `--candidates [h,v,w2]`, for options that are lists of words."""
    parameters = inspect.signature(function, eval_str=True).parameters
    flags = {f"--{name}" for name, p in parameters.items() if p.annotation == list[str] | None}
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


def _dashed(flag: str) -> str:
    """`--batch-size` is `--batch_size`."""
    return flag[2:].replace("-", "_")


def _readable(message: str) -> str:
    """jsonargparse's message in one line, without Python's names of types."""
    message = " ".join(message.split())
    message = re.sub(r"<class '(\w+)'>", r"\1", message)
    message = re.sub(r"Parser key \"?([\w.]+)\"?:", r"--\1:", message)
    return message.replace("typing.", "")
