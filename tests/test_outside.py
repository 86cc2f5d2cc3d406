"""Starting points from outside the recipe: a folder, a stage of another run, a repository on the hub."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from rlhf_pipeline import fingerprint, plan, recipe
from rlhf_pipeline.comparison import wanted
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.fingerprint import Digests
from rlhf_pipeline.models import adapters, base
from rlhf_pipeline.models.roles import SharedBase
from rlhf_pipeline.models.staged import StagedBase, artifacts
from rlhf_pipeline.recipe import outside
from rlhf_pipeline.recipe.schema import Recipe
from rlhf_pipeline.rewards.trial import try_rewards
from rlhf_pipeline.rundir.layout import WEIGHTS
from rlhf_pipeline.smoke import cut
from rlhf_pipeline.stages import check
from rlhf_pipeline.stages.job import Job, Reader

COMMIT, NEW = "1" * 40, "2" * 40
RECIPE = """\
name: second
model: {{path: {model}, quantization: none}}
lora: {{r: 16, target_modules: all-linear, lora_dropout: 0.1}}
stages:
  ppo:
    init: {init}
    reward: {reward}
    data: tiny:prompts
    trainer: {{learning_rate: 1e-4}}
  dpo:
    init: {init}
    data: tiny:preferences
    trainer: {{learning_rate: 1e-4}}
