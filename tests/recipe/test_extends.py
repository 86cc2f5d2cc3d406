"""A recipe built on another: what is merged, where each value comes from, what cannot be meant."""

from pathlib import Path

import pytest

from rlhf_pipeline import recipe
from rlhf_pipeline.errors import InputError

BASE = """\
name: base
output_dir: out
seed: 1
model: {path: tiny, quantization: none}
lora: {r: 8, target_modules: [q_proj, v_proj]}
stages:
  sft:
    data: {path: rows.jsonl, eval_fraction: 0.1, columns: {completion: reply}}
    trainer:
      learning_rate: 1e-3
      lr_scheduler_type: cosine_with_min_lr
      lr_scheduler_kwargs: {min_lr: 1e-5, warmup_type: linear}
  reward: {data: tiny:preferences}
  ppo: {data: tiny:prompts}
"""
ROW = '{"prompt": "a", "reply": "b"}\n'


@pytest.fixture
def write(tmp_path: Path):
    """Write `team/base.yaml`, the data beside it, and further files; returns the path of the last one."""

    def to(**texts: str) -> str:
        (tmp_path / "team").mkdir(exist_ok=True)
        (tmp_path / "team" / "base.yaml").write_text(BASE)
        (tmp_path / "team" / "rows.jsonl").write_text(ROW)
        (tmp_path / "rows.jsonl").write_text(ROW)
        for name, text in texts.items():
            (tmp_path / f"{name}.yaml").write_text(text)
        return str(tmp_path / f"{list(texts)[-1]}.yaml")

    return to


def problem(path: str, *overrides: str) -> InputError:
    with pytest.raises(InputError) as caught:
        recipe.load(path, overrides)
    return caught.value


def test_mappings_merge_and_everything_else_is_replaced(write, tmp_path):
    loaded = recipe.load(
        write(
            mine="""\
extends: team/base.yaml
seed: 2
lora: {target_modules: all-linear}
stages:
  dpo: {data: tiny:preferences}
  sft:
    trainer:
      lr_scheduler_kwargs: {min_lr: 2e-5}
      max_steps: 3
"""
        )
    )
    assert loaded.seed == 2
    assert loaded.model.quantization == "none"
    assert loaded.lora == {"r": 8, "target_modules": "all-linear"}
    assert list(loaded.stages) == ["sft", "reward", "ppo", "dpo"]
    assert loaded.stages["sft"].trainer == {
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": 2e-5, "warmup_type": "linear"},
        "max_steps": 3,
    }
    assert loaded.stages["sft"].data.eval_fraction == 0.1


def test_the_name_is_not_inherited(write):
    """Or two recipes would share a run directory."""
    assert recipe.load(write(mine="extends: team/base.yaml\n")).name == "mine"
    assert recipe.load(write(mine="extends: team/base.yaml\nname: other\n")).name == "other"


def test_a_path_starts_from_the_folder_of_the_file_that_says_it(write, tmp_path):
    team = tmp_path / "team"
    loaded = recipe.load(write(mine="extends: team/base.yaml\n"))
    assert loaded.stages["sft"].data.path == str(team / "rows.jsonl")
    assert (loaded.output_dir, loaded.folder) == (str(team / "out"), tmp_path)
    loaded = recipe.load(write(mine="extends: team/base.yaml\noutput_dir: out\nstages: {sft: {data: rows.jsonl}}\n"))
    assert loaded.stages["sft"].data.path == str(tmp_path / "rows.jsonl")
    assert loaded.output_dir == str(tmp_path / "out")


@pytest.mark.parametrize(("where", "file"), [("", "mine"), ("team", "team/judged")])
def test_a_judge_is_looked_for_beside_the_file_that_names_it(write, tmp_path, where, file):
    judged = "extends: {}\nevaluate: {{data: tiny:heldout, judge: 'ours:judge'}}\n"
    write(x="")
    (tmp_path / "team" / "judged.yaml").write_text(judged.format("base.yaml"))
    path = write(mine="extends: team/judged.yaml\n" if where else judged.format("team/base.yaml"))
    assert recipe.load(path).folder == tmp_path / where


