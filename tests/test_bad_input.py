"""What people get wrong: one sentence with its place and a hint, exit code 2, nothing written, no traceback."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import short_run

from rlhf_pipeline import recipe
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.recipe import TINY

GOOD = """\
name: t
model: {path: tiny, quantization: none, dtype: float32}
lora: {r: 4, target_modules: all-linear}
evaluate: {data: tiny:heldout, judge: 'rlhf_pipeline.models.tiny.world:judge', n: 4}
stages:
  sft:
    data: tiny:demonstrations
    trainer: {learning_rate: 1e-3}
  reward: {data: tiny:preferences}
  ppo: {data: tiny:prompts}
  dpo: {data: tiny:preferences}
"""
SHIPPED = ("demonstrations", "preferences", "prompts")
ROW = '{"prompt": "a", "completion": "b"}\n'


def write(folder: Path, text: str) -> None:
    """Write the recipe with the first rows of the shipped data, which are checked sooner than all of them."""
    for name in SHIPPED:
        rows = (TINY / "data" / f"{name}.jsonl").read_text().splitlines(True)[:64]
        (folder / f"{name}.jsonl").write_text("".join(rows))
        text = text.replace(f"tiny:{name}", f"{name}.jsonl")
    (folder / "r.yaml").write_text(text)


def run(folder: Path, *arguments: str, **environment: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """Run the command in a folder; returns what it did and the modules it imported."""
    command = [sys.executable, "-X", "importtime", "-m", "rlhf_pipeline", *arguments]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=os.environ | environment, timeout=120, check=False
    )
    imported = re.findall(r"^import time:.*\|\s+(\S+)$", done.stderr, re.MULTILINE)
    done.stderr = "".join(line for line in done.stderr.splitlines(True) if not line.startswith("import time:"))
    return done, imported


def assert_refused(done: subprocess.CompletedProcess, folder: Path, *words: str) -> None:
    """One `error:` line with all the words, exit code 2, data nowhere, no traceback, no run directory."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    for word in words:
        assert word in errors[0]
    assert not (folder / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["run", "plan", "status", "validate"])
def test_a_recipe_that_is_not_there_is_refused_by_every_command(tmp_path, command):
    done, imported = run(tmp_path, command, "tinny")
    assert_refused(done, tmp_path, "tinny: there is no such recipe")
    assert "hint: did you mean the shipped recipe `tiny`?" in done.stderr
    assert "torch" not in imported


@pytest.mark.slow
def test_a_bad_override_is_refused(tmp_path):
    (tmp_path / "r.yaml").write_text(GOOD)
    done, imported = run(tmp_path, "run", "r.yaml", "ppo.trainer.kl_cof=0.1")
    assert_refused(done, tmp_path, "override `ppo.trainer.kl_cof=0.1`: unknown key `kl_cof`")
    assert "hint: did you mean `kl_coef`?" in done.stderr
    assert "torch" not in imported


