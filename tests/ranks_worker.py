"""One process of a launched run: trains the tiny Janus as each scenario says and writes down what it saw.

    accelerate launch ... tests/ranks_worker.py FOLDER MODEL SCENARIO...

Rank r leaves FOLDER/SCENARIO-r.json; rank 0 also FOLDER/SCENARIO.safetensors with the whole trained parameters.
"""

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from tiny import digits, janus_trainer, record

import gcpo_trl.trainer
from gcpo_trl.runs.devices import launcher_settings

torch.set_num_threads(1)

# One group of four: with two processes it lies on both.
GROUP = {"num_generations": 4, "max_steps": 3, "learning_rate": 1e-3, "seed": 3}
SAVED = {"save_strategy": "steps", "save_steps": 1, "save_only_model": False}
BUFFER = {"num_iterations": 2, "steps_per_generation": 2, "max_steps": 5}
SCENARIOS = {
    "full": {},
    "lora": {"lora": True},
    "all_tokens": {"select_strategies": ["everything"], "weight_form": "none"},
    "stage": {
        "weight_form": "stage",
        "divergence_weight": "stage",
        "divergence": "forward_kl",
        "divergence_on": "all",
        "loss_type": "dapo",
        "beta": 0.5,
    },
    "failing": {"fails": True},
}
# saved_full_aligned, resumed_full_aligned, ...: a run, and one that goes on from a checkpoint of it.
for weights, adapted in (("full", {}), ("lora", {"lora": True})):
    for place, changes in (("aligned", SAVED | {"max_steps": 3}), ("inside", SAVED | BUFFER)):
        case, step = f"{weights}_{place}", {"aligned": 2, "inside": 3}[place]
        SCENARIOS[f"saved_{case}"] = adapted | changes
        SCENARIOS[f"resumed_{case}"] = adapted | changes | {"resume": step, "folder": f"saved_{case}"}


def fails_on_the_last_rank(prompts, completions, trainer_state, **columns):
    rank, world = (
        gcpo_trl.trainer.gcpo_trainer.torch.distributed.get_rank(),
        gcpo_trl.trainer.gcpo_trainer.torch.distributed.get_world_size(),
    )
    if rank == world - 1 and trainer_state.global_step == 1:
        raise RuntimeError("the detector cannot read this image")
    return [0.0] * len(prompts)


def seen_by(trainer):
    """Of every loss: a row's tokens, which of them train, its advantage, and each one's weight or STAGE similarity."""
    rows, weights = [], []
    weigh, loss = gcpo_trl.trainer.gcpo_trainer.advantage_weight, trainer._compute_loss

    def weighed(*args, **kwargs):
        weights[:] = [weigh(*args, **kwargs)]
        return weights[0]

    def computed(model, inputs):
        value = loss(model, inputs)
        ids = inputs["completion_ids"]
        mask = inputs["tool_mask"] if "tool_mask" in inputs else torch.ones_like(ids)
        weight = weights[0] if weights else inputs.get("opposing_similarity", torch.ones(ids.shape))
        parts = (ids, mask, inputs["advantages"], weight)
        rows.append([list(row) for row in zip(*(part.tolist() for part in parts), strict=True)])
        return value

    gcpo_trl.trainer.gcpo_trainer.advantage_weight, trainer._compute_loss = weighed, computed
    return rows


def train(scenario, folder, model):
    changes = dict(SCENARIOS[scenario])
    peft = LoraConfig(r=2, lora_alpha=8) if changes.pop("lora", False) else None
    reward = fails_on_the_last_rank if changes.pop("fails", False) else digits
    step, home = changes.pop("resume", None), folder / changes.pop("folder", scenario)
    settings = {"per_device_train_batch_size": 4 // world(), **GROUP, **changes}
    settings |= launcher_settings(settings)
    trainer = janus_trainer(model, home, reward=reward, peft_config=peft, **settings)
    gcpo_trl.trainer.gcpo_trainer.advantage_weight = WEIGHT
    rows, kept = seen_by(trainer), record(trainer)
    trainer.train(resume_from_checkpoint=str(home / f"checkpoint-{step}") if step else None)
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # every rank takes part under ZeRO-3
    report = {
        "world": trainer.accelerator.num_processes,
        "engine": type(trainer.model_wrapped).__name__,
        "stage": getattr(trainer.accelerator.state.deepspeed_plugin, "zero_stage", None),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "disagreement": [
            entry["gcpo/diversity/disagreement"]
            for entry in trainer.state.log_history
            if "gcpo/diversity/disagreement" in entry
        ],
        "norms": [float(entry["grad_norm"]) for entry in trainer.state.log_history if "grad_norm" in entry],
        "images": [batch["completion_ids"].tolist() for batch in kept.batches],
        "rows": rows,
    }
    (folder / f"{scenario}-{trainer.accelerator.process_index}.json").write_text(json.dumps(report))
    if trainer.accelerator.is_main_process:
        trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
        trained = {name: value.cpu().contiguous().clone() for name, value in state.items() if name in trained}
        save_file(trained, folder / f"{scenario}.safetensors")


def world():
    import os

    return int(os.environ.get("WORLD_SIZE", "1"))


WEIGHT = gcpo_trl.trainer.gcpo_trainer.advantage_weight

if __name__ == "__main__":
    for name in sys.argv[3:]:
        train(name, Path(sys.argv[1]), sys.argv[2])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
