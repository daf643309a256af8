"""Is it still getting better? Fixed prompts, fixed seeds, other rewards than those that train, and two plain measures.

gcpo/held_out/<reward>    mean over the images that the reward scored
gcpo/held_out/sharpness   mean variance of the Laplacian of luminance; falls when pictures go blank or blurred
gcpo/held_out/entropy     mean token entropy, nats; falls when the policy draws ever the same
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import TrainerCallback

from .. import trl_compat
from ..rewards.loading import load_reward
from ..rollout import Sampling, sample
from ..validation import check_count

logger = logging.getLogger(__name__)

PREFIX = "gcpo/held_out/"
LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601
OWN_MEASURES = ("sharpness", "entropy")

# How far a measure may fall, as a share of its start. Entropy always falls in reinforcement learning, and pictures grow
# plainer as they improve, so both may fall far; a held-out reward that loses a tenth is worse at what was wanted.
SHARES = {"sharpness": 0.4, "entropy": 0.5}
REWARD_SHARE = 0.1
NOISE_FACTOR = 2.0  # standard errors that a change must exceed
WINDOW, LEAST_WINDOW = 10, 3  # logged training rewards averaged at either end


@dataclass(frozen=True)
class Measured:
    """Mean over the images that were scored, and its standard error; infinite for fewer than two images."""

    mean: float
    error: float


@dataclass(frozen=True)
class Change:
    """A measure at the start and now, the standard error of either, and the share of the start that it may fall."""

    start: float
    now: float
    error: float
    share: float


def reward_hacking(training: Sequence[float], changes: Mapping[str, Change]) -> list[str]:
    """Names of the measures that fell while the training reward rose; empty if it did not rise.

    The training reward, one mean a logged step, has risen if the mean of its last steps exceeds that of its first by
    more than 2 standard errors: 10 steps at either end, fewer if there are fewer, at least 3. The noise of one step is
    the root of half the mean squared difference of neighbours, which a trend hardly enters.

    A measure has fallen if it lost more than ``share`` of its size at the start and more than 2 standard errors of the
    difference.
    """
    window = min(WINDOW, len(training) // 2)
    if window < LEAST_WINDOW:
        return []
    rewards = np.asarray(training, dtype=np.float64)
    noise = math.sqrt(np.square(np.diff(rewards)).mean() / 2)
    if rewards[-window:].mean() - rewards[:window].mean() <= NOISE_FACTOR * noise * math.sqrt(2 / window):
        return []
    return [
        name
        for name, change in changes.items()
        if change.start - change.now > max(change.share * abs(change.start), NOISE_FACTOR * math.sqrt(2) * change.error)
    ]


def sharpness(picture: Image.Image) -> float:
    """Variance, over the inner pixels, of the Laplacian (four neighbours minus four times the centre) of luminance in
    [0, 1]. Blank: 0."""
    light = np.asarray(picture.convert("RGB"), dtype=np.float64) @ np.asarray(LUMINANCE) / 255
    laplacian = light[:-2, 1:-1] + light[2:, 1:-1] + light[1:-1, :-2] + light[1:-1, 2:] - 4 * light[1:-1, 1:-1]
    return float(laplacian.var()) if laplacian.size else 0.0


def split(total: int, rank: int, world: int) -> tuple[list[int], int]:
    """This rank's share of ``total`` samples, and how many of them count.

    Every rank draws equally many, because under ZeRO-3 all ranks take part in every forward pass; what is missing
    repeats the last sample and does not count.
    """
    each = math.ceil(total / world)
    first = rank * each
    indices = [min(index, total - 1) for index in range(first, first + each)]
    return indices, max(0, min(each, total - first))


def reduce(accelerator: Any, values: Mapping[str, Sequence[float | None]]) -> dict[str, Measured]:
    """Mean and standard error of each measure over all ranks, from sums and counts.

    None and NaN are left out, as in training; a measure without a single value is absent.
    """
    kept = [[v for v in column if v is not None and not math.isnan(v)] for column in values.values()]
    local = [[sum(column), sum(value * value for value in column), len(column)] for column in kept]
    sums = torch.tensor(local, dtype=torch.float32, device=accelerator.device)
    measured = {}
    for name, (total, squares, count) in zip(values, accelerator.reduce(sums, reduction="sum").tolist(), strict=True):
        if count:
            variance = max(0.0, squares - total * total / count) / (count - 1) if count > 1 else math.inf
            measured[name] = Measured(total / count, math.sqrt(variance / count))
    return measured


@contextlib.contextmanager
def randomness_kept() -> Iterator[None]:
    """Rewards may draw random numbers; training goes on as if they had not."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


