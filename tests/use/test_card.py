"""What a model card says of a stage's rewards."""

from rlhf_pipeline.rundir.record import Record
from rlhf_pipeline.use import card


def test_all_that_scored_the_replies_is_named() -> None:
    record = Record(
        kind="ppo", init="sft", reward="helpful", rewards={"reward.2": "/of/runs/other:harmless"},
        inputs={"model": "base@1", "rewards.1.function": "mine:short", "rewards.2.model": "classifier@abc",
                "rewards.1.weight": 0.5},
    )  # fmt: skip
    rows = list(card._origins({"ppo": record}))
    assert rows[1][2] == "sft, scored by helpful, other:harmless, mine:short, classifier"
