"""Published weights: where a file is found, what is said if it is not, and that every tensor has its place.

A place is what the user gives: a file, a folder that holds it, or a hub repository.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reward_funcs.runtime import whole_weights

if TYPE_CHECKING:
    from torch import Tensor

SHOWN = 5  # keys named in an error


@dataclass(frozen=True)
class WeightFile:
    """A published file: what it is, its name, the variable that names another place, the hub repository or the URL."""

    what: str
    name: str
    variable: str
    repository: str = ""
    url: str = ""

    def find(self, place: str) -> Path:
        """The file: as given, by its name in a folder, or downloaded if its publisher is a hub repository."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        path = Path(place).expanduser()
        if path.is_dir():
            path = path / self.name
        if path.is_file():
            return path
        if not self.repository:
            raise FileNotFoundError(self._advice(place))
        try:
            return Path(hf_hub_download(place, self.name))
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise FileNotFoundError(self._advice(place)) from error

    def _advice(self, place: str) -> str:
        command = f"hf download {self.repository} {self.name} --local-dir DIR"
        nor = ", nor downloadable here"
        if not self.repository:
            command, nor = f"curl -L --create-dirs -o 'DIR/{self.name}' {self.url}", ""
        return (
            f"{self.what} {place!r} is neither a file, nor a folder with {self.name}{nor}: run `{command}` where there "
            f"is a network and set {self.variable}=DIR"
        )


@contextmanager
def found(what: str, place: str, files: str, variable: str) -> Iterator[None]:
    """Inside, an OSError of `from_pretrained(place)` becomes one that says how to get `files`: a hub id and names."""
    try:
        yield
    except OSError as error:
        raise FileNotFoundError(
            f"{what} {place!r} is neither a local folder nor downloadable here: run `hf download {files} "
            f"--local-dir DIR` where there is a network and set {variable}=DIR"
        ) from error


def pretrained(kind: Any, place: str) -> Any:
    """`kind.from_pretrained` in float32, whole on each rank. A weight the place lacks is an error, not a random one."""
    import torch

    with whole_weights():
        model, info = kind.from_pretrained(place, dtype=torch.float32, output_loading_info=True)
    check_keys(f"{place!r} as a {kind.__name__}", given=(), wanted=info["missing_keys"])
    return model.eval()


def read_tensors(path: Path) -> Mapping[str, Tensor]:
    """Tensors of a .safetensors or .pt file, also where they lie under "state_dict". No pickled code runs."""
    import torch
    from safetensors.torch import load_file

    if path.suffix == ".safetensors":
        return load_file(path)
    saved = torch.load(path, map_location="cpu", weights_only=True)
    return saved.get("state_dict", saved)


def check_keys(what: str, given: Collection[str], wanted: Collection[str]) -> None:
    """ValueError that lists the keys wanted but not given and those given but not wanted, if there are any."""
    lacking, besides = sorted({*wanted} - {*given}), sorted({*given} - {*wanted})
    if lacking or besides:
        raise ValueError(
            f"{what}: missing keys {named(lacking)}; unexpected keys {named(besides)}; give the file as published"
        )


def named(keys: list[str]) -> str:
    """The first of the keys, and how many more."""
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return (", ".join(keys[:SHOWN]) or "none") + more
