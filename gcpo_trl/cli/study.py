"""``gcpo study STUDY.yaml``: every run of a study, its table, its learning curves and its Pareto picture.

Each run is a process of its own and leaves one JSON file, so a study that was stopped goes on where it was, studies
share runs that are equal, and a run that fails is a line of the table and no end of the others.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import queue
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ..evaluation.benchmark import Benchmark, ask_once, choose
from ..evaluation.diversity import choose_gauge
from ..evaluation.folder import Folder, write_whole
from ..evaluation.runner import run as draw_and_judge
from ..evaluation.runner import settings_of
from ..extras import require
from ..rollout import Sampling
from ..runs.build import build_trainer
from ..runs.recipe import parsed
from ..studies.figure import study_picture
from ..studies.plan import BASE, Measure, Run, Study, read_study
from ..studies.statistics import Arm, minutes, table
from .console import say

CURVES = (
    *("reward", "kl", "gcpo/divergence/k3", "gcpo/entropy/all", "gcpo/diversity/disagreement", "gcpo/weight/mean"),
    *("gcpo/time/rollout", "gcpo/time/reward", "gcpo/time/reference", "gcpo/time/update"),
)
EVALUATION_SEED = 1234
SAID = 200  # characters of a failure in a table
CHATTER = ("[INFO]", "INFO", "[DEBUG]", "wandb:")  # how lines begin that libraries and our own log print in passing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("study", type=Path, nargs="+", metavar="STUDY.yaml")
    parser.add_argument("--out", type=Path, default=Path("outputs/studies"))
    parser.add_argument("--jobs", type=int, default=None, help="runs at once; default: one a GPU, or one a CPU core")
    parser.add_argument("--report-only", action="store_true", help="tables and pictures of what is there")
    parser.add_argument("--readme", type=Path, default=None, help="put tables between its '<!-- NAME:start -->' marks")
    parser.add_argument("--run", default=None, help=argparse.SUPPRESS)  # one run, by key, in this process


def prepare(options: argparse.Namespace) -> Callable[[], int]:
    """Read the studies and check every run of each; the returned function runs what is missing."""
    studies = [read_study(path) for path in options.study]
    if options.jobs is not None and options.jobs < 1:
        raise ValueError(f"--jobs {options.jobs}; write how many runs may train at once, such as 2")
    if options.run is not None:
        return lambda: one_run(studies[0], options)
    require("matplotlib", "viz")
    for study in studies:
        if options.readme is not None:
            parts_of(options.readme, study)
    return lambda: run_studies(studies, options)


def run_studies(studies: list[Study], options: argparse.Namespace) -> int:
    """Run what is missing and report each study; 1 if a run failed."""
    failed = 0
    for path, study in zip(options.study, studies, strict=True):
        if not options.report_only:
            run_missing(path, study, options)
        failed += report(study, options)
    return 1 if failed else 0


# one run


def one_run(study: Study, options: argparse.Namespace) -> int:
    """Train and judge the run of this key; its file appears once it is whole."""
    run = next((run for run in study.runs() if run.key == options.run), None)
    if run is None:
        raise ValueError(f"{options.study[0]} has no run {options.run}; it changed while it ran, so start it again")
    write_whole(result_file(options.out, run), (json.dumps(train_and_judge(run)) + "\n").encode())
    return 0


def train_and_judge(run: Run) -> dict[str, Any]:
    """What a study keeps of a run: its settings, curves, scores and minutes."""
    start, benchmark = time.monotonic(), benchmark_of(run.measure)
    with tempfile.TemporaryDirectory(prefix="gcpo-study-") as scratch:
        own = {"seed": run.seed, "data_seed": run.seed, "output_dir": f"{scratch}/model", "logging_steps": 1}
        settings, args, model_args = parsed({**run.settings, **own})
        trainer = build_trainer(settings, args, model_args)
        if args.max_steps:
            trainer.train()
        scales = run.measure.guidance_scales or (args.rollout_guidance_scale,)
        reports = {f"{scale:g}": judged(run, benchmark, trainer.policy, scale, Path(scratch)) for scale in scales}
    history = trainer.state.log_history
    return {
        "key": run.key,
        "settings": dict(run.settings),
        "seed": run.seed,
        "minutes": (time.monotonic() - start) / 60,
        "history": {name: [float(entry[name]) for entry in history if name in entry] for name in CURVES},
        "reports": {scale: report["overall"] for scale, report in reports.items()},
        "tasks": {scale: report["tasks"] for scale, report in reports.items()},
        "images": next(iter(reports.values()))["images"],
    }


def benchmark_of(measure: Measure) -> Benchmark:
    """Prompts and judges, asked once: what they lack is seen before anything trains."""
    benchmark = choose(measure.benchmark, images_per_prompt=measure.images_per_prompt, limit=measure.limit)
    known = ask_once(benchmark)
    if measure.measure not in known:
        raise ValueError(f"measure {measure.measure!r} is none of {measure.benchmark}: {', '.join(known)}")
    if not measure.diversity:
        return benchmark
    return dataclasses.replace(benchmark, gauge=choose_gauge(measure.diversity, benchmark.images_per_prompt))


def judged(run: Run, benchmark: Benchmark, policy: Any, scale: float, scratch: Path) -> dict[str, Any]:
    """The benchmark's report at one guidance scale."""
    sampling = Sampling(guidance_scale=scale, batch_size=run.measure.batch_size)
    settings = settings_of(policy, benchmark, sampling, EVALUATION_SEED, "in training", None)
    folder = Folder(scratch / f"pictures_{scale:g}", benchmark.images_per_prompt)
    folder.open(settings)
    return draw_and_judge(policy, benchmark, folder, settings)


