"""A smoke through the real command: the recipe's own stages, on its own rows, and nothing left behind."""

import csv
import gzip
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import pytest
from processes import Started
from transformers import AutoConfig

from rlhf_pipeline import kinds
from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.ppo.config import PPOConfig
from rlhf_pipeline.recipe import TINY
from rlhf_pipeline.rundir import file_digests
from rlhf_pipeline.smoke import cut, worker

RECIPE = """
name: mine
model: {path: qwen, quantization: nf4, dtype: float16, attention: flash_attention_2}
lora: {r: 4, lora_alpha: 8, target_modules: [q_proj, down_proj]}
evaluate: {data: tiny:heldout, judge: "my_judge:judge", n: 50, max_new_tokens: 100}
launch: {num_processes: 8}
stages:
  sft:
    data: {mix: [{path: demonstrations.jsonl, weight: 2}, {path: tiny:demonstrations, weight: 1}], eval_fraction: 0.05}
    trainer: {max_steps: 5000, learning_rate: 1e-3, tf32: true, eval_steps: 500, warmup_steps: 100}
  reward:
    data: {path: pairs.csv.gz, columns: {prompt: question, chosen: better, rejected: worse}, eval_fraction: 0.1}
    gates: {eval_accuracy: ">= 1.1"}
  ppo:
    data: {path: tiny:prompts, eval_data: tiny:prompts}
    trainer: {total_episodes: 100000, num_mini_batches: 4, num_ppo_epochs: 4, response_length: 500, eval_steps: 100}
  dpo: {data: tiny:preferences, trainer: {per_device_train_batch_size: 64, gradient_accumulation_steps: 8}}
"""
JUDGE = """
def judge(prompts, completions, **columns):
    assert len(prompts) <= 2
    return [float(len(completion)) for completion in completions]
"""
ROWS = 200


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def places(folder: Path) -> dict[str, str]:
    """The environment of a smoke in a folder: places of its own for what it may leave."""
    (folder.parent / "tmp").mkdir()
    own = {"TMPDIR": "tmp", "XDG_CACHE_HOME": "cache", "HF_DATASETS_CACHE": "datasets"}
    return {name: str(folder.parent / place) for name, place in own.items()} | {"HF_HUB_OFFLINE": "1"}


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`rlhf-pipeline smoke recipe.yaml` beside the recipe, by processes that have imported already."""
    out, err = folder.parent / "out.txt", folder.parent / "err.txt"
    with out.open("w") as stdout, err.open("w") as stderr:
        process = Started(
            ["smoke", "recipe.yaml", *arguments],
            folder,
            places(folder),
            stderr.fileno(),
            stdout.fileno(),
            prepare=fork_the_worker,
        )
    return subprocess.CompletedProcess([], process.wait(180), out.read_text(), err.read_text())


def fork_the_worker() -> None:
    """In the process of a command: have what makes the tiny checkpoint be a fork of it."""

    def forked(command: list[str], *, stdout: TextIO, **_: Any) -> subprocess.CompletedProcess[str]:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                for place in (1, 2):
                    os.dup2(stdout.fileno(), place)
                code = worker.main(command[-1])
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        return subprocess.CompletedProcess(command, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    cut.subprocess = SimpleNamespace(run=forked, DEVNULL=subprocess.DEVNULL)
    file_digests.SETTLED_S = -1.0  # what files hold is remembered at once
    sys.dont_write_bytecode = True  # as a variable has it in new processes


def write(folder: Path, recipe: str, judge: str = JUDGE) -> Path:
    folder.mkdir()
    (folder / "recipe.yaml").write_text(recipe)
    (folder / "my_judge.py").write_text(judge)
    return folder


def shipped(name: str) -> list[dict]:
    return [json.loads(line) for line in (TINY / "data" / f"{name}.jsonl").open()][:ROWS]


@pytest.fixture(scope="module")
def smoked(tmp_path_factory, tokenizer):
    """A recipe of four stages for a large model without any weights, smoked once: folder, what was kept, and said."""
    folder = write(tmp_path_factory.mktemp("smoke") / "mine", RECIPE)
    config = AutoConfig.for_model(
        "qwen3", num_key_value_heads=8, head_dim=128, vocab_size=1100, pad_token_id=0, eos_token_id=1, bos_token_id=None
    )
    config.save_pretrained(folder / "qwen")
    tokenizer.save_pretrained(folder / "qwen")
    (folder / "qwen" / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")  # a header of no weights
    with (folder / "demonstrations.jsonl").open("w") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in shipped("demonstrations"))
    with gzip.open(folder / "pairs.csv.gz", "wt", newline="") as lines:
        table = csv.writer(lines)
        table.writerow(["question", "better", "worse"])
        table.writerows([row["prompt"], row["chosen"], row["rejected"]] for row in shipped("preferences"))
    before = tree(folder)
    done = run(folder, "--json", "--keep", "../kept")
    assert done.returncode == 0, done.stderr
    assert tree(folder) == before
    assert list((folder.parent / "tmp").iterdir()) == []
    assert not (folder.parent / "cache").exists() and not (folder.parent / "datasets").exists()
    return folder, folder.parent / "kept", done


class TestFourStages:
    def test_each_goes_through_and_is_told_of(self, smoked):
        report = json.loads(smoked[2].stdout)
        assert report["ok"] and report["failure"] is None
        assert [(stage["name"], stage["state"]) for stage in report["stages"]] == [
            ("sft", "ok"), ("reward", "ok"), ("ppo", "ok"), ("dpo", "ok")
        ]  # fmt: skip
        assert all(stage["first"] is not None and stage["seconds"] > 0 for stage in report["stages"])
        assert report["notes"] == [
            "`launch` is left out: one process runs each stage",
            "`dtype: float16` needs a GPU: bfloat16 is used instead",
            "`attention: flash_attention_2` needs a GPU: `auto` is used instead",
            "`tf32`: left out, since a CPU does not use them"
        ]  # fmt: skip
        assert report["seconds"] < 120

    def test_what_validate_warns_of_is_said_of_the_first_rows(self, smoked):
        """And not what follows from there being so few of them: DPO's batch is of 512 pairs."""
        warnings = json.loads(smoked[2].stdout)["warnings"]
        assert [f"warning: {warning}" for warning in warnings] == [
            line for line in smoked[2].stderr.splitlines() if line.startswith("warning: ")
        ]
        said = "\n".join(warnings)
        assert "stages.ppo.data: the prompts of 8 of 8 (100%) held-out rows are trained on too" in said
        assert "stages.reward.trainer.learning_rate is not set" in said
        assert "fewer than one batch" not in said

    def test_model_is_a_small_one_of_the_same_architecture(self, smoked):
        config = json.loads((smoked[1] / "model" / "config.json").read_text())
        assert (config["model_type"], config["num_hidden_layers"], config["hidden_size"]) == ("qwen3", 2, 64)
        assert config["vocab_size"] > 1024

    def test_rows_are_the_first_ones_under_their_own_names(self, smoked):
        folder, kept, _ = smoked
        rows = (folder / "demonstrations.jsonl").read_text().splitlines()[: cut.ROWS]
        assert [json.loads(line) for line in (kept / "data" / "sft-1.jsonl").open()] == [
            json.loads(row) for row in rows
        ]
        with (kept / "data" / "reward-1.csv").open(newline="") as lines:
            pairs = list(csv.DictReader(lines))
        first = shipped("preferences")[0]
        assert pairs[0] == {"question": first["prompt"], "better": first["chosen"], "worse": first["rejected"]}
        assert len(pairs) == cut.ROWS

    def test_settings_are_the_recipes_but_for_size(self, smoked):
        """Two steps, with evaluation; the same LoRA, quantization, wiring and learning rate."""
        run = smoked[1] / "runs" / "mine"
        loaded = recipes.load(str(run / "recipe.yaml"))
        assert loaded.model.quantization == "nf4"
        assert loaded.stages["sft"].trainer["learning_rate"] == 1e-3
        assert [source.weight for source in loaded.stages["sft"].data.sources] == [2, 1]
        assert (loaded.stages["ppo"].init, loaded.stages["ppo"].reward) == ("sft", "reward")
        for stage in ("sft", "reward", "ppo", "dpo"):
            adapter = json.loads((run / stage / "adapter" / "adapter_config.json").read_text())
            assert (adapter["r"], set(adapter["target_modules"])) == (4, {"q_proj", "down_proj"})
            steps = [json.loads(line) for line in (run / stage / "metrics.jsonl").open()]
            assert {row["step"] for row in steps if "gold/kl" not in row} == {1, 2}
            record = json.loads((run / stage / "stage.json").read_text())
            assert record["machine"]["device"].endswith(("CPU thread", "CPU threads"))
            evaluated = {"sft": "eval_loss", "reward": "eval_accuracy", "ppo": "eval_objective/kl"}.get(stage)
            assert evaluated is None or evaluated in record["metrics"]
            assert stage == "reward" or record["metrics"]["judge_mean"] >= 0


