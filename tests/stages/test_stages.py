"""Each stage by itself on the tiny checkpoint: what its first numbers must be, and what it must leave alone."""

import contextlib
import json
import math
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook

from rlhf_pipeline import recipe as recipes
from rlhf_pipeline import stages
from rlhf_pipeline.data import encode, prepare
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.models import adapters
from rlhf_pipeline.models.base import load_base
from rlhf_pipeline.models.roles import SharedBase
from rlhf_pipeline.models.tokenizer import load_tokenizer
from rlhf_pipeline.ppo.forward import reply_scores
from rlhf_pipeline.ppo.rollout import Episodes
from rlhf_pipeline.recipe import TINY
from rlhf_pipeline.stages.check import check
from rlhf_pipeline.stages.evaluate import ask, judge_policy, summary
from rlhf_pipeline.stages.job import Job
from rlhf_pipeline.stages.ppo import check_weights
from rlhf_pipeline.stages.resumable import with_room_for_replies
from rlhf_pipeline.user_code import FunctionError

pytestmark = pytest.mark.slow

RECIPE = """
name: short
seed: 7
model: {path: tiny, quantization: none, dtype: float32}
lora: {r: 4, lora_alpha: 8, target_modules: all-linear}
stages:
  sft:
    data: demonstrations.jsonl
    trainer: {max_steps: 2, learning_rate: 1e-2, per_device_train_batch_size: 8, gradient_checkpointing: false,
              logging_steps: 1}
  reward:
    data: {path: preferences.jsonl, eval_fraction: 0.5}
    trainer: {max_steps: 6, learning_rate: 1e-2, per_device_train_batch_size: 8, gradient_checkpointing: false,
              per_device_eval_batch_size: 4}
  ppo:
    data: prompts.jsonl
    trainer: {learning_rate: 1e-3, total_episodes: 16, per_device_train_batch_size: 2, num_ppo_epochs: 1,
              gradient_accumulation_steps: 2, response_length: 6, gradient_checkpointing: false}
  dpo:
    data: preferences.jsonl
    trainer: {max_steps: 1, per_device_train_batch_size: 4, gradient_checkpointing: false, logging_steps: 1}
"""


def train(folder: Path, stage: str, *overrides: str) -> tuple[Job, dict]:
    """Run one stage of the recipe in this process and publish its adapter; the job and its metrics."""
    recipe = recipes.load(str(folder / "recipe.yaml"), overrides)
    job = Job(recipe, stage, recipe.run)
    job.work.mkdir(parents=True)
    metrics = stages.BY_KIND[job.stage.kind].run(job)
    job.artifact.rename(job.folder / "adapter")
    return job, metrics


def logged(job: Job) -> list[dict]:
    return [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A folder with a little of the tiny world, an SFT and a reward adapter trained on it; the reward's metrics."""
    folder = tmp_path_factory.mktemp("stages")
    (folder / "recipe.yaml").write_text(RECIPE)
    for name, count in (("demonstrations", 8), ("preferences", 32), ("prompts", 8)):
        lines = (TINY / "data" / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:count]))
    train(folder, "sft")
    return folder, train(folder, "reward")[1]


@pytest.fixture
def folder(prepared: tuple[Path, dict], tmp_path: Path) -> Path:
    """A copy of the prepared folder, to resume from."""
    return Path(shutil.copytree(prepared[0], tmp_path / "copy"))


def test_the_first_sft_loss_is_that_of_the_replies_alone(prepared: tuple[Path, dict]) -> None:
    recipe = recipes.load(str(prepared[0] / "recipe.yaml"))
    tokenizer = load_tokenizer(recipe.model.path)
    base = load_base(recipe.model, tokenizer)
    losses = []
    spec = recipe.stages["sft"].data
    for line in Path(spec.path).read_text().splitlines():
        row = json.loads(line)
        ((prompt, reply),) = encode.encode_records(tokenizer, spec, [(row["prompt"], row["completion"])])
        ids = torch.tensor([prompt + reply])
        logits = base(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(reply), reduction="none"))
    first = logged(Job(recipe, "sft", recipe.run))[0]["loss"]
    assert first == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)


