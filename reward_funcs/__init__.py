"""Rewards: plain callables, one file each, independent of gcpo_trl. README.md says how to add one."""
