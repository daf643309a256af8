"""Rewards for a run: loaded by name, checked and run side by side (`loading`), or served over HTTP (`server`)."""

from .loading import check_rewards, load_reward, load_rewards, place_rewards

__all__ = ["check_rewards", "load_reward", "load_rewards", "place_rewards"]