@pytest.mark.slow
def test_a_bad_row_of_a_late_stage_is_refused_before_the_first_one_trains(tmp_path, warm_server):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    (tmp_path / "pairs.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(good | {'rejected': None})}\n")
    write(tmp_path, GOOD.replace("dpo: {data: tiny:preferences}", "dpo: {data: pairs.jsonl}"))
    code, said = short_run.run_warm(warm_server, tmp_path, "r.yaml")
    (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2 and f"{tmp_path / 'pairs.jsonl'}: row 2: `rejected` is missing" in error
    assert "hint: the row has prompt, chosen, rejected" in said
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Do the worker's check of a changed recipe in this process."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    from rlhf_pipeline.stages import check as checks

    def of(*names: str, replace: tuple[str, str] = ("", ""), overrides: tuple[str, ...] = ()) -> InputError:
        write(tmp_path, GOOD.replace(*replace))
        loaded = recipe.load(str(tmp_path / "r.yaml"), overrides)
        with pytest.raises(InputError) as caught:
            checks.check(loaded, list(names))
        assert not loaded.run.exists()
        return caught.value

    return of


def test_a_hub_model_without_network_is_refused(check):
    """The tests have none: see conftest.py."""
    found = check("sft", replace=("path: tiny", "path: nobody/no-such-model"))
    assert found.place == "model.path: nobody/no-such-model"
    assert "neither a model folder nor a hub model" in found.message
    assert "check the spelling, the network" in found.hint


@pytest.mark.parametrize("config", ["{}", '{"model_type": "no-such-type"}', "not JSON"])
def test_a_model_folder_that_cannot_be_read_is_named(check, tmp_path, config):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(config)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")  # a header of nothing
    found = check("sft", replace=("path: tiny", "path: model"))
    assert found.place == f"model.path: {tmp_path / 'model'}"


def test_a_model_that_cannot_write_text_is_refused(check, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "model" / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")  # a header of nothing
    found = check("sft", replace=("path: tiny", "path: model"))
    assert "cannot load `vit` as a causal language model" in found.message


def test_an_adapter_without_room_for_the_one_it_starts_from_is_refused(check):
    """Which layers that concerns only the model can tell."""
    found = check("dpo", overrides=("dpo.lora.target_modules=[q_proj]",))
    assert found.place == "stages.dpo.lora"
    assert "cannot begin as that of `sft`" in found.message
    assert "no place for the weights of `model.layers.0" in found.message
    assert "init: base" in found.hint


@pytest.mark.parametrize(
    ("stage", "overrides", "place", "message"),
    [
        ("dpo", ("dpo.lora.rank_pattern={v_proj: 2}",), "stages.dpo.lora", "rank 2 at `model.layers.0"),
        ("ppo", ("sft.lora.lora_alpha=3", "ppo.lora.target_modules=[none]"), "stages.ppo.lora", "none"),
        ("dpo", ("sft.lora.target_modules=[none]",), "stages.sft.lora", "none"),  # where it was written
        ("reward", ("lora.target_modules=[q_proj, lm_head]",), "lora", "no place for the weights of `lm_head`"),
        ("dpo", ("lora={target_modules: all-linear}", "dpo.lora.r=4"), "stages.dpo.lora", "rank 4 at"),  # PEFT's r is 8
    ],
)  # fmt: skip
def test_what_only_the_model_shows_of_an_adapter_names_the_lora_it_was_written_in(
    check, stage, overrides, place, message
):
    found = check(stage, overrides=overrides)
    assert found.place == place
    assert message in found.message


@pytest.mark.parametrize(("stage", "lora"), [("sft", "stages.sft.lora"), ("dpo", "stages.dpo.lora")])
def test_an_adapter_on_the_output_embedding_is_refused_where_trl_would_not_train_it(check, monkeypatch, stage, lora):
    """TRL itself says so only when the stage begins, which may be hours later."""
    from rlhf_pipeline.stages import check as checks

    monkeypatch.setattr(checks, "FUSED_HEAD", True)
    found = check(stage, overrides=(f"{stage}.lora.target_modules=[q_proj, k_proj, v_proj, o_proj, lm_head]",))
    assert found.place == lora
    assert "an adapter on the output embedding cannot be trained in stage" in found.message


def test_larger_adapters_pass_the_check(tmp_path, monkeypatch):
    """By rank, by modules, with magnitudes; a reward model, which has another head, too."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from rlhf_pipeline.models.base import load_config
    from rlhf_pipeline.stages import check as checks

    write(tmp_path, GOOD)
    larger = ["sft.lora={target_modules: [q_proj], use_dora: true}", "reward.lora={r: 8, target_modules: all-linear}"]
    larger += ["ppo.lora={target_modules: [q_proj, lm_head]}", "dpo.lora.rank_pattern={q_proj: 5}"]
    loaded = recipe.load(str(tmp_path / "r.yaml"), larger)
    assert checks.check_lora(loaded, list(loaded.stages), load_config(loaded.model)) is None


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ("json:no_such_function", "module `json` has no function `no_such_function`"),
        ("broken_judge:judge", "ZeroDivisionError"),
        ("json:__name__", "module `json` has no function `__name__`"),
    ],
)
def test_a_judge_that_cannot_be_used_is_refused(check, tmp_path, judge, message):
    (tmp_path / "broken_judge.py").write_text("1 / 0\n")
    found = check("sft", overrides=(f"evaluate.judge='{judge}'",))
    assert found.place == "evaluate.judge"
    assert message in found.message


def test_a_judge_that_forgets_an_import_of_its_own_is_not_blamed_for_its_name(check, tmp_path):
    """The module is there; what it asks for is not."""
    (tmp_path / "forgetful_judge.py").write_text("import json\njson.no_such_thing\n")
    found = check("sft", overrides=("evaluate.judge='forgetful_judge:judge'",))
    assert "has no `judge`" not in found.message
    assert "no_such_thing" in found.message


@pytest.fixture
def refused(tmp_path):
    """Load the recipe with overrides of which the last one is at fault."""

    def of(*overrides: str) -> InputError:
        write(tmp_path, GOOD)
        with pytest.raises(InputError) as caught:
            recipe.load(str(tmp_path / "r.yaml"), overrides)
        assert caught.value.place == f"override `{overrides[-1]}`"
        assert len(caught.value.all) == 1
        return caught.value

    return of


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("sft.trainer.optim=nonsense", "'adamw_torch'"),
        ("sft.trainer.eval_strategy=nonsense", "'epoch'"),
    ],
)
def test_a_word_that_the_library_does_not_have_is_refused_with_those_it_has(refused, override, word):
    found = refused(override)
    assert word in found.message and "'nonsense'" in found.message


def test_a_sound_recipe_passes_the_check(tmp_path, monkeypatch):
    """Else every refusal above could be of something else."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from rlhf_pipeline.stages import check as checks

    write(tmp_path, GOOD)
    loaded = recipe.load(str(tmp_path / "r.yaml"))
    warnings = checks.check(loaded, list(loaded.stages))
    expected = ("the longer reply", "chat template", "learning_rate is not set")
    assert not [warning for warning in warnings if not any(words in warning for words in expected)]
    assert not loaded.run.exists()


@pytest.mark.slow
def test_a_recipe_for_more_gpus_than_there_are_here_is_valid_and_does_not_run(tmp_path, monkeypatch, warm_server):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    write(tmp_path, GOOD)
    code, out, err = short_run.ask(tmp_path, "validate", "r.yaml", "launch.num_processes=2", server=warm_server)
    assert code == 0, err
    assert "sft, reward, ppo, dpo: trained by 2 processes; `run` refuses that here: 2 processes on this machine" in out
    code, out, err = short_run.ask(tmp_path, "run", "r.yaml", "launch.num_processes=2", server=warm_server)
    assert code == 2
    assert "2 processes on this machine need a GPU each, and there is 1 here" in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("key", "value", "needed"),
    [
        ("kl_horizon", "100", "target_kl"),
        ("eval_delay", "2", "eval_strategy"),
        ("eval_on_start", "true", "eval_strategy"),
        ("per_device_eval_batch_size", "2", "eval_strategy"),
    ],
)
def test_a_ppo_key_without_the_one_that_it_needs_is_refused(refused, key, value, needed):
    assert refused(f"ppo.trainer.{key}={value}").message == f"`{key}` has no effect without `{needed}`"


@pytest.mark.parametrize("other", ["total_episodes=8", "max_steps=2"])
def test_two_lengths_of_ppo_are_refused(refused, other):
    found = refused(f"ppo.trainer.{other}", "ppo.trainer.num_train_epochs=1")
    assert other.partition("=")[0] in found.message


def test_prompts_held_out_for_nothing_are_refused(check):
    found = check("ppo", overrides=("ppo.data.eval_fraction=0.5",))
    assert found.place == "stages.ppo.data.eval_fraction"
    assert "eval_steps" in found.hint


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "dpo"])
def test_steps_of_evaluation_ask_for_evaluation(check, stage):
    """In Transformers, `eval_steps` alone evaluates nothing, without a word."""
    found = check(stage, overrides=(f"{stage}.trainer.eval_steps=2",))
    assert "held-out" in found.message and "eval_fraction" in found.hint


