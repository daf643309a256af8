"""The chain of trainers is a chain, and its documented table of overrides is the code's."""

import inspect
import re

from trl import GRPOTrainer

import gcpo_trl.trainer
from gcpo_trl import GCPOTrainer

CHAIN = [part for part in GCPOTrainer.__mro__ if part.__module__.startswith("gcpo_trl")][::-1]


def test_each_class_has_one_class_below_it():
    below = [GRPOTrainer, *CHAIN[:-1]]
    assert [part.__bases__ for part in CHAIN] == [(base,) for base in below]
    line = re.search(r"trl\.GRPOTrainer < (.*)", gcpo_trl.trainer.__doc__).group(1)
    assert line.split(" < ") == [part.__name__ for part in CHAIN]


def test_the_table_lists_every_override_and_no_other():
    found: dict[str, list[str]] = {}
    for part in CHAIN:
        for name, value in vars(part).items():
            if inspect.isfunction(value) and hasattr(GRPOTrainer, name):
                found.setdefault(name, []).append(part.__name__)
    rows = re.findall(r"^    (\w+) {2,}(\w[\w ]*)$", gcpo_trl.trainer.__doc__, flags=re.MULTILINE)
    assert {name: classes.split() for name, classes in rows} == found
