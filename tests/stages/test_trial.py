"""What the libraries would refuse only when a stage trains is refused before the first one does, for every stage."""

import pytest

from rlhf_pipeline import recipe as recipes
from rlhf_pipeline import stages
from rlhf_pipeline.errors import InputError, InputErrors
from rlhf_pipeline.stages.check import check
from rlhf_pipeline.stages.job import Job, Reader
from rlhf_pipeline.stages.trial import try_trainer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader(recipes.load("tiny", []))


def attempt(reader: Reader, stage: str, *settings: str) -> None:
    recipe = recipes.load("tiny", [f"stages.{stage}.trainer.{setting}" for setting in settings])
    job = Job(recipe, stage, recipe.run, reader)
    try_trainer(job, stages.BY_KIND[job.stage.kind].prepare(job))


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "dpo"])
def test_what_trains_is_not_refused(reader, stage):
    attempt(reader, stage)
    attempt(reader, stage, "lr_scheduler_type=cosine_with_min_lr", "lr_scheduler_kwargs={min_lr_rate: 0.1}")


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("sft", ["packing=true"]),
        ("sft", ["max_length=2"]),  # leaves no row of a trial
        ("sft", ["optim=paged_adamw_8bit"]),
        ("reward", ["center_rewards_coefficient=0.01"]),
        ("dpo", ["precompute_ref_log_probs=true"]),
        ("dpo", ["loss_type=[sigmoid, sft]", "loss_weights=[1.0, 0.1]"]),
        ("dpo", ["torch_compile=true"]),
    ],
)
def test_unusual_settings_are_not_refused(reader, stage, settings):
    attempt(reader, stage, *settings)


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "dpo"])
def test_a_schedule_without_what_it_needs(reader, stage):
    with pytest.raises(InputError, match="One of min_lr or min_lr_rate should be set") as error:
        attempt(reader, stage, "lr_scheduler_type=cosine_with_min_lr")
    assert error.value.place == f"stages.{stage}.trainer"


@pytest.mark.parametrize(
    ("stage", "settings", "said", "key"),
    [
        ("sft", ["packing=true", "max_length=null"], "When packing is enabled, `max_length` can't be", "max_length"),
        ("sft", ["lr_scheduler_type=cosine", "lr_scheduler_kwargs={foo: 1}"], "unexpected keyword argument 'foo'", ""),
        ("dpo", ["optim=galore_adamw"], "galore_torch", "optim"),
        ("ppo", ["optim=lomo"], "lomo_optim", "optim"),
    ],
)
def test_other_refusals_name_their_key(reader, stage, settings, said, key):
    with pytest.raises(InputError, match=said) as error:
        attempt(reader, stage, *settings)
    assert error.value.place == ".".join(filter(None, ["stages", stage, "trainer", key]))


def test_the_check_finds_those_of_all_stages_at_once():
    settings = [f"stages.{stage}.trainer.lr_scheduler_type=cosine_with_min_lr" for stage in ("reward", "dpo")]
    recipe = recipes.load("tiny", settings)
    with pytest.raises(InputErrors) as errors:
        check(recipe, list(recipe.stages))
    assert [error.place for error in errors.value.all] == ["stages.reward.trainer", "stages.dpo.trainer"]