@pytest.mark.parametrize(
    ("stage", "what"),
    [(stage, what) for stage in ("sft", "reward", "ppo", "dpo") for what in ("logging", "eval", "save")],
)
def test_steps_beside_another_strategy_are_refused(refused, stage, what):
    for strategy in ("epoch", "no"):
        first = (f"{stage}.data.eval_fraction=0.5", f"{stage}.trainer.{what}_strategy='{strategy}'")
        found = refused(*first, f"{stage}.trainer.{what}_steps=2")
        assert f"`{what}_strategy`" in found.message


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "dpo"])
def test_a_number_of_checkpoints_where_none_are_kept_is_refused(refused, stage):
    found = refused(f"{stage}.trainer.save_strategy='no'", f"{stage}.trainer.save_total_limit=3")
    assert found.message == "`save_total_limit` has no effect without `save_strategy`"


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "dpo"])
def test_checkpoints_for_being_the_best_are_refused(check, stage):
    found = check(stage, overrides=(f"{stage}.trainer.save_strategy=best",))
    assert found.place == f"stages.{stage}.trainer.save_strategy"
    assert "being the best" in found.message and found.hint


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("ppo.trainer.lr_scheduler_type=reduce_lr_on_plateau", "reduce_lr_on_plateau"),
        ("ppo.trainer.num_mini_batches=3", "3 mini-batches"),
        ("ppo.trainer.gamma=1.5", "`gamma`"),
    ],
)
def test_a_value_that_ppo_cannot_train_with_is_refused(check, override, word):
    found = check("ppo", overrides=(override,))
    assert found.place == "stages.ppo.trainer"
    assert word in found.message
