"""Fixtures of tests/tiny.py."""

from tiny import libraries_frozen, policy, shared_policy, tiny_janus, tiny_llamagen, tiny_text  # noqa: F401
