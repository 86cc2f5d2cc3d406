"""Whether two machines have the same recipe: what each may say in its own way is no difference."""

import copy
import json

import pytest

from rlhf_pipeline import recipe
from rlhf_pipeline.run.same_recipe import difference


def loaded(*overrides: str) -> dict:
    far = ["launch.num_processes=2", "launch.num_machines=2", "launch.main_process_ip=a", "launch.use_cpu=true"]
    return json.loads(json.dumps(recipe.load("tiny", [*far, *overrides]).model_dump(mode="json")))


@pytest.mark.parametrize(
    ("key", "here", "there"),
    [
        (("model", "revision"), None, "0123abc"),
        (("model", "path"), "/home/a/model", "/mnt/model"),
        (("output_dir",), "/home/a/runs", "/mnt/shared"),
        (("stages", "ppo", "init"), "org/adapter", "org/adapter@0123abc"),
        (("stages", "sft", "trainer", "warmup_steps"), 1, 1.0),
        (("launch", "main_process_ip"), "10.0.0.1", "localhost"),
        (("launch", "machine_rank"), 1, 0),
    ],
)
def test_what_each_machine_may_say_in_its_own_way_is_no_difference(key, here, there):
    mine = loaded()
    other = copy.deepcopy(mine)
    for one, value in ((mine, here), (other, there)):
        for part in key[:-1]:
            one = one[part]
        one[key[-1]] = value
    assert difference(mine, other) is None


def test_what_is_left_to_its_default_is_what_is_written_as_nothing():
    mine = loaded()
    assert mine["launch"].get("gpu_ids") is None
    assert difference(mine, {**mine, "launch": {**mine["launch"], "gpu_ids": None}}) is None


def test_auto_may_count_more_gpus_here_and_not_fewer(monkeypatch):
    there = {"launch": {"num_processes": 4, "num_machines": 2}}
    for gpus, processes, agree in (("0,1,2,3", 8, True), ("0,1,2,3", 6, False), ("0", 2, False), ("", 2, False)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
        here = {"launch": {"num_processes": processes, "num_machines": 2}}
        assert (difference(here, there) is None) is agree


def test_another_model_data_or_stage_is_a_difference():
    mine = loaded()
    for override in ("model.path=org/other", "sft.data.limit=9", "seed=7", "stages.dpo.init=base"):
        key = override.partition("=")[0].removeprefix("stages.")
        assert f"`{key}" in difference(loaded(override), mine), override
