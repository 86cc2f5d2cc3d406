"""What several processes save: a step of each kind that trains, by one process and by two with half the batch each.

Every process has one thread. The model is a Llama of 60 million parameters with random weights and adapters of rank 16,
in float32, and all texts are equally long. The first step does not count. `apart` is two processes with half the batch
each that do not know of each other: what the machine itself allows, which has one memory for both.

`CPU` are seconds of processor time, of the process that has most: on a machine where others work they are worth more
than `step`, which is wall time.

Bytes are those that the loopback device carried in a step, from one process to the other and back, per process. Each
measurement runs in a network namespace of its own, so that nothing else is counted; that takes root. Without, there are
no bytes.
"""

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

SHAPE = "60M"
LORA = "{r: 16, lora_alpha: 32, lora_dropout: 0.0, target_modules: all-linear}"
GROUPS = {"num_generations": 4, "max_completion_length": 48}


class Kind(NamedTuple):
    """A kind that trains.

    Attributes:
        trainer: its keys, beside those that all have.
        data: of the tiny world, of which nothing but the shape is read.
        rows: of a step, of all processes; of kinds that sample, replies.
        prompt, whole: tokens of a prompt, and of a prompt with its reply.
    """

    trainer: dict[str, Any]
    data: str
    rows: int = 8
    prompt: int = 64
    whole: int = 128


