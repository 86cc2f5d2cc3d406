"""How many labels does it take, if the learner chooses the pairs? Exits with 1 where the goal is missed.

Somebody who thinks as the gold judge of the tiny world, and is wrong about one label in ten, chooses between replies of
the tiny SFT model. Two that are worth the same are a tie. Each label is learned from at once. The accuracy is that on
pairs of other prompts, which ask for other facts, with the judge's own word. Pairs are asked in random order, by the
learner's mutual information, or by that with one in five at random. The number of labels is where the mean of the last
five accuracies first reaches the goal.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from numpy.typing import NDArray

from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.arena.choosing import AT_MOST
from rlhf_pipeline.arena.learner import Learner
from rlhf_pipeline.models.tiny import world
from rlhf_pipeline.run.launch import command
from rlhf_pipeline.rundir.items import Item, item

GOAL, RATIO = 0.85, 0.7
SLIPS = 0.1
MOST = 300  # labels
TRIED = 500  # pairs of which the most informative one is asked
RECIPE = """
name: arena
output_dir: {folder}
seed: 42
model: {{path: tiny, quantization: none, dtype: float32}}
lora: {{r: 16, lora_alpha: 32, target_modules: all-linear}}
stages:
  sft:
    data: {{path: tiny:demonstrations, chat: false}}
    trainer:
      learning_rate: 4e-3
      num_train_epochs: 1
      per_device_train_batch_size: 32
      gradient_checkpointing: false
  reward:
    data: {{path: tiny:preferences, chat: false, eval_fraction: 0.15}}
    trainer:
      learning_rate: 3e-3
      num_train_epochs: 1
      per_device_train_batch_size: 16
      gradient_checkpointing: false
  candidates:
    kind: sample
    init: sft
    data: {{path: {folder}/questions.jsonl, chat: false}}
    n: 6
    sampling: {{temperature: 1.0, max_new_tokens: 24, batch_size: 104}}
