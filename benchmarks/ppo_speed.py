"""How long one PPO update of the tiny recipe takes, beside TRL's own loop; exits with 1 where the bound is missed.

Both train the same four roles on one base, with the recipe's PPO settings, prompts and earlier stages, each in a
process of its own. They take turns, so that a change of the load meets both alike. An update's seconds are those from
one `on_step_end` to the next, so the first update is not counted. Each draws prompts and replies in its own way; the
tokens of the replies, up to the end of each, are counted for both. CPU seconds are printed beside the wall's, as they
suffer less from what else runs.

Our workers freeze the heap, which spares the garbage collector, and let glibc keep freed memory. So there are two
processes, the worker's and a plain script's, and both loops run in both. The bound is on wall time, both in a script.

TRL's side needs TRL 1.12, the last with a PPOTrainer: an environment that `make floor` made.
"""

import os

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import argparse
import cProfile
import gc
import io
import json
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, set_seed
from transformers.utils import logging

from rlhf_pipeline import recipe
from rlhf_pipeline.data import prepare
from rlhf_pipeline.models.base import load_base
from rlhf_pipeline.models.roles import SharedBase
from rlhf_pipeline.models.tokenizer import load_tokenizer
from rlhf_pipeline.ppo.config import PPOConfig
from rlhf_pipeline.ppo.trainer import PPOTrainer
from rlhf_pipeline.rewards import mixture
from rlhf_pipeline.run.launch import PREFERENCES
from rlhf_pipeline.stages.job import Job

LOOPS = ["ours", "TRL"]
PROCESSES = {"worker": PREFERENCES, "script": {}}
AT_MOST = 0.7  # of TRL's seconds
TOP = 20  # lines of a profile
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}


class Clock(TrainerCallback):
    """Notes when each update ended, by the wall's clock and by the CPU's."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append((time.perf_counter(), time.process_time()))


class Rollouts:
    """Notes each sampling's seconds and the tokens of its replies, up to the end of each."""

    def __init__(self, stop_token_id: int) -> None:
        self.stop_token_id = stop_token_id
        self.seconds: list[float] = []
        self.tokens: list[int] = []

    def of_ours(self, trainer: PPOTrainer) -> None:
        """Stand in for the trainer's `roll_out`."""
        roll_out = trainer.roll_out

        def timed(prompts: list[list[int]]) -> Any:
            begun = time.perf_counter()
            episodes = roll_out(prompts)
            self.seconds.append(time.perf_counter() - begun)
            self.tokens.append(int(episodes.reply_lengths.sum()))
            return episodes

        trainer.roll_out = timed

    def of_theirs(self, policy: Any) -> None:
        """Stand in for the policy's `generate`."""
        generate = policy.generate

        def timed(**inputs: Any) -> Any:
            begun = time.perf_counter()
            output = generate(**inputs)
            self.seconds.append(time.perf_counter() - begun)
            rows = output if isinstance(output, torch.Tensor) else output.sequences
            stops = (rows[:, inputs["input_ids"].shape[1] :] == self.stop_token_id).int()
            self.tokens.append(int((stops.cumsum(1) - stops == 0).sum()))  # the stop token is the last that counts
            return output

        policy.generate = timed


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run directory of `tiny` whose sft and reward to use; else made")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--updates", type=int, default=6, help="of each process, the first not counted")
    parser.add_argument("--profile", action="store_true", help="then show where our optimisation spends its time")
    parser.add_argument("--measure", choices=LOOPS, help=argparse.SUPPRESS)
    parser.add_argument("--process", choices=PROCESSES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options)))
        return
    if options.updates < 2:
        parser.error("--updates must be at least 2, since the first is not counted")
    with tempfile.TemporaryDirectory(prefix="ppo-speed-") as folder:
        run = options.run.resolve() if options.run else make_run(folder)
        command = [f"--run={run}", f"--out={folder}/out", f"--updates={options.updates}"]
        measured = compare(command, options.repeats)
        profile = in_a_process("ours", "worker", [*command, "--profile"])["profile"] if options.profile else None
    medians = {
        clock: {who: statistics.median(numbers[clock] for numbers in every) for who, every in measured.items()}
        for clock in ("seconds", "cpu_seconds")
    }
    ratios = {}
    for what, ours, theirs in (
        ("ours in a worker / TRL in a script", "ours, worker", "TRL, script"),
        ("both in a script", "ours, script", "TRL, script"),
        ("both in a worker", "ours, worker", "TRL, worker"),
    ):
        ratios[what], cpu = (of_clock[ours] / of_clock[theirs] for of_clock in medians.values())
        print(f"{what}: {ratios[what]:.3f}, of CPU time {cpu:.3f}")
    if profile:
        print(profile)
    print(json.dumps({"threads": torch.get_num_threads(), "ratios": ratios, "medians": medians}))
    bounded = ratios["both in a script"]
    print(f"both in a script: it must be at most {AT_MOST}", file=sys.stderr)
    sys.exit(int(bounded > AT_MOST))