def test_ppo_reads_the_scores_that_the_reward_model_was_evaluated_with(prepared: tuple[Path, dict]) -> None:
    """What PPO reads on the shared base, over the pairs the reward stage held out, gives that stage's numbers."""
    folder, metrics = prepared
    recipe = recipes.load(str(folder / "recipe.yaml"))
    tokenizer = load_tokenizer(recipe.model.path)
    held_out = prepare.preferences(recipe.stages["reward"].data, tokenizer, recipe.seed).held_out
    assert held_out is not None and len(held_out) > 4
    job = Job(recipe, "ppo", recipe.run)
    reward_lora = recipe.stages["reward"].lora
    shared = SharedBase(
        load_base(recipe.model, tokenizer), job.stage.lora, job.init, [(job.reward_models[0][0], reward_lora)]
    )

    def score(prompt: list[int], reply: list[int]) -> float:
        lengths = torch.tensor([[len(prompt)], [len(reply)]])
        none = torch.zeros(1, len(reply))
        return reply_scores(shared.reward, Episodes(torch.tensor([prompt + reply]), *lengths, none > 0, none)).item()

    with torch.no_grad():
        margins = [
            score(row["prompt_ids"], row["chosen_ids"]) - score(row["prompt_ids"], row["rejected_ids"])
            for row in held_out
        ]
    # TRL averages over batches, the last of which may be smaller: the mean of means.
    batches = [margins[i : i + 4] for i in range(0, len(margins), 4)]
    means = [sum(batch) / len(batch) for batch in batches]
    assert metrics["eval_margin"] == pytest.approx(sum(means) / len(means), abs=1e-4)
    shares = [sum(margin > 0 for margin in batch) / len(batch) for batch in batches]
    assert metrics["eval_accuracy"] == pytest.approx(sum(shares) / len(shares), abs=1e-6)


def test_what_the_reward_model_says_of_held_out_pairs_is_written_down(prepared: tuple[Path, dict]) -> None:
    folder, metrics = prepared
    recipe = recipes.load(str(folder / "recipe.yaml"))
    held_out = prepare.preferences(
        recipe.stages["reward"].data, load_tokenizer(recipe.model.path), recipe.seed
    ).held_out
    assert held_out is not None
    lines = (recipe.run / "reward" / "pairs.jsonl").read_text().splitlines()
    pairs = [json.loads(line) for line in lines]
    for name in ("chosen", "rejected"):
        assert [pair[f"{name}_length"] for pair in pairs] == [len(ids) for ids in held_out[f"{name}_ids"]]
    margins = [pair["chosen"] - pair["rejected"] for pair in pairs]
    means = [sum(margins[i : i + 4]) / len(margins[i : i + 4]) for i in range(0, len(margins), 4)]
    assert metrics["eval_margin"] == pytest.approx(sum(means) / len(means), abs=1e-4)


def test_the_judge_looks_on_without_a_trace_in_training(folder: Path, tmp_path: Path) -> None:
    """It is asked before the first of four updates, after the second, when it fails, and after the last."""
    judge = """
asked = 0

def judge(prompts, completions, **_):
    global asked
    asked += 1
    if asked == 3:  # the first is that of the policy which nothing measured
        raise OSError("no line to the judge")
    return [asked] * len(prompts)
"""
    evaluate = ["evaluate.data=prompts.jsonl", "evaluate.judge=counting:judge", "evaluate.n=4"]
    runs = []
    for name, along in (("not", 0), ("asked", 2)):
        copy = Path(shutil.copytree(folder, tmp_path / name))
        (copy / "counting.py").write_text(judge)
        more = [*evaluate, f"evaluate.along={along}", "evaluate.max_new_tokens=6"]
        job, metrics = train(copy, "ppo", *more, "ppo.trainer.logging_steps=1", "ppo.trainer.learning_rate=5e-3")
        assert not [key for key in metrics if key.startswith("gold/")]
        runs.append((load_file(job.folder / "adapter" / adapters.WEIGHTS), logged(job)))
    (quiet, rows), (watched, more_rows) = runs
    assert all(torch.equal(quiet[name], watched[name]) for name in quiet)
    gold = [row for row in more_rows if "gold/kl" in row]
    assert [row["step"] for row in gold] == [0, 2, 4]
    assert gold[0]["gold/kl"] == pytest.approx(0, abs=1e-5) and abs(gold[-1]["gold/kl"]) > 1e-4
    assert gold[-1]["gold/score_mean"] != gold[0]["gold/score_mean"]
    assert [row.get("gold/judge_mean") for row in gold] == [2, None, 4]
    others = [row for row in more_rows if "gold/kl" not in row]
    assert [row["objective/kl"] for row in others] == [row["objective/kl"] for row in rows]