# many runs


def run_missing(path: Path, study: Study, options: argparse.Namespace) -> None:
    """Start what has no result, so many at once as there is room for; Ctrl-C ends them all."""
    missing = [run for run in study.runs() if not result_file(options.out, run).exists()]
    if not missing:
        return
    slots, room = slots_of(options.jobs)
    say(f"{study.name}: {len(missing)} of {len(study.runs())} runs to do, {slots} at once")
    started: list[subprocess.Popen[bytes]] = []
    with ThreadPoolExecutor(slots) as pool:
        waiting = [pool.submit(launch, path, run, options.out, room, started) for run in missing]
        try:
            for done, (run, future) in enumerate(zip(missing, waiting, strict=True), start=1):
                say(f"{study.name}: {done}/{len(missing)} {outcome(run, options.out, future.result())}")
        except KeyboardInterrupt:
            for future in waiting:
                future.cancel()
            for process in started:
                process.terminate()
            raise


def slots_of(jobs: int | None) -> tuple[int, queue.Queue[dict[str, str]]]:
    """How many runs at once, and the environment of each place: its GPU, or its share of the CPU's cores."""
    cores, gpus = len(os.sched_getaffinity(0)), torch.cuda.device_count()
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name] or range(gpus)
    slots = jobs or gpus or cores
    room: queue.Queue[dict[str, str]] = queue.Queue()
    for slot in range(slots):
        threads = {"OMP_NUM_THREADS": str(max(1, cores // slots))}
        room.put(threads | ({"CUDA_VISIBLE_DEVICES": str(visible[slot % gpus])} if gpus else {}))
    return slots, room


def launch(
    path: Path, run: Run, out: Path, room: queue.Queue[dict[str, str]], started: list[subprocess.Popen[bytes]]
) -> int:
    """One run in its own process; returns its exit code. What it printed stays in its log."""
    place, log = room.get(), log_file(out, run)
    log.parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-m", "gcpo_trl", "study", str(path), "--out", str(out), "--run", run.key]
    try:
        with log.open("wb") as file:
            process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **place})
            started.append(process)
            return process.wait()
    finally:
        room.put(place)


def last_words(printed: str) -> str:
    """The last line of what a failed run printed that may be its reason.

    Libraries say what they do at the end of a process too, and standard output, which is buffered where it is a file,
    comes behind the error; such lines are passed over unless there are no others.
    """
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    reasons = [line for line in lines if not line.startswith(CHATTER)]
    return (reasons or lines or ["it printed nothing"])[-1]


def outcome(run: Run, out: Path, code: int) -> str:
    """A line about a run that has ended; where it left no result, its last words are kept for the table.

    Only the main thread calls this: after Ctrl-C it no longer does, so what that ended counts as not yet run.
    """
    result = result_file(out, run)
    if result.exists():
        failure_file(out, run).unlink(missing_ok=True)
        content = json.loads(result.read_text())
        score = next(iter(content["reports"].values()))[run.measure.measure]["mean"]
        return f"{run.key}, seed {run.seed}: {run.measure.measure} {score:.3f} in {content['minutes']:.1f} min"
    log = log_file(out, run)
    why = f"exit code {code}: {last_words(log.read_text(errors='replace'))[:SAID]}"
    write_whole(failure_file(out, run), json.dumps({"why": why}).encode())
    return f"{run.key}, seed {run.seed}: failed, {why}; see {log}"


# the report


def report(study: Study, options: argparse.Namespace) -> int:
    """Print and write table, numbers and picture of what there is; returns the number of failed runs."""
    arms = [arm_of(name, runs, options.out) for name, runs in study.arms.items()]
    if not any(arm.results for arm in arms):
        say(f"{study.name}: no run has a result yet")
        return sum(len(arm.failures) for arm in arms)
    text = section(study, arms)
    say(f"\n{study.name}: {study.question}\n\n{text}\n")
    folder = options.out / study.name
    write_whole(folder / "table.md", f"{text}\n".encode())
    write_whole(folder / "runs.json", json.dumps({arm.name: arm.results for arm in arms}, indent=1).encode())
    picture = folder / "picture.png"
    study_picture(arms, study.baseline, study.measure.measure, study.measure.against, scales_of(arms)[0], picture)
    if options.readme is not None:
        shown = options.readme.parent / "pictures" / f"{study.name}.png"
        write_whole(shown, picture.read_bytes())
        insert(options.readme, study, f"{text}\n\n![{study.name}](pictures/{shown.name})")
    return sum(len(arm.failures) for arm in arms)


def arm_of(name: str, runs: list[Run], out: Path) -> Arm:
    """The results and failures of an arm that are on disk."""
    results = {run.seed: json.loads(file.read_text()) for run in runs if (file := result_file(out, run)).exists()}
    failures = {
        run.seed: json.loads(file.read_text())["why"]
        for run in runs
        if run.seed not in results and (file := failure_file(out, run)).exists()
    }
    return Arm(name, results, failures, trained=name != BASE)


def scales_of(arms: list[Arm]) -> list[str]:
    """Guidance scales of the evaluations, in the study's order."""
    return list(dict.fromkeys(scale for arm in arms for result in arm.results.values() for scale in result["reports"]))


def section(study: Study, arms: list[Arm]) -> str:
    """The table and one line about what it is of."""
    scales = scales_of(arms)
    results = [result for arm in arms for result in arm.results.values()]
    steps = sorted({result["settings"]["max_steps"] for result in results} - {0})
    images = " or ".join(f"{count:,}" for count in sorted({result["images"] for result in results}))
    return (
        f"{table(arms, study.baseline, study.measure.measure, scales)}\n\n"
        f"{' or '.join(map(str, steps))} steps; mean ± half of the 95% t interval over seeds "
        f"{', '.join(map(str, study.seeds))}; evaluation on {images} images of held-out prompts at guidance "
        f"{scales[0]}. All runs together: {minutes(arms):.0f} minutes of one process."
    )


def result_file(out: Path, run: Run) -> Path:
    return out / "runs" / f"{run.key}.json"


def log_file(out: Path, run: Run) -> Path:
    return out / "runs" / f"{run.key}.log"


def failure_file(out: Path, run: Run) -> Path:
    return out / "runs" / f"{run.key}.failed"


def mark(study: Study, end: str) -> str:
    """The line of a README before or after a study's table."""
    return f"<!-- {study.name}:{end} -->"


def insert(readme: Path, study: Study, text: str) -> None:
    """Put ``text`` between the study's marks."""
    head, rest = parts_of(readme, study)
    write_whole(readme, f"{head}{mark(study, 'start')}\n{text}\n{mark(study, 'end')}{rest}".encode())


def parts_of(readme: Path, study: Study) -> tuple[str, str]:
    """What stands before and after the study's marks; raises ValueError where they are not there."""
    start, end = mark(study, "start"), mark(study, "end")
    head, _, inside = readme.read_text().partition(start)
    _, closed, rest = inside.partition(end)
    if not closed:
        raise ValueError(f"{readme} has no '{start}' and after it '{end}'; add the two lines where the table belongs")
    return head, rest
