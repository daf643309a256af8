"""A name or a path -> the object: the file is the plug-in, and its name is the registered name.

    "similarity"              ->  <package>/similarity.py, the attribute of its kind (`select`, `load`, `reward`)
    "my_pkg.mine:select"      ->  that attribute of that module
    "my_pkg.mine.select"      ->  the same

Nothing is registered, and nothing is imported that is not used. Standard library only.
"""

import difflib
import importlib
import importlib.util
import pkgutil
from collections.abc import Iterable
from types import ModuleType
from typing import Any


def resolve(name: str, package: str, attribute: str) -> Any:
    """The object behind `name`: `attribute` of the module `package.name`, or what a dotted path points at.

    ValueError, with the nearest names, if there is no such thing. A plug-in that is there but needs a package that
    is not raises its own ModuleNotFoundError.
    """
    if ":" in name:
        module_name, _, attribute = name.partition(":")
    elif "." in name:
        module_name, _, attribute = name.rpartition(".")
    else:
        module_name = f"{package}.{name}"
        known = available(package)
        if name not in known:
            names = ", ".join(known) or "no files"
            raise ValueError(f"{package} has no {name!r}; {_did_you_mean(name, known)}it has {names}")
    return _attribute(_module(module_name, name), attribute, name)


def available(package: str) -> list[str]:
    """Names of the modules of a package, sorted, without importing them. A leading _ means: not a plug-in."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise ValueError(f"{package!r} is not a package that can be imported")
    modules = pkgutil.iter_modules(spec.submodule_search_locations)
    return sorted(module.name for module in modules if not module.name.startswith("_"))


def _module(module_name: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the plug-in was found; something it imports was not
        raise ValueError(f"cannot resolve {name!r}: there is no module {error.name!r} on the Python path") from error


def _attribute(module: ModuleType, attribute: str, name: str) -> Any:
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [known for known in dir(found) if not known.startswith("_")]
            raise ValueError(f"cannot resolve {name!r}: {found!r} has no {part!r}; {_did_you_mean(part, names)}")
        found = getattr(found, part)
    return found


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    """The names nearest to `name` as the start of a sentence; empty if none is near."""
    near = difflib.get_close_matches(name, list(known), n=3)
    return f"did you mean {' or '.join(map(repr, near))}? " if near else ""