@pytest.mark.parametrize("init", ["sft", "base"])
def test_ppo_starts_at_its_reference_whatever_that_is(folder: Path, init: str) -> None:
    job, _ = train(folder, "ppo", f"ppo.init={init}", "ppo.trainer.total_episodes=8")
    assert abs(logged(job)[0]["objective/kl"]) < 1e-4
    assert logged(job)[0]["objective/scores"] != 0


def test_ppo_takes_one_step_an_epoch_on_the_last_batch_of_a_pass_too(folder: Path) -> None:
    """Eight prompts, four an update: every second update ends a pass, where TRL would step once per micro-batch."""
    steps = []
    handle = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    try:
        job, _ = train(folder, "ppo")
    finally:
        handle.remove()
    assert len(logged(job)) == 4
    assert len(steps) == 4


def test_ppo_with_gradient_checkpointing_gives_the_same_numbers(folder: Path) -> None:
    first, _ = train(folder, "ppo", "name=short")
    shutil.move(first.folder, folder / "without")
    second, _ = train(folder, "ppo", "ppo.trainer.gradient_checkpointing=true")
    without = [json.loads(line) for line in (folder / "without" / "metrics.jsonl").read_text().splitlines()]
    for one, other in zip(without, logged(second), strict=True):
        for name in ("objective/kl", "objective/scores", "loss/policy_avg", "loss/value_avg"):
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5)


def test_ppo_takes_everything_that_a_recipe_may_give_it(folder: Path) -> None:
    """Demonstrations, held-out prompts, checkpoints and a value head, each with its key, leave their traces."""
    job, metrics = train(
        folder, "ppo", "ppo.ptx_data=demonstrations.jsonl", "ppo.trainer.ptx_coef=0.1", "ppo.data.eval_fraction=0.25",
        "ppo.trainer.eval_steps=1", "ppo.trainer.eval_on_start=true", "ppo.trainer.save_steps=1",
        "ppo.trainer.total_episodes=8", "ppo.value_model=head",
    )  # fmt: skip
    assert [row["step"] for row in logged(job) if "eval_objective/scores" in row] == [0, 1, 2]
    assert metrics["eval_objective/scores"] == logged(job)[-1]["eval_objective/scores"]
    assert [row["loss/ptx"] > 0 for row in logged(job) if "loss/policy_avg" in row] == [True, True]
    assert {path.name for path in job.work.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    assert load_file(job.work / "checkpoint-2" / "value.safetensors").keys() == {"score.weight"}
    samples = [json.loads(line) for line in (job.folder / "samples.jsonl").read_text().splitlines()]
    assert {sample["split"] for sample in samples} == {"train", "eval"}


def test_the_seed_of_the_recipe_is_that_of_ppo(folder: Path) -> None:
    losses = []
    for seed in (7, 7, 8):
        job, _ = train(folder, "ppo", f"seed={seed}", "ppo.trainer.total_episodes=4")
        losses.append([logged(job)[0][name] for name in ("objective/scores", "loss/policy_avg", "loss/value_avg")])
        shutil.rmtree(job.folder)
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    "override", ["learning_rate=0.0", "vf_coef=0.0", "value_learning_rate=0.0", "value_warmup_updates=9"]
)
def test_ppo_that_is_told_to_leave_a_role_alone_does_not_fail_for_that(folder: Path, override: str) -> None:
    """It is refused before training, or it is done: not trained to the end and then found wrong."""
    with contextlib.suppress(InputError):
        train(folder, "ppo", f"ppo.trainer.{override}", "ppo.trainer.total_episodes=4")


def test_the_dtype_of_the_model_decides_the_precision_of_ppo(folder: Path) -> None:
    for dtype, bf16 in (("float32", False), ("bfloat16", True)):
        recipe = recipes.load(str(folder / "recipe.yaml"), [f"model.dtype={dtype}"])
        assert stages.BY_KIND["ppo"].prepare(Job(recipe, "ppo", recipe.run))[0].bf16 is bf16


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "dpo"])
def test_steps_of_evaluation_switch_it_on(folder: Path, stage: str) -> None:
    """Transformers asks for `eval_strategy: steps` as well."""
    overrides = [f"{stage}.trainer.eval_steps=3", f"{stage}.data.eval_fraction=0.5"]
    recipe = recipes.load(str(folder / "recipe.yaml"), overrides)
    args = stages.BY_KIND[stage].prepare(Job(recipe, stage, recipe.run))[0]
    assert (args.eval_strategy, args.eval_steps) == ("steps", 3)


