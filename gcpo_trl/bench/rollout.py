"""Drawing one group of images: the engine, transformers' ``generate``, and the plain loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from ..policies.janus import JanusPolicy
from ..rollout import Sampling, sample
from ..rollout.recorder import Recorder
from . import naive
from .measure import Operations, Report, interleave
from .model import Size, build_policy, prompts_of

SCALE = 5.0
SIZES = {
    "wide": Size(hidden=512, layers=8, heads=8, grid=24, codes=16384, group=8),
    "narrow": Size(hidden=64, layers=24, heads=4, grid=10, codes=1024, group=8),  # the host is the limit
}
QUICK = {"narrow": Size(hidden=32, layers=24, heads=2, grid=4, codes=64, group=2)}


def run(quick: bool, rounds: int) -> list[Report]:
    """A report a size."""
    return [measure(name, size, rounds) for name, size in (QUICK if quick else SIZES).items()]


def measure(name: str, size: Size, rounds: int) -> Report:
    """Times, ratios and counters of one size."""
    policy, report = build_policy(size), Report(f"rollout, {name}", asdict(size))
    interleave(report, peers_of(policy, size), rounds)
    best = "graph" if "graph" in report.timings else "eager"
    report.compare(
        best, {"transformers' generate": "transformers", "plain loop": "plain loop", "reference": "reference"}
    )
    report.counters |= counters(policy, size)
    return report


def peers_of(policy: JanusPolicy, size: Size) -> dict[str, Callable[[], Any]]:
    """What draws the same number of images of the same prompt."""
    prompts = prompts_of(size)
    policy.set_generation(SCALE)
    texts = [policy._template(prompt) for prompt in prompts]
    inputs = policy.processor(text=texts, generation_mode="image", padding=True, return_tensors="pt")
    inputs = inputs.to(policy.model.device)

    @torch.no_grad()
    def transformers_generate() -> Any:
        return policy.model.generate(**inputs, generation_mode="image", do_sample=True, guidance_scale=SCALE)

    def ours(backend: str) -> Callable[[], Any]:
        sampling = Sampling(guidance_scale=SCALE, backend=backend)
        return lambda: sample(policy, prompts, 0, list(range(len(prompts))), sampling)

    backends = ["eager", "reference", *(["graph"] if torch.cuda.is_available() else [])]
    return {backend: ours(backend) for backend in backends} | {
        "transformers": transformers_generate,
        "plain loop": lambda: naive.rollout(policy, prompts, SCALE),
    }


@torch.no_grad()
def counters(policy: JanusPolicy, size: Size, steps: int = 4) -> dict[str, float]:
    """What a token costs, whatever the machine: counted over some tokens in the middle, as torch dispatches them."""
    prompts, sampling = prompts_of(size), Sampling(guidance_scale=SCALE)
    state, logits = policy.start(policy.encode(prompts[:1]), torch.zeros(len(prompts), dtype=torch.long), guided=True)
    recorder = Recorder(torch.full((len(prompts), policy.num_tokens), 0.5, device=logits.conditional.device))
    order = torch.arange(policy.num_tokens, device=logits.conditional.device)
    recorder.take(logits, order[:1], sampling)
    del logits
    with Operations() as seen:
        for position in range(1, 1 + steps):
            recorder.take(policy.step(state, recorder.last), order[position : position + 1], sampling)
        stored = seen.alive(size.codes)
    with Operations() as plain:
        kept = naive.rollout(policy, prompts, SCALE)
    with Operations() as reference:
        sample(policy, prompts, 0, list(range(len(prompts))), Sampling(guidance_scale=SCALE, backend="reference"))
    return {
        "kernels a token": seen.kernels.total() / steps,
        "kernels a token, reference": reference.kernels.total() / policy.num_tokens,
        "kernels a token, plain loop": plain.kernels.total() / policy.num_tokens,
        "host syncs a token": seen.syncs / steps,
        "host syncs a token, plain loop": plain.syncs / len(kept[2]),
        "bytes of stored logits": stored,
        "bytes of stored logits, plain loop": len(kept[2]) * len(prompts) * size.codes * kept[1].element_size(),
    }
