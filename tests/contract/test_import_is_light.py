"""`import gcpo_trl` loads no model code: names are imported on first use."""

import json
import subprocess
import sys

import pytest

import gcpo_trl

HEAVY = {"torch", "transformers", "trl"}
SCRIPT = "import json, sys, {module}; json.dump(sorted({{name.partition('.')[0] for name in sys.modules}}), sys.stdout)"


def loaded_by(module: str) -> set[str]:
    """Top-level names in `sys.modules` of a fresh interpreter that imported `module`."""
    command = [sys.executable, "-c", SCRIPT.format(module=module)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return set(json.loads(done.stdout))


@pytest.mark.parametrize("module", ["gcpo_trl", "gcpo_trl.plugins", "gcpo_trl.cli", "gcpo_trl.prompts", "reward_funcs"])
def test_import_loads_no_model_code(module):
    assert not HEAVY & loaded_by(module)


def test_the_check_sees_what_is_loaded():
    assert "decimal" in loaded_by("decimal")


def test_an_unknown_name_is_an_attribute_error_that_lists_the_known_ones():
    with pytest.raises(AttributeError, match="GCPOTrainer"):
        _ = gcpo_trl.GCPOTrainr
