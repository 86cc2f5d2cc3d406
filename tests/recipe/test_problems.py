"""Everything that is wrong with a recipe, at once: each thing once, at its place, and nothing that only follows."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from rlhf_pipeline import recipe
from rlhf_pipeline.errors import InputError, InputErrors
from rlhf_pipeline.recipe import schema, validation

FULL = """\
name: t
model: {path: tiny, quantization: none}
stages:
  sft:
    data: tiny:demonstrations
    trainer: {learning_rate: 2e-5}
  reward: {data: tiny:preferences}
  ppo: {data: tiny:prompts}
  dpo: {data: tiny:preferences}
"""


@pytest.fixture
def problems(tmp_path: Path):
    """Load a text with overrides; returns place and message of all that is found, and the hints."""

    def of(text: str, *overrides: str) -> list[tuple[str, str, str | None]]:
        file = tmp_path / "r.yaml"
        file.write_text(text, encoding="utf-8")
        with pytest.raises(InputError) as caught:
            recipe.load(str(file), overrides)
        assert isinstance(caught.value, InputErrors) == (len(caught.value.all) > 1)
        return [(str(one.place).replace(f"{tmp_path}/", ""), one.message, one.hint) for one in caught.value.all]

    return of


def test_every_problem_is_reported_in_the_order_of_the_file(problems):
    text = """\
name: a/b
seed: lucky
model:
  path: tiny
  quantisation: none
lora: {r: big, bias: all}
evaluate: {data: tiny:heldout, judge: no_function}
stages:
  sft:
    data: {path: gone.jsonl, eval_fraction: 2}
    trainer: {learning_rate: fast, max_stepz: 3, output_dir: x}
    gates: {train_loss: about 3}
  reward:
    init: dpo
    data: tiny:preference
  ppo: {data: tiny:prompts, reward: sft}
  polish: {data: tiny:preferences}
  dpo:
    data: tiny:preferences
    reward: reward
