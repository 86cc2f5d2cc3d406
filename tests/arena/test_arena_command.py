"""The commands `label` and `arena` as people type them: links, several people, a clean end, a sentence for a fault."""

import contextlib
import importlib.util
import json
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from arena_server import Browser, serving, together
from safetensors.numpy import save_file

from rlhf_pipeline import cli
from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.arena import serving as serving_page
from rlhf_pipeline.arena import sources
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.recipe.rows import DIMENSIONS
from rlhf_pipeline.run import runner
from rlhf_pipeline.run.launch import Launcher
from rlhf_pipeline.rundir import items
from rlhf_pipeline.rundir.choices import Target
from rlhf_pipeline.rundir.labels import Label, Labels, Pair

ROWS = [{"prompt": f"p {number}", "replies": ["a", "b", "a"]} for number in range(40)]
Say = Callable[..., tuple[int, str, str]]


def write(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def say(tmp_path: Path, monkeypatch, capfd) -> Say:
    """The command itself, in this process."""

    def main(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["rlhf-pipeline", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capfd.readouterr()

    return main


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_the_page_is_shown_to_several_people_until_it_is_stopped(tmp_path: Path, stop: signal.Signals) -> None:
    write(tmp_path / "rows.jsonl", ROWS)
    with serving("arena", "--data", "rows.jsonl", "--people", "alice, bob", folder=tmp_path) as server:
        assert list(server.links) == ["", "alice", "bob"]
        browsers = [Browser(server.links[name]) for name in server.links]
        assert "</html>" in browsers[1].client.get("/").text
        states = [browser.client.get("/api/session").json() for browser in browsers]
        assert [state["person"] for state in states] == [serving_page.owner_name([]), "alice", "bob"]
        assert [state["is_owner"] for state in states] == [True, False, False]
        together(browsers, lambda browser: [browser.click() for _ in range(5)])
        assert browsers[0].client.get("/api/people").json()["people"][0]["labels"] == 5
        code, said = server.end(stop)
    assert code == 0
    assert said.splitlines() == ["0 labels; Ctrl-C ends, and every label is saved as it is made", "stopped: 15 labels"]
    with Labels(tmp_path / "rows.jsonl.labels.db") as labels:
        assert labels.count("arena") == 15


@pytest.mark.slow
def test_all_addresses_are_opened_aloud_and_who_is_not_asked_any_more_stays_out(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", ROWS)
    with serving("arena", "--data", "rows.jsonl", "--people", "alice", folder=tmp_path) as server:
        before = server.links["alice"].partition("?")[2]
    arguments = ("arena", "--data", "rows.jsonl", "--host", "0.0.0.0", "--people", "bob")
    with serving(*arguments, folder=tmp_path) as server:
        browser = Browser(server.links["bob"])
        assert browser.client.get(f"/?{before}").status_code == 401
        assert browser.client.get("/", headers={"host": "evil.example"}).status_code == 403
        code, said = server.end(signal.SIGINT)
    assert code == 0 and said.startswith("warning: this opens the page for every machine that reaches ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["arena"], "error: name a run, or a file with --data"),
        (["arena", "runs/x", "--data", "rows.jsonl"], "error: name a run, or a file with --data"),
        (["arena", "--data", "none.jsonl"], "error: --data none.jsonl: there is no such file"),
        (["arena", "--data", "same.jsonl"], "error: same.jsonl: no row has two replies that differ"),
        (["arena", "--data", "odd.jsonl"], "error: odd.jsonl: the columns (x) are not candidates; those need "),
        (["arena", "--data", "rows.jsonl", "--columns", "x"], "error: --columns: `x` names no columns"),
        (["arena", "--data", "rows.jsonl", "--people", "a,a"], "error: --people: a stands there twice"),
        (["arena", "--data", "rows.jsonl", "--people", "a,"], "error: --people: '' is no name for a person"),
        (["arena", "--data", "rows.jsonl", "--people", "<b>"], "error: --people: '<b>' is no name for a person"),
        (["arena", "--data", "rows.jsonl", "--host", "no.such.invalid"], "error: --host no.such.invalid: there is no "),
        (["arena", "--data", "rows.jsonl", "--host", ".."], "error: --host ..: there is no such address"),
        (["arena", "--data", "rows.jsonl", "--host", ""], "error: --host '': there is no such address"),
        (["arena", "--data", "rows.jsonl", "--host", "192.0.2.77"], "error: --host 192.0.2.77: this machine has no su"),
        (["arena", "--data", "."], "error: --data .: this is a folder"),
        (["arena", "--data", "alone.jsonl"], "error: alone.jsonl: row 1: `replies` should be two replies or more"),
        (["arena", "--data", "space.jsonl"], "error: space.jsonl: no row has two replies that differ"),
        (["arena", "--data", "rows.jsonl", "--as", "feedback"], "error: --as feedback: it says what `--export` writes"),
        (["label", "none", "--as", "labels"], "error: --as labels: it says what `--export` writes"),
        (["arena", "--data", "rows.jsonl", "--export", "x.jsonl", "--open"], "error: --open: no page is shown with "),
        (["label", "none", "--import", "x.jsonl", "--people", "a"], "error: --people: no page is shown with "),
        (
            ["arena", "--data", "rows.jsonl", "--import", "none.json"],
            "error: --import none.json: there is no such file",
        ),
        (["label", "none"], "error: none: "),
    ],
)
def test_a_fault_is_one_sentence(say: Say, tmp_path: Path, arguments: list[str], says: str) -> None:
    write(tmp_path / "rows.jsonl", ROWS)
    write(tmp_path / "same.jsonl", [{"prompt": "p", "replies": ["a", "a"]}])
    write(tmp_path / "odd.jsonl", [{"x": "p"}])
    write(tmp_path / "alone.jsonl", [{"prompt": "p", "replies": ["a"]}])
    write(tmp_path / "space.jsonl", [{"prompt": "p", "replies": ["a", "a \n"]}])
    code, out, err = say(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(says) and "Traceback" not in err and len(err.splitlines()) <= 2
    if ".jsonl: " in says and "--data" not in says:  # the rows are not what is needed
        assert "`--columns prompt=YOURS,replies=YOURS`" in err and "kind ppo" not in err


def test_a_port_that_is_taken_is_said(say: Say, tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", ROWS)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, _, err = say("arena", "--data", "rows.jsonl", "--port", port)
    assert code == 2
    assert err == f"error: --port {port}: port {port} is taken\nhint: `--port 0` takes one that is free\n"


def test_labels_that_are_damaged_are_said_and_stay(say: Say, tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "rows.jsonl.labels.db").write_bytes(b"no labels " * 100)
    code, _, err = say("arena", "--data", "rows.jsonl")
    assert code == 2 and err.startswith("error: rows.jsonl.labels.db: these labels are damaged")
    assert (tmp_path / "rows.jsonl.labels.db").read_bytes() == b"no labels " * 100


def test_what_is_not_installed_is_said(say: Say, tmp_path: Path, monkeypatch) -> None:
    write(tmp_path / "rows.jsonl", ROWS)
    find = importlib.util.find_spec
    absent = ("starlette", "markdown_it")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find(name))
    code, _, err = say("arena", "--data", "rows.jsonl")
    assert (code, err) == (
        2,
        "error: the page needs starlette and markdown-it-py, which are not installed\n"
        "hint: pip install starlette markdown-it-py, as the extra `arena` does\n",
    )


def test_labels_are_written_and_read_without_a_page(say: Say, tmp_path: Path, monkeypatch) -> None:
    file = write(tmp_path / "rows.jsonl", ROWS)
    with Labels(tmp_path / "rows.jsonl.labels.db") as labels:
        setup = sources.of_file(str(file), {})
        pair = sources_pair(setup)
        labels.add(Label("12345678", pair.key, "arena", "anna", "first"), pair)
    # Who only writes and reads files needs none of the page's libraries.
    for name in ("starlette", "uvicorn", "markdown_it", "pygments"):
        monkeypatch.setitem(sys.modules, name, None)
    code, out, err = say("arena", "--data", "rows.jsonl", "--export", "clicks.jsonl", "--as", "labels")
    assert (code, out, err) == (0, "", "1 row of labels in clicks.jsonl\n")
    (tmp_path / "rows.jsonl.labels.db").unlink()
    code, _, err = say("arena", "--data", "rows.jsonl", "--import", "clicks.jsonl", "--export", "pairs.jsonl")
    assert (code, err) == (0, "1 of 1 labels are new\n1 row of preferences in pairs.jsonl\n")


def sources_pair(setup: sources.Setup) -> Any:
    first = setup.items[0]
    return Pair.of(first.key, first.prompt, *first.replies[:2])


# What a run has to show

LABELLED = """\
name: t
model: {path: tiny, quantization: none, dtype: float32}
stages:
  first: {kind: label, data: rows.jsonl}
  second: {kind: label, data: rows.jsonl, until: {labels: 5, reward_accuracy: ">= 0.7"}, dimensions: [tone]}
"""


@pytest.fixture
def waiting(tmp_path: Path) -> Path:
    """The directory of a run in which the first stage is done, and the second one waits."""
    write(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "t.yaml").write_text(LABELLED, encoding="utf-8")
    run = tmp_path / "runs" / "t"
    for stage, folder in (("first", run / "first"), ("second", run / "second" / "work")):
        folder.mkdir(parents=True)
        items.write(folder / "items.jsonl", [items.item(f"{stage} {number}", ["a", "b"]) for number in range(6)])
        save_file({"features": np.eye(12, dtype=np.float32)}, folder / "features.safetensors")
    (run / ".lock").touch()
    (run / "recipe.yaml").write_text(recipes.to_yaml(recipes.load(str(tmp_path / "t.yaml"))), encoding="utf-8")
    return run


def test_the_stage_that_waits_is_labelled(waiting: Path) -> None:
    setup = sources.of_stage(waiting, recipes.of_run(waiting), None)
    assert (setup.title, setup.stage, setup.mode, setup.dimensions) == ("t", "second", "label", ["tone"])
    assert setup.target == Target(labels=5, reward_accuracy=">= 0.7")
    assert [one.prompt for one in setup.items] == [f"second {number}" for number in range(6)]
    assert setup.features is not None and setup.features.shape == (12, 12) and setup.features.dtype == np.float32
    assert setup.command == f"rlhf-pipeline run {waiting}"


def test_a_stage_is_labelled_by_its_name_also_when_it_is_done(waiting: Path) -> None:
    setup = sources.of_stage(waiting, recipes.of_run(waiting), "first")
    assert (setup.stage, setup.target) == ("first", Target(per_item=1))
    assert tuple(setup.dimensions) == DIMENSIONS and setup.items[0].prompt == "first 0"


def test_a_finished_run_shows_the_items_of_its_label_stage_apart(waiting: Path) -> None:
    setup = sources.of_run(waiting, recipes.of_run(waiting))
    assert (setup.stage, setup.mode, setup.target) == ("arena", "arena", None)
    assert setup.items[0].prompt == "second 0" and setup.features is not None


def test_a_stage_with_nothing_to_label_yet_says_so(say: Say, waiting: Path) -> None:
    (waiting / "second" / "work" / "items.jsonl").unlink()
    code, _, err = say("label", "t.yaml", "second")
    assert code == 2
    assert err == (
        f"error: {waiting}: stage `second` has nothing to label yet\n"
        f"hint: `rlhf-pipeline run {waiting}` goes as far as that\n"
    )
    assert sources.of_stage(waiting, recipes.of_run(waiting), None).stage == "first"


@pytest.mark.parametrize(
    ("features", "says"),
    [
        (np.eye(11, dtype=np.float32), "these are not finite features of the 12 replies in items.jsonl"),
        (np.full((12, 2), np.nan, np.float32), "these are not finite features"),
        (np.zeros(12, np.float32), "these are not finite features"),
        (None, "the features cannot be read"),
    ],
)
def test_features_of_something_else_are_said(waiting: Path, features: Any, says: str) -> None:
    file = waiting / "second" / "work" / "features.safetensors"
    if features is None:
        file.write_bytes(b"torn")
    else:
        save_file({"features": features}, file)
    with pytest.raises(InputError, match=says):
        sources.of_stage(waiting, recipes.of_run(waiting), None)


def test_without_features_people_label_all_the_same(waiting: Path) -> None:
    (waiting / "second" / "work" / "features.safetensors").unlink()
    assert sources.of_stage(waiting, recipes.of_run(waiting), None).features is None


@pytest.mark.slow
def test_the_same_labels_in_the_page_and_in_the_run(waiting: Path) -> None:
    with serving("label", str(waiting), folder=waiting) as server:
        browser = Browser(server.links[""])
        state = browser.client.get("/api/session").json()
        assert (state["title"], state["stage"], state["has_features"]) == ("t", "second", True)
        together([browser], lambda browser: [browser.click() for _ in range(5)])
        code, said = server.end(signal.SIGINT)
    assert code == 0 and said.splitlines()[-1].startswith("stopped: 5 of 5 labels, accuracy of the reward ")
    with Labels(waiting / "labels.db") as labels:
        assert labels.count("second") == 5 and labels.stages() == ["second"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with a recipe, and nothing made yet."""
    folder = tmp_path / "runs" / "tiny-sample"
    folder.mkdir(parents=True)
    (folder / ".lock").touch()
    loaded = recipes.load("tiny-best-of-n", [f"output_dir={folder.parent}", f"name={folder.name}"])
    (folder / "recipe.yaml").write_text(recipes.to_yaml(loaded), encoding="utf-8")
    return folder


def test_a_run_shows_the_replies_of_its_sample_stage(run: Path) -> None:
    loaded = recipes.of_run(run)
    (stage,) = [name for name, one in loaded.stages.items() if one.kind == "sample"][-1:]
    (run / stage).mkdir()
    write(run / stage / "rows.jsonl", [*ROWS, {"prompt": "alone", "replies": ["a", "a"], "sampled": {}}])
    setup = sources.of_run(run, loaded)
    assert (setup.title, setup.stage, setup.mode, setup.target) == ("tiny-sample", "arena", "arena", None)
    assert len(setup.items) == 40 and setup.items[0].replies == ["a", "b"]


def test_a_run_without_one_shows_what_its_policies_said(run: Path) -> None:
    replies = {"base": {"text": "a"}, "sft": {"text": "b"}, "dpo": {"text": "b"}}
    rows = [{"prompt": "p", "replies": replies}, {"prompt": "q", "replies": {"base": {"text": "a"}}}, "odd"]
    (run / "comparison.json").write_text(json.dumps({"rows": rows}), encoding="utf-8")
    setup = sources.of_run(run, recipes.of_run(run))
    assert [(one.prompt, one.replies) for one in setup.items] == [("p", ["a", "b"])]


def test_a_run_with_nothing_to_show_says_so(run: Path) -> None:
    with pytest.raises(InputError, match="no prompt with two replies that differ"):
        sources.of_run(run, recipes.of_run(run))
    with pytest.raises(InputError, match="no stage of this run is labelled by people"):
        sources.of_stage(run, recipes.of_run(run), None)
    with pytest.raises(InputError, match="there is no `nothing`"):
        sources.of_stage(run, recipes.of_run(run), "nothing")


@pytest.fixture
def finished(tiny_run: Path, warm_server: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a run that is done, whose replies the warm server reads."""
    monkeypatch.setattr(runner, "Launcher", lambda *_, **__: contextlib.nullcontext(warm_server))
    return Path(shutil.copytree(tiny_run, tmp_path / "tiny"))


def test_what_a_finished_run_shows_is_read_once_by_its_reward_model(finished: Path) -> None:
    said, loaded = list[str](), recipes.of_run(finished)
    setup = sources.of_run(finished, loaded)
    assert setup.features is None
    first = sources.with_features(setup, finished, loaded, said.append)
    assert [line.partition(",")[0] for line in said] == ["reading the replies with `reward`"]
    assert first.features is not None and len(first.features) == sum(len(one.replies) for one in setup.items)
    again = sources.with_features(setup, finished, loaded, said.append)
    assert len(said) == 1 and np.array_equal(again.features, first.features)
    other = sources.with_features(setup._replace(items=setup.items[:2]), finished, loaded, said.append)
    assert len(said) == 2 and len(other.features) == sum(len(one.replies) for one in setup.items[:2])


def test_replies_that_cannot_be_read_are_labelled_all_the_same(finished: Path) -> None:
    said, loaded = list[str](), recipes.of_run(finished)
    loaded.model.path = str(finished / "gone")
    setup = sources.with_features(sources.of_run(finished, loaded), finished, loaded, said.append)
    assert setup.features is None
    assert said[-1].startswith("note: nothing learns along, since the replies cannot be read: ")
