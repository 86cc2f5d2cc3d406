"""Content counts, not its date: files by what they hold, hub models and datasets by their commit."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import processes
import pytest

from rlhf_pipeline import fingerprint, plan
from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.fingerprint import Digests
from rlhf_pipeline.recipe.schema import Data, Model
from rlhf_pipeline.rundir import file_digests

OLD, NEW, OTHER = "a" * 40, "b" * 40, "c" * 40
CLOCK = time.time


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that digests are remembered in; none yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rlhf-pipeline" / "digests.jsonl"


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock by which every file of the test has been as it is for a minute."""
    monkeypatch.setattr(file_digests.time, "time", lambda: CLOCK() + 60)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a"}\n')
    return file


def remembered(memory: Path) -> list[str]:
    """The files of a memory, one for each of its lines; all of these can be read."""
    return [json.loads(line)[0] for line in memory.read_text().splitlines()]


def of(path: Path) -> str:
    """The digest of a data file as a fresh process would find it."""
    return Digests().of_data(Data(path=str(path)))


def digest_all(cache: str, prefix: str) -> None:
    """In a process of its own: find the digests of twenty files."""
    os.environ["XDG_CACHE_HOME"] = cache
    file_digests.SETTLED_S = -1.0
    for number in range(20):
        of(Path(f"{prefix}-{number}.jsonl"))


class TestMemory:
    def test_a_file_is_read_once_and_again_only_after_a_change(self, memory, settled, rows, monkeypatch):
        first = of(rows)
        read = []
        real = fingerprint.hashlib.file_digest
        monkeypatch.setattr(fingerprint.hashlib, "file_digest", lambda *given: read.append(1) or real(*given))
        assert of(rows) == first and read == []
        rows.write_text('{"prompt": "b"}\n')
        assert of(rows) != first and read == [1]

    def test_the_same_size_and_date_with_other_content_is_noticed(self, memory, settled, rows):
        """A file replaced by a tool that keeps dates: only the time of the change itself tells."""
        first, state = of(rows), rows.stat()
        rows.write_text('{"prompt": "b"}\n')
        os.utime(rows, ns=(state.st_atime_ns, state.st_mtime_ns))
        assert (rows.stat().st_size, rows.stat().st_mtime_ns) == (state.st_size, state.st_mtime_ns)
        assert of(rows) != first

    def test_a_new_date_on_the_same_content_changes_nothing(self, memory, settled, rows):
        first = of(rows)
        os.utime(rows, (1, 1))
        assert of(rows) == first

    def test_a_file_that_has_just_changed_is_not_remembered(self, memory, rows):
        """Written again within the resolution of the clock, it could keep size and times."""
        assert of(rows).startswith("rows.jsonl@")
        assert not memory.exists()

    def test_a_memory_that_is_full_keeps_the_newer_half_of_what_is_there(self, memory, settled, tmp_path, monkeypatch):
        files = [tmp_path / f"{number}.jsonl" for number in range(10)]
        for file in files:
            file.write_text(file.name)
            of(file)
        files[7].write_text("other")
        of(files[7])
        assert remembered(memory) == [str(file) for file in (*files, files[7])]
        monkeypatch.setattr(file_digests, "MOST_BYTES", memory.stat().st_size - 1)
        files[9].unlink()
        (tmp_path / "new.jsonl").touch()
        of(tmp_path / "new.jsonl")
        assert remembered(memory) == [str(tmp_path / name) for name in (
            "4.jsonl", "5.jsonl", "6.jsonl", "8.jsonl", "7.jsonl", "new.jsonl"
        )]  # fmt: skip
        monkeypatch.setattr(file_digests.hashlib, "file_digest", lambda *_: pytest.fail("a file was read"))
        assert of(files[7]) != of(files[8])

    def test_of_a_hundred_files_each_is_written_once(self, memory, settled, tmp_path):
        """Nothing that was remembered before is written again."""
        written = []
        for number in range(100):
            (tmp_path / f"{number}.txt").touch()
            before = memory.stat().st_size if memory.exists() else 0
            of(tmp_path / f"{number}.txt")
            written.append(memory.stat().st_size - before)
            if number == 0:
                inode = memory.stat().st_ino
        assert max(written) < min(written) + 10 and memory.stat().st_ino == inode

    @pytest.mark.parametrize(
        "line", ["{", "[]", "7", '{"a": 1}', '["a", 1, 2]', '["a", "x", 1, 1, "d"]', "\udc80", "[" * 100_000, '["a", 1']
    )
    def test_a_spoilt_line_is_passed_over(self, memory, settled, rows, tmp_path, monkeypatch, line):
        expected = of(rows)
        with memory.open("ab") as lines:
            lines.write(line.encode("utf-8", "surrogateescape"))  # cut short: without its line break
        (tmp_path / "other.jsonl").touch()
        other = of(tmp_path / "other.jsonl")
        monkeypatch.setattr(file_digests.hashlib, "file_digest", lambda *_: pytest.fail("a file was read"))
        assert (of(rows), of(tmp_path / "other.jsonl")) == (expected, other)

    def test_a_place_that_cannot_be_written_to_is_no_error(self, settled, rows, tmp_path, monkeypatch):
        """A file where the folder should be keeps everybody out, root as well."""
        (tmp_path / "no-folder").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no-folder"))
        assert of(rows) == of(rows)

    def test_without_the_variable_it_is_below_the_home(self, settled, rows, tmp_path, monkeypatch):
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        of(rows)
        assert (tmp_path / "home" / ".cache" / "rlhf-pipeline" / "digests.jsonl").is_file()

    @pytest.mark.slow
    def test_processes_at_once_lose_nothing(self, memory, tmp_path):
        """Eight processes write to it at the same time: every line is whole, and there."""
        for i in range(8):
            for j in range(20):
                (tmp_path / f"{i}-{j}.jsonl").write_text(f"{i} {j}")
        started = [
            processes.context().Process(target=digest_all, args=(str(memory.parents[1]), f"{tmp_path}/{i}"))
            for i in range(8)
        ]
        for one in started:
            one.start()
        for one in started:
            one.join()
        assert [one.exitcode for one in started] == [0] * 8
        assert sorted(remembered(memory)) == sorted(
            str(tmp_path / f"{i}-{j}.jsonl") for i in range(8) for j in range(20)
        )
        assert [file.name for file in memory.parent.iterdir()] == ["digests.jsonl"]

    def test_a_file_that_cannot_be_read_is_an_input_error(self, memory, tmp_path):
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "config.json").symlink_to(tmp_path / "nowhere")
        with pytest.raises(InputError) as caught:
            Digests().of_model(Model(path=str(folder)))
        assert caught.value.place == str(folder / "config.json")