class HeldOutCallback(TrainerCallback):
    """Draws the same held-out images every so many steps, measures them, and warns when they get worse as reward rises.

    rewards          a reward or a list: names ("shapes"), paths ("my_pkg.mine:score") or functions, best others than
                     those that train. None for an image leaves it out of the mean
    prompts          a list of strings, a list of rows or a dataset with a column ``prompt``; other columns reach the
                     rewards as they do in training
    images_per_prompt  images of each prompt
    every            optimizer steps between two looks; there is one before the first step, too
    seed             of the images, which are the same at every look except for what was learnt
    guidance         classifier-free guidance; None is ``rollout_guidance_scale``

    Pass it in ``callbacks`` of `GCPOTrainer` or to ``add_callback``. Training is not disturbed: its images and random
    numbers are those of a run without the callback. When `reward_hacking` names a measure that it did not name at the
    look before, a warning says so. "The start" is the first look in the run's log, also after a resume.

    Raises ValueError or TypeError on arguments that cannot work, when made or when training starts.
    """

    def __init__(
        self,
        rewards: Any,
        prompts: Any,
        images_per_prompt: int = 4,
        every: int = 50,
        seed: int = 1234,
        guidance: float | None = None,
    ) -> None:
        check_count("images_per_prompt", images_per_prompt, least=1, hint="write the images of a prompt, such as 4")
        check_count("every", every, least=1, hint="write the optimizer steps between two looks, such as 50")
        check_count("seed", seed, least=0, hint="write a seed, such as 1234")
        if guidance is not None and not (math.isfinite(guidance) and guidance >= 0):
            raise ValueError(f"guidance={guidance} must be a finite number >= 0; 1 is none, None is that of training")
        self.rewards = named_rewards(rewards)
        self.rows = prompt_rows(prompts)
        self.images_per_prompt, self.every, self.seed, self.guidance = images_per_prompt, every, seed, guidance
        self._trainer: Any = None
        self._fallen: set[str] = set()

    def attach(self, trainer: Any) -> None:
        """`GCPOTrainer` calls this before it trains; callbacks are not given their trainer otherwise."""
        if not trainer.policy.generates_images:
            raise ValueError("HeldOutCallback measures images, but the model is a text model; leave the callback out")
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The first look, unless a resumed run has taken it already."""
        if self._trainer is None:
            raise TypeError("HeldOutCallback needs GCPOTrainer, which draws its images; this is another trainer")
        self._fallen = set()
        if not any(PREFIX + "entropy" in entry for entry in state.log_history):
            self._look(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A look every ``every`` steps."""
        if state.global_step % self.every == 0:
            self._look(state)

    def _look(self, state: Any) -> None:
        with randomness_kept():
            measured = self._measure()
        for name in self.rewards:
            if name not in measured:
                logger.warning("step %d: the held-out reward %r scored no image", state.global_step, name)
        trl_compat.log_apart(self._trainer, {PREFIX + name: one.mean for name, one in measured.items()})
        if state.is_world_process_zero:
            self._warn(state, measured)

    def _measure(self) -> dict[str, Measured]:
        accelerator = self._trainer.accelerator
        indices, own = split(
            len(self.rows) * self.images_per_prompt, accelerator.process_index, accelerator.num_processes
        )
        rows = [self.rows[index // self.images_per_prompt] for index in indices]
        images, tokens, entropies = self._draw([row["prompt"] for row in rows], indices)
        values: dict[str, Sequence[float | None]] = {
            name: self._score(reward, rows[:own], images[:own], tokens[:own]) if own else []
            for name, reward in self.rewards.items()
        }
        values["sharpness"] = [sharpness(image) for image in images[:own]]
        values["entropy"] = entropies[:own]
        return reduce(accelerator, values)

    def _draw(self, prompts: list[Any], indices: list[int]) -> tuple[list[Any], list[list[int]], list[float]]:
        """Pictures, tokens and mean entropy (nats) of each image, no more in flight than training has."""
        trainer, args = self._trainer, self._trainer.args
        sampling = Sampling(
            guidance_scale=args.rollout_guidance_scale if self.guidance is None else self.guidance,
            temperature=trainer.temperature,
            top_k=trainer.top_k,
            top_p=trainer.top_p,
            batch_size=args.rollout_batch_size or args.per_device_train_batch_size * args.steps_per_generation,
            entropy_from=args.select_entropy_from,
            backend=args.rollout_backend,
        )
        with trl_compat.generation_context(trainer):
            rollout = sample(trainer.policy, prompts, self.seed, indices, sampling)
            images = trainer.policy.decode(rollout.tokens)
        return images, rollout.tokens.tolist(), rollout.entropy.mean(dim=1).tolist()

    def _score(
        self, reward: Callable[..., Any], rows: Sequence[Mapping[str, Any]], images: list[Any], tokens: list[list[int]]
    ) -> list[float | None]:
        """Called as TRL calls it, except that what it logs goes nowhere: the metrics are those of training."""
        columns = {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}
        scores = reward(
            prompts=[row["prompt"] for row in rows],
            completions=images,
            completion_ids=tokens,
            trainer_state=self._trainer.state,
            log_extra=lambda *_: None,
            log_metric=lambda *_: None,
            **columns,
        )
        if inspect.iscoroutine(scores):
            with ThreadPoolExecutor(1) as pool:  # a notebook's own event loop forbids another in its thread
                scores = pool.submit(asyncio.run, scores).result()
        return scores

    def _warn(self, state: Any, measured: Mapping[str, Measured]) -> None:
        """Say which measures `reward_hacking` names now and did not name at the look before."""
        starts: dict[str, float] = {}
        for entry in state.log_history:
            for name in measured:
                if PREFIX + name in entry:
                    starts.setdefault(name, entry[PREFIX + name])
        changes = {
            name: Change(starts[name], one.mean, one.error, SHARES.get(name, REWARD_SHARE))
            for name, one in measured.items()
        }
        training = [entry["reward"] for entry in state.log_history if entry.get("reward") is not None]
        fallen = reward_hacking(training, changes)
        for name in fallen:
            if name not in self._fallen:
                logger.warning(
                    "step %d: the training reward has risen, but held-out %s fell from %.4g to %.4g since the start. "
                    "This is what reward hacking looks like: compare the pictures (log_images), raise beta, or stop",
                    state.global_step,
                    name,
                    changes[name].start,
                    changes[name].now,
                )
        self._fallen = set(fallen)


def named_rewards(rewards: Any) -> dict[str, Callable[..., Any]]:
    """Rewards under the names they are logged as; raises on none, on two of one name and on torch modules."""
    listed = list(rewards) if isinstance(rewards, (list, tuple)) else [rewards]
    if not listed:
        raise ValueError("rewards is empty; name at least one, such as 'shapes'")
    named: dict[str, Callable[..., Any]] = {}
    for reward in listed:
        if isinstance(reward, torch.nn.Module):
            raise TypeError(f"reward {type(reward).__name__} is a torch module, which scores text; pass a function")
        function = load_reward(reward)
        name = function.__name__
        if name in named or name in OWN_MEASURES:
            raise ValueError(f"two held-out measures are called {name!r}; give the reward function another __name__")
        named[name] = function
    return named


def prompt_rows(prompts: Any) -> list[dict[str, Any]]:
    """Rows with a ``prompt`` and the same columns each; raises ValueError or TypeError on anything else."""
    if isinstance(prompts, (str, Mapping)) or not hasattr(prompts, "__iter__"):
        raise TypeError(f"prompts is a {type(prompts).__name__}; write a list of prompts, even of one")
    rows = [{"prompt": row} if isinstance(row, str) else row for row in prompts]
    if not rows:
        raise ValueError("prompts is empty; give at least one held-out prompt")
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise TypeError(f"prompts[{index}] is a {type(row).__name__}; write a string or a row such as a dict")
        if "prompt" not in row:
            raise ValueError(f"prompts[{index}] has {sorted(row)} but no 'prompt'; name its caption 'prompt'")
        if set(row) != set(rows[0]):
            raise ValueError(
                f"prompts[{index}] has the columns {sorted(row)}, but the first row has {sorted(rows[0])}; give every "
                "row the same ones"
            )
    return [dict(row) for row in rows]
