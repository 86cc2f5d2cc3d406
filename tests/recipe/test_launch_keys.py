"""`launch` in a recipe: Accelerate's own keys, its files, and what of them decides a stage's result."""

import importlib.util
import io
import json
import tomllib
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from rich.console import Console

from rlhf_pipeline import devices, recipe
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.fingerprint import Digests, stage_inputs
from rlhf_pipeline.recipe import library_keys
from rlhf_pipeline.recipe.launch_keys import options
from rlhf_pipeline.recipe.launch_rules import INSTALL, require_devices
from rlhf_pipeline.recipe.show import origin_of
from rlhf_pipeline.terminal.tables import say_processes

RECIPE = """\
name: r
model: {{path: tiny, quantization: none}}
stages:
  sft: {{data: tiny:demonstrations, trainer: {{per_device_train_batch_size: 4}}}}
  candidates: {{kind: sample, data: tiny:prompts}}
  dpo: {{data: tiny:preferences{own}}}
{launch}
"""
# As `accelerate config` of 1.15 asks for it, with all questions answered.
ASKED = {
    "compute_environment": "LOCAL_MACHINE", "debug": False, "distributed_type": "FSDP", "downcast_bf16": "no",
    "enable_cpu_affinity": False, "machine_rank": 0, "main_training_function": "main", "mixed_precision": "bf16",
    "num_machines": 1, "num_processes": 4, "rdzv_backend": "static", "same_network": True, "tpu_env": [],
    "tpu_use_cluster": False, "tpu_use_sudo": False, "use_cpu": False, "megatron_lm_config": {}, "fp8_config": None,
    "fsdp_config": {"fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"},
}  # fmt: skip
TEMPLATES = Path(importlib.util.find_spec("trl").origin).parent / "accelerate_configs"


def write(folder: Path, launch: str = "", own: str = "") -> str:
    file = folder / "r.yaml"
    file.write_text(RECIPE.format(launch=launch, own=own))
    return str(file)


def load(folder: Path, launch: str = "", *overrides: str, own: str = "") -> recipe.Recipe:
    return recipe.load(write(folder, launch, own), list(overrides))


def inputs(loaded: recipe.Recipe, name: str = "sft") -> dict:
    return stage_inputs(loaded, name, {"sft": "1"}, Digests())


def test_a_stage_has_its_own_or_that_of_the_top_if_it_trains(tmp_path):
    loaded = load(tmp_path, "launch: {num_processes: 4, use_cpu: true}", own=", launch: {num_processes: 1}")
    assert loaded.launch_of("sft") == {"num_processes": 4, "use_cpu": True, "machine_rank": 0}
    assert [loaded.processes(name) for name in loaded.stages] == [4, 1, 1]
    assert loaded.launch_of("candidates") == loaded.launch_of("dpo") == {}
    again = recipe.load(_written(loaded, tmp_path))
    assert [again.launch_of(name) for name in again.stages] == [loaded.launch_of(name) for name in loaded.stages]


def _written(loaded: recipe.Recipe, folder: Path) -> str:
    (folder / "resolved.yaml").write_text(recipe.to_yaml(loaded))
    return str(folder / "resolved.yaml")


def test_a_file_of_accelerate_is_read_and_the_other_keys_go_before_it(tmp_path):
    for name, text in (("a.yaml", yaml.safe_dump(ASKED)), ("a.json", json.dumps(ASKED))):
        (tmp_path / name).write_text(text)
        assert load_config_from_file(str(tmp_path / name)).num_processes == 4, "Accelerate takes it"
        loaded = load(tmp_path, f"launch: {name}")
        assert loaded.launch_of("sft")["fsdp_config"] == ASKED["fsdp_config"]
        assert loaded.processes("sft") == 4 and "mixed_precision" not in loaded.launch_of("sft")
        assert load(tmp_path, f"launch: {name}", "launch.num_processes=2").processes("sft") == 2
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(ASKED | {"tpu_name": "pod", "fsdp_config": {"fsdp_verzion": 2}}))
    with pytest.raises(InputError) as refused:
        load(tmp_path, "launch: b.yaml")
    assert [str(error.place).partition(": ")[2] for error in refused.value.all] == [
        "fsdp_config.fsdp_verzion",
        "tpu_name",
    ]


