"""`show`: the resolved recipe as a recipe again, and where each value comes from."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import trl

from rlhf_pipeline import recipe
from rlhf_pipeline.recipe import library_keys, show

BASE = """\
name: base
model: {path: tiny, quantization: none}
stages:
  sft:
    data: tiny:demonstrations
    trainer: {learning_rate: 1e-3}
  reward: {data: tiny:preferences}
  ppo: {data: tiny:prompts}
"""
MINE = """\
extends: base.yaml
output_dir: ${PLACE:-runs}
lora: {r: 8}
stages:
  sft:
    trainer:
      max_steps: ${STEPS}
      loss_type: nll
  dpo:
    data:
    - tiny:preferences
    - path: tiny:preferences
      limit: 4
    lora: {r: 16}
    gates: {train_loss: "< 9"}
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch) -> str:
    monkeypatch.setenv("STEPS", "3")
    monkeypatch.delenv("PLACE", raising=False)
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "mine.yaml").write_text(MINE)
    return str(tmp_path / "mine.yaml")


def shown(path: str, *overrides: str) -> str:
    return show.as_yaml(*recipe.load_with_origins(path, overrides))


@pytest.mark.parametrize(
    ("key", "origin"),
    [
        ("name", "from the file's name"),
        ("output_dir", "mine.yaml:2, ${PLACE}"),
        ("seed", "override"),
        ("model.path", "base.yaml:2"),
        ("model.dtype", "default"),
        ("lora.r", "mine.yaml:3"),
        ("stages.sft.kind", "from the stage's name"),
        ("stages.sft.init", "no sft stage before"),
        ("stages.reward.init", "the latest sft stage before"),
        ("stages.ppo.reward", "the latest reward stage before"),
        ("stages.ppo.trainer.stop_token", "default"),
        ("stages.ppo.trainer.max_steps", "override"),
        ("stages.sft.data.path", "base.yaml:5"),
        ("stages.sft.data.eval_fraction", "default"),
        ("stages.sft.trainer.learning_rate", "base.yaml:6"),
        ("stages.sft.trainer.max_steps", "mine.yaml:7, ${STEPS}"),
        ("stages.sft.lora.r", "from lora"),
        ("stages.reward.lora.r", "from sft"),
        ("stages.dpo.lora.r", "mine.yaml:14"),
        ("stages.dpo.data.mix.0.path", "mine.yaml:11"),
        ("stages.dpo.data.mix.1.limit", "mine.yaml:13"),
        ("stages.dpo.gates.train_loss", "mine.yaml:15"),
    ],
)
def test_every_value_has_its_origin(mine, key, origin):
    loaded, origins = recipe.load_with_origins(mine, ["seed=7", "ppo.trainer={max_steps: 2}"])
    assert show.as_json(loaded, origins)["origins"][key] == origin


def test_the_output_says_the_same_and_is_a_recipe(mine, tmp_path):
    loaded, origins = recipe.load_with_origins(mine, ["seed=7"])
    text = show.as_yaml(loaded, origins)
    (tmp_path / "again.yaml").write_text(text)
    assert recipe.load(str(tmp_path / "again.yaml")).model_dump() == loaded.model_dump()
    as_json = show.as_json(loaded, origins)
    # Each line with a value ends with the origin that the object has for it.
    said = re.findall(r"^ *(?:- )?(\w+): [^#\n]*?\S *  # (.+)$", text, re.MULTILINE)
    assert [origin for _, origin in said] == list(as_json["origins"].values())
    assert [key for key, _ in said] == [path.rpartition(".")[2] for path in as_json["origins"]]


def test_every_line_with_a_value_has_an_origin_and_they_are_aligned(mine):
    lines = [line for line in shown(mine).splitlines() if line.partition("#")[0].strip() and not line.endswith(":")]
    assert all("  # " in line for line in lines)
    columns = {line.rindex("  # ") for line in lines if len(line.partition("  # ")[0].rstrip()) <= show.WIDEST}
    assert len(columns) == 1