class TestSources:
    """Globs, folders, mixes: what they are made of counts, wherever it lies."""

    @pytest.fixture
    def folder(self, tmp_path):
        folder = tmp_path / "rows"
        folder.mkdir()
        for name in ("a.jsonl", "b.jsonl.gz", "c.csv"):
            (folder / name).write_text(name)
        return folder

    @pytest.mark.parametrize("pattern", ["rows", "rows/*", "*/*"])
    @pytest.mark.parametrize(
        ("change", "counts"),
        [
            (lambda folder: (folder / "a.jsonl").write_text("other"), True),
            (lambda folder: (folder / "d.json").write_text("d"), True),
            (lambda folder: (folder / "c.csv").unlink(), True),
            (lambda folder: (folder / "c.csv").rename(folder / "c.json"), True),
            (lambda folder: (folder / "readme.md").write_text("d"), False),
        ],
    )
    def test_names_and_contents_of_all_files_count(self, memory, folder, pattern, change, counts):
        path = folder.parent / pattern
        before = of(path)
        change(folder)
        assert (of(path) != before) == counts
        assert before.startswith(f"{path.name}@")

    @pytest.mark.parametrize("pattern", ["rows", "rows/*", "*/*.csv"])
    def test_where_they_lie_does_not_count(self, memory, folder, pattern, tmp_path):
        before = of(tmp_path / pattern)
        (tmp_path / "elsewhere").mkdir()
        shutil.move(folder, tmp_path / "elsewhere" / "rows")
        assert of(tmp_path / "elsewhere" / pattern) == before

    def test_a_mix_is_what_its_sources_are(self, memory, rows, folder):
        mix = Data(mix=[{"path": str(rows), "weight": 2.0}, {"path": str(folder)}, {"path": "org/x", "revision": OLD}])
        assert Digests().of_data(mix) == f"{of(rows)} + {of(folder)} + org/x@{OLD}"

    def test_eval_data_have_a_value_of_their_own(self, memory, rows, folder):
        data = Data(path=str(rows), eval_data={"path": str(folder)})
        assert Digests().of_data(data) == of(rows)
        assert Digests().of_source(data.eval_data) == of(folder)