@pytest.mark.parametrize(
    ("text", "place", "message", "hint"),
    [
        ("debug: false\nnum_processes: two\n", "a.yaml:2:16: num_processes", "got 'two'", "see `accelerate config`"),
        ("num_processes: 3\nnum_machines: 2\nmain_process_ip: b", "a.yaml:1:16: num_processes", "do not div", "each"),
        ("num_processes: 2\n  debug: b\n", "a.yaml:2:8", "this is not YAML", "check indentation"),
        ("debug: false\ndebug: true\n", "a.yaml:2:1: debug", "is written twice", "keep one"),
        ("num_processes: 2\ndistributed_type: NO\n", "a.yaml:2:1: distributed_type", "NO` contradicts", "remove it"),
        ("num_processes: 2\ndistributed_type: false\n", "a.yaml:2:1: distributed_type", "type: false`", "MULTI_GPU"),
        ("num_processes: 2\ndistributed_type: XLA\n", "a.yaml:2:1: distributed_type", "TPU", "it may be MULTI_GPU"),
        ("config_file: b.yaml\nnum_processes: 2\n", "a.yaml:1:1: config_file", "names no other one", "remove it"),
        ("num_processes: 2\nfp16: true\n", "a.yaml:2:1: fp16", "mixed_precision: fp16", "remove it"),
        ("num_processes: 2\nfsdp_config:\n  fsdp_sharding_strategy: 1\n  fsdp_use_orig_params: true\n",
         "a.yaml:3:3: fsdp_config.fsdp_sharding_strategy", "`fsdp_use_orig_params` are of FSDP's", "to-fsdp2"),
        ("num_processes: 2\nuse_cpu: true\ndistributed_type: MULTI_GPU\n", "a.yaml:3:1: distributed_type",
         "MULTI_GPU` contradicts", "`use_cpu`"),
        # Keys of Accelerate's SageMakerConfig.
        ("base_job_name: accelerate-sagemaker-1\ncompute_environment: AMAZON_SAGEMAKER\ndistributed_type: 'NO'\n"
         "ec2_instance_type: ml.p3.2xlarge\niam_role_name: role\nmixed_precision: 'no'\nnum_machines: 2\nregion: us\n",
         "a.yaml:2:22: compute_environment", "this file is for SageMaker", "`This machine`"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_said_of_its_own_line_and_key(tmp_path, monkeypatch, text, place, message, hint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(text)
    for written in (["launch: a.yaml"], ["", "launch=a.yaml"]):
        with pytest.raises(InputError) as refused:
            load(tmp_path, *written)
        (error,) = refused.value.all
        assert error.place == place and message in error.message and hint in error.hint


def test_a_file_in_json_has_keys_without_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").write_text('{"num_processes": "two"}')
    with pytest.raises(InputError) as refused:
        load(tmp_path, "launch: a.json")
    assert refused.value.place == "a.json: num_processes"


@pytest.mark.parametrize("file", sorted(TEMPLATES.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_file_that_trl_ships_is_taken_or_refused_for_a_reason(tmp_path, file):
    refused = {"fsdp1": "first version", "single_gpu": "`distributed_type: NO` contradicts `num_processes: 8`"}
    if file.stem in refused:
        with pytest.raises(InputError, match=refused[file.stem]):
            load(tmp_path, f"launch: {file}")
    else:
        assert load(tmp_path, f"launch: {file}").processes("sft") == 8


def test_words_in_a_file_are_true_or_false_where_accelerate_takes_them_so(tmp_path):
    """PyYAML reads YAML 1.1."""
    text = "distributed_type: NO\ndebug: no\nsame_network: yes\ntpu_use_sudo: off\nuse_cpu: On\nfp16: no\n"
    (tmp_path / "a.yaml").write_text(text)
    assert load_config_from_file(str(tmp_path / "a.yaml")).use_cpu is True
    assert load(tmp_path, "launch: a.yaml").launch == {"debug": False, "use_cpu": True, "num_processes": 1}
    (tmp_path / "a.yaml").write_text(
        "num_processes: 2\nmain_process_port: null\nfsdp_config: {fsdp_offload_params: no}"
    )
    divided = {"fsdp_version": 2, "fsdp_offload_params": False}
    assert load(tmp_path, "launch: a.yaml").launch == {"num_processes": 2, "fsdp_config": divided}
    with pytest.raises(InputError, match="expected true or false, got 'no'"):
        load(tmp_path, "launch: {num_processes: 2, use_cpu: no}")


def test_what_accelerate_config_writes_of_one_machine_and_what_scripts_for_any_number_say_is_accepted(tmp_path):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(ASKED | {"gpu_ids": "all", "main_process_ip": None}))
    assert load(tmp_path, "launch: a.yaml").processes("sft") == 4
    asked = {"distributed_type": "NO", "num_processes": 1, "gpu_ids": "0", "machine_rank": 0, "num_machines": 1}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(asked))
    assert load(tmp_path, "launch: a.yaml").launch_of("sft") == {}
    of_any = [f"launch.{one}" for one in ("num_processes=2", "num_machines=1", "machine_rank=0", "main_process_ip=a")]
    assert load(tmp_path, "", *of_any).launch == {"num_processes": 2, "num_machines": 1}


def test_a_key_of_a_file_can_be_taken_back(tmp_path):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"num_processes": 2, "gpu_ids": "0,1"}))
    with pytest.raises(InputError, match="beside `use_cpu` `gpu_ids` would change nothing"):
        load(tmp_path, "", "launch=a.yaml", "launch.use_cpu=true")
    found = load(tmp_path, "", "launch=a.yaml", "launch.use_cpu=true", "launch.gpu_ids=null").launch
    assert found == {"num_processes": 2, "use_cpu": True}


def test_one_process_on_the_cpu_is_started_without_a_gpu(tmp_path):
    loaded = load(tmp_path, "launch: {num_processes: 1, use_cpu: true}")
    assert loaded.launch_of("sft") == {"num_processes": 1, "use_cpu": True, "machine_rank": 0}
    assert inputs(loaded) == inputs(load(tmp_path))


def test_launch_in_a_recipe_that_trains_nothing_is_refused(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "model: {path: tiny}\nlaunch: auto\nstages:\n  one: {kind: sample, data: tiny:prompts}\n"
    )
    with pytest.raises(InputError, match="no stage of this recipe trains") as refused:
        recipe.load(str(tmp_path / "r.yaml"))
    assert str(refused.value.place).endswith("r.yaml:2:1: launch")


def test_gpus_that_are_named_and_not_visible_are_said_before_anything_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "can_be_counted", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    require_devices(load(tmp_path, "launch: {num_processes: 2, gpu_ids: '6, 4'}"), ["sft"])
    with pytest.raises(InputError, match="`gpu_ids` names GPU 1, and those that are visible here are 4, 5, 6") as one:
        require_devices(load(tmp_path, "launch: {num_processes: 2, gpu_ids: '4,1'}"), ["sft"])
    assert str(one.value.place).endswith(": launch.gpu_ids")
    assert load(tmp_path, "launch: {num_processes: auto, gpu_ids: '4,5'}").processes("sft") == 2


@pytest.mark.parametrize("name", ["a.yaml", "a.json"])
def test_a_file_of_deepspeed_is_sought_beside_the_file_that_names_it(tmp_path, name):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "ds.json").write_text("{}")
    config = {"deepspeed_config_file": "ds.json"}
    (tmp_path / "configs" / name).write_text(json.dumps({"num_processes": 2, "deepspeed_config": config}))
    for written in ([f"launch: configs/{name}"], ["", f"launch=configs/{name}"]):
        found = load(tmp_path, *written).launch["deepspeed_config"]["deepspeed_config_file"]
        assert found == str(tmp_path / "configs" / "ds.json")
    own = f"launch: {{config_file: configs/{name}, deepspeed_config: {{deepspeed_config_file: configs/ds.json}}}}"
    assert load(tmp_path, own).launch["deepspeed_config"]["deepspeed_config_file"] == found