KINDS = {
    "sft": Kind({}, "demonstrations"),
    "reward": Kind({}, "preferences"),
    "dpo": Kind({}, "preferences"),
    "kto": Kind({}, "thumbs"),
    "grpo": Kind(GROUPS, "prompts", 32, 32, 80),
    "rloo": Kind(GROUPS, "prompts", 32, 32, 80),
    "ppo": Kind({"response_length": 48, "num_ppo_epochs": 1}, "prompts", 32, 32, 80),
}
RECIPE = """
name: scaling
seed: 0
model: {{path: base, quantization: none, dtype: float32}}
lora: {lora}
stages:
  reward: {{init: base, data: {tiny}/preferences.jsonl, trainer: {{}}}}
  {kind}: {{init: base, data: {data}, trainer: {trainer}}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--ways", nargs="+", choices=("one", "two", "apart"), default=("one", "two", "apart"))
    parser.add_argument("--steps", type=int, default=2, help="with the first, which does not count")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--process", help=argparse.SUPPRESS)  # in a process that trains: the folder
    options = parser.parse_args()
    if options.process:
        print(json.dumps(train(options.kinds[0], Path(options.process), options.steps)))
        return
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    with tempfile.TemporaryDirectory(prefix="scaling-") as name:
        folder = Path(name)
        make_base(folder / "base")
        for kind in options.kinds:
            for _ in range(options.repeats):
                for way in options.ways:
                    of_way = found.setdefault(kind, {}).setdefault(way, [])
                    of_way.append(measure(kind, way, folder, options.steps))
                    print(
                        f"{kind:<7}{way:<6}" + "  ".join(f"{key} {of_way[-1][key]:.4g}" for key in of_way[-1]),
                        flush=True,
                    )
    for kind, ways in found.items():
        for phase in ways.get("one", [{}])[0]:
            if phase in ("bytes", "trained"):
                continue
            best = {way: min(one[phase] for one in of_way) for way, of_way in ways.items()}
            ratios = "  ".join(f"one / {way} {best['one'] / best[way]:.2f}" for way in best if way != "one")
            print(f"{kind:<7}{phase:<11}{ratios}")
    print(json.dumps(found))


def measure(kind: str, way: str, folder: Path, steps: int) -> dict[str, float]:
    """The seconds of a step's phases, and what it sent; of processes apart the slowest one's."""
    from rlhf_pipeline.recipe import TINY

    processes, tiny = 1 if way == "one" else 2, TINY / "data"
    trainer = {"gradient_checkpointing": False, "per_device_train_batch_size": KINDS[kind].rows // processes}
    filled = {"lora": LORA, "kind": kind, "trainer": json.dumps(trainer | KINDS[kind].trainer), "tiny": tiny}
    stage = RECIPE.format(data=f"{tiny}/{KINDS[kind].data}.jsonl", **filled)
    if kind == "reward":
        stage = stage.replace(stage[stage.index("  reward:") : stage.rindex("  reward:")], "")
    (folder / "recipe.yaml").write_text(stage)
    program = [__file__, "--kinds", kind, "--steps", str(steps), "--process", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    if way == "two":
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29511"]
        command = [sys.executable, *launcher, *program]
    else:
        command = [sys.executable, *program]
    if os.geteuid() == 0:
        command = ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for _ in range(2 if way == "apart" else 1)
    ]
    answers = []
    for one in running:
        said, errors = one.communicate()
        if one.returncode:
            sys.exit(f"{kind}, {way}:\n{errors[-3000:]}")
        answers += [json.loads(line) for line in said.splitlines() if line.startswith('{"')]
    return {key: max(answer[key] for answer in answers) for key in answers[0]}


def make_base(folder: Path) -> None:
    import torch
    from rollout_speed import SHAPES
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from rlhf_pipeline.recipe import TINY

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPES[SHAPE])).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY / "checkpoint").save_pretrained(folder)


def train(kind: str, folder: Path, steps: int) -> dict[str, float]:
    """Take a few steps; the seconds of the later ones by phase, the median of each, and the bytes that were sent."""
    import statistics

    import torch
    from transformers import TrainerCallback, set_seed

    from rlhf_pipeline import ranks, stages
    from rlhf_pipeline import recipe as recipes
    from rlhf_pipeline.forecast import lengths, measured, stage
    from rlhf_pipeline.rewards import mixture
    from rlhf_pipeline.stages.job import Job

    torch.set_num_threads(1)
    set_seed(0)
    recipe = recipes.load(str(folder / "recipe.yaml"))
    job = Job(recipe, kind, recipe.run)
    with tempfile.TemporaryDirectory(prefix="scaling-out-") as out, contextlib.redirect_stdout(sys.stderr):
        args: Any = job.trainer_config(stages.BY_KIND[kind].CONFIG)
        stage.only_train(args, steps, Path(out))
        trainer = measured.trainer_of(
            job, args, lengths.of_stage(job.stage, KINDS[kind].prompt, KINDS[kind].whole), Path(out)
        )
        if job.stage.scored_by:
            roles = trainer.shared if kind == "ppo" else trainer.roles
            rewards = mixture.load(recipe, kind, roles.rewards, job.reader.tokenizer)
            if kind == "ppo":
                trainer.rewards = rewards
            else:
                trainer.score_with(rewards, job.stage.scored_by)
        seen: list[tuple[float, float, int, dict[str, float]]] = []

        class Noting(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                memory = getattr(trainer, "memory", None)
                seen.append(
                    (time.perf_counter(), time.process_time(), carried(), dict(memory.unreported[-1]) if memory else {})
                )

        trainer.add_callback(Noting())
        trainer.train()
    steps_of = [
        [later - earlier for earlier, later in zip(*two, strict=True)]
        for two in itertools.pairwise(one[:3] for one in seen)
    ]
    wall, processor, sent = (statistics.median(of) for of in zip(*steps_of, strict=True))
    found = {"step": wall, "CPU": processor}
    if kind == "ppo":
        of = [numbers for *_, numbers in seen[1:]]
        for phase, value in {
            "sampling": lambda one: one["rollout/sampling_seconds"],
            "scoring": lambda one: one["rollout/seconds"] - one["rollout/sampling_seconds"],
            "optimising": lambda one: one["optimise/seconds"],
        }.items():
            found[phase] = statistics.median(map(value, of))
    found["bytes"] = sent / ranks.count()
    found["trained"] = sum(one.numel() for one in trainer.model.parameters() if one.requires_grad)
    return found


def carried() -> int:
    """The bytes that the loopback device has carried."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split(":")[1].split()[8]) for line in lines if line.strip().startswith("lo:"))


if __name__ == "__main__":
    main()