def test_what_the_recipe_leaves_to_the_libraries_is_shown_with_their_defaults(mine):
    """Beside what is set, what decides the result: TRL's value where TRL has another one than Transformers."""
    text, loaded = shown(mine), recipe.load(mine)
    reward = text.partition("\n  reward:\n")[2].partition("\n  ppo:\n")[0]
    comments = re.sub(r"\n +# {3}", " ", reward)  # joins the lines of one paragraph
    (trl_line,) = re.findall(r"# default in TRL: (.*)", comments)
    (transformers_line,) = re.findall(r"# default in Transformers: (.*)", comments)
    assert f"learning_rate: {trl.RewardConfig.learning_rate:.1e}".replace("1.0e-04", "0.0001") in trl_line
    assert "num_train_epochs: 3.0" in transformers_line and "seed" not in transformers_line
    assert "logging_steps" not in comments  # it decides nothing about the result
    defaults = show.as_json(*recipe.load_with_origins(mine))["library_defaults"]
    assert "stages.sft.trainer.learning_rate" not in defaults  # the recipe sets it
    for kind, config in (("sft", trl.SFTConfig), ("reward", trl.RewardConfig), ("dpo", trl.DPOConfig)):
        fields = {field.name: field for field in dataclasses.fields(config)}
        of_stage = {path: said for path, said in defaults.items() if path.startswith(f"stages.{kind}.")}
        assert len(of_stage) > 15
        for path, said in of_stage.items():
            field = fields[path.rpartition(".")[2]]
            default = field.default_factory() if callable(field.default_factory) else field.default
            ours = library_keys.OURS.get(path.rpartition(".")[2])
            expected = ours[0] if ours else getattr(default, "value", default)
            assert said == {"value": expected, "from": "rlhf_pipeline" if ours else said["from"]}, path
            assert path.rpartition(".")[2] not in loaded.stages[kind].trainer
    assert defaults["stages.ppo.trainer.kl_coef"] == {"value": 0.05, "from": "rlhf_pipeline"}
    assert defaults["lora.lora_dropout"] == {"value": 0.0, "from": "peft"}


@pytest.mark.parametrize("name", recipe.shipped())
def test_every_shipped_recipe_is_shown_as_it_loads(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = recipe.load(name)
    (tmp_path / "again.yaml").write_text(shown(name))
    assert recipe.load(str(tmp_path / "again.yaml")).model_dump() == loaded.model_dump()


@pytest.mark.parametrize(
    "override",
    [
        "sft.gates={'train_loss': '< 9'}",
        "sft.data.columns={prompt: 'a # b', completion: '${X}'}",
        "sft.data={path: tiny:demonstrations, eval_data: {path: tiny:demonstrations, limit: 1}}",
        "reward.data=[{path: tiny:preferences, weight: 2}, {path: tiny:preferences, weight: 1, columns: {a: '1e3'}}]",
        "lora={r: 4, target_modules: [q_proj, 'no'], rank_pattern: {'.*': 6}}",
        "evaluate={data: tiny:heldout, judge: 'a:b'}",
        "sft.data.chat=false",
    ],
)
def test_whatever_a_recipe_says_survives_being_shown_and_resolved(mine, tmp_path, override):
    loaded = recipe.load(mine, [override])
    for text in (shown(mine, override), recipe.to_yaml(loaded)):
        (tmp_path / "again.yaml").write_text(text)
        assert recipe.load(str(tmp_path / "again.yaml"), ["name=mine"]).model_dump() == loaded.model_dump()


def test_two_files_of_one_name_are_told_apart(mine, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "mine.yaml").write_text("extends: ../mine.yaml\nseed: 4\n")
    loaded, origins = recipe.load_with_origins(str(tmp_path / "sub" / "mine.yaml"))
    said = show.as_json(loaded, origins)["origins"]
    assert said["seed"] == f"{tmp_path}/sub/mine.yaml:2"
    assert said["lora.r"] == f"{tmp_path}/sub/../mine.yaml:3"
    assert said["model.path"] == "base.yaml:2"


@pytest.mark.slow
def test_the_command_prints_it_without_importing_torch(mine, tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "rlhf_pipeline", "show", "mine.yaml", "seed=7"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == shown(mine, "seed=7")
    assert not re.search(r"\| +(torch|transformers|datasets|jinja2)$", done.stderr, re.MULTILINE)
    done = subprocess.run([*command[:1], *command[3:], "--json"], cwd=tmp_path, capture_output=True, text=True,
                          check=True, timeout=60, env=os.environ)  # fmt: skip
    assert json.loads(done.stdout) == show.as_json(*recipe.load_with_origins(mine, ["seed=7"]))


@pytest.mark.slow
@pytest.mark.parametrize("option", [(), ("--json",)])
def test_secrets_of_the_environment_are_not_printed(mine, tmp_path, option):
    """What it prints may end in the log of a CI that anyone reads."""
    token = "hf_" + "a1B2" * 9
    command = [sys.executable, "-m", "rlhf_pipeline", "show", "mine.yaml", *option]
    environment = os.environ | {"HF_TOKEN": token, "PLACE": f"runs/{token}"}
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60, env=environment
    )
    assert token not in done.stdout + done.stderr
    assert "runs/***" in done.stdout