def test_several_files_and_a_shipped_recipe(write, tmp_path, monkeypatch):
    path = write(
        far="extends: tiny\nseed: 5\nlora: {r: 2}\nstages: {ppo: null}\n",
        near="extends: far.yaml\nlora: {lora_alpha: 2}\n",
        mine="extends: near.yaml\nstages: {dpo: {trainer: {beta: 0.9}}}\n",
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    loaded = recipe.load(path)
    tiny = recipe.load("tiny")
    assert (loaded.seed, loaded.lora) == (5, tiny.lora | {"r": 2, "lora_alpha": 2})
    assert list(loaded.stages) == ["sft", "reward", "dpo"]
    assert loaded.stages["dpo"].trainer == tiny.stages["dpo"].trainer | {"beta": 0.9}
    assert loaded.output_dir == str(tmp_path / "runs")  # of a shipped recipe: from the file that extends it


def test_a_file_goes_before_a_shipped_recipe_of_its_name(write, tmp_path):
    path = write(mine="extends: tiny\n")
    (tmp_path / "tiny").write_text(BASE.replace("rows.jsonl", "tiny:demonstrations"))
    assert recipe.load(path).seed == 1


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("rows.jsonl", {"path": "rows.jsonl", "eval_fraction": 0.1, "columns": {"completion": "reply"}}),
        ("{limit: 3}", {"path": "team/rows.jsonl", "limit": 3, "eval_fraction": 0.1}),
        ("{eval_data: rows.jsonl}", {"path": "team/rows.jsonl", "eval_fraction": 0.0}),
        ("[rows.jsonl, {path: team/rows.jsonl, limit: 2}]", {"path": "", "columns": {}, "eval_fraction": 0.1}),
    ],
)
def test_data_merge_whichever_form_they_are_written_in(write, tmp_path, data, expected):
    loaded = recipe.load(write(mine=f"extends: team/base.yaml\nstages: {{sft: {{data: {data}}}}}\n")).stages["sft"].data
    if expected["path"]:
        expected = expected | {"path": str(tmp_path / expected["path"])}
    assert {key: getattr(loaded, key) for key in expected} == expected
    assert bool(loaded.mix) == data.startswith("[")
    assert (loaded.eval_data is not None) == ("eval_data" in data)


def test_one_source_can_replace_several_and_a_new_path_leaves_the_split_of_the_former_one(write, tmp_path):
    first = "extends: team/base.yaml\nstages: {sft: {data: [rows.jsonl, rows.jsonl]}, ppo: {data: HUB}}\n"
    first = first.replace("HUB", "{path: a/b, split: test, revision: v1, max_prompt_length: 9}")
    path = write(several=first, mine="extends: several.yaml\nstages: {sft: {data: rows.jsonl}, ppo: {data: c/d}}\n")
    loaded = recipe.load(path)
    assert loaded.stages["sft"].data.mix == []
    assert loaded.stages["sft"].data.path == str(tmp_path / "rows.jsonl")
    prompts = loaded.stages["ppo"].data
    assert (prompts.path, prompts.split, prompts.revision, prompts.max_prompt_length) == ("c/d", "train", None, 9)


def test_messages_name_the_file_that_wrote_the_value(write, tmp_path):
    write(x="")
    bad = BASE.replace("1e-3", "fast").replace("r: 8", "rr: 8")
    path = write(mine="extends: team/bad.yaml\nseed: x\nstages:\n  reward: {gate: {}}\n")
    (tmp_path / "team" / "bad.yaml").write_text(bad)
    found = problem(path, "dpo=3")
    assert [str(one.place).replace(f"{tmp_path}/", "") for one in found.all] == [
        "mine.yaml:2:7: seed",
        "mine.yaml:4:12: stages.reward.gate",
        "team/bad.yaml:5:8: lora.rr",
        "team/bad.yaml:10:22: stages.sft.trainer.learning_rate",
        "override `dpo=3`",
    ]


def test_what_is_replaced_is_not_held_against_the_recipe(write, tmp_path, monkeypatch):
    """A variable without value, a wrong number, a file that is not there: nobody reads them."""
    monkeypatch.delenv("NOT_SET_HERE", raising=False)
    path = write(mine="extends: team/bad.yaml\nseed: 3\nevaluate: null\nstages: {sft: {data: rows.jsonl}}\n")
    bad = "evaluate: {data: tiny:heldout, judge: '${NOT_SET_HERE}'}\n" + BASE.replace(
        "seed: 1", "seed: ${NOT_SET_HERE}"
    ).replace("rows.jsonl", "gone.jsonl").replace("1e-3", "fast")
    (tmp_path / "team" / "bad.yaml").write_text(bad)
    loaded = recipe.load(path, ["sft.trainer.learning_rate=1"])
    assert (loaded.seed, loaded.stages["sft"].trainer["learning_rate"]) == (3, 1)
    assert [str(one.place).rpartition(" ")[2] for one in problem(path).all] == ["stages.sft.trainer.learning_rate"]


