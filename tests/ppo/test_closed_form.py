"""PPO beside the exact optimum of its objective, on the task of `benchmarks/closed_form.py` with shorter training."""

from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.slow

BETA = 0.1  # far from the reference; tests/sweep has two larger ones
UPDATES = 48  # the benchmark takes more; hence the wider tolerance


@pytest.fixture(scope="module")
def task(closed_form: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return closed_form.Task(tmp_path_factory.mktemp("closed-form"), seed=1)


def test_sft_teaches_the_reference_to_say_every_word_equally_often(task: Any) -> None:
    p = task.log_probs(task.share().reference).exp()[:, task.words]
    assert p.min().item() > 0.075 and p.max().item() < 0.09
    assert p.sum(1).min().item() > 0.99


def test_expected_reward_and_kl_end_near_the_exact_optimum(task: Any) -> None:
    measured = task.train(BETA, max_steps=UPDATES)
    assert measured.ours.reward == pytest.approx(measured.exact.reward, abs=0.1)
    assert measured.ours.kl == pytest.approx(measured.exact.kl, rel=0.1, abs=0.1)
