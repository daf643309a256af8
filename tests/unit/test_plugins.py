"""Names and paths become objects; what is not there is named, with what is."""

import sys

import pytest

from gcpo_trl.plugins import available, resolve


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of plug-ins: one that works, one in a folder, one that lacks a dependency, one that explodes."""
    root = tmp_path / "plugins_under_test"
    (root / "folder").mkdir(parents=True)
    (root / "__init__.py").write_text("")
    (root / "good.py").write_text("def reward():\n    return 'good'\n\n\nclass Nested:\n    value = 7\n")
    (root / "folder" / "__init__.py").write_text("def reward():\n    return 'folder'\n")
    (root / "needs.py").write_text("import no_such_dependency\n")
    (root / "explodes.py").write_text("raise RuntimeError('imported')\n")
    (root / "_helper.py").write_text("def reward():\n    return 'helper'\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "plugins_under_test"
    for module in [m for m in sys.modules if m.split(".")[0] == "plugins_under_test"]:
        del sys.modules[module]


def test_a_name_is_a_file_of_the_package(package):
    assert resolve("good", package, "reward")() == "good"
    assert resolve("folder", package, "reward")() == "folder"


def test_a_path_points_anywhere(package):
    assert resolve("plugins_under_test.good:reward", "math", "unused")() == "good"
    assert resolve("plugins_under_test.good.reward", "math", "unused")() == "good"
    assert resolve("plugins_under_test.good:Nested.value", "math", "unused") == 7


def test_listing_imports_nothing_and_leaves_helpers_out(package):
    assert available(package) == ["explodes", "folder", "good", "needs"]
    assert [m for m in sys.modules if m.startswith("plugins_under_test.")] == []


def test_resolving_imports_only_what_is_used(package):
    resolve("good", package, "reward")
    assert [m for m in sys.modules if m.startswith("plugins_under_test.")] == ["plugins_under_test.good"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("god", r"plugins_under_test has no 'god'; did you mean 'good'\? it has explodes, folder, good, needs"),
        ("zzz", r"has no 'zzz'; it has explodes, folder, good, needs"),
        ("_helper", "has no '_helper'"),
        ("plugins_under_test.good:rewad", r"has no 'rewad'; did you mean 'reward'\?"),
        ("plugins_under_test.absent:reward", "there is no module 'plugins_under_test.absent'"),
        ("absent_package.module.reward", "there is no module 'absent_package'"),
    ],
)
def test_what_is_not_there_is_a_value_error(package, name, message):
    with pytest.raises(ValueError, match=message):
        resolve(name, package, "reward")


def test_a_file_without_the_attribute_is_a_value_error(package):
    with pytest.raises(ValueError, match="has no 'load'"):
        resolve("good", package, "load")


@pytest.mark.parametrize("name", ["needs", "plugins_under_test.needs:reward"])
def test_a_missing_dependency_keeps_its_own_error(package, name):
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        resolve(name, package, "reward")


def test_what_is_not_a_package_is_a_value_error():
    for name in ("no_such_package", "math"):
        with pytest.raises(ValueError, match="is not a package"):
            available(name)