@pytest.mark.parametrize(
    ("text", "place", "message", "hint"),
    [
        ("extends: gone.yaml\n", ":1:10: extends", "there is no recipe", "folder of this file"),
        ("seed: 1\nextends: tinny\n", ":2:10: extends", "there is no recipe", "did you mean `tiny`?"),
        ("extends: mime.yaml\n", ":1:10: extends", "there is no recipe", "did you mean `mine.yaml`?"),
        ("extends: [a, b]\n", ":1:10: extends", "expected the path of one recipe", "one other"),
        ("extends:\n", ":1:9: extends", "expected the path of one recipe", "one other"),
        ("extends: ${NOT_SET_HERE}\n", ":1:10: extends", "`NOT_SET_HERE` is not set", "set it"),
        ("extends: mine.yaml\n", ":1:10: extends", "cannot extend itself: mine.yaml → mine.yaml", "remove one"),
        ("extends: team/base.yaml\nstages: {pppo: }\n", ":2:10: stages.pppo", "no stage `pppo` to leave", "`ppo`"),
        ("extends: team/base.yaml\nstages: {new: }\n", ":2:10: stages.new", "no stage `new` to leave", "sft, reward"),
        ("extends: team/base.yaml\nstages: {reward: null}\n", None, "stage `ppo` needs a reward", "add a stage"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(write, monkeypatch, text, place, message, hint):
    monkeypatch.delenv("NOT_SET_HERE", raising=False)
    path = write(mine=text)
    found = problem(path)
    assert len(found.all) == 1
    if place:
        assert found.place == f"{path}{place}"
    assert message in found.message
    assert hint in found.hint


def test_a_circle_of_files_is_refused(write, tmp_path):
    path = write(a="extends: b.yaml\n", b="extends: c.yaml\n", c="extends: b.yaml\n", mine="extends: a.yaml\n")
    found = problem(path)
    assert found.message == "a recipe cannot extend itself: b.yaml → c.yaml → b.yaml"
    assert found.place == f"{tmp_path}/c.yaml:1:10: extends"


def test_a_fault_in_the_extended_file_names_that_file(write, tmp_path):
    path = write(broken="a: [1\n", mine="extends: broken.yaml\n")
    assert str(problem(path).place).startswith(f"{tmp_path}/broken.yaml:")
    path = write(twice=BASE.replace("seed: 1", "seed: 1\nseed: 2").replace("rows.jsonl", "tiny:prompts"),
                 mine="extends: twice.yaml\n")  # fmt: skip
    assert problem(path).place == f"{tmp_path}/twice.yaml:4:1: seed"


def test_what_is_extended_twice_is_one_fault_and_no_more(write):
    path = write(base=BASE, mine="extends: base.yaml\nextends: team/base.yaml\nseed: 3\n")
    assert [str(one.place) for one in problem(path).all] == [f"{path}:2:1: extends"]


def test_extends_is_for_files_not_for_the_command_line(write):
    found = problem(write(mine=BASE), "extends=tiny")
    assert found.message == "unknown key `extends`"
    assert found.place == "override `extends=tiny`"


def test_an_override_reaches_what_is_inherited(write, tmp_path):
    loaded = recipe.load(write(mine="extends: team/base.yaml\n"), ["sft.data.limit=1", "lora.r=2", "seed=9"])
    assert (loaded.stages["sft"].data.limit, loaded.lora["r"], loaded.seed) == (1, 2, 9)
    assert loaded.stages["sft"].data.path == str(tmp_path / "team" / "rows.jsonl")


def test_the_resolved_recipe_stands_alone(write, tmp_path):
    loaded = recipe.load(write(mine="extends: team/base.yaml\nstages: {sft: {lora: {r: 4}}}\n"))
    (tmp_path / "resolved.yaml").write_text(recipe.to_yaml(loaded))
    assert "extends" not in recipe.to_yaml(loaded)
    assert recipe.load(str(tmp_path / "resolved.yaml")).model_dump() == loaded.model_dump()
