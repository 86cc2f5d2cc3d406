"""Several runs as one comparison: what is shared once, what can be compared, and what cannot."""

from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline.comparison.joined import Part, join, labels
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.shares import interval

SETTINGS = {"prompts": "evaluate.data", "n": 4, "temperature": 0.7, "max_new_tokens": 8, "seed": 1, "digest": "d"}
JUDGED = {"base": [0.0, 0.0, 0.0, 0.0], "sft": [0.0, 1.0, 0.0, 1.0]}


def part(label: str, ppo: list[float], *, base: str = "tiny", **changes: Any) -> Part:
    """A run of three policies, whose ppo is judged so; its rewards are twice that."""
    made_of = {"sft": "1", "reward": "2", "ppo": label} | changes.pop("made_of", {})
    judged = JUDGED | {"ppo": ppo}
    rows = [
        {
            "prompt": f"Question {i}",
            "replies": {
                name: {"text": f"{name} of {label}", "tokens": 5, "ended": True, "kl": 0.5, "judge": judged[name][i],
                       "reward": 2 * judged[name][i]}
                for name in judged
            },
        }
        for i in range(4)
    ]  # fmt: skip
    means = {
        name: {"reward": sum(of) / 2, "judge": sum(of) / 4, "kl": 0.5, "tokens": 5.0, "ended": 1.0}
        for name, of in judged.items()
    }
    comparison = {"rows": rows, "means": means, "judge": "my:judge", "ai_judge": None, "notes": [], "win_rates": []}
    roles = {"policies": ["base", "sft", "ppo"], "reference": "sft", "reward": "reward"}
    for key in roles.keys() & changes.keys():
        roles[key] = changes.pop(key)
    return Part(label, Path("runs") / label, base, made_of, comparison=comparison | changes, **roles)


def rates(found: dict[str, Any]) -> dict[tuple[str, str, str], dict[str, float]]:
    return {(rate["a"], rate["b"], rate["by"]): rate for rate in found["win_rates"]}


def test_what_runs_share_is_there_once_and_win_rates_are_those_of_the_rows():
    first, second = part("a", [1.0, 1.0, 1.0, 0.0]), part("b", [0.0, 1.0, 0.0, 0.0])
    found = join([first, second], SETTINGS)
    assert found["policies"] == ["base", "sft", "a: ppo", "b: ppo"]
    assert list(found["means"]) == list(found["rows"][0]["replies"]) == found["policies"]
    assert found["means"]["b: ppo"] == second.comparison["means"]["ppo"]
    assert (found["reference"], found["reward"], found["judge"], found["notes"]) == ("sft", "reward", "my:judge", [])
    assert found["rows"][2]["replies"]["b: ppo"]["text"] == "ppo of b"
    assert [run["policies"] for run in found["runs"]] == [
        {"base": "base", "sft": "sft", "ppo": f"{label}: ppo"} for label in "ab"
    ]
    by = rates(found)
    assert len(by) == len(found["win_rates"]) == 2 * 6
    # b wins none, loses prompts 1 and 3, and ties on 2 and 4.
    low, high = interval(1.0, 4)
    expected = {"win_rate": 0.25, "ties": 0.5, "low": low, "high": high}
    for measure in ("judge", "reward"):
        assert expected.items() <= by["b: ppo", "a: ppo", measure].items()
    assert by["a: ppo", "sft", "judge"]["win_rate"] == (2 + 0.5) / 4


def test_other_weights_or_another_base_are_not_shared():
    other_sft = part("b", [1.0] * 4, made_of={"sft": "other"})
    assert join([part("a", [1.0] * 4), other_sft], SETTINGS)["policies"] == [
        "base", "a: sft", "a: ppo", "b: sft", "b: ppo"
    ]  # fmt: skip
    other_base = part("b", [1.0] * 4, base="large")
    found = join([part("a", [1.0] * 4), other_base], SETTINGS)
    assert found["policies"] == [f"{label}: {name}" for label in "ab" for name in ("base", "sft", "ppo")]
    assert any("different bases" in note for note in found["notes"])
    three = join([part("a", [1.0] * 4), part("b", [1.0] * 4), part("c", [1.0] * 4, made_of={"sft": "x"})], SETTINGS)
    assert three["policies"] == ["base", "a: sft", "a: ppo", "b: ppo", "c: sft", "c: ppo"]


