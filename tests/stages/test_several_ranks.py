"""Two ranks with half the batch each train as one process with the whole: same rows, same adapters, same numbers."""

import functools
import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from together import together
from transformers import TrainerCallback, TrainerState

from rlhf_pipeline import ranks, stages
from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.callbacks.checkpoints import REQUEST, Stopped
from rlhf_pipeline.models import adapters
from rlhf_pipeline.models.adapters import DivergedError
from rlhf_pipeline.models.base import load_base
from rlhf_pipeline.ppo.rollout import Episodes, concatenate
from rlhf_pipeline.recipe import TINY
from rlhf_pipeline.rundir import durable
from rlhf_pipeline.rundir.layout import WEIGHTS
from rlhf_pipeline.stages import groups, sft
from rlhf_pipeline.stages.batches import Spare
from rlhf_pipeline.stages.job import Job

# Of seven rows, three optimizer steps of 2 + 2 rows each take the last one alone: a rank has none then.
TRAINER = (
    "num_train_epochs: 2, gradient_accumulation_steps: 2, learning_rate: 5e-3, gradient_checkpointing: true, "
    "logging_steps: 1, eval_strategy: epoch, save_steps: 1, save_total_limit: 9, per_device_eval_batch_size: 1"
)
GROUPS = (
    "num_train_epochs: 2, gradient_accumulation_steps: 2, num_generations: 2, max_completion_length: 8, "
    "learning_rate: 5e-3, gradient_checkpointing: true, logging_steps: 1, eval_strategy: epoch, save_steps: 1, "
    "save_total_limit: 9, per_device_eval_batch_size: 2"
)
REWARD = """
def score(prompts, completions, **_):
    return [float(len(prompt) * len(completion) % 7) for prompt, completion in zip(prompts, completions)]
"""
RECIPE = f"""
name: short
seed: 7
model: {{path: tiny, quantization: none, dtype: float32}}
lora: {{r: 4, lora_alpha: 8, lora_dropout: 0.0, target_modules: [q_proj, v_proj, down_proj]}}
stages:
  start:
    kind: sft
    data: demonstrations.jsonl
    trainer: {{max_steps: 2, learning_rate: 1e-2, per_device_train_batch_size: 4, gradient_checkpointing: false}}
  sft:
    init: start
    data: {{path: demonstrations.jsonl, limit: 7, eval_data: held_out.jsonl}}
    trainer: {{{TRAINER}}}
  reward:
    init: start
    data: {{path: preferences.jsonl, limit: 7, eval_data: held_out_pairs.jsonl}}
    trainer: {{{TRAINER}, center_rewards_coefficient: 0.1}}
  dpo:
    init: start
    data: {{path: preferences.jsonl, limit: 7, eval_data: held_out_pairs.jsonl}}
    trainer: {{{TRAINER}, loss_type: [sigmoid, sft], loss_weights: [1.0, 0.5]}}
  kto:
    init: start
    data: {{path: thumbs.jsonl, eval_data: held_out_thumbs.jsonl}}
    trainer: {{{TRAINER}}}
  grpo:
    init: start
    data: {{path: demonstrations.jsonl, eval_data: held_out.jsonl}}
    rewards: [{{function: "short:score"}}]
    trainer: {{{GROUPS}, beta: 0.1, num_iterations: 2}}
  rloo:
    init: start
    data: {{path: demonstrations.jsonl, eval_data: held_out.jsonl}}
    rewards: [{{function: "short:score"}}]
    trainer: {{{GROUPS}, beta: 0.1}}
"""
FILES = {"demonstrations": "held_out", "preferences": "held_out_pairs", "thumbs": "held_out_thumbs"}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, data with rows of very unlike length, and the artifact that all stages start from."""
    folder = tmp_path_factory.mktemp("several")
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "short.py").write_text(REWARD)
    for name, held_out in FILES.items():
        rows = [json.loads(line) for line in (TINY / "data" / f"{name}.jsonl").read_text().splitlines()[:12]]
        for number, row in enumerate(rows):
            for side in ("completion", "chosen", "rejected"):
                if side in row and number % 3 == 0:
                    row[side] = row[side] * 6
        write(folder / f"{name}.jsonl", rows[:7])
        write(folder / f"{held_out}.jsonl", rows[7:10] if name == "preferences" else rows[7:])  # an odd number
    job = new_job(folder, "start")
    stages.BY_KIND["sft"].run(job)
    job.artifact.rename(job.published)
    shutil.rmtree(job.work)
    return folder


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def new_job(folder: Path, stage: str, *overrides: str) -> Job:
    recipe = recipes.load(str(folder / "recipe.yaml"), overrides)
    job = Job(recipe, stage, recipe.run)
    job.work.mkdir(parents=True, exist_ok=True)
    return job


def train(folder: Path, stage: str, *overrides: str) -> dict[str, Any]:
    """Run a stage on this rank."""
    torch.manual_seed(999)
    job = new_job(folder, stage, *overrides)
    return stages.BY_KIND[job.stage.kind].run(job)


def logged(folder: Path, stage: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "runs/short" / stage / "metrics.jsonl").read_text().splitlines()]
    times = ("time", "_runtime", "_per_second", "flos")
    return [{name: value for name, value in row.items() if not name.endswith(times)} for row in rows]


def adapter(folder: Path, stage: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "runs/short" / stage / "work/adapter" / WEIGHTS)


def assert_same(folder: Path, other: Path, stage: str, within: float = 1e-4, but: Sequence[str] = ()) -> None:
    one, two = adapter(folder, stage), adapter(other, stage)
    assert one.keys() == two.keys()
    start = load_file(folder / "runs/short/start/adapter" / WEIGHTS)
    assert max((one[name] - start[name]).abs().max() for name in start) > 1e-3
    for name in one:
        torch.testing.assert_close(
            two[name], one[name], rtol=0, atol=within, msg=lambda text, name=name: f"{name}: {text}"
        )
    rows, others = logged(folder, stage), logged(other, stage)
    assert len(rows) == len(others) >= 4
    for row, again in zip(rows, others, strict=True):
        for name in but:
            assert row.pop(name, 0.0) == pytest.approx(again.pop(name, 0.0), rel=0.1, abs=0.05)
        assert row == pytest.approx(again, rel=1e-4, abs=1e-5)


@pytest.fixture(scope="module")
def uninterrupted(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that trains a stage by two ranks, and returns the folder; once for each stage and its settings."""

    @functools.cache
    def trained(stage: str, *overrides: str) -> Path:
        folder = Path(shutil.copytree(prepared, tmp_path_factory.mktemp("uninterrupted") / "one"))
        together(train, folder, stage, *overrides)
        return folder

    return trained


