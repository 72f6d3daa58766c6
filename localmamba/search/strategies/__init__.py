"""The strategies. Each module here is imported and registers one with `register_strategy`."""

from importlib import import_module
from pkgutil import iter_modules

DEFAULT_STRATEGY = "softmax"
"""The paper's search."""

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