"""


@pytest.fixture
def made(make_artifacts, tmp_path):
    """Copies of an SFT and a reward adapter over one base, under `adapters/`."""
    artifacts = make_artifacts("llama")
    for name in ("init", "reward"):
        shutil.copytree(getattr(artifacts, name), tmp_path / "adapters" / name)
    return artifacts


@pytest.fixture
def load(made, tmp_path) -> Callable[..., Recipe]:
    def load(*overrides: str, init: str = "adapters/init", reward: str = "adapters/reward") -> Recipe:
        text = RECIPE.format(model=made.spec.path, init=init, reward=reward)
        (tmp_path / "recipe.yaml").write_text(text)
        return recipe.load(str(tmp_path / "recipe.yaml"), overrides)

    return load


@pytest.fixture
def other_run(made, tmp_path) -> Path:
    """A run that has made both."""
    run = tmp_path / "runs" / "other"
    for name, folder in (("sft", "init"), ("reward", "reward")):
        shutil.copytree(tmp_path / "adapters" / folder, run / name / "adapter")
        inputs = {"model": Digests().of_model(made.spec), "model.quantization": "none"}
        (run / name / "stage.json").write_text(json.dumps({"name": name, "state": "done", "inputs": inputs}))
    return run


def checked(loaded: Recipe) -> list[str]:
    """What the check says of adapters, and warns of."""
    names = list(loaded.stages)
    config = Reader(loaded).config
    check.check_lora(loaded, names, config)
    return check.check_adapters_from_outside(loaded, names, config)


def refused(*arguments: object, by: Callable[..., object]) -> InputError:
    with pytest.raises(InputError) as caught:
        by(*arguments)
    return caught.value.all[0]


def test_an_adapter_s_folder_is_a_starting_point_and_gives_the_shape(load, made, tmp_path):
    loaded = load()
    assert loaded.stages["ppo"].init == loaded.stages["dpo"].init == str(tmp_path / "adapters" / "init")
    assert loaded.stages["ppo"].reward == str(tmp_path / "adapters" / "reward")
    lora = loaded.stages["dpo"].lora
    assert (lora["r"], lora["lora_alpha"]) == (4, 8)
    assert len({name.rpartition(".")[2] for name in lora["target_modules"]}) == 7
    assert "lora_dropout" not in lora  # the recipe's own is the shape of what starts from the base
    assert load("dpo.lora.r=6").stages["dpo"].lora["r"] == 6
    assert checked(load("dpo.lora.r=6")) == []
    job = Job(loaded, "ppo", loaded.run)
    ((reward, shape),) = job.reward_models
    assert (job.init, reward) == (tmp_path / "adapters" / "init", tmp_path / "adapters" / "reward")
    assert shape["r"] == 8


def test_the_resolved_recipe_loads_to_the_same(load, tmp_path, other_run):
    for given in ({}, {"init": "runs/other:sft", "reward": "runs/other:reward"}):
        loaded = load("dpo.lora.r=16", **given)
        (tmp_path / "again").mkdir(exist_ok=True)
        (tmp_path / "again" / "recipe.yaml").write_text(recipe.to_yaml(loaded))
        assert recipe.load(str(tmp_path / "again" / "recipe.yaml")).model_dump() == loaded.model_dump()


def test_a_stage_of_another_run_is_a_starting_point(load, other_run):
    loaded = load(init="runs/other:sft", reward="runs/other:reward")
    assert loaded.stages["ppo"].parents == {"init": f"{other_run}:sft", "reward": f"{other_run}:reward"}
    assert Job(loaded, "ppo", loaded.run).init == other_run / "sft" / "adapter"
    assert checked(loaded) == []
    plans = {stage.name: stage for stage in plan.make(loaded)}
    assert plans["ppo"].inputs["init"].startswith("other:sft@") and "/" not in plans["ppo"].inputs["init"]
    assert plans["ppo"].parents["init"] == f"{other_run}:sft"
    assert plan.select(list(plans.values()), None, "ppo", []) == [plans["ppo"]]  # nothing has to be done before it


def test_its_content_counts_and_not_where_it_lies(load, tmp_path, other_run):
    def prints(**given: str) -> list[str]:
        return [stage.fingerprint for stage in plan.make(load(**given))]

    before = prints()
    shutil.copytree(tmp_path / "adapters", tmp_path / "moved" / "adapters")
    assert prints(init="moved/adapters/init") == before
    weights = tmp_path / "adapters" / "init" / WEIGHTS
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    after = prints()
    assert before[0] != after[0] and before[1] != after[1]
    head = tmp_path / "adapters" / "reward" / WEIGHTS
    save_file({name: tensor * 2 for name, tensor in load_file(head).items()}, head, {"format": "pt"})
    assert prints()[0] != after[0] and prints()[1] == after[1]


def test_the_policy_begins_as_the_adapter_does_and_so_does_the_reference(load, made, tokenizer, batch):
    """PPO's KL at the first step is 0, and DPO's margin: the policy is the adapter, not the base."""
    job = Job(load("ppo.lora.r=6"), "ppo", Path())
    ids = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        bare = base.load_base(made.spec, tokenizer)
        plain = bare(**ids).logits
        theirs = PeftModel.from_pretrained(bare, str(made.init)).eval()(**ids).logits
        policy = adapters.with_policy_adapter(base.load_base(made.spec, tokenizer), job.stage.lora, job.init).eval()
        torch.testing.assert_close(policy(**ids).logits, theirs)
        assert (theirs - plain).abs().max() > 0.1
        shared = SharedBase(base.load_base(made.spec, tokenizer), job.stage.lora, job.init, job.reward_models)
        pair = (adapters.adapter_parameters(shared.peft, role).values() for role in ("policy", "reference"))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*pair, strict=True))


def test_kl_of_a_comparison_is_from_the_adapter_too(load, tmp_path, batch):
    loaded = load()
    reference = wanted.roles(loaded, ["ppo", "dpo"]).reference
    assert reference == str(tmp_path / "adapters" / "init")
    model = StagedBase(loaded.model, artifacts(loaded.run, ["base", reference]))
    ids = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        with model.acting_as("base"):
            plain = model.causal_lm(**ids).logits
        with model.acting_as(reference):
            assert (model.causal_lm(**ids).logits - plain).abs().max() > 0.1


# What is refused, and where


@pytest.mark.parametrize(
    ("given", "place", "message", "hint"),
    [
        ({"init": "./gone"}, "ppo.init", "there is no adapter folder", "relative paths start from"),
        ({"init": "adapters"}, "ppo.init", "needs stage `adapters`, which is not in the recipe", "earlier stages"),
        ({"init": "./adapters"}, "ppo.init", "is not an adapter: it has no adapter_config.json", "save_pretrained"),
        ({"init": "./runs/other"}, "ppo.init", "is not an adapter", "its stages, `./runs/other:STAGE`: dpo"),
        ({"init": "runs/othr:sft"}, "ppo.init", "there is no run directory", "relative paths start from"),
        ({"init": "runs/other:sfd"}, "ppo.init", "has no stage `sfd`", "did you mean `sft`?"),
        ({"init": "runs/other:dpo"}, "ppo.init", "stage `dpo` of", "status"),
        ({"init": "adapters/reward"}, "ppo.init", "of a reward model; `init` needs that of a policy", "SEQ_CLS"),
        ({"reward": "adapters/init"}, "ppo.reward", "of a policy; `reward` needs that of a reward model", "SEQ_CLS"),
        ({"reward": "runs/other:sft"}, "ppo.reward", "`other:sft` is the adapter of a policy", "SEQ_CLS"),
        ({"init": "nobody/nothing"}, "ppo.init", "there is no adapter of that name on the hub", "./nobody/nothing"),
    ],
)  # fmt: skip
def test_what_is_no_adapter_for_this_is_an_error_at_its_place(load, other_run, given, place, message, hint):
    (other_run / "dpo").mkdir()
    (other_run / "dpo" / "stage.json").write_text('{"state": "running"}')
    error = refused(by=lambda: load(**given))
    assert message in error.message and hint in (error.hint or "")
    assert f"stages.{place}" in error.place


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "`init` is no LoRA adapter but IA3"),
        ({"modules_to_save": ["lm_head"]}, "`init` has trained more than LoRA's matrices: modules_to_save"),
        ({"bias": "all"}, "`init` has trained more than LoRA's matrices: bias"),
    ],
)
def test_what_holds_more_than_lora_is_refused(load, tmp_path, changes, message):
    file = tmp_path / "adapters" / "init" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert message in refused(by=load).message


def test_weights_as_a_pickle_are_not_read(load, tmp_path):
    (tmp_path / "adapters" / "init" / WEIGHTS).rename(tmp_path / "adapters" / "init" / "adapter_model.bin")
    assert "only safetensors are read" in str(refused(by=load).hint)


def test_a_smaller_rank_does_not_fit_and_says_whose(load):
    error = refused(by=lambda: load("dpo.lora.r=2"))
    assert "rank 2 is less than 4, that of `init`, whose adapter stage `dpo` starts from" in error.message


def test_another_base_is_one_clear_error(load, other_run, checkpoints, tmp_path):
    """By the digest in the run's record, by the folder that the configuration names, or by the shapes."""
    qwen = f"model.path={checkpoints['qwen3']}"
    for given in ({}, {"init": "runs/other:sft", "reward": "runs/other:reward"}):
        error = refused(load(qwen, **given), by=checked)
        assert error.place == "stages.ppo.init"
        assert "was trained over another base: llama@" in error.message and "and not qwen3@" in error.message
        assert "set `model.path` to that" in error.hint
    for name in ("init", "reward"):
        file = tmp_path / "adapters" / name / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "/gone/model"}))
    assert checked(load()) == []  # nobody knows, and it fits
    error = refused(load(f"model.path={checkpoints['gpt2']}", "lora.target_modules=all-linear"), by=checked)
    assert error.place in ("stages.ppo.init", "stages.ppo.reward")


