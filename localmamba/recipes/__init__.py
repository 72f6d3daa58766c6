"""Recipes: named settings of a command, YAML files in a folder for each command.

`localmamba train --data digits` starts from `train/digits.yaml`, a folder from `train/folder.yaml`;
`--config NAME` takes another one. The heading of each says where it comes from. `extends: NAME` in
a recipe, or in a file of one's own, stands for the settings of another one.
"""

from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent


def list_recipes(command: str) -> list[str]:
    """Lists the recipes of a command."""
    return sorted(path.stem for path in (ROOT / command).glob("*.yaml"))


def find_recipe(command: str, name: str) -> Path:
    """Returns the file of a recipe, from its name or from the path of a file of one's own.

    Raises:
        ValueError: If there is neither.
    """
    shipped = ROOT / command / f"{name}.yaml"
    for path in (shipped, Path(name)):
        if path.is_file():
            return path
    known = ", ".join(list_recipes(command)) or "none"
    raise ValueError(f"config {name!r} is neither a file nor a recipe of {command}: {known}")


def default_recipe(command: str, data: str) -> str | None:
    """Returns the name of the recipe that a command starts from with this data, if any."""
    names = list_recipes(command)
    name = data if data in names else "folder"
    return name if name in names else None


def load_recipe(command: str, name: str) -> dict[str, Any]:
    """Loads the settings of a recipe, and of those that it extends.

    Raises:
        ValueError: If there is no such recipe, or it is not YAML of settings.
    """
    import yaml

    settings: dict[str, Any] = {}
    read: list[Path] = []
    following: str | None = name
    while following is not None:
        path = find_recipe(command, following)
        if path in read:
            raise ValueError(f"config {path} extends itself")
        read.append(path)
        try:
            content = yaml.safe_load(path.read_text()) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"config {path} is no YAML: {reason}") from None
        if not isinstance(content, dict):
            raise ValueError(f"config {path} must hold settings, `name: value`")
        following = content.pop("extends", None)
        settings = {**content, **settings}
    return settings
