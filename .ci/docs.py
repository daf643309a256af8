"""Browsable pages of the API with pdoc: `make docs` writes them to outputs/docs.

pdoc leaves out names that are imported on first use, and submodules that the `__all__` of a package does not name. Both
are resolved before it looks.
"""

import importlib
import pkgutil
from pathlib import Path

import pdoc

PACKAGES = ("gcpo_trl", "reward_funcs")


def show_everything(name: str) -> None:
    """Import a package and all below it, and let its `__all__` name its modules too. An import that fails ends this."""
    package = importlib.import_module(name)
    children = [m for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")]
    if hasattr(package, "__all__"):
        vars(package).update({public: getattr(package, public) for public in package.__all__})
        package.__all__ = list(dict.fromkeys([*package.__all__, *(child.name for child in children)]))
    for child in children:
        if child.ispkg:
            show_everything(f"{name}.{child.name}")
        else:
            importlib.import_module(f"{name}.{child.name}")


if __name__ == "__main__":
    for package in PACKAGES:
        show_everything(package)
    pdoc.render.configure(docformat="google")
    pdoc.pdoc(*PACKAGES, output_directory=Path("outputs/docs"))