class TestModelFolder:
    @pytest.fixture
    def folder(self, tmp_path):
        folder = tmp_path / "base"
        (folder / "parts").mkdir(parents=True)
        for name in (
            "config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "chat_template.jinja", "merges.txt",
            "modeling_own.py", "parts/more.py", "README.md",
        ):  # fmt: skip
            (folder / name).write_text("one")
        return folder

    @pytest.mark.parametrize("trusted", [False, True])
    @pytest.mark.parametrize(
        ("name", "counts"),
        [
            ("config.json", (True, True)),
            ("model-00001-of-00002.safetensors", (True, True)),
            ("tokenizer.model", (True, True)),
            ("chat_template.jinja", (True, True)),
            ("merges.txt", (True, True)),
            ("modeling_own.py", (False, True)),
            ("parts/more.py", (False, True)),
            ("README.md", (False, False)),
        ],
    )
    def test_what_decides_what_is_loaded_counts(self, memory, folder, name, counts, trusted):
        spec = Model(path=str(folder), trust_remote_code=trusted)
        before = Digests().of_model(spec)
        (folder / name).write_text("two")
        after = Digests().of_model(spec)
        assert (before != after) == counts[trusted]
        assert before.startswith("base@")

    def test_a_file_that_changes_its_name_is_a_change(self, memory, folder):
        spec = Model(path=str(folder))
        before = Digests().of_model(spec)
        (folder / "merges.txt").rename(folder / "vocab.txt")
        assert Digests().of_model(spec) != before


class TestJudge:
    @pytest.fixture
    def places(self, tmp_path, monkeypatch):
        """The recipe's folder and the current folder."""
        for name in ("recipe", "here"):
            (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / "here")
        return tmp_path / "recipe", tmp_path / "here"

    def test_its_source_counts_and_is_not_imported(self, memory, places, tmp_path):
        mark = tmp_path / "mark"
        file = places[0] / "my_own_judge.py"
        file.write_text(f"open({str(mark)!r}, 'w')\n")
        before = Digests().of_function("my_own_judge:judge", places[:1])
        file.write_text("# another\n" + file.read_text())
        after = Digests().of_function("my_own_judge:judge", places[:1])
        assert before != after and before.startswith("my_own_judge.py@")
        assert not mark.exists() and "my_own_judge" not in sys.modules

    def test_beside_the_recipe_comes_before_the_current_folder(self, memory, places):
        (places[1] / "near.py").write_text("here")
        here = Digests().of_function("near:judge", places[:1])
        (places[0] / "near.py").write_text("beside the recipe")
        assert Digests().of_function("near:judge", places[:1]) not in (None, here)

    def test_in_a_package_without_importing_it(self, memory, places, tmp_path):
        package = places[0] / "judges" / "strict"
        package.mkdir(parents=True)
        (places[0] / "judges" / "__init__.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\n")
        (package / "one.py").write_text("1")
        before = Digests().of_function("judges.strict.one:judge", places[:1])
        (package / "one.py").write_text("2")
        assert Digests().of_function("judges.strict.one:judge", places[:1]) not in (None, before)
        assert not (tmp_path / "mark").exists()

    def test_the_tiny_worlds_is_found_where_it_is_installed(self, memory, places):
        assert Digests().of_function("rlhf_pipeline.models.tiny.world:judge", places[:1]).startswith("world.py@")

    def test_an_installed_module_is_what_a_worker_would_import(self, memory, places):
        """A file of the same name beside the recipe is not what is run, so it is not what counts."""
        before = Digests().of_function("json.decoder:judge", places[:1])
        (places[0] / "json").mkdir()
        for name in ("__init__.py", "decoder.py"):
            (places[0] / "json" / name).write_text("")
        assert Digests().of_function("json.decoder:judge", places[:1]) == before is not None

    @pytest.mark.parametrize("judge", ["nowhere_at_all:judge", "json.nothing:judge", "json.decoder.deeper:f", "sys:f"])
    def test_one_that_has_no_file_is_none(self, memory, places, judge):
        assert Digests().of_function(judge, places[:1]) is None


