"""How long a step takes, by real trainers."""

import pytest

from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.forecast import measured, rows

LEAST = [
    "evaluate=null", "ppo.trainer.per_device_train_batch_size=2", "ppo.trainer.response_length=4",
    "ppo.trainer.whiten_rewards=true",  # which the run itself would refuse for so few episodes
    "dpo.trainer.per_device_train_batch_size=2", "dpo.trainer.max_steps=-1", "dpo.trainer.num_train_epochs=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def recipe():
    return recipes.load("tiny", LEAST)


@pytest.mark.parametrize("name", ["dpo", "ppo"])
def test_a_step_is_timed_and_the_steps_are_those_of_a_run(recipe, name):
    known = rows.longest(recipe)
    left = measured.step(recipe, name, known)
    assert left.step_s > 0
    count = {"dpo": 2 * -(-_rows(recipe, "dpo") // 2), "ppo": 1280 // 2}[name]
    assert left.steps == count
    assert left.seconds == left.step_s * count


def test_without_rows_only_the_step_is_known(recipe):
    assert measured.step(recipe, "dpo", {}).steps is None


def _rows(recipe, name):
    from rlhf_pipeline.stages import BY_KIND
    from rlhf_pipeline.stages.job import Reader

    stage = recipe.stages[name]
    return len(Reader(recipe).read(BY_KIND[stage.kind].read, stage.data).train)