@pytest.mark.parametrize(
    ("theirs", "ours", "other"),
    [
        ("org/base", "org/base", None),
        ("org/base", "org/instruct", "org/base"),
        ("/gone/base", "org/base", None),
    ],
)
def test_bases_on_the_hub_are_told_apart_by_their_names(load, tmp_path, theirs, ours, other):
    file = tmp_path / "adapters" / "init" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": theirs}))
    loaded = load(f"model.path={ours}")
    assert Digests().other_base(str(loaded.stages["ppo"].init), loaded.model) == other


def test_weights_of_another_size_do_not_fit(load, tmp_path):
    for name, what in (("init", "lora_A.weight"), ("reward", "score.weight")):
        file = tmp_path / "adapters" / name / WEIGHTS
        before = load_file(file)
        changed = {key: tensor[:, :-1].contiguous() if key.endswith(what) else tensor for key, tensor in before.items()}
        save_file(changed, file, {"format": "pt"})
        error = refused(
            load(), by=lambda loaded: check.check_adapters_from_outside(loaded, ["ppo"], Reader(loaded).config)
        )
        assert error.place == f"stages.ppo.{name}" and "does not fit this recipe's model" in error.message
        save_file(before, file, {"format": "pt"})


def test_of_an_ensemble_all_members_count(load, tmp_path):
    reward = tmp_path / "adapters" / "reward"
    alone = Digests().of_adapter(str(reward))
    (reward / "member-2").mkdir()
    for name in (WEIGHTS, "adapter_config.json"):
        shutil.copy(reward / name, reward / "member-2")
    both = Digests().of_adapter(str(reward))
    assert checked(load()) == []
    state = load_file(reward / WEIGHTS)
    save_file({name: weights + 1 for name, weights in state.items()}, reward / "member-2" / WEIGHTS)
    assert len({alone, both, Digests().of_adapter(str(reward))}) == 3
    name = next(iter(state))
    save_file(state | {name: torch.zeros(2, 2)}, reward / "member-2" / WEIGHTS)
    error = refused(load(), by=checked)
    assert error.message.endswith("its members have weights of other shapes than the first one has")


