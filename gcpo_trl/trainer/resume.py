"""What TRL leaves out of a checkpoint: the rollout buffer, a reference that moves, and which checkpoints are whole.

TRL draws images once for ``steps_per_generation * num_iterations`` batches and keeps them in memory. Without them a
run that continues in between would draw other images for the rest of the buffer. Each rank saves its own share, tensors
as safetensors and the rest as JSON.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, load_model, save_file, save_model
from torch.utils.data import Sampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer

from .. import trl_compat
from ..config import GCPOConfig

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"  # transformers writes it last
REFERENCE_FILE = "reference.safetensors"  # of a run with sync_ref_model
# Keys of a saved batch by the names that they had until 0.1.0; read under another name they would be silently missing.
FORMER_KEYS = {"drawn_mask": "policy_mask", "drawn_items_in_batch": "policy_items_in_batch"}


def save_buffer(folder: Path, rank: int, world: int, step: int, buffer: list[dict[str, Any]]) -> None:
    """One rank's files: ``step``, the micro-batches trained so far, and the batches that are left of a generation.

    A batch holds tensors, None and what JSON can hold.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{index}.{key}": value.detach().cpu().contiguous().clone()  # slices of one batch share their memory
        for index, batch in enumerate(buffer)
        for key, value in batch.items()
        if isinstance(value, torch.Tensor)
    }
    plain = [{k: v for k, v in batch.items() if not isinstance(v, torch.Tensor)} for batch in buffer]
    save_file(tensors, folder / f"rollout_{rank}.safetensors")
    content = {"world_size": world, "step": step, "batches": plain}
    (folder / f"rollout_{rank}.json").write_text(json.dumps(content))