"""


class World(NamedTuple):
    """What there is to ask, and what it is asked for.

    Attributes:
        features: float32 `[replies, d]`.
        items: the number of each reply's prompt.
        gold: what each reply is worth.
        asked: pairs to ask, `[m, 2]`.
        held_out: pairs of other facts that differ in gold, `[t, 2]`.
    """

    features: NDArray[np.float32]
    items: NDArray[np.intp]
    gold: NDArray[np.float64]
    asked: NDArray[np.intp]
    held_out: NDArray[np.intp]


def candidates(folder: Path) -> tuple[recipes.Recipe, list[Item]]:
    """Train the tiny SFT model and have it answer every question six times, unless that is done."""
    file = folder / "arena.yaml"
    file.write_text(RECIPE.format(folder=folder))
    questions = [json.dumps({"prompt": question.prompt}) + "\n" for question in world.questions()]
    (folder / "questions.jsonl").write_text("".join(questions))
    subprocess.run(command("rlhf_pipeline", "run", str(file)), check=True, stdout=sys.stderr)
    recipe = recipes.of_run(folder / "arena")
    found = []
    for line in (folder / "arena" / "candidates" / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        replies = list(dict.fromkeys(row["replies"]))
        if len(replies) > 1:
            found.append(item(row["prompt"], replies))
    return recipe, found


def build(found: Sequence[Item], features: NDArray[np.float32], graded: bool, facts: int, seed: int) -> World:
    """Divide the prompts by the facts that they ask for: most are for asking, the others held out."""
    fact = {question.prompt: question.fact for question in world.questions()}
    names = sorted(set(fact.values()))
    held = {names[i] for i in np.random.default_rng(seed).permutation(len(names))[:facts]}
    prompts = [one.prompt for one in found for _ in one.replies]
    replies = [reply for one in found for reply in one.replies]
    gold = np.array(
        [
            float(world.is_right(fact[prompt], reply) + world.is_polite(reply))
            if graded
            else world.judge([prompt], [reply])[0]
            for prompt, reply in zip(prompts, replies, strict=True)
        ]
    )
    items = np.repeat(np.arange(len(found)), [len(one.replies) for one in found])
    starts = np.cumsum([0, *(len(one.replies) for one in found)])
    asked, held_out = [], []
    for number, one in enumerate(found):
        pairs = [
            (starts[number] + a, starts[number] + b) for a, b in itertools.combinations(range(len(one.replies)), 2)
        ]
        if fact[one.prompt] in held:
            held_out += [(a, b) for a, b in pairs if gold[a] != gold[b]]
        else:
            asked += pairs
    return World(features, items, gold, np.array(asked), np.array(held_out))


def accuracy(learner: Learner, made: World) -> float:
    """How often the better reply of a held-out pair has the higher reward."""
    rewards = learner.means()
    a, b = made.held_out.T
    return float(np.mean((rewards[a] > rewards[b]) == (made.gold[a] > made.gold[b])))


def curve(made: World, at_random: float, seed: int, most: int) -> tuple[list[float], list[float], float]:
    """The held-out accuracy after each label, the seconds that each took, and the share of ties."""
    rng = np.random.default_rng(seed)
    learner = Learner(made.features, items=made.items)
    left = list(range(len(made.asked)))
    first: list[int] = []
    second: list[int] = []
    outcome: list[float] = []
    honest: list[bool] = []
    found, took = [], []
    for _ in range(most):
        began = time.perf_counter()
        honest.append(bool(rng.random() < at_random))
        if honest[-1]:
            chosen = left[rng.integers(len(left))]
        else:
            tried = rng.choice(left, min(TRIED, len(left)), replace=False)
            chosen = int(tried[np.argmax(learner.informative(*made.asked[tried].T))])
        left.remove(chosen)
        a, b = map(int, made.asked[chosen])
        worth = 0.5 * (1 + np.sign(made.gold[a] - made.gold[b]))
        if rng.random() < SLIPS:
            worth = 1 - worth if worth != 0.5 else float(rng.integers(2))
        first.append(a)
        second.append(b)
        outcome.append(float(worth))
        learner.fit(first, second, outcome, honest)
        took.append(time.perf_counter() - began)
        found.append(accuracy(learner, made))
    return found, took, float(np.mean(np.array(outcome) == 0.5))


def needed(accuracies: Sequence[float], goal: float) -> int | None:
    """After how many labels the mean of the last five accuracies reaches the goal."""
    means = np.convolve(accuracies, np.ones(5) / 5, "valid")
    reached = np.flatnonzero(means >= goal)
    return int(reached[0]) + 5 if len(reached) else None


def time_a_click() -> None:
    """A click with 4,000 features and up to 1,000 labels, and as many pairs to choose from as the page scores."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((4000, 4000), dtype=np.float32)
    weights = rng.standard_normal(4000) / 20
    first = rng.integers(0, 4000, 1000)
    second = (first + rng.integers(1, 4000, 1000)) % 4000
    outcome = ((features[first] - features[second]) @ weights + rng.logistic(size=1000) > 0).astype(float)
    honest = rng.random(1000) < 0.2
    asked = rng.integers(0, 4000, AT_MOST)
    others = (asked + 1) % 4000
    for labels in (100, 255, 1000):
        learner = Learner(features)
        learner.fit(first[: labels - 6], second[: labels - 6], outcome[: labels - 6], honest[: labels - 6])
        learner.informative(asked, others)
        took = []
        for count in range(labels - 5, labels + 1):
            began = time.perf_counter()
            learner.fit(first[:count], second[:count], outcome[:count], honest[:count])
            learner.belief(first[count - 1 : count], second[count - 1 : count])
            learner.informative(asked, others)
            learner.accuracy()
            took.append(time.perf_counter() - began)
        print(
            f"a click at {labels:>5} labels: {1000 * statistics.median(took):.0f} ms, at most {1000 * max(took):.0f} ms"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="keeps the run, so that another call need not train")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--features", default="sft", help="whose: sft, reward or base")
    parser.add_argument("--graded", action="store_true", help="right and polite count one each, not only both together")
    parser.add_argument("--most", type=int, default=MOST, help="labels")
    parser.add_argument("--click", action="store_true", help="only time a click")
    chosen = parser.parse_args()
    if chosen.click:
        time_a_click()
        return 0
    from rlhf_pipeline.stages.features import features

    with tempfile.TemporaryDirectory() as temporary:
        folder = (chosen.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        recipe, found = candidates(folder)
        states = features(recipe, folder / "arena", chosen.features, found, batch_size=64).numpy()
    ways = {"random": 1.0, "informative": 0.0, "four in five": 0.2}
    wanted: dict[str, list[int | None]] = {name: [] for name in ways}
    curves: dict[str, list[list[float]]] = {name: [] for name in ways}
    for seed in range(chosen.seeds):
        made = build(found, states, chosen.graded, 40, seed)
        if not seed:
            print(f"{len(made.asked)} pairs to ask, {len(made.held_out)} held out, {states.shape[1]} features")
        for name, share in ways.items():
            accuracies, took, ties = curve(made, share, seed, chosen.most)
            curves[name].append(accuracies)
            wanted[name].append(needed(accuracies, GOAL))
            last, median = accuracies[-1], 1000 * statistics.median(took)
            print(
                f"seed {seed} {name:<12} {wanted[name][-1]} labels to {GOAL}, {last:.3f} after {chosen.most}, "
                f"{ties:.0%} ties, {median:.0f} ms a label",
                flush=True,
            )
    print("\nheld-out accuracy, mean over the seeds")
    marks = [mark for mark in (5, 10, 20, 30, 40, 60, 80, 100, 150, 200, 300, 400) if mark <= chosen.most]
    print(f"{'labels':<14}" + "".join(f"{mark:>7}" for mark in marks))
    for name, some in curves.items():
        print(f"{name:<14}" + "".join(f"{np.mean([one[mark - 1] for one in some]):>7.3f}" for mark in marks))
    usual = [count or chosen.most for count in wanted["random"]]
    ratios = {}
    for name in ("informative", "four in five"):
        ours = [count or chosen.most for count in wanted[name]]
        ratios[name] = statistics.mean(ours) / statistics.mean(usual)
        each = ", ".join(f"{a / b:.2f}" for a, b in zip(ours, usual, strict=True))
        print(f"{name}: {statistics.mean(ours):.0f} labels instead of {statistics.mean(usual):.0f}: "
              f"{ratios[name]:.2f} (of the seeds: {each}; aim {RATIO})")  # fmt: skip
    return int(ratios["informative"] > RATIO)


if __name__ == "__main__":
    sys.exit(main())