def test_ppo_accepts_each_key_beside_the_one_that_it_needs(folder: Path) -> None:
    given = {
        "target_kl": 1.0, "kl_horizon": 5, "eval_steps": 2, "eval_delay": 1, "eval_on_start": True,
        "per_device_eval_batch_size": 2,
    }  # fmt: skip
    overrides = [f"ppo.trainer.{key}={json.dumps(value)}" for key, value in given.items()]
    recipe = recipes.load(str(folder / "recipe.yaml"), [*overrides, "ppo.data.eval_fraction=0.5"])
    args = stages.BY_KIND["ppo"].prepare(Job(recipe, "ppo", recipe.run))[0]
    assert {key: getattr(args, key) for key in given} == given


@pytest.mark.parametrize("role", ["base", "reference", "reward", "policy", "value"])
def test_weights_that_should_not_have_moved_or_stayed_are_reported(role: str) -> None:
    before = dict.fromkeys(("base", "reference", "reward", "policy", "value"), 1)
    right = before | {"policy": 2, "value": 2}
    check_weights(before, right, {"policy", "value"})
    with pytest.raises(RuntimeError, match=f"`{role}`"):
        check_weights(before, right | {role: 3 - right[role]}, {"policy", "value"})


def test_the_first_dpo_loss_is_ln_2_with_an_adapter_on_the_embedding(folder: Path) -> None:
    """PEFT names those weights another way, and TRL's copy of the policy misses them."""
    lora = "lora.target_modules=[embed_tokens,q_proj]"
    shutil.rmtree(folder / "runs" / "short" / "sft")
    train(folder, "sft", lora)
    job, _ = train(folder, "dpo", lora)
    assert logged(job)[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_first_dpo_loss_is_ln_2_from_an_sft_adapter(folder: Path, quantization: str) -> None:
    job, _ = train(folder, "dpo", f"model.quantization={quantization}")
    assert logged(job)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert logged(job)[0]["rewards/margins"] == 0


def test_sft_with_packing_is_checked_by_the_trainers_own_batches(folder: Path) -> None:
    """TRL tells the model where packed rows begin only where those for training are packed or padding-free, too."""
    settings = ("data.eval_fraction=0.5", "trainer.max_length=64", "trainer.eval_packing=true", "trainer.max_steps=1")
    overrides = [f"stages.sft.{one}" for one in settings]
    shutil.rmtree(folder / "runs" / "short" / "sft")
    with pytest.raises(InputError, match="held-out rows would see each other") as error:
        train(folder, "sft", *overrides)
    assert error.value.place == "stages.sft.trainer.eval_packing"
    shutil.rmtree(folder / "runs" / "short" / "sft")
    train(folder, "sft", *overrides, "stages.sft.trainer.packing=true")


def test_precomputed_log_probs_are_those_of_this_reference_and_these_settings(folder: Path) -> None:
    """TRL computes them before its copy of the policy is whole, and its cache knows neither cuts nor `ld_alpha`."""
    lora = "lora.target_modules=[embed_tokens,q_proj]"
    shutil.rmtree(folder / "runs" / "short" / "sft")
    train(folder, "sft", lora)
    losses: dict[tuple[str, bool], tuple[float, float]] = {}
    for setting in ("max_length=40", "max_length=22", "ld_alpha=0.3"):
        for precomputed in (True, False):
            settings = (setting, "max_steps=2", "learning_rate=1e-2", *["precompute_ref_log_probs=true"] * precomputed)
            overrides = [lora, "stages.dpo.data.eval_fraction=0.5", *(f"stages.dpo.trainer.{one}" for one in settings)]
            job, metrics = train(folder, "dpo", *overrides)
            assert logged(job)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
            assert (job.work / "reference.safetensors").is_file() == precomputed
            losses[setting, precomputed] = logged(job)[1]["loss"], metrics["eval_loss"]
            shutil.rmtree(job.folder)
        assert losses[setting, True] == pytest.approx(losses[setting, False], rel=1e-5)
    assert len({losses[setting, False] for setting, _ in losses}) == 3  # what TRL's cache would have mixed up


EVALUATE = "evaluate={data: asked.jsonl, judge: 'my_judge:judge', n: 3, max_new_tokens: 4, batch_size: 2}"


@pytest.fixture
def judged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, float]]:
    """Judge the SFT policy with a function of the user's, given as source."""

    def with_judge(source: str) -> dict[str, float]:
        turns = [{"role": "user", "content": "What color is a lemon?"}]
        asked = [{"prompt": "Q: What?\nA:", "weight": 2.0}] * 2 + [{"prompt": "Q: Who?\nA:", "weight": 5.0}] * 2
        if "chat" in source:
            asked = [{"prompt": turns, "weight": 1.0}]
        (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
        (folder / "my_judge.py").write_text(source)
        monkeypatch.delitem(__import__("sys").modules, "my_judge", raising=False)
        recipe = recipes.load(str(folder / "recipe.yaml"), [EVALUATE])
        tokenizer = load_tokenizer(recipe.model.path)
        return judge_policy(Job(recipe, "sft", recipe.run), load_base(recipe.model, tokenizer), tokenizer)

    monkeypatch.syspath_prepend(str(folder))
    return with_judge


def test_a_stop_token_that_the_model_does_not_have_is_refused(folder: Path) -> None:
    for token in ("[5, 999999]", "-1"):
        recipe = recipes.load(str(folder / "recipe.yaml"), [f"ppo.trainer.stop_token_id={token}"])
        with pytest.raises(InputError, match="is no token of this model") as error:
            stages.BY_KIND["ppo"].prepare(Job(recipe, "ppo", recipe.run))
        assert error.value.place == "stages.ppo.trainer.stop_token_id"


def test_the_judge_gets_prompts_replies_and_columns_and_its_mean_is_the_metric(
    judged: Callable[[str], dict[str, float]], folder: Path
) -> None:
    metrics = judged(
        "def judge(prompts, completions, weight, **_):\n"
        "    assert prompts == ['Q: What?\\nA:', 'Q: What?\\nA:', 'Q: Who?\\nA:']\n"
        "    assert all(isinstance(reply, str) for reply in completions)\n"
        "    return weight\n"
    )
    gap = pytest.approx(0, abs=1e-5)
    assert metrics == {
        "judge_mean": 3.0, "judge_replies": 3, "judge_mean_se": pytest.approx(1.0), "generation_gap": gap
    }  # fmt: skip
    samples = [json.loads(line) for line in (folder / "runs/short/sft/samples.jsonl").read_text().splitlines()]
    assert [sample["judge"] for sample in samples] == [2.0, 2.0, 5.0]


def test_a_judge_of_chats_gets_texts_and_the_turns_under_messages(judged: Callable[[str], dict[str, float]]) -> None:
    """Of TRL's turns, `len(completion) < 200` would be true of a reply of any length."""
    metrics = judged(
        "def judge(prompts, completions, messages):  # a chat\n"
        "    assert prompts == ['What color is a lemon?']\n"
        "    assert isinstance(completions[0], str)\n"
        "    turns = [{'role': 'user', 'content': prompts[0]}, {'role': 'assistant', 'content': completions[0]}]\n"
        "    assert messages == [turns]\n"
        "    return [5.0]\n"
    )
    assert metrics["judge_mean"] == 5


ROWS: list[tuple[Any, dict[str, Any]]] = [("a", {"weight": 1}), ("b", {"weight": 2, "messages": "of the data"})]


@pytest.mark.parametrize(
    ("judge", "scores"),
    [
        (lambda completions: [len(reply) for reply in completions], [1.0, 2.0]),
        (lambda weight, **_: weight, [1.0, 2.0]),
        (lambda *_, prompts, missing=3: [missing, None], [3.0, None]),
        (lambda messages, **others: [len(others), messages[1][0]["content"] == "b"], [3.0, 1.0]),
        (lambda **given: numpy.float32([0.5, True]), [0.5, 1.0]),
    ],
)
def test_a_judge_takes_what_it_names(judge: Callable, scores: list[float | None]) -> None:
    assert ask(judge, ROWS, ["x", "yy"]) == scores


def ends(**_: Any) -> list[float]:
    sys.exit(3)


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        (lambda prompts, answer: [], "the judge wants `answer`, and the data have no such column"),
        (lambda **_: [1.0], "the judge returned 1 number for 2 replies"),
        (lambda **_: None, "the judge returned None, not a list of numbers"),
        (lambda **_: "01", "the judge returned '01', not a list of numbers"),
        (lambda **_: {"a": 1, "b": 0}, "the judge returned .*, not a list of numbers"),
        (lambda **_: (sys.exit() for _ in "ab"), r"the judge called sys.exit\(\)"),
        (lambda **_: [1.0, math.nan], "the judge returned nan for reply 2, to the prompt 'b': it is no finite number"),
        (lambda **_: [math.inf, 1.0], "the judge returned inf for reply 1, to the prompt 'a': it is no finite number"),
        (lambda **_: [1.0, "good"], "the judge returned 'good' for reply 2, to the prompt 'b': it is no finite number"),
        (ends, r"the judge called sys.exit\(3\)"),
    ],
)
def test_what_a_judge_must_not_do_is_said(judge: Callable, said: str) -> None:
    with pytest.raises(FunctionError, match=f"^{said}$"):
        ask(judge, ROWS, ["x", "yy"])