def test_rewards_of_other_models_are_not_compared():
    """Those of one run with each other still are; the judge compares all."""
    first, second = part("a", [1.0] * 4), part("b", [0.0] * 4, made_of={"reward": "other"})
    found = join([first, second], SETTINGS)
    assert found["reward"] is None and "different reward models" in found["notes"][0]
    by = rates(found)
    assert ("b: ppo", "a: ppo", "reward") not in by and ("b: ppo", "a: ppo", "judge") in by
    # The shared ones were scored by both: no one number is right.
    assert all(found["means"][name]["reward"] is None for name in ("base", "sft"))
    assert all(row["replies"]["sft"]["reward"] is None for row in found["rows"])
    assert found["means"]["a: ppo"]["reward"] == 2.0 and found["means"]["sft"]["kl"] == 0.5
    own = part("a", [1.0] * 4, policies=["sft", "ppo"]), part("b", [1.0] * 4, made_of={"reward": "3", "sft": "9"})
    assert ("a: ppo", "a: sft", "reward") in rates(join(own, SETTINGS))


def test_kl_from_other_references_is_said_to_be():
    found = join([part("a", [1.0] * 4), part("b", [0.0] * 4, reference="base")], SETTINGS)
    assert found["reference"] is None and "each run's own reference" in found["notes"][0]
    assert found["means"]["sft"]["kl"] is None and found["means"]["b: ppo"]["kl"] == 0.5


def test_other_judges_and_notes():
    first = part("a", [1.0] * 4, notes=["no AI judge: gone", "both"])
    found = join([first, part("b", [0.0] * 4, judge="other:judge", notes=["both"])], SETTINGS)
    assert found["judge"] is None and ("b: ppo", "a: ppo", "judge") not in rates(found)
    assert "different judges" in found["notes"][0]
    assert found["notes"][1:] == ["a: no AI judge: gone", "both"]


def test_win_rates_of_an_ai_judge_stay_within_runs():
    rate = {"a": "ppo", "b": "sft", "by": "ai_judge", "win_rate": 0.75, "low": 0.5, "high": 0.9, "ties": 0.0}
    parts = [part(label, [1.0] * 4, ai_judge="base", win_rates=[rate]) for label in "ab"]
    found = join(parts, SETTINGS)
    asked = [key for key in rates(found) if key[2] == "ai_judge"]
    assert asked == [("a: ppo", "sft", "ai_judge"), ("b: ppo", "sft", "ai_judge")]
    assert found["ai_judge"] == "base" and "none between runs" in found["notes"][0]


def test_other_prompts_are_an_error():
    second = part("b", [1.0] * 4)
    second.comparison["rows"][0]["prompt"] = "Something else"
    with pytest.raises(InputError, match="asked other prompts than a") as caught:
        join([part("a", [1.0] * 4), second], SETTINGS)
    assert caught.value.place == str(Path("runs/b"))


def test_runs_are_called_by_what_tells_them_apart(tmp_path):
    for name in ("one/first", "one/second", "two/first"):
        (tmp_path / name).mkdir(parents=True)
    assert labels([tmp_path / "one/first", tmp_path / "one/second"]) == ["first", "second"]
    assert labels([tmp_path / "one/first", tmp_path / "two/first"]) == ["one/first", "two/first"]
    with pytest.raises(InputError, match="given twice"):
        labels([tmp_path / "one/first", tmp_path / "two/first", tmp_path / "two/../one/first"])