def load_buffer(folder: Path, rank: int, world: int, device: torch.device) -> tuple[int, list[dict[str, Any]]] | None:
    """``(step, buffer)`` of one rank; None, and a warning, where the checkpoint has none for so many ranks."""
    file = folder / f"rollout_{rank}.json"
    content = json.loads(file.read_text()) if file.exists() else {"world_size": 0}
    if content["world_size"] != world:
        seen = f"was written by {content['world_size']} ranks" if content["world_size"] else "holds no rollout buffer"
        logger.warning("%s %s, this run has %d: images of its last generation are drawn again", folder, seen, world)
        return None
    buffer: list[dict[str, Any]] = [dict(batch) for batch in content["batches"]]
    for name, tensor in load_file(folder / f"rollout_{rank}.safetensors").items():
        index, key = name.split(".", 1)
        buffer[int(index)][FORMER_KEYS.get(key, key)] = tensor.to(device)
    return content["step"], buffer


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was saved to its end: the trainer's state, written last, is there and can be read."""
    try:
        return "global_step" in json.loads((checkpoint / STATE_FILE).read_text())
    except (OSError, json.JSONDecodeError):
        return False


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step that was saved to its end; None if there is none."""
    found: list[tuple[int, Path]] = []
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if not step.isdigit():
            continue
        if is_whole(path):
            found.append((int(step), path))
        else:
            logger.warning("%s was not saved to its end and is passed over", path)
    return max(found)[1] if found else None


def check_reference(reference: torch.nn.Module, args: Any, checkpoint: Any) -> None:
    """Raise ValueError where ``sync_ref_model`` moves a reference that checkpoints could not keep, or did not.

    Under ZeRO-3 and FSDP a process holds parts of it only.
    """
    sharded = any(hasattr(one, "ds_tensor") or hasattr(one, "to_local") for one in reference.parameters())
    if sharded and args.save_strategy != "no" and not args.save_only_model:
        raise ValueError(
            "sync_ref_model=True moves a reference that is sharded, which checkpoints do not keep, so no run could go "
            "on from one; train with ddp or zero2, or set sync_ref_model=False, save_only_model=True or "
            "save_strategy='no'"
        )
    if checkpoint and not (Path(checkpoint) / REFERENCE_FILE).is_file():
        raise ValueError(
            f"{checkpoint} has no {REFERENCE_FILE}, so the reference that sync_ref_model=True moves is lost; set it to "
            "False to go on with the one that the run started from, or start anew"
        )


class EpochOrder(Sampler[int]):
    """TRL's `RepeatSampler`, in an order that the epoch decides alone.

    Its generator shuffles once an epoch and is not saved, so a run that goes on in its third epoch would see the order
    of the first. Here the shuffles of the epochs before are made again; an uninterrupted run notices nothing.
    """

    def __init__(self, sampler: Any, epochs_done: Callable[[], int]) -> None:
        self.sampler = sampler
        self.epochs_done = epochs_done

    def __iter__(self) -> Iterator[int]:
        if self.sampler.shuffle and self.sampler.seed is not None:
            self.sampler.generator.manual_seed(self.sampler.seed)
            for _ in range(self.epochs_done()):
                torch.randperm(self.sampler.num_samples, generator=self.sampler.generator)
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


class ExactResume(GRPOTrainer):
    """Checkpoints keep the rollout buffer and a moving reference, and a run continues only from whole ones.

    Overrides what transformers calls while it saves and loads; the state of the random numbers is saved on every rank.
    The lowest class of the chain: it also names the types of what all of them use.
    """

    args: GCPOConfig
    model: Any
    ref_model: Any
    processing_class: Any
    _saved: frozenset[Path] = frozenset()

    def train(self, resume_from_checkpoint: Any = None, trial: Any = None, ignore_keys_for_eval: Any = None) -> Any:
        """GRPOTrainer's training. ``True`` goes on from the last checkpoint that was saved to its end.

        Raises ValueError if the checkpoint was not.
        """
        if resume_from_checkpoint:
            last = last_whole_checkpoint(Path(self.args.output_dir))
            if resume_from_checkpoint is True:
                resume_from_checkpoint = str(last)
            if not is_whole(Path(resume_from_checkpoint)):
                raise ValueError(
                    f"resume_from_checkpoint={str(resume_from_checkpoint)!r} is no checkpoint that was saved to its "
                    f"end; the last one in {self.args.output_dir} is {last}"
                )
        if self.accelerator.num_processes > 1:
            chosen = gather_object([str(resume_from_checkpoint or "the start")])
            if len(set(chosen)) > 1:
                raise ValueError(f"the processes would go on from {chosen}; use a disk that all machines share")
        if self.args.sync_ref_model:
            check_reference(self.ref_model, self.args, resume_from_checkpoint)
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _get_train_sampler(self, dataset: Any = None) -> EpochOrder:
        """``state.epoch`` is a fraction of batches; rounding must not put its last batch into the epoch before."""
        sampler = super()._get_train_sampler(dataset)
        return EpochOrder(sampler, lambda: math.floor((self.state.epoch or 0.0) + 1e-6))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A state file of an earlier run must not call this checkpoint whole before it is."""
        folder = trl_compat.checkpoint_folder(self, trial)
        if self.args.should_save and folder.exists():
            (folder / STATE_FILE).unlink(missing_ok=True)
            if folder not in self._saved:  # another run's, whose other files would be read as this one's
                shutil.rmtree(folder)
        self._saved = self._saved | {folder}
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        """Beside the state of the random numbers: how far the rollout buffer is used, and what is left in it."""
        super()._save_rng_state(output_dir)
        step, buffer = trl_compat.micro_batches(self), trl_compat.rollout_buffer(self)
        used = step % (self.args.steps_per_generation * self.num_iterations)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        save_buffer(Path(output_dir), rank, world, step, buffer if used else [])
        if self.args.sync_ref_model and self.args.should_save:
            save_model(self.accelerator.unwrap_model(self.ref_model), str(Path(output_dir) / REFERENCE_FILE))
        self.accelerator.wait_for_everyone()  # rank 0 now writes the file that calls the checkpoint whole

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """PEFT loads every adapter in fp32, also where TRL had it in bf16, as it has those of a quantised model."""
        before = {name: one.dtype for name, one in self.model.named_parameters() if one.requires_grad}
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for name, parameter in self.model.named_parameters():
            if before.get(name, parameter.dtype) != parameter.dtype:
                parameter.data = parameter.data.to(before[name])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Also called where a run goes on, after the optimizer is loaded and before the first batch."""
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        accelerator = self.accelerator
        if self.args.sync_ref_model:
            load_model(accelerator.unwrap_model(self.ref_model), Path(checkpoint) / REFERENCE_FILE)
        kept = load_buffer(Path(checkpoint), accelerator.process_index, accelerator.num_processes, accelerator.device)
        step, buffer = kept or (self.state.global_step * self.args.gradient_accumulation_steps, [])
        trl_compat.continue_at(self, step, buffer)