@pytest.mark.slow
def test_failure_is_told_and_nothing_is_left(tmp_path):
    """A hub model that cannot be had has a stand-in, the stage after the failed one does not run, exit code 1."""
    recipe = """
model: {path: nobody/no-such-model-7b, quantization: none, chat_template_kwargs: {enable_thinking: false}}
lora: {target_modules: [c_attn, q_proj]}
evaluate: {data: tiny:heldout, judge: "my_judge:judge"}
stages:
  sft: {data: nobody/no-such-data}
  dpo: {data: tiny:preferences}
"""
    judge = """
def judge(prompts, completions, **columns):
    if completions == ["A reply."] * 2:  # the check's
        return [0.0, 1.0]
    raise ValueError("no!")
"""
    folder = write(tmp_path / "mine", recipe, judge)
    before = tree(folder)
    done = run(folder)
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert lines, done.stderr
    assert lines[0].startswith("sft      failed  ") and "no!" in lines[0]
    assert lines[1:] == ["dpo      not run"]
    notes = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
    assert len(notes) == 4
    assert "nobody/no-such-model-7b is not available" in notes[0]
    assert "the shipped tokenizer and a Llama are used instead" in notes[0]
    assert "`all-linear` is used instead" in notes[1]
    assert "`chat_template_kwargs` belong to the model's own chat template" in notes[2]
    assert "rows of the tiny world are used instead" in notes[3]
    assert "Traceback" not in done.stderr and str(tmp_path / "tmp") not in done.stderr
    assert "hint: `--keep FOLDER` keeps the whole log" in done.stderr
    assert tree(folder) == before
    assert list((tmp_path / "tmp").iterdir()) == []
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("second", "said"), [
    ('{"prompt": "a", "completion"', ":2: this line is not JSON"),
    ('{"prompt": "a", "answered": "b"}', ": the columns (prompt, answered) are not demonstrations"),
])  # fmt: skip
def test_bad_rows_are_a_fault_of_the_recipe(tmp_path, second, said):
    """Exit code 2, with the user's own file, as `run` says it: found in that file, or in the rows taken from it."""
    folder = write(tmp_path / "mine", "model: {path: tiny}\nstages:\n  sft: {data: rows.jsonl}\n")
    (folder / "rows.jsonl").write_text(f'{{"prompt": "a"}}\n{second}\n')
    before = tree(folder)
    done = run(folder)
    assert done.returncode == 2
    assert done.stdout == ""
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"{folder}/rows.jsonl{said}" in error
    assert tree(folder) == before
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [
    "model: {path: tiny}\nstages:\n  sft: {data: tiny:demonstration}\n",
    "model: {path: tiny}\nstages:\n  sft: {data: tiny:demonstrations, trainer: {learning_rat: 1}}\n",
])  # fmt: skip
def test_fault_of_the_recipe_is_found_without_torch(tmp_path, recipe):
    folder = write(tmp_path / "mine", recipe)
    done = run(folder)
    assert done.returncode == 2
    assert "did you mean" in done.stderr or "tiny:demonstrations" in done.stderr


