"""From settings to a trainer: names are resolved and data is read before any weight is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.profiler import profile
from transformers import ProgressCallback, TrainerCallback, set_seed
from trl import ModelConfig, get_peft_config, get_quantization_config

from ..config import GCPOConfig
from ..rewards.loading import load_reward, place_rewards
from ..trainer import GCPOTrainer
from .datasets import load_prompts
from .recipe import RunArguments


class RewardProgress(ProgressCallback):
    """transformers' progress bar with the mean reward of the last logged step."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "reward" in logs:
            self.training_bar.set_postfix(reward=f"{float(logs['reward']):.3f}", refresh=False)


class Trace(TrainerCallback):
    """A trace of one optimizer step, rollout and all, in ``output_dir/profile``; of the main process."""

    def __init__(self) -> None:
        self._profile: profile | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and state.global_step == min(1, state.max_steps - 1):
            self._profile = profile()
            self._profile.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._profile is None:
            return
        self._profile.stop()
        folder = Path(args.output_dir) / "profile"
        folder.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(folder / f"step-{state.global_step:06d}.json.gz"))
        self._profile = None


def build_trainer(run: RunArguments, args: GCPOConfig, model_args: ModelConfig, callbacks: Any = None) -> Any:
    """The trainer a recipe describes; names are resolved before any weight is loaded."""
    if not model_args.model_name_or_path:
        raise ValueError("model_name_or_path is missing; give a path, a hub id, 'shapes-janus' or 'shapes-llamagen'")
    if model_args.load_in_4bit and model_args.dtype == "auto":
        raise ValueError("load_in_4bit computes in dtype, which 'auto' leaves open; write --dtype bfloat16 or float32")
    place_rewards(args.reward_device)
    rewards = [load_reward(name) for name in run.reward_funcs]
    dataset = load_prompts(run.dataset_name, run.dataset_split, run.dataset_size, args.seed)
    defaults = {"dtype": model_args.dtype or "float32", "revision": model_args.model_revision}
    args.model_init_kwargs = defaults | dict(args.model_init_kwargs or {})
    if model_args.attn_implementation:
        args.model_init_kwargs["attn_implementation"] = model_args.attn_implementation
    set_seed(args.seed)
    trainer = GCPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=rewards,
        args=args,
        train_dataset=dataset,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
        callbacks=callbacks,
    )
    trainer.remove_callback(ProgressCallback)
    if not args.disable_tqdm:
        trainer.add_callback(RewardProgress)
    if run.profile:
        trainer.add_callback(Trace)
    return trainer