@pytest.fixture
def copies(prepared: Path, tmp_path: Path) -> tuple[Path, Path]:
    return Path(shutil.copytree(prepared, tmp_path / "one")), Path(shutil.copytree(prepared, tmp_path / "two"))


@pytest.mark.parametrize(
    ("stage", "of_each", "more"),
    [
        ("sft", 1, ()),
        ("reward", 1, ()),
        ("reward", 1, ("reward.members=2",)),
        ("dpo", 1, ()),
        ("dpo", 1, ("dpo.trainer.precompute_ref_log_probs=true",)),
        ("kto", 2, ("kto.reference=base",)),
        ("kto", 2, ("kto.reference=base", "kto.data.limit=5")),
    ],
)
def test_two_ranks_end_as_one_process(copies, stage, of_each, more):
    one, two = copies
    size = f"{stage}.trainer.per_device_train_batch_size="
    alone = train(one, stage, f"{size}{2 * of_each}", f"{stage}.trainer.per_device_eval_batch_size=2", *more)
    first, second = together(train, two, stage, f"{size}{of_each}", *more)
    assert_same(one, two, stage)
    assert second == {}
    assert stage != "kto" or max(row.get("kl", 0.0) for row in logged(one, stage)) > 0.1
    assert first == pytest.approx(alone, rel=1e-4, abs=1e-5)


def test_rows_are_those_of_one_process_in_its_order_each_once(copies):
    """Also rows of like length together, an order that Transformers draws from each rank's own generator."""
    one, two = copies
    overrides = ("sft.trainer.train_sampling_strategy=group_by_length", "sft.trainer.eval_strategy=no")
    alone = read_rows(one, "sft.trainer.per_device_train_batch_size=2", *overrides)
    together_read = together(read_rows, two, "sft.trainer.per_device_train_batch_size=1", *overrides)
    assert sorted(row for batch in alone[:4] for row in batch) == list(range(7)) and alone[:4] != alone[4:]
    for whole, *shares in zip(alone, *together_read, strict=True):
        assert [row for share in shares for row in share] == whole
    assert any(not share for share in together_read[0])