@pytest.mark.parametrize("trainer", [
    {},
    {"num_mini_batches": 8, "per_device_train_batch_size": 64, "gradient_accumulation_steps": 4},
    {"whiten_rewards": True, "num_mini_batches": 2},
    {"whiten_rewards": True, "per_device_train_batch_size": 1},
    {"max_steps": 100, "warmup_steps": 50},
    {"num_train_epochs": 3, "eval_strategy": "steps", "eval_delay": 20},
    {"value_warmup_updates": 20, "save_strategy": "no"},
])  # fmt: skip
def test_two_small_updates_of_ppo_are_possible_whatever_the_recipe_says(trainer, tmp_path):
    settings = dict(trainer)
    cut._cut_ppo(settings)
    args = PPOConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    assert args.total_episodes == 2 * batch <= 64
    assert args.response_length <= 16


@pytest.mark.parametrize(("lora", "named"), [
    ({"target_modules": "all-linear"}, False),
    ({"target_modules": ["fc1", "q_proj"]}, False),
    ({"target_modules": r".*\.layers\.(1|23)\.self_attn\.q_proj"}, True),
    ({"target_modules": ["model.layers.30.mlp.down_proj"]}, True),
    ({"target_modules": ["q_proj"], "layers_to_transform": [30, 31]}, True),
    ({"target_modules": ["q_proj"], "rank_pattern": {"layers.5.self_attn.q_proj": 8}}, True),
])  # fmt: skip
def test_lora_that_names_layers_by_number_needs_all_of_them(lora, named):
    assert cut._names_layers(lora) is named


@pytest.mark.slow
def test_ctrl_c_ends_it_and_leaves_nothing(tmp_path):
    """As every other command, with the exit code of a shell."""
    (tmp_path / "recipe.yaml").write_text("model: {path: tiny}\nstages:\n  sft: {data: tiny:demonstrations}\n")
    (tmp_path / "temporary").mkdir()
    command = [sys.executable, "-m", "rlhf_pipeline", "smoke", "recipe.yaml"]
    environment = os.environ | {"TMPDIR": str(tmp_path / "temporary")}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as smoke:
        while not any((tmp_path / "temporary").glob("rlhf-smoke-*/data")):
            assert smoke.poll() is None
            time.sleep(0.05)
        smoke.send_signal(signal.SIGINT)
        said = smoke.communicate(timeout=60)[1]
    assert (smoke.returncode, said.splitlines()[-1]) == (130, "interrupted")
    assert not any((tmp_path / "temporary").iterdir())
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("kind", kinds.KINDS, ids=lambda kind: kind.name)
def test_the_tiny_world_has_rows_of_every_kind_to_stand_in(kind: kinds.Kind) -> None:
    assert (cut.TINY / "data" / f"{cut.OF_TINY.get(kind.reads, kind.reads)}.jsonl").is_file()