def test_the_mean_of_a_judge_and_its_standard_error() -> None:
    """Two replies to each of four prompts; those of one prompt are no independent evidence."""
    scores = [1.0, 0.0, 1.0, None, 1.0, 1.0, 0.0, None]
    means = [1.0, 0.5, 0.5]
    expected = {"judge_mean": 2 / 3, "judge_replies": 6, "judge_mean_se": statistics.stdev(means) / math.sqrt(3)}
    assert summary(scores, 2) == pytest.approx(expected)
    assert summary([0.5], 1) == {"judge_mean": 0.5, "judge_replies": 1}
    # Sixteen of sixteen do not show that all would be; and of a constant that is no share nobody knows its error.
    assert summary([1.0] * 16, 1)["judge_mean_se"] == pytest.approx(math.sqrt(0.9 * 0.1 / 20))
    assert summary([0.0] * 16, 1)["judge_mean_se"] == pytest.approx(math.sqrt(0.1 * 0.9 / 20))
    assert summary([7.0] * 16, 1) == {"judge_mean": 7.0, "judge_replies": 16}
    with pytest.raises(FunctionError, match="no opinion on any reply"):
        summary([None, None], 1)


def test_several_replies_to_each_prompt(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of them are those of `samples: 1`, and each is another draw."""
    monkeypatch.syspath_prepend(str(folder))
    (folder / "asked.jsonl").write_text("".join(json.dumps({"prompt": f"Q: {i}?\nA:"}) + "\n" for i in range(3)))
    (folder / "length_judge.py").write_text("def judge(completions):\n    return [len(one) for one in completions]\n")
    found = []
    for samples in (1, 3):
        settings = "evaluate={data: asked.jsonl, judge: 'length_judge:judge', max_new_tokens: 6, batch_size: 3}"
        recipe = recipes.load(str(folder / "recipe.yaml"), [settings, f"evaluate.samples={samples}"])
        tokenizer = load_tokenizer(recipe.model.path)
        metrics = judge_policy(Job(recipe, "sft", recipe.run), load_base(recipe.model, tokenizer), tokenizer)
        rows = [json.loads(line) for line in (folder / "runs/short/sft/samples.jsonl").read_text().splitlines()]
        assert metrics["judge_replies"] == len(rows) == 3 * samples
        found.append(rows)
    once, thrice = found
    assert thrice[:3] == once
    assert [row["prompt"] for row in thrice] == [row["prompt"] for row in once] * 3
    assert len({tuple(row["completion"] for row in thrice[i : i + 3]) for i in (0, 3, 6)}) == 3


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def judge(prompts, completions, answer):\n    return [1.0, 1.0]\n", "the judge wants `answer`"),
        ("def judge(completions):\n    return completions[0]['content']\n", "it raised TypeError: string indices"),
        ("def judge(completions):\n    raise SystemExit(1)\n", r"called sys.exit\(1\)"),
    ],
)
def test_the_check_calls_the_judge_on_two_rows(
    source: str, said: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "asked.jsonl").write_text('{"prompt": "Q: What?\\nA:", "completion": " so"}\n' * 5)
    (folder / "tried_judge.py").write_text(source)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "tried_judge", raising=False)
    recipe = recipes.load(
        str(folder / "recipe.yaml"), ["evaluate={data: asked.jsonl, judge: 'tried_judge:judge', n: 5}"]
    )
    with pytest.raises(InputError, match=said) as error:
        check(recipe, ["sft"])
    assert error.value.place == "evaluate.judge" and "`tried_judge:judge` fails on the first rows" in str(error.value)


@pytest.mark.parametrize(("limit", "left"), [(None, [1, 2, 3]), (3, [1, 2]), (4, [1, 2, 3]), (1, [])])
def test_rows_whose_prompt_fills_max_length_are_left_out(limit: int | None, left: list[int]) -> None:
    rows = Dataset.from_dict({"prompt_ids": [[5] * length for length in (1, 2, 3)]})
    assert [len(ids) for ids in with_room_for_replies(rows, limit)["prompt_ids"]] == left