def test_another_quantization_is_a_warning(load, other_run):
    warnings = checked(load("model.quantization=int8", init="runs/other:sft", reward="runs/other:reward"))
    assert len(warnings) == 3 and "`quantization: none`, and here it is `int8`" in warnings[0]


def test_smoke_does_without_for_its_base_is_another(load, tmp_path):
    loaded, notes = load(), []
    cut._replace_what_is_outside(loaded, notes)
    assert {name: stage.parents for name, stage in loaded.stages.items()} == {
        "reward-of-ppo": {"init": "base"},
        "ppo": {"init": "base", "reward": "reward-of-ppo"},
        "dpo": {"init": "base"},
    }
    assert (loaded.stages["reward-of-ppo"].lora["r"], loaded.stages["dpo"].lora["r"]) == (8, 4)
    assert len(notes) == 3 and not any(str(tmp_path) in note for note in notes)


# The hub, by its cache


def test_an_adapter_on_the_hub_is_pinned_to_its_commit(load, tmp_path, monkeypatch):
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def publish(name: str, folder: str, commit: str) -> None:
        repository = cache / f"models--org--{name}"
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / "main").write_text(commit)
        shutil.copytree(tmp_path / "adapters" / folder, repository / "snapshots" / commit)

    publish("policy", "init", COMMIT)
    publish("scorer", "reward", COMMIT)
    loaded = load(init="org/policy", reward="org/scorer")
    assert loaded.stages["ppo"].lora["r"] == 4
    plans = {stage.name: stage for stage in plan.make(loaded)}
    assert plans["ppo"].inputs["init"] == f"org/policy@{COMMIT}"
    assert loaded.stages["ppo"].parents == {"init": f"org/policy@{COMMIT}", "reward": f"org/scorer@{COMMIT}"}
    job = Job(loaded, "ppo", loaded.run)
    ((reward, _),) = job.reward_models
    assert job.init == cache / "models--org--policy" / "snapshots" / COMMIT and (reward / WEIGHTS).is_file()
    assert checked(loaded) == []
    publish("policy", "init", NEW)
    later = load(init="org/policy", reward="org/scorer")
    assert [stage.fingerprint for stage in plan.make(later)][1] != plans["dpo"].fingerprint
    assert plan.make(loaded)[1].fingerprint == plans["dpo"].fingerprint  # a commit stays
    held = load(init=f"org/policy@{COMMIT}", reward="org/scorer")
    fingerprint.pin(held)
    assert held.stages["dpo"].init == f"org/policy@{COMMIT}"
    assert "SEQ_CLS" in str(refused(by=lambda: load(init="org/scorer")).hint)
    (cache / "models--org--policy" / "snapshots" / NEW / WEIGHTS).unlink()
    error = refused(by=lambda: outside.folder("org/policy"))
    assert "has no adapter_model.safetensors" in error.message


def test_what_people_read_names_it_shortly():
    assert [outside.said(name) for name in ("sft", "base", "/runs/other:sft", f"org/policy@{COMMIT}", "/a/b")] == [
        "sft", "base", "other:sft", "org/policy", "b",
    ]  # fmt: skip


def test_members_are_combined_only_where_there_are_several(made, tmp_path):
    text = RECIPE.format(model=made.spec.path, init="adapters/init", reward="")
    (tmp_path / "r.yaml").write_text(
        text.replace("reward: \n", "rewards: [{stage: ./adapters/reward, combine: min}]\n")
    )
    loaded = recipe.load(str(tmp_path / "r.yaml"))
    with pytest.raises(InputError, match="`reward` is one reward model, not several") as caught:
        try_rewards(loaded, "ppo", Reader(loaded).tokenizer)
    assert caught.value.place == "stages.ppo.rewards.0.combine"
    shutil.copytree(made.reward, tmp_path / "adapters" / "reward" / "member-2")
    try_rewards(loaded, "ppo", Reader(loaded).tokenizer)
