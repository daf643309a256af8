"""Every test runs offline, on one thread, from a fixed seed, with the shapes in the signatures checked."""

import importlib.util
import os
import random
import re
import tempfile

import numpy as np
import pytest
import torch

CHECKED = ["gcpo_trl.objective", "gcpo_trl.rollout"]
OPT_IN = ("learn", "gpu", "weights", "network")
SHAPES_CHECKED = importlib.util.find_spec("beartype") is not None

for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "offline",
}.items():
    os.environ.setdefault(_name, _value)  # read when the libraries are first imported, which is after this file

_TRACKIO = tempfile.TemporaryDirectory(prefix="trackio-")  # else a test would write among the user's own runs
os.environ["TRACKIO_DIR"] = _TRACKIO.name

torch.set_num_threads(1)  # the tensors are small; more threads only get in each other's way

if SHAPES_CHECKED:
    from jaxtyping import install_import_hook

    # An int where a float is asked for is right by PEP 484, which beartype follows only when told to.
    install_import_hook(CHECKED, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")


def pytest_report_header(config: pytest.Config) -> list[str]:
    shapes = "checked" if SHAPES_CHECKED else "not checked; pip install beartype"
    left_out = ", ".join(_left_out(config)) or "none"
    return [f"shapes in signatures: {shapes}", f"left out unless -m names them: {left_out}"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what -m does not name. A -m in addopts would be replaced by the one on the command line."""
    left_out = [item for item in items if any(map(item.get_closest_marker, _left_out(config)))]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def _left_out(config: pytest.Config) -> list[str]:
    named = re.findall(r"\w+", config.option.markexpr)
    return [marker for marker in OPT_IN if marker not in named]


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)  # libraries that take no generator read this one
    torch.manual_seed(0)