def read_rows(folder: Path, *overrides: str) -> list[list[int]]:
    """The rows that this rank trains on, batch by batch, by their number in the data."""
    job, read = new_job(folder, "sft", *overrides), []
    _, tokenizer, data, _ = sft.prepare(job)
    pad = tokenizer.pad_token_id

    class Noted(sft.ResumableSFTTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            torch.rand(1 + ranks.index())  # as dropout draws, on each rank as much as its rows are long
            ids = [[i for i in row.tolist() if i != pad] for row in inputs["input_ids"]]
            read.append([] if isinstance(inputs, Spare) else [known.index(one) for one in ids])
            return super().training_step(model, inputs, *args, **kwargs)

    known = [[i for i in row if i != pad] for row in data.train["input_ids"]]
    torch.manual_seed(5)
    trainer_of(job, Noted).train()
    return read


def trainer_of(job: Job, kind: type[sft.ResumableSFTTrainer], *callbacks: TrainerCallback) -> Any:
    args, tokenizer, data, _ = sft.prepare(job)
    model = adapters.with_policy_adapter(load_base(job.recipe.model, tokenizer), job.stage.lora, None)
    return kind.over(model, args, tokenizer, data.train, data.held_out, callbacks)


def masks(folder: Path) -> list[list[float]]:
    """What dropout would draw on this rank, step by step."""
    drawn = []

    class Noted(sft.ResumableSFTTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            with torch.random.fork_rng():
                drawn.append(torch.nn.functional.dropout(torch.ones(32)).tolist())
            return super().training_step(*args, **kwargs)

    trainer_of(new_job(folder, "sft", "sft.trainer.per_device_train_batch_size=1"), Noted).train()
    return drawn


def test_each_rank_draws_dropout_for_itself_in_each_pass(copies):
    """Here nothing else is drawn, so that ranks that begin alike would stay so."""
    first, second = together(masks, copies[0])
    assert len(first) == len(second) == 8
    assert all(one != other for one, other in zip(first, second, strict=True))
    assert second[0] != second[4]


BY_PASS = (f"sft.trainer={{{TRAINER.replace('save_steps: 1', 'save_strategy: epoch')}}}",)


@pytest.mark.parametrize(
    ("stage", "step", "more"), [("sft", 1, ()), ("sft", 2, ()), ("sft", 2, BY_PASS), ("dpo", 1, ()), ("grpo", 1, ())]
)
def test_two_ranks_resume_with_the_random_numbers_and_the_replies_of_each(copies, uninterrupted, stage, step, more):
    """Bit for bit: amid a pass, where one ends, and of grpo amid a batch of replies."""
    _, two = copies
    size = f"{stage}.trainer.per_device_train_batch_size={2 if stage == 'grpo' else 1}"
    overrides = (*more, size, "lora.lora_dropout=0.2", *RESUMED[stage])
    one = uninterrupted(stage, *overrides)
    keep_checkpoint(one, two, stage, step)
    together(train, two, stage, *overrides)
    assert_same(one, two, stage, within=0)
    assert not torch.equal(*(torch.load(state, weights_only=False)["cpu"] for state in random_states(two, stage)))


def test_another_number_of_ranks_resumes_on_the_same_rows(copies):
    one, two = copies
    train(one, "sft", "sft.trainer.per_device_train_batch_size=2")
    keep_checkpoint(one, two, "sft", 1)
    together(train, two, "sft", "sft.trainer.per_device_train_batch_size=1")
    assert_same(one, two, "sft")
    keep_checkpoint(two, one, "sft", 3)
    train(one, "sft", "sft.trainer.per_device_train_batch_size=2")
    assert_same(two, one, "sft")


RESUMED = {
    "sft": ("sft.trainer.train_sampling_strategy=group_by_length", "sft.trainer.eval_strategy=no"),
    "dpo": ("dpo.trainer.disable_dropout=false", "dpo.trainer.eval_strategy=no"),
    "grpo": (),
}


def keep_checkpoint(source: Path, target: Path, stage: str, step: int) -> None:
    """Leave in the target what a run that broke off after a checkpoint leaves."""
    kept = source.parent / f"kept-{step}"
    shutil.copytree(source / "runs/short" / stage / f"work/checkpoint-{step}", kept)
    work = target / "runs/short" / stage / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    kept.rename(work / f"checkpoint-{step}")
    if source != target:
        shutil.copy(source / "runs/short" / stage / "metrics.jsonl", work.parent)


def random_states(folder: Path, stage: str) -> list[Path]:
    return sorted((folder / "runs/short" / stage / "work/checkpoint-4").glob("rng_state_*"))


def stopped(folder: Path) -> tuple[int | None, list[str]]:
    """Train until this process, which on rank 1 alone is asked to, has stopped; with the step, and what rank 0 left."""

    class Ask(TrainerCallback):
        def on_step_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
            if ranks.index() == 1 and state.global_step == 1:
                REQUEST._take(0, None)

    job = new_job(folder, "sft", "sft.trainer.per_device_train_batch_size=1", "sft.trainer.save_steps=100")
    try:
        trainer_of(job, sft.ResumableSFTTrainer, Ask(), job.checkpoints()).train()
    except Stopped as end:
        return end.step, [path.name for path in durable.newest_first(job.work)]
    raise AssertionError("it went on")


def test_all_ranks_stop_where_one_is_asked_to(copies):
    one, _ = copies
    assert together(stopped, one) == [(2, ["checkpoint-2"])] * 2


def diverged(folder: Path) -> str:
    job = new_job(folder, "sft", "sft.trainer.per_device_train_batch_size=1")

    class Diverging(sft.ResumableSFTTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            bad = ranks.index() == 1 and self.state.global_step == 1
            return super().compute_loss(*args, **kwargs) * (float("nan") if bad else 1.0)

    try:
        trainer_of(job, Diverging).train()
    except DivergedError as error:
        return str(error)
    raise AssertionError("it went on")


def test_a_loss_that_is_not_finite_on_one_rank_ends_training_on_all(copies):
    one, _ = copies
    assert together(diverged, one) == ["the loss became nan at step 2 on rank 1"] * 2


# TRL shuffles a rank's replies before it divides them into the parts of a step, whose means over tokens these are.
OF_TOKENS = (
    "entropy",
    "kl",
    "rollout/log_prob_gap_mean",
    *(f"clip_ratio/{of}_mean" for of in ("low", "high", "region")),
)


def given(trainer: Any, prompts: list[list[int]], *_: Any) -> Episodes:
    """In a policy's place: the replies to a prompt follow from it and their place in their group of two."""
    first, episodes = ranks.index() * len(prompts), []
    for number, prompt in enumerate(prompts):
        drawn = random.Random(repr((list(prompt), (first + number) % 2)))
        reply = [drawn.randrange(20, 200) for _ in range(drawn.randrange(1, 8))]
        lengths = torch.tensor([len(prompt)]), torch.tensor([len(reply)])
        ids = torch.tensor([[*prompt, *reply]])
        episodes.append(Episodes(ids, *lengths, torch.tensor([True]), torch.full((1, len(reply)), -1.0)))
    return concatenate(episodes, 0)


@pytest.mark.parametrize(
    ("stage", "of_each", "more"),
    [
        ("grpo", 2, ()),
        ("grpo", 2, ("grpo.trainer.loss_type=bnpo", "grpo.trainer.gradient_accumulation_steps=1")),
        ("rloo", 2, ()),
    ],
)
def test_two_ranks_that_sample_the_same_replies_end_as_one_process(copies, monkeypatch, stage, of_each, more):
    monkeypatch.setattr(groups.GroupTrainer, "roll_out", given)  # the ranks are forked from here
    one, two = copies
    size = f"{stage}.trainer.per_device_train_batch_size="
    alone = train(one, stage, f"{size}{2 * of_each}", *more)
    first, second = together(train, two, stage, f"{size}{of_each}", *more)
    assert_same(one, two, stage, but=() if "grpo.trainer.gradient_accumulation_steps=1" in more else OF_TOKENS)
    assert second == {}
    assert first.keys() == alone.keys()


def test_a_batch_of_replies_that_is_given_is_of_all_ranks(copies):
    """Seven prompts are enough for fourteen replies in groups of two, by however many ranks."""
    of_all = ("grpo.trainer.generation_batch_size=14", "grpo.trainer.per_device_train_batch_size=1")
    job = new_job(copies[0], "grpo", *of_all, "grpo.launch={num_processes: 7, use_cpu: true}")
    assert len(stages.BY_KIND["grpo"].prepare(job).data.train) == 7