def test_a_changed_judge_judges_again_and_trains_nothing(load, settled, tmp_path):
    (tmp_path / "my_judge.py").write_text("1")
    offline = ("model.path=tiny", "reward.data=tiny:preferences", "dpo.data=tiny:preferences")
    overrides = (*offline, "evaluate.data=tiny:heldout", "evaluate.judge=my_judge:judge")
    before = planned(load(*overrides))
    (tmp_path / "my_judge.py").write_text("2")
    after = planned(load(*overrides))
    assert changed(before, after) == set()
    assert {name for name in after if before[name].judging != after[name].judging} == {"sft", "ppo", "dpo"}


class Hub:
    """A server that says which commit a name stands for, and remembers what it was asked."""

    def __init__(self) -> None:
        self.commits: dict[str, str] = {}
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                hub.asked.append(path)
                commit = hub.commits.get(path)
                body = json.dumps({"id": "x/y", "sha": commit} if commit else {"error": "not found"}).encode()
                self.send_response(200 if commit else 404)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"


def reach(monkeypatch: pytest.MonkeyPatch, address: str, cache: Path) -> None:
    """Let the hub library, which reads its settings once, ask there, and look into that cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.close_session()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    reach(monkeypatch, hub.address, tmp_path / "hub")
    hub.commits = {"/api/models/org/base": OLD, "/api/datasets/org/pairs": OLD, "/api/datasets/org/asked": OLD}
    yield hub
    hub.server.shutdown()
    hub.server.server_close()
    huggingface_hub.close_session()


RECIPE = """\
name: t
model: {path: org/base, quantization: none}
lora: {r: 4, target_modules: all-linear}
evaluate: {data: org/asked, judge: "rlhf_pipeline.models.tiny.world:judge"}
stages:
  sft: {data: tiny:demonstrations}
  reward: {data: org/pairs}
  ppo: {data: tiny:prompts}
  dpo: {data: org/pairs}
