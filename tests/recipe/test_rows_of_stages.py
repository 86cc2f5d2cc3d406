"""What stages that read the rows of others take over from them, and which figures a judge will have."""

from pathlib import Path

import pytest

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.recipe import Recipe, load

TEXT = """
model: {{path: tiny, quantization: none}}
stages:
  sft: {{data: tiny:demonstrations}}
  reward: {{data: tiny:preferences}}
  candidates: {{kind: sample, data: {{path: tiny:prompts, chat: false}}, rewards: [{{stage: reward}}]}}
  feedback: {{kind: judge, data: stage:candidates, judge: {{model: base}}{judge}}}
  dpo: {{data: stage:feedback}}
  best: {{kind: dpo, init: sft, data: stage:candidates}}
{more}
"""


def written(folder: Path, judge: str = "", more: str = "") -> Recipe:
    (folder / "r.yaml").write_text(TEXT.format(judge=judge, more=more))
    return load(str(folder / "r.yaml"))


def test_whether_text_is_a_users_turn_is_taken_over_from_hop_to_hop(tmp_path: Path) -> None:
    stages = written(tmp_path).stages
    assert [stages[name].data.chat for name in ("candidates", "feedback", "dpo", "best")] == [False] * 4
    assert stages["sft"].data.chat is None


def test_dpo_takes_the_best_and_the_worst_of_sampled_replies_alone(tmp_path: Path) -> None:
    stages = written(tmp_path).stages
    assert (stages["best"].data.pairs, stages["dpo"].data.pairs) == ("best_and_worst", None)


def test_a_gate_on_agreement_with_people_needs_people(tmp_path: Path) -> None:
    gate = ", gates: {judge/human_kappa_low: '>= 0.3'}"
    with pytest.raises(InputError, match="will have no metric `judge/human_kappa_low`"):
        written(tmp_path, gate)
    assert written(tmp_path, f"{gate}, human: tiny:preferences").stages["feedback"].gates