def test_a_file_is_read_as_recipes_are_and_what_is_switched_off_is_passed_over(tmp_path):
    off = "dynamo_backend: NO\nipex_config: {ipex: false}\ndowncast_bf16: no\nmixed_precision: no\n"
    (tmp_path / "a.yaml").write_text(f"distributed_type: NO\nnum_processes: 1\n{off}")
    loaded, origins = recipe.load_with_origins(write(tmp_path, "launch: a.yaml"), ["model.dtype=float32"])
    assert loaded.launch == {"num_processes": 1}
    assert origin_of(("launch", "num_processes"), origins) == "a.yaml:2"
    (tmp_path / "a.yaml").write_text("distributed_type: MULTI_CPU\nnum_processes: 2\nuse_cpu: true\n")
    assert load(tmp_path, "launch: a.yaml").processes("sft") == 2


def test_a_model_cannot_be_divided_by_keys_of_a_stage_that_samples(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("model: {path: tiny}\nlaunch: {num_processes: 4}\nstages:\n  sft: {data: tiny:demonstrations}\n"
                    "  reward: {data: tiny:preferences}\n  ppo: {data: tiny:prompts}\n")  # fmt: skip
    with pytest.raises(InputError, match="samples from a base that each process holds whole") as refused:
        recipe.load(str(file), ["ppo.launch.fsdp_config.fsdp_version=2"])
    assert len(refused.value.all) == 1 and "{num_processes: 4}" in refused.value.hint
    with pytest.raises(InputError, match="`num_processes` is missing") as refused:
        recipe.load(str(file), ["sft.launch.fsdp_config.fsdp_version=2"])
    assert "replaces that at the top" in refused.value.hint


def test_auto_is_as_many_as_there_are_gpus_or_one_without(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert load(tmp_path, "launch: auto").processes("sft") == 3
    two = load(tmp_path, "launch: {num_processes: auto, num_machines: 2, main_process_ip: a}", "launch.machine_rank=1")
    assert (two.processes("sft"), two.machine_rank, two.launch_of("dpo")["machine_rank"]) == (6, 1, 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert load(tmp_path, "launch: auto").launch_of("sft") == {}


def test_the_number_of_a_machine_is_enough_at_the_top_where_a_stage_has_several(tmp_path):
    own = ", launch: {num_processes: 2, use_cpu: true, num_machines: 2, main_process_ip: there}"
    second = load(tmp_path, "", "launch.machine_rank=1", own=own)
    assert (second.machine_rank, second.launch_of("dpo")["machine_rank"], second.launch_of("sft")) == (1, 1, {})
    again = recipe.load(_written(second, tmp_path))
    assert (again.machine_rank, again.launch_of("dpo")) == (1, second.launch_of("dpo"))
    for rank, own_keys, said in (
        (2, own, "there is no machine 2 among 2"),
        ("two", own, "got 'two'"),
        (1, ", launch: {num_processes: 2}", "`num_processes` is missing"),
        (1, "", "`num_processes` is missing"),
    ):
        with pytest.raises(InputError, match=said) as refused:
            load(tmp_path, "", f"launch.machine_rank={rank}", own=own_keys)
        assert len(refused.value.all) == 1


def test_fewer_gpus_than_processes_are_said_before_anything_trains(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    loaded = load(tmp_path, "launch: {num_processes: 2}")
    with pytest.raises(InputError, match="2 processes on this machine need a GPU each, and there is 1 here"):
        require_devices(loaded, ["sft"])
    require_devices(loaded, ["candidates"])
    said = io.StringIO()
    say_processes(loaded, Console(file=said, width=200))
    assert "sft, dpo: trained by 2 processes; `run` refuses that here: 2 processes on this machine" in said.getvalue()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    require_devices(loaded, ["sft"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    require_devices(load(tmp_path, "launch: {num_processes: 2, use_cpu: true}"), ["sft"])


def test_the_fingerprint_has_the_rows_of_a_step_and_not_where_they_are(tmp_path):
    alone = inputs(load(tmp_path, "", "sft.trainer.per_device_train_batch_size=8"))
    two = inputs(load(tmp_path, "launch: {num_processes: 2, use_cpu: true}"))
    assert two == alone
    assert inputs(load(tmp_path, "launch: {num_processes: 4}"))["trainer.per_device_train_batch_size"] == 16
    far = "launch: {num_processes: 2, num_machines: 2, main_process_ip: there, main_process_port: 1234}"
    assert inputs(load(tmp_path, far)) == inputs(load(tmp_path, far, "launch.machine_rank=1")) == two
    divided = inputs(load(tmp_path, "launch: {num_processes: 2, fsdp_config: {fsdp_offload_params: true}}"))
    assert divided == two | {"launch.fsdp_config.fsdp_offload_params": True, "launch.fsdp_config.fsdp_version": 2}
    of_dpo = inputs(load(tmp_path, "launch: {num_processes: 2}"), "dpo")
    assert of_dpo["trainer.per_device_train_batch_size"] == 16, "TRL's default for each is 8"


def test_deepspeed_that_is_not_installed_is_said_before_anything_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    loaded = load(tmp_path, "launch: {num_processes: 2, deepspeed_config: {zero_stage: 2}}")
    with pytest.raises(InputError, match="DeepSpeed is not installed") as raised:
        require_devices(loaded, ["sft"])
    assert (raised.value.hint, "launch.deepspeed_config" in str(raised.value.place)) == (INSTALL, True)
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert f"pip install '{project['optional-dependencies']['deepspeed'][0]}'" in INSTALL


def test_a_file_of_deepspeed_counts_by_what_it_holds(tmp_path):
    found = []
    for stage in (2, 3, 3):
        (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        launch = "launch: {num_processes: 2, deepspeed_config: {deepspeed_config_file: ds.json}}"
        found.append(inputs(load(tmp_path, launch)))
    assert found[1] == found[2] != found[0]
    with pytest.raises(InputError, match="there is no file"):
        load(tmp_path, launch.replace("ds.json", "other.json"))


@pytest.mark.parametrize(
    ("config", "divides"),
    [("zero_stage: 3", True), ("zero_stage: 2", False), ("deepspeed_config_file: ds.json", True)],
)
def test_zero_3_divides_the_base_also_where_a_file_of_deepspeed_says_so(tmp_path, config, divides):
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    loaded = load(tmp_path, f"launch: {{num_processes: 2, deepspeed_config: {{{config}}}}}")
    assert loaded.divides("sft") is divides


def test_the_keys_are_those_of_the_installed_accelerate():
    ours = {"config_file"}
    assert set(library_keys.accepted("launch")) - ours == set(ClusterConfig.__dataclass_fields__)
    assert {"fsdp_version", "fsdp_transformer_layer_cls_to_wrap"} <= set(options("fsdp_config"))
    assert {"zero_stage", "deepspeed_config_file"} <= set(options("deepspeed_config"))


def test_another_file_leaves_behind_what_the_recipe_below_said(tmp_path):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"num_processes": 3}))
    write(tmp_path, "launch: {num_processes: 2, use_cpu: true}")
    (tmp_path / "top.yaml").write_text("extends: r.yaml\nlaunch: a.yaml\n")
    assert recipe.load(str(tmp_path / "top.yaml")).launch_of("sft") == {"num_processes": 3, "machine_rank": 0}
    (tmp_path / "top.yaml").write_text("extends: r.yaml\nlaunch: {num_processes: 4}\n")
    assert recipe.load(str(tmp_path / "top.yaml")).launch_of("sft")["use_cpu"] is True