def make_run(folder: str) -> Path:
    """Run the tiny recipe's stages up to the reward model."""
    print("training the tiny recipe's sft and reward", file=sys.stderr)
    command = [sys.executable, "-m", "rlhf_pipeline", "run", "tiny", "--until", "reward", f"output_dir={folder}/runs"]
    subprocess.run(command, env=os.environ | ENVIRONMENT, stdout=subprocess.DEVNULL, check=True)
    return Path(folder) / "runs" / "tiny"


def compare(command: list[str], repeats: int) -> dict[str, list[dict[str, Any]]]:
    """Both loops in both processes, in turn; all numbers."""
    measured: dict[str, list[dict[str, Any]]] = {}
    for repeat in range(1, repeats + 1):
        for process in PROCESSES:
            for loop in LOOPS:
                numbers = in_a_process(loop, process, command)
                measured.setdefault(f"{loop}, {process}", []).append(numbers)
                print(f"{repeat}  {loop:<4} in a {process}  {row(numbers)}", flush=True)
    return measured


def row(numbers: dict[str, Any]) -> str:
    parts = "  ".join(f"{name} {seconds:.3f}" for name, seconds in numbers["parts"].items())
    tokens, seconds = numbers["tokens"], numbers["seconds"]
    cpu = f"cpu {numbers['cpu_seconds']:6.3f} s"
    return f"{seconds:6.3f} s an update, {cpu}   {tokens:4.0f} reply tokens, {tokens / seconds:4.0f} a second   {parts}"


def in_a_process(loop: str, process: str, arguments: list[str]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", loop, "--process", process, *arguments]
    environment = os.environ | ENVIRONMENT | PROCESSES[process]
    child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if child.returncode != 0:
        sys.exit(f"{loop} ended with {child.returncode}:\n{child.stdout[-3000:]}")
    return json.loads(child.stdout.splitlines()[-1])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Means over all updates but the first: seconds, of the whole and of its parts, and tokens of replies."""
    loaded = recipe.load("tiny")
    stage = loaded.stages["ppo"]
    batch = stage.trainer["per_device_train_batch_size"]
    stage.trainer["total_episodes"] = options.updates * batch
    job = Job(loaded, "ppo", options.run)
    decided = {"output_dir": str(options.out), "num_sample_generations": 0}
    tokenizer = load_tokenizer(loaded.model.path)
    prompts = prepare.prompts(stage.data, tokenizer, loaded.seed).train
    set_seed(loaded.seed)
    shared = SharedBase(load_base(loaded.model, tokenizer), stage.lora, job.init, job.reward_models)
    clock, rollouts, profile = Clock(), Rollouts(tokenizer.eos_token_id), cProfile.Profile()
    if options.measure == "ours":
        rewards = mixture.load(loaded, "ppo", shared.rewards, tokenizer)
        args = job.trainer_config(PPOConfig, **decided)
        trainer = PPOTrainer(args, tokenizer, shared, rewards, prompts, callbacks=[clock])
        rollouts.of_ours(trainer)
        if options.profile:
            optimise = trainer.optimise
            trainer.optimise = lambda *arguments: profile.runcall(optimise, *arguments)
    else:
        from trl.experimental import ppo as trl_ppo

        rollouts.of_theirs(shared.policy)
        trainer = trl_ppo.PPOTrainer(
            args=job.trainer_config(trl_ppo.PPOConfig, **decided),
            processing_class=tokenizer,
            model=shared.policy,
            ref_model=shared.reference,
            reward_model=shared.reward,
            value_model=shared.value,
            train_dataset=prompts,
            callbacks=[clock],
        )
    if options.process == "worker":
        gc.collect()
        gc.freeze()
    trainer.train()
    counted = options.updates - 1
    first = len(rollouts.tokens) // options.updates  # samplings in the first update
    numbers: dict[str, Any] = {
        "seconds": (clock.ends[-1][0] - clock.ends[0][0]) / counted,
        "cpu_seconds": (clock.ends[-1][1] - clock.ends[0][1]) / counted,
        "tokens": sum(rollouts.tokens[first:]) / counted,
        "parts": {"sampling": sum(rollouts.seconds[first:]) / counted},
    }
    parts = numbers["parts"]
    if options.measure == "ours":
        logged = trainer.state.log_history[1:]
        scoring = (update["rollout/seconds"] - update["rollout/sampling_seconds"] for update in logged)
        parts["scoring"] = sum(scoring) / counted
        parts["optimisation"] = sum(update["optimise/seconds"] for update in logged) / counted
    parts["rest"] = numbers["seconds"] - sum(parts.values())
    if options.profile:
        text = io.StringIO()
        pstats.Stats(profile, stream=text).strip_dirs().sort_stats("tottime").print_stats(TOP)
        numbers["profile"] = text.getvalue().strip()
    return numbers


if __name__ == "__main__":
    main()