name: b
"""
    found = problems(text, "name=[1", "dpo.trainer.beta=big")
    assert [place for place, _, _ in found] == [
        "r.yaml:1:7: name",
        "r.yaml:2:7: seed",
        "r.yaml:5:3: model.quantisation",
        "r.yaml:6:11: lora.r",
        "r.yaml:6:16: lora.bias",
        "r.yaml:7:39: evaluate.judge",
        "r.yaml:10:18: stages.sft.data.path",
        "r.yaml:10:45: stages.sft.data.eval_fraction",
        "r.yaml:11:30: stages.sft.trainer.learning_rate",
        "r.yaml:11:36: stages.sft.trainer.max_stepz",
        "r.yaml:11:50: stages.sft.trainer.output_dir",
        "r.yaml:12:25: stages.sft.gates.train_loss",
        "r.yaml:14:11: stages.reward.init",
        "r.yaml:15:11: stages.reward.data.path",
        "r.yaml:16:37: stages.ppo.reward",
        "r.yaml:17:3: stages.polish.kind",
        "r.yaml:20:5: stages.dpo.reward",
        "r.yaml:21:1: name",
        "override `name=[1`",
        "override `dpo.trainer.beta=big`",
    ]
    assert all(message for _, message, _ in found)


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        # A key misspelt is not missing as well.
        ("model:", "modle:", "r.yaml:2:1: modle"),
        ("stages:", "stage:", "r.yaml:3:1: stage"),
        ("data: tiny:demonstrations", "dat: tiny:demonstrations", "r.yaml:5:5: stages.sft.dat"),
        ("{path: tiny,", "{pth: tiny,", "r.yaml:2:9: model.pth"),
        ("ppo: {data: tiny:prompts}", "ppo: {data: {pth: tiny:prompts}}", "r.yaml:8:16: stages.ppo.data.pth"),
        ("  reward: {", "  rater: {knd: reward, ", "r.yaml:7:11: stages.rater.knd"),
        # A stage of unknown kind may be the one that others need.
        ("  reward: {", "  rewrd: {", "r.yaml:7:3: stages.rewrd.kind"),
        ("  reward: {", "  reward: {kind: rward, ", "r.yaml:7:18: stages.reward.kind"),
        ("  reward: {data: tiny:preferences}", "  reward: 3", "r.yaml:7:11: stages.reward"),
        ("  sft:\n", "  sft:\n    kind: [sft]\n", "r.yaml:5:11: stages.sft.kind"),
        # What depends on a value that is wrong.
        ("    trainer: {learning_rate: 2e-5}", "    lora: {r: x}", "r.yaml:6:15: stages.sft.lora.r"),
        ("  reward: {", "  reward: {gates: {eval_loss: '> 0'}, trainer: {eval_strategy: 3}, ",
         "r.yaml:7:64: stages.reward.trainer.eval_strategy"),
        ("dpo: {data: tiny:preferences}",
         "dpo: {trainer: {eval_delay: 1, eval_steps: x}, data: {path: tiny:preferences, eval_fraction: 0.1}}",
         "r.yaml:9:46: stages.dpo.trainer.eval_steps"),
        ("dpo: {data: tiny:preferences}",
         "dpo: {data: {path: tiny:preferences, eval_fraction: '${NOT_SET_HERE}'}, trainer: {eval_on_start: true}}",
         "r.yaml:9:55: stages.dpo.data.eval_fraction"),
        ("    trainer: {learning_rate: 2e-5}",
         "    trainer: {optim: '${NOT_SET_HERE}', adam_beta1: 0.9, save_total_limit: 2}",
         "r.yaml:6:22: stages.sft.trainer.optim"),
        ("dpo: {data: tiny:preferences}",
         "dpo: {trainer: {eval_steps: '${NOT_SET_HERE}', eval_delay: 1}, data: {path: a/b, eval_fraction: 0.1}}",
         "r.yaml:9:31: stages.dpo.trainer.eval_steps"),
        ("  dpo: {data: tiny:preferences}",
         "  first: {kind: dpo, init: sftt, data: tiny:preferences}\n"
         "  dpo: {init: first, data: tiny:preferences, lora: {r: 8}}", "r.yaml:9:28: stages.first.init"),
        ("stages:\n", "evaluate: {data: tiny:heldout, judge: x}\nstages:\n", "r.yaml:3:39: evaluate.judge"),
        ("model: {path: tiny, quantization: none}", "model: tiny", "r.yaml:2:8: model"),
        ("model: {path: tiny, quantization: none}", "model:", "r.yaml:2:7: model"),
    ],
)  # fmt: skip
def test_what_only_follows_from_a_problem_is_not_reported(problems, old, new, place):
    assert old in FULL
    assert [found[0] for found in problems(FULL.replace(old, new, 1))] == [place]


@pytest.mark.parametrize(
    ("old", "new", "places"),
    [
        ("model: {path: tiny, quantization: none}\n", "", ["r.yaml: model", "r.yaml:4:5: stages.sft.x"]),
        ("model: {path: tiny, quantization: none}", "model: [tiny]", ["r.yaml:2:8: model", "r.yaml:5:5: stages.sft.x"]),
        ("stages:\n", "seed: x\nstages:\n", ["r.yaml:3:7: seed", "r.yaml:6:5: stages.sft.x"]),
    ],
)
def test_the_rest_is_checked_past_a_section_that_is_of_no_use(problems, old, new, places):
    text = FULL.replace("    data: tiny:dem", "    x: 1\n    data: tiny:dem").replace(old, new)
    assert [found[0] for found in problems(text)] == places


def test_duplicate_keys_are_reported_beside_the_rest(problems):
    found = problems("name: t\nname: u\nmodel: {path: tiny, path: tiny}\nstages: {sft: {data: tiny:prompts, x: 1}}\n")
    assert found == [
        ("r.yaml:2:1: name", "the key `name` is written twice here, first on line 1", "keep one of them"),
        ("r.yaml:3:21: model.path", "the key `path` is written twice here, first on line 3", "keep one of them"),
        ("r.yaml:4:36: stages.sft.x", "unknown key `x`", found[2][2]),
    ]


@pytest.mark.parametrize(
    ("old", "new", "hint"),
    [
        ("  dpo: {", "  dpo: {learning_rate: 1e-4, ", "it belongs under the stage's `trainer`"),
        ("  dpo: {", "  dpo: {beta: 0.1, ", "it belongs under the stage's `trainer`"),
        ("  dpo: {", "  dpo: {eval_fraction: 0.1, ", "it belongs under the stage's `data`"),
        ("  dpo: {", "  dpo: {r: 8, ", "it belongs under the stage's `lora`"),
        ("  dpo: {", "  dpo: {seed: 8, ", "it belongs at the top of the recipe"),
        ("  dpo: {", "  dpo: {quantization: nf4, ", "it belongs under `model`"),
        ("  dpo: {", "  dpo: {lr: 1e-4, ", "did you mean `learning_rate`? It belongs under the stage's `trainer`"),
        ("  dpo: {", "  dpo: {eval_fracton: 1, ", "did you mean `eval_fraction`? It belongs under the stage's `data`"),
        ("  dpo: {", "  dpo: {trainer: {lr: 1e-4}, ", "did you mean `learning_rate`?"),
        # Of a pair of keys for training and evaluation, the one for training; unless the other is named.
        ("  dpo: {", "  dpo: {trainer: {per_device_batch_size: 4}, ", "did you mean `per_device_train_batch_size`?"),
        ("  dpo: {", "  dpo: {trainer: {per_gpu_batch_size: 4}, ", "did you mean `per_device_train_batch_size`?"),
        ("  dpo: {", "  dpo: {trainer: {per_device_eval_bs: 4}, ", "did you mean `per_device_eval_batch_size`?"),
        ("  dpo: {", "  dpo: {trainer: {gates: {}}, ", "it belongs under the stage itself"),
        ("  dpo: {", "  dpo: {trainer: {max_prompt_length: 8}, ", "it belongs under the stage's `data`"),
        ("  dpo: {", "  dpo: {trainer: {kl_coef: 0.1}, ", "it is a key of ppo, and this stage is of kind `dpo`"),
        ("  dpo: {", "  dpo: {lora: {rank: 8}, ", "did you mean `r`?"),
        ("stages:", "quantization: nf4\nstages:", "it belongs under `model`"),
        ("stages:", "data: x\nstages:", "it belongs under a stage"),
        ("stages:", "learning_rate: 1e-4\nstages:", "it belongs under the `trainer` of a stage"),
        ("stages:", "sft: {}\nstages:", "stages belong under `stages`"),
        ("path: tiny,", "path: tiny, r: 8,", "it belongs under `lora`"),
        ("path: tiny,", "path: tiny, model_name_or_path: x,", "did you mean `path`?"),
        ("data: tiny:prompts", "data: {mix: [{path: tiny:prompts, eval_fraction: 0.1}]}", "it belongs beside `mix`"),
        ("data: tiny:prompts", "data: {mix: [{path: tiny:prompts, wheight: 1}]}", "did you mean `weight`?"),
    ],
)  # fmt: skip
def test_a_key_at_the_wrong_level_is_answered_with_the_right_one(problems, old, new, hint):
    found = problems(FULL.replace(old, new, 1))
    assert len(found) == 1
    assert found[0][1].startswith("unknown key")
    assert found[0][2] == hint


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("messages: []", "`messages` cannot be set: every chat template is given it"),
        ("'enable-thinking': false", "`enable-thinking` cannot be a name in a chat template"),
    ],
)
def test_what_a_chat_template_cannot_be_told(problems, setting, message):
    ((place, found, _),) = problems(FULL, f"model.chat_template_kwargs={{{setting}}}")
    assert found == message
    assert "chat_template_kwargs" in place


@pytest.mark.parametrize(
    ("stage", "setting", "hint"),
    [
        ("sft", "bf16: true", "set `model.dtype: bfloat16` instead"),
        ("dpo", "bf16_full_eval: true", "set `model.dtype: bfloat16` instead"),
        ("sft", "fp16: true", "set `model.dtype: float16` instead"),
        ("ppo", "bf16: true", "set `model.dtype: bfloat16` instead"),
        ("ppo", "tf32: true", "set `model.dtype` instead"),
        ("sft", "bf16: false", "remove it"),
        ("sft", "trust_remote_code: true", "set `model.trust_remote_code` instead"),
        ("sft", "chat_template_path: x.jinja", "set `model.chat_template` instead"),
        ("sft", "assistant_only_loss: true", "set `data.loss: all` instead"),
        ("sft", "seed: 7", "set `seed` at the top of the recipe instead"),
        ("sft", "run_name: x", "set `name` at the top of the recipe instead"),
        ("sft", "push_to_hub: true", "remove it"),
    ],
)
def test_a_key_that_the_recipe_decides_is_answered_with_the_recipes_own(problems, stage, setting, hint):
    ((_, message, found),) = problems(FULL, f"{stage}.trainer={{{setting}}}")
    assert "cannot be set: " in message and found == hint


@pytest.mark.parametrize(
    ("old", "new", "message", "hint"),
    [
        ("2e-5", "'2e-5'", "expected a number, got '2e-5'", "remove the quotes: between them it is text"),
        ("2e-5", ".inf", "expected a number, got '.inf'", "see trl.SFTConfig"),
        ("2e-5", "nan", "expected a number, got 'nan'", "see trl.SFTConfig"),
        ("2e-5", "-1e999", "`-1e999` is too large a number", "a number has at most 308 digits before the point"),
        ("learning_rate: 2e-5", "packing: yes", "expected true or false, got 'yes'", "write true"),
        ("stages:", "keep_checkpoints: off\nstages:", "expected true or false, got 'off'", "write false"),
        ("stages:", "seed: 1.0\nstages:", "expected a whole number, got 1.0", None),
        ("stages:", "seed: '7'\nstages:", "expected a whole number, got '7'",
         "remove the quotes: between them it is text"),
        ("name: t", "name: 7", "expected text, got 7", "put it in quotes"),
        ("none}", "nf8}", "expected 'nf4', 'int8' or 'none', got 'nf8'", "did you mean `nf4`?"),
        ("none}", "null}", "expected 'nf4', 'int8' or 'none', got null", "did you mean `none`?"),
        ("path: tiny,", "path: '',", "`path` is empty", None),
        ("stages:", "lora:\nstages:", "expected a mapping, got null", "is what belongs to it indented?"),
        ("stages:", "lora: {7: 8}\nstages:", "unknown key `7`", "the keys are those of peft.LoraConfig"),
        ("2e-5", "-2e-5", "expected a number of at least 0, got -2e-05", None),
        ("learning_rate: 2e-5", "per_device_train_batch_size: 0", "expected a number of at least 1, got 0", None),
        ("learning_rate: 2e-5", "num_train_epochs: 0", "expected a number more than 0, got 0", None),
        ("learning_rate: 2e-5", "data_seed: -1", "expected a number from 0 to 4,294,967,295, got -1", None),
        ("learning_rate: 2e-5", "adam_beta2: 1.5", "expected a number from 0 to 1, got 1.5", None),
        ("stages:\n", "seed: -1\nstages:\n", "expected a number of at least 0, got -1", None),
        ("stages:\n", "seed: 4294967296\nstages:\n", "expected a number less than 4,294,967,296, got 4294967296", None),
        ("data: tiny:prompts", "data: {path: tiny:prompts, limit: 0}", "expected a number of at least 1, got 0", None),
        ("data: tiny:prompts", "data: {path: tiny:prompts, columns: [a]}", "expected a mapping, got a list", None),
        ("data: tiny:prompts", "data: {mix: [3]}", "expected a mapping, got 3", None),
        ("data: tiny:prompts", "data: {mix: [{path: a, weight: 0}]}", "expected a number more than 0, got 0", None),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_kind_says_what_was_expected(problems, old, new, message, hint):
    assert old in FULL
    found = problems(FULL.replace(old, new, 1))
    assert [(said, advice) for _, said, advice in found] == [(message, hint)]


@pytest.mark.parametrize(
    ("kind", "setting", "below", "message", "hint"),
    [
        ("sft", "max_steps: 2.5", "", "expected a whole number, got 2.5", "see trl.SFTConfig"),
        ("sft", "packing: 'true'", "", "expected true or false, got 'true'",
         "remove the quotes: between them it is text"),
        ("sft", "log_level: 3", "", "expected text, got 3", "put it in quotes"),
        ("sft", "eval_strategy: step", "", "expected 'no', 'steps' or 'epoch', got 'step'", "did you mean `steps`?"),
        ("sft", "lr_scheduler_type: cosin", "", "expected a name such as 'cosine', 'cosine_with_restarts', "
         "'cosine_with_min_lr', got 'cosin'", "did you mean `cosine`?"),
        ("sft", "lr_scheduler_type: polynmial", "", "expected a name such as 'polynomial', got 'polynmial'",
         "did you mean `polynomial`?"),
        ("sft", "optim: 3", "", "expected a name such as 'adamw_torch', 'adamw_torch_fused', 'adamw_torch_xla', got 3",
         "see trl.SFTConfig"),
        ("sft", "lr_scheduler_kwargs: 3", "", "expected text or a mapping, got 3", "see trl.SFTConfig"),
        ("sft", "include_num_input_tokens_seen: {}", "", "expected true or false or text, got a mapping",
         "see trl.SFTConfig"),
        ("dpo", "loss_type: ipo", "", "expected a list, got 'ipo'", "write ['ipo']"),
        ("dpo", "loss_type: [ipo, 3]", ".1", "expected text, got 3", "put it in quotes"),
        ("dpo", "liger_kernel_config: {rope: 'yes'}", ".rope", "expected true or false, got 'yes'", "write true"),
        ("lora", "target_modules: [q_proj, [v]]", ".1", "expected text, got a list", "see peft.LoraConfig"),
        ("lora", "target_modules: 3", "", "expected text or a list, got 3", "write [3]"),
        ("lora", "init_lora_weights: 'yes'", "", "expected true or false or a name such as 'gaussian', 'eva', 'olora', "
         "got 'yes'", "write true"),
        ("lora", "layers_to_transform: [1, '2']", ".1", "expected a whole number, got '2'",
         "remove the quotes: between them it is text"),
    ],
)  # fmt: skip
def test_a_value_of_a_type_that_a_library_does_not_take_says_which_it_takes(
    problems, kind, setting, below, message, hint
):
    where = "lora" if kind == "lora" else f"stages.{kind}.trainer"
    stage = f"{kind}: {{data: tiny:preferences, trainer: {{{setting}}}}}"
    stage = f"sft: {{data: tiny:demonstrations}}\nlora: {{{setting}}}" if kind == "lora" else stage
    found = problems(f"model: {{path: tiny, quantization: none}}\nstages:\n  {stage}\n")
    place = f"{where}.{setting.partition(':')[0]}{below}"
    assert [(at.rpartition(" ")[2], said, advice) for at, said, advice in found] == [(place, message, hint)]


def test_numbers_as_people_write_them_are_numbers(tmp_path):
    (tmp_path / "r.yaml").write_text(FULL.replace("{learning_rate: 2e-5}", "{learning_rate: 1e-4, max_steps: 1_000}"))
    trainer = recipe.load(str(tmp_path / "r.yaml")).stages["sft"].trainer
    assert trainer == {"learning_rate": 0.0001, "max_steps": 1000}
    assert type(trainer["max_steps"]) is int


def test_wrong_overrides_are_all_reported_beside_the_file(problems):
    found = problems(FULL.replace("2e-5", "fast"), "sft", "seed=[1", "tempo=1", "name.x=1", "sft.trainer={a: 1, a: 2}")
    assert [place for place, _, _ in found] == [
        "r.yaml:6:30: stages.sft.trainer.learning_rate",
        "override `sft`",
        "override `seed=[1`",
        "override `name.x=1`",
        "override `sft.trainer={a: 1, a: 2}`",
        "override `tempo=1`",
    ]


def test_a_key_without_effect_beside_the_others_is_refused_at_its_place(problems):
    text = FULL.replace(
        "{learning_rate: 2e-5}", "{optim: sgd, adam_beta1: 0.9, save_strategy: 'no', save_total_limit: 2}"
    )
    assert [found[:2] for found in problems(text)] == [
        ("r.yaml:6:27: stages.sft.trainer.adam_beta1", "`adam_beta1` has no effect with `optim: sgd`"),
        (
            "r.yaml:6:65: stages.sft.trainer.save_total_limit",
            "`save_total_limit` has no effect without `save_strategy`",
        ),
    ]


def test_a_wrong_value_from_the_environment_names_its_variable(problems, monkeypatch):
    monkeypatch.setenv("LR", "fast")
    found = problems(FULL.replace("{learning_rate: 2e-5}", "\n      learning_rate: ${LR}"))
    assert found[0][:2] == (
        "r.yaml:7:22: stages.sft.trainer.learning_rate",
        "expected a number, got 'fast' (from ${LR})",
    )


def test_every_pattern_of_the_schema_has_words() -> None:
    """A value that does not match it is said in a sentence, and not by a traceback."""
    models = [one for one in vars(schema).values() if isinstance(one, type) and issubclass(one, BaseModel)]
    with_pattern = {
        name
        for model in models
        for name, field in model.model_fields.items()
        if any(getattr(rule, "pattern", None) for rule in field.metadata)
    }
    assert {"judge", "api_key_env"} <= with_pattern <= set(validation.PATTERNS)