"""


@pytest.fixture
def load(tmp_path: Path, memory: Path):
    (tmp_path / "r.yaml").write_text(RECIPE)
    return lambda *overrides: recipes.load(str(tmp_path / "r.yaml"), overrides)


def planned(recipe: recipes.Recipe) -> dict[str, plan.StagePlan]:
    return {stage.name: stage for stage in plan.make(recipe)}


def changed(before: dict[str, plan.StagePlan], after: dict[str, plan.StagePlan]) -> set[str]:
    return {name for name in after if before[name].fingerprint != after[name].fingerprint}


class TestPin:
    def test_every_name_on_the_hub_is_asked_once_and_written_down(self, hub, load):
        recipe = load("sft.data=org/pairs")
        plans = planned(recipe)
        assert sorted(hub.asked) == sorted(hub.commits)
        assert recipe.model.revision == OLD
        assert {recipe.stages[name].data.revision for name in ("sft", "reward", "dpo")} == {OLD}
        assert recipe.stages["ppo"].data.revision is None
        assert recipe.evaluate.data.revision == OLD
        assert recipes.to_yaml(recipe).count(OLD) == 5
        assert plans["dpo"].inputs["model"] == f"org/base@{OLD}"
        assert plans["dpo"].inputs["data"] == f"org/pairs@{OLD}"
        assert not any("revision" in key for stage in plans.values() for key in [*stage.inputs, *(stage.judging or {})])
        planned(recipe)
        assert len(hub.asked) == 3, "a commit is not asked for again"

    @pytest.mark.parametrize(
        ("name", "stages"),
        [
            ("/api/models/org/base", {"sft", "reward", "ppo", "dpo"}),
            ("/api/datasets/org/pairs", {"reward", "ppo", "dpo"}),
            ("/api/datasets/org/asked", set()),
        ],
    )
    def test_a_new_commit_changes_the_stages_that_use_it(self, hub, load, name, stages):
        before = planned(load())
        assert changed(before, planned(load())) == set()
        hub.commits[name] = NEW
        after = planned(load())
        assert changed(before, after) == stages
        judged = {stage for stage in after if before[stage].judging != after[stage].judging}
        assert judged == ({"sft", "ppo", "dpo"} if name.endswith("asked") else set())

    def test_the_reason_names_both_commits(self, hub, load):
        before = planned(load())
        hub.commits["/api/models/org/base"] = NEW
        (reason,) = plan._changes(before["sft"].inputs, planned(load())["sft"], processes=1)
        assert reason == f"model changed: org/base ({OLD[:8]}) → org/base ({NEW[:8]})"

    def test_the_sources_of_a_mix_and_held_out_data_are_asked_as_well(self, hub, load):
        recipe = load("dpo.data.path=tiny:preferences", "reward.data.path=tiny:preferences")
        recipe.stages["dpo"].data = Data(
            mix=[{"path": "org/pairs"}, {"path": "org/pairs", "revision": OTHER}],
            eval_data={"path": "org/asked"},
        )
        fingerprint.pin(recipe)
        data = recipe.stages["dpo"].data
        assert [source.revision for source in data.mix] == [OLD, OTHER]
        assert data.eval_data.revision == OLD
        assert sorted(hub.asked) == sorted(hub.commits)

    def test_a_classifiers_commit_is_pinned_and_counts(self, hub, load):
        """Its label is its name; that another commit is another reward, the fingerprint knows."""
        hub.commits["/api/models/org/judge"] = OLD
        rewards = "ppo.rewards=[{model: org/judge, weight: 0.5}]"
        before = planned(recipe := load(rewards))
        assert recipe.stages["ppo"].rewards[0].revision == OLD
        assert before["ppo"].inputs["rewards.0.model"] == f"org/judge@{OLD}"
        hub.commits["/api/models/org/judge"] = NEW
        assert changed(before, planned(load(rewards))) == {"ppo"}

    def test_a_branch_is_resolved_and_a_commit_is_not_asked_for(self, hub, load):
        hub.commits["/api/models/org/base/revision/v1.0"] = NEW
        branch = load("model.revision=v1.0", f"evaluate.data.revision={OTHER}")
        fingerprint.pin(branch)
        assert branch.model.revision == NEW
        assert branch.evaluate.data.revision == OTHER
        assert "/api/datasets/org/asked" not in hub.asked

    def test_the_same_data_at_two_commits_are_two(self, hub, load):
        recipe = load(f"dpo.data.revision={OTHER}")
        plans = planned(recipe)
        assert plans["reward"].inputs["data"] == f"org/pairs@{OLD}"
        assert plans["dpo"].inputs["data"] == f"org/pairs@{OTHER}"

    def test_a_recipe_without_hub_names_asks_nothing(self, hub, load):
        recipe = load("model.path=tiny", "evaluate=null", "reward.data=tiny:preferences", "dpo.data=tiny:preferences")
        planned(recipe)
        assert hub.asked == []
        assert recipe.model.revision is None

    def test_an_answer_that_is_no_commit_is_not_believed(self, hub, load):
        hub.commits["/api/models/org/base"] = "main"
        recipe = load()
        fingerprint.pin(recipe)
        assert recipe.model.revision is None


def remember(cache: Path, kind: str, name: str, revision: str, commit: str) -> None:
    """What the hub library leaves in its cache when it has downloaded a repository."""
    refs = cache / f"{kind}s--{name.replace('/', '--')}" / "refs"
    refs.mkdir(parents=True, exist_ok=True)
    (refs / revision).write_text(commit)


class TestWithoutTheHub:
    @pytest.fixture(params=["offline", "closed", "unknown name"])
    def cut_off(self, request, tmp_path, monkeypatch):
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            reach(monkeypatch, f"http://127.0.0.1:{closed.getsockname()[1]}", tmp_path / "hub")
        if request.param == "offline":
            monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        if request.param == "unknown name":
            monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", request.getfixturevalue("hub").address)
            request.getfixturevalue("hub").commits.clear()
        return tmp_path / "hub"

    def test_the_cache_tells_the_commit(self, cut_off, load):
        remember(cut_off, "model", "org/base", "main", OLD)
        remember(cut_off, "model", "org/base", "v1.0", NEW)
        remember(cut_off, "dataset", "org/pairs", "main", OTHER)
        recipe = load()
        assert planned(recipe)["dpo"].inputs["model"] == f"org/base@{OLD}"
        assert (recipe.model.revision, recipe.stages["dpo"].data.revision) == (OLD, OTHER)
        recipe = load("model.revision=v1.0")
        fingerprint.pin(recipe)
        assert recipe.model.revision == NEW

    def test_without_a_cache_the_name_stands_as_given(self, cut_off, load):
        recipe = load()
        plans = planned(recipe)
        assert plans["sft"].inputs["model"] == "org/base"
        assert plans["dpo"].inputs["data"] == "org/pairs"
        assert recipe.model.revision is None
        assert changed(plans, planned(load("model.revision=v1.0"))) == set(plans)

    def test_a_spoilt_cache_is_no_commit(self, cut_off, load):
        remember(cut_off, "model", "org/base", "main", "not a commit")
        recipe = load()
        fingerprint.pin(recipe)
        assert recipe.model.revision is None


def test_a_hub_that_does_not_answer_is_waited_for_only_shortly(tmp_path, monkeypatch, load):
    monkeypatch.setattr("rlhf_pipeline.hub.TIMEOUT_S", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        reach(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path / "hub")
        recipe = load("evaluate=null", "reward.data=tiny:preferences", "dpo.data=tiny:preferences")
        started = time.monotonic()
        fingerprint.pin(recipe)
        assert 0.4 < time.monotonic() - started < 2
    assert recipe.model.revision is None


@pytest.mark.slow
def test_the_command_asks_the_hub_that_the_environment_names(hub, load, tmp_path):
    """The real process, which reads the settings itself: three questions, nothing else, and no torch."""
    program = (
        "import json, sys\nfrom rlhf_pipeline import plan, recipe\n"
        "plans = plan.make(recipe.load('r.yaml'))\n"
        "print(json.dumps([plans[0].inputs['model'], 'torch' in sys.modules, 'huggingface_hub' in sys.modules]))\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS"))}
    environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert json.loads(done.stdout) == [f"org/base@{OLD}", False, True], done.stderr
    assert sorted(hub.asked) == sorted(hub.commits)
    hub.asked.clear()
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment | {"HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert json.loads(done.stdout) == ["org/base", False, True], done.stderr
    assert hub.asked == []


def test_a_plan_without_hub_names_does_not_import_the_hub_library(load, tmp_path):
    (tmp_path / "r.yaml").write_text("name: t\nmodel: {path: tiny}\nstages:\n  sft: {data: tiny:demonstrations}\n")
    program = (
        "import sys\nfrom rlhf_pipeline import plan, recipe\nplan.make(recipe.load('r.yaml'))\n"
        "sys.exit('huggingface_hub' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=tmp_path, timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("override", "place"),
    [("model.revision=main", "model.revision"), ("sft.data.revision=main", "stages.sft.data.revision")],
)
def test_a_revision_of_a_local_file_is_refused(tmp_path, override, place):
    (tmp_path / "r.yaml").write_text("model: {path: tiny}\nstages:\n  sft: {data: tiny:demonstrations}\n")
    with pytest.raises(InputError, match="`revision` has no effect") as caught:
        recipes.load(str(tmp_path / "r.yaml"), [override])
    assert caught.value.place == f"override `{override}`" and caught.value.hint == "remove it"
    (tmp_path / "model").mkdir()
    shutil.copytree(recipes.TINY / "checkpoint", tmp_path / "model" / "tiny")
    with pytest.raises(InputError, match="`revision` has no effect"):
        recipes.load(str(tmp_path / "r.yaml"), ["model.path=model/tiny", override])
