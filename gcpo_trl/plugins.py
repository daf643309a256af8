"""A name or a path -> the object: the file is the plug-in, and its name is the registered name.

    "similarity"              ->  <package>/similarity.py, the attribute of its kind (`select`, `load`, `reward`)
    "my_pkg.mine:select"      ->  that attribute of that module
    "my_pkg.mine.select"      ->  the same

Nothing is registered, and nothing is imported that is not used. Standard library only.
"""

import ast
import difflib
import importlib
import importlib.util
import pkgutil
from collections.abc import Iterable
from pathlib import Path
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


def available(package: str, attribute: str | None = None) -> list[str]:
    """Names of the modules of a package, sorted, without importing them. A leading _ means: not a plug-in.

    With ``attribute``, those alone whose source defines or imports that name at its top level.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise ValueError(f"{package!r} is not a package that can be imported")
    modules = [m.name for m in pkgutil.iter_modules(spec.submodule_search_locations) if not m.name.startswith("_")]
    if attribute is not None:
        modules = [name for name in modules if attribute in _top_level_names(f"{package}.{name}")]
    return sorted(modules)


def _top_level_names(module_name: str) -> set[str]:
    """Names that the source of a module binds at its top level; nothing is imported."""
    spec = importlib.util.find_spec(module_name)
    if spec is None or spec.origin is None:
        return set()
    names: set[str] = set()
    for node in ast.parse(Path(spec.origin).read_text()).body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                names |= {alias.asname or alias.name for alias in aliases}
            case ast.Assign(targets=targets):
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
            case ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
    return names


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
