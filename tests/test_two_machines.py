"""Two network namespaces as two machines with a shared folder: they train together, stop together, and miss each other.

It takes root. How one hears that another is gone is tried below without, in less time.
"""

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import short_run
import yaml

from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.errors import InputError, InputErrors, Interrupted, RunError, Waiting
from rlhf_pipeline.run import machines, ranks, runner, signals
from rlhf_pipeline.rundir import state
from rlhf_pipeline.rundir.layout import RunDirectory
from rlhf_pipeline.terminal.live import plain_line
from rlhf_pipeline.terminal.watching import RunView

FIRST, SECOND = "10.77.3.1", "10.77.3.2"
RECIPE = {
    "name": "far",
    "model": {"path": "tiny", "quantization": "none", "dtype": "float32"},
    "launch": {"num_processes": 2, "num_machines": 2, "main_process_ip": FIRST, "use_cpu": True},
    "stages": {
        "sft": {
            "data": {"path": "tiny:demonstrations", "limit": 64},
            "trainer": {"max_steps": 400, "per_device_train_batch_size": 2, "save_steps": 2},
        }
    },
}


@pytest.fixture
def namespaces() -> Iterator[list[str]]:
    """Two that are connected to each other and to nothing else."""
    names = [f"rlhf{os.getpid()}{which}" for which in "ab"]
    commands = [
        *(f"ip netns add {name}" for name in names),
        f"ip link add veth0 netns {names[0]} type veth peer name veth1 netns {names[1]}",
    ]
    for i, (name, address) in enumerate(zip(names, (FIRST, SECOND), strict=True)):
        commands += [f"ip -n {name} addr add {address}/24 dev veth{i}"]
        commands += [f"ip -n {name} link set {link} up" for link in (f"veth{i}", "lo")]
    try:
        for command in commands:
            try:
                subprocess.run(command.split(), check=True, capture_output=True, text=True)
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"network namespaces are not to be had here: {getattr(error, 'stderr', '') or error}")
        yield names
    finally:
        for name in names:
            for process in _inside(name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            with contextlib.suppress(OSError):
                subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _inside(namespace: str) -> list[int]:
    """The processes of a namespace."""
    with contextlib.suppress(OSError):
        said = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False).stdout
        return [int(word) for word in said.split()]
    return []


class Machine:
    """`rlhf-pipeline run` in a namespace."""

    def __init__(self, namespace: str, folder: Path, number: int) -> None:
        self.namespace, self._log = namespace, folder / f"said-{number}-{time.monotonic_ns()}.txt"
        words = ["ip", "netns", "exec", namespace, sys.executable, "-m", "rlhf_pipeline", "run", "far.yaml"]
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [*words, f"launch.machine_rank={number}"], cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1"}, start_new_session=True,
            )  # fmt: skip

    @property
    def said(self) -> str:
        return self._log.read_text(errors="replace")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="network namespaces are Linux's")
def test_two_machines_stop_together_and_one_misses_the_other(tmp_path, namespaces):
    (tmp_path / "far.yaml").write_text(yaml.safe_dump(RECIPE))
    work = tmp_path / "runs" / "far" / "sft" / "work"

    def start() -> list[Machine]:
        return [Machine(name, tmp_path, number) for number, name in reversed(list(enumerate(namespaces)))][::-1]

    def wait_for(step: int, both: list[Machine]) -> None:
        deadline = time.monotonic() + 120
        while (short_run.sound_step(work) or 0) < step:
            said = "\n".join(one.said for one in both)
            assert time.monotonic() < deadline and all(one.process.poll() is None for one in both), said
            time.sleep(0.05)

    both = start()
    wait_for(4, both)
    os.killpg(both[1].process.pid, signal.SIGTERM)  # as a terminal's Ctrl-C, and SLURM, which reach all processes
    assert [one.process.wait(60) for one in both] == [130, 130], [one.said for one in both]
    step = short_run.sound_step(work)
    for one in both:
        assert f"stage `sft` stopped, with a checkpoint at step {step}\n" in one.said
    assert "with 2 processes on 2 machines" in both[0].said and "takes its part in sft" in both[1].said

    both = start()
    wait_for(step + 4, both)
    began = time.monotonic()
    for process in _inside(namespaces[0]):
        with contextlib.suppress(ProcessLookupError):  # it ends with its parent
            os.kill(process, signal.SIGKILL)
    assert both[1].process.wait(60) == 1, both[1].said
    assert time.monotonic() - began < 60 and not _inside(namespaces[1]), "within a minute, and nothing is left"
    assert "error: machine 0 has given no sign for 30 s, so this one has ended its processes, too" in both[1].said
    assert re.search(rf"^sft     resumes from step {step} of 400$", both[0].said, re.MULTILINE)
    assert short_run.sound_step(work) >= step + 4


# What one machine hears of another, without processes that train.


@pytest.fixture
def far(tmp_path, monkeypatch) -> recipes.Recipe:
    """The recipe on the second machine, with short times."""
    for name, value in (("BEAT_S", 0.1), ("SILENT_S", 0.6), ("COME_S", 1.0), ("POLL_S", 0.02)):
        monkeypatch.setattr(machines, name, value)
    (tmp_path / "far.yaml").write_text(yaml.safe_dump(RECIPE))
    return recipes.load(str(tmp_path / "far.yaml"), ["launch.machine_rank=1"])


def ends(far: recipes.Recipe, error: BaseException | None) -> BaseException | None:
    """How the second machine ends when the first one ends so."""

    def lead() -> None:
        with contextlib.suppress(BaseException), machines.leading(far):
            time.sleep(0.3)
            if error:
                raise error

    first = threading.Thread(target=lead)
    first.start()
    try:
        machines.follow(far, lambda _: None)
    except (Exception, Interrupted) as raised:
        return raised
    finally:
        first.join()
    return None


def test_the_others_end_as_the_first_one_does(far):
    assert ends(far, None) is None
    for error in (RunError("a", hint="b"), Interrupted("c"), Waiting("d", hint="e"), InputError("f", hint="g")):
        found = ends(far, error)
        assert (type(found), found.message, getattr(found, "hint", None)) == (
            type(error), error.message, getattr(error, "hint", None),
        )  # fmt: skip
    assert isinstance(ends(far, KeyboardInterrupt()), Interrupted)
    assert ends(far, Interrupted("stopped", then="it begins again")).then == "it begins again"
    assert str(ends(far, ZeroDivisionError("h")).message) == "h"


def test_all_faults_that_the_first_one_found_are_said_with_their_places(far):
    faults = [InputError("it is empty", place="rows.jsonl: row 1", hint="fill it"), InputError("so is it", place="b")]
    found = ends(far, InputErrors(faults))
    assert [(str(one), one.hint) for one in found.all] == [(str(one), one.hint) for one in faults]
    assert str(ends(far, faults[0])) == "rows.jsonl: row 1: it is empty"


def test_a_machine_that_is_stopped_while_it_waits_leaves_nothing_behind(tmp_path):
    (tmp_path / "far.yaml").write_text(yaml.safe_dump(RECIPE))
    words = [sys.executable, "-m", "rlhf_pipeline", "run", "far.yaml", "launch.machine_rank=1"]
    waiting = subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert "waits for machine 0" in waiting.stderr.readline()
    waiting.send_signal(signal.SIGINT)
    said = waiting.communicate(timeout=30)[1]
    assert said == (
        "machine 1 was stopped while it waited for machine 0\nnothing had begun; the same command waits again\n"
    )
    assert waiting.returncode == 130 and not (tmp_path / "runs").exists()


def test_a_stop_while_another_process_is_looked_for_is_said_alike(far, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(machines, "refuse_if_taken", interrupt)
    with pytest.raises(Interrupted, match="machine 1 was stopped while it waited for machine 0") as raised:
        machines.follow(far, lambda _: None)
    assert raised.value.then == "nothing had begun; the same command waits again"


def test_a_machine_does_not_wait_where_there_is_nothing_to_do(far, monkeypatch):
    monkeypatch.setattr(runner.to_do, "find", lambda *_, **__: runner.ToDo({}, compares=False))
    began = time.monotonic()
    said: list[str] = []
    runner.run(far, say=said.append)
    assert said == [f"machine 1: there is nothing to do in {far.run}, all is done"]
    assert time.monotonic() - began < machines.COME_S and not (far.run / ".machines").exists()


def test_a_first_machine_that_does_not_come_is_waited_for_and_then_said(far, monkeypatch):
    folder = far.run / ".machines"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text('{"id": "of yesterday", "over": null}')
    (folder / "0.beat").write_text('{"of": "yesterday", "count": 7}')
    monkeypatch.setattr(machines, "REMIND_S", 0.7)
    said: list[str] = []
    with pytest.raises(RunError, match="machine 0 has not begun within"):
        machines.follow(far, said.append)
    waits = f"for machine 0 ({FIRST}) in {far.run}; "
    assert said == [
        f"machine 1 waits {waits}Ctrl-C ends it",
        f"machine 1 still waits {waits}see whether the same command is at work there, and sees this folder, or has "
        "ended with an error",
    ]


def test_a_first_machine_that_is_refused_before_it_begins_ends_the_others(far, monkeypatch):
    """It may also have been quicker than they are, where a cluster has started all together."""
    at_first = far.model_copy(update={"launch": {**far.launch, "machine_rank": 0}})

    def refused(message: str = "the lock is held") -> None:
        with contextlib.suppress(RunError), machines.telling(at_first):
            raise RunError(message, hint="wait")

    refused("of yesterday")
    timer = threading.Timer(0.3, refused)
    timer.start()
    began = time.monotonic()
    with pytest.raises(RunError, match="the lock is held") as raised:
        machines.follow(far, lambda _: None)
    timer.join()
    assert raised.value.hint == "wait" and time.monotonic() - began < machines.COME_S

    said: list[str] = []
    monkeypatch.setattr(machines, "REMIND_S", 0.3)
    with pytest.raises(RunError, match="machine 0 has not begun within"):
        machines.follow(far, said.append)
    waits = f"machine 1 still waits for machine 0 ({FIRST}) in {far.run}; "
    still = f"{waits}its last run there ended with: the lock is held"
    assert said[1:] == [still] * 3

    monkeypatch.setenv("SLURM_STEP_ID", "0")
    with pytest.raises(RunError, match="machine 0 has not begun within"):
        machines.follow(far, lambda _: None)
    refused()
    with pytest.raises(RunError, match="the lock is held"):
        machines.follow(far, lambda _: None)

    monkeypatch.delenv("SLURM_STEP_ID")

    def done() -> None:
        with machines.telling(at_first):
            pass

    timer = threading.Timer(0.3, done)
    timer.start()
    assert machines.follow(far, lambda _: None) is None, "it needed nobody"
    timer.join()


def test_a_first_machine_that_does_not_reach_itself_by_its_address_says_so(far, monkeypatch):
    """Its ranks would wait for minutes."""
    monkeypatch.setattr(ranks, "REACH_S", 0.3)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert ranks._unreached("127.0.0.1", port) is ranks._unreached("localhost", port) is None
    job = job_of(far, "nowhere.invalid")
    before = signal.getsignal(ranks.STOP_SIGNAL)
    assert ranks.main(job, machine=0) == 1
    signal.signal(ranks.STOP_SIGNAL, before)
    said = json.loads(job.with_name("result.json").read_text())["message"]
    assert said.startswith("this machine, the first one, does not reach itself by `main_process_ip: nowhere.invalid`: ")
    assert ranks._unreached("192.0.2.1", port), "of nobody, by RFC 5737"


def test_one_of_the_others_that_fails_before_it_comes_ends_the_first_one(far):
    folder = far.run / ".machines"

    def fails(message: str, place: str | None = None) -> None:
        with contextlib.suppress(InputError), machines.telling(far):
            raise InputError(message, place=place, hint="fewer processes")

    fails("of yesterday")
    with machines.leading(far):
        assert machines.has_failed(folder, 1) is None
        with contextlib.suppress(Interrupted), machines.telling(far):
            raise Interrupted("it comes again")
        assert machines.has_failed(folder, 1) is None
        fails("no GPU here", place="r.yaml:3")
        job = job_of(far, "127.0.0.1")
        words = [sys.executable, "-m", "rlhf_pipeline.run.ranks", str(job), str(os.getpid()), "0"]
        assert subprocess.run(words, timeout=30, check=False).returncode == 1
    result = json.loads(job.with_name("result.json").read_text())
    assert (result["message"], result["hint"]) == ("machine 1: r.yaml:3: no GPU here", "fewer processes")


def test_a_first_machine_whose_run_directory_is_in_use_says_so_to_the_others(tmp_path):
    """By the command, which also ends the one that waits for it."""
    (tmp_path / "far.yaml").write_text(yaml.safe_dump(RECIPE))
    loaded = recipes.load(str(tmp_path / "far.yaml"))
    words = [sys.executable, "-m", "rlhf_pipeline", "run", "far.yaml"]
    with RunDirectory(loaded.run).locked():
        ends = [
            subprocess.Popen(
                [*words, f"launch.machine_rank={rank}"], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
                env=os.environ | {"SLURM_STEP_ID": "0"},
            )
            for rank in (0, 1)
        ]  # fmt: skip
        try:
            said = [one.communicate(timeout=60)[1] for one in ends]
        finally:
            for one in ends:
                one.kill()
    assert [one.returncode for one in ends] == [1, 1], said
    assert all("is in use" in one for one in said)


def test_a_recipe_that_one_machine_cannot_read_ends_the_others(far, tmp_path):
    """By the command, where one waits for it; where nobody does, nothing is left behind."""
    file, words = tmp_path / "far.yaml", [sys.executable, "-m", "rlhf_pipeline", "run", "far.yaml"]

    def refused(*more: str) -> str:
        code = subprocess.run([*words, *more], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        assert code.returncode == 2
        return code.stderr

    file.write_text(yaml.safe_dump(RECIPE | {"sede": 1}))
    refused()
    assert not far.run.exists()
    file.write_text(yaml.safe_dump(RECIPE))
    second = subprocess.Popen(
        [*words, "launch.machine_rank=1"], cwd=tmp_path, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        assert "waits for machine 0" in second.stderr.readline()
        said = refused("launch.machine_rank=0", "sft.trainr.max_steps=1", "sft.data.path=nowhere.jsonl")
        found = second.communicate(timeout=60)[1]
    finally:
        second.kill()
    assert said.count("error: ") == 2 and found == said.replace("error: ", "error: machine 0: ")
    assert second.returncode == 2


def test_a_first_machine_hears_of_a_recipe_that_another_cannot_read(far, tmp_path):
    file = str(tmp_path / "far.yaml")
    with machines.leading(far.model_copy(update={"launch": {**far.launch, "machine_rank": 0}})):
        folder = far.run / ".machines"
        fault = InputError("unknown key", place="far.yaml:3:1")
        for override, heard in (
            ("name=[]", False), ("launch.machine_rank=7", False), ("launch.num_machines=two", False),
            ("launch.machine_rnk=1", False), ("output_dir=1", False), ("sede=1", True),
        ):  # fmt: skip
            overrides = ["launch.machine_rank=1"] * (override != "launch.machine_rnk=1") + [override]
            with pytest.raises(InputError):
                recipes.load(file, overrides)
            machines.tell_of_recipe(recipes.as_far_as_read(file, overrides), fault)
            assert (machines.has_failed(folder, 1) is not None) is heard, override
        assert machines.has_failed(folder, 1)["errors"][0]["place"] == "far.yaml:3:1"
        assert not machines.has_failed(folder, 0)


def test_a_second_process_of_a_machine_ends_nobody(far, monkeypatch):
    """It is refused, or cannot read its recipe; the one that is at work is heard."""
    folder = far.run / ".machines"
    monkeypatch.setattr(machines, "BEAT_S", 0.4)
    with machines.beating(folder, 1):
        while not (folder / "1.beat").exists():
            time.sleep(0.01)
        with pytest.raises(RunError, match="is at work on this run already"), machines.telling(far):
            machines.follow(far, lambda _: None)
        machines.tell_of_recipe(far, InputError("unknown key"))
        assert machines.last_end(folder, 1) is None
    first = ranks.Ranks(job_of(far), machine=0)
    with machines.leading(far), machines.beating(folder, 1):
        with contextlib.suppress(InputError), machines.telling(far):
            raise InputError("no GPU here")
        first.listen()


def test_a_first_machine_that_falls_silent_is_said(far, monkeypatch):
    folder, counts, said = far.run / ".machines", itertools.count(), threading.Event()
    folder.mkdir(parents=True)
    (folder / "run.json").write_text('{"id": "1", "over": null}')

    def beat() -> None:
        while not said.wait(0.05) and (count := next(counts)) < 10:
            (folder / "0.beat").write_text(f'{{"count": {count}}}')

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(RunError, match="machine 0 has given no sign for"):
        machines.follow(far, lambda _: None)
    said.set()
    thread.join()
    assert next(counts) >= 10, "not while it counted"


def test_a_machine_is_one_process(far):
    folder = far.run / ".machines"
    with machines.beating(folder, 1):
        while not (folder / "1.beat").exists():
            time.sleep(0.01)
        with pytest.raises(RunError, match=f"machine 1 is at work on this run already: process {os.getpid()} on"):
            machines.follow(far, lambda _: None)
    assert not (folder / "1.beat").exists(), "it has said that it is gone"
    (folder / "1.beat").write_text('{"of": "yesterday", "count": 7}')
    with pytest.raises(RunError, match="machine 0 has not begun within"):
        machines.follow(far, lambda _: None)


def test_a_machine_that_cannot_write_to_what_all_share_says_so(far):
    """At once: machine 0 would wait for it in vain."""
    (far.run / "1.beat").mkdir(parents=True)
    with pytest.raises(IsADirectoryError), machines.beating(far.run, 1):
        pytest.fail("it gives no signs of life")
    blocked = far.model_copy(update={"output_dir": str(far.run / "file")})
    Path(blocked.output_dir).write_text("")
    with pytest.raises(RunError, match=r"the run directory .* cannot be made"):
        runner.run(blocked, say=lambda _: None)


def test_a_machine_alone_tells_nobody(tmp_path):
    alone = {**RECIPE, "launch": {"num_processes": 2, "use_cpu": True}}
    (tmp_path / "far.yaml").write_text(yaml.safe_dump(alone))
    loaded = recipes.load(str(tmp_path / "far.yaml"))
    with machines.leading(loaded):
        assert not (loaded.run / ".machines").exists()


def test_what_the_first_machine_waits_for_is_said_and_shown_and_a_stop_is_of_no_step(far, monkeypatch):
    monkeypatch.setattr(machines, "REMIND_S", 0.1)
    first, said = ranks.Ranks(job_of(far), machine=0), list[str]()
    view = RunView(far.run, far)
    (far.run / "sft" / "stage.json").write_text('{"name": "sft", "kind": "sft", "state": "running"}')

    def stop() -> None:
        first.stopping = True
        stopping.append(RunDirectory(far.run).absent_machines())
        with RunDirectory(far.run).locked():
            states.extend(f"{stage.state}: {stage.reason}" for stage in state.read(far.run).stages)

    stopping: list[list[int]] = []
    states: list[str] = []
    timer = threading.Timer(0.7, stop)
    timer.start()
    with machines.leading(far), machines.reminding(far, said.append), pytest.raises(LookupError):
        first.listen()
    timer.join()
    waits = "machine 0 waits for machine 1; the same command runs there with `launch.machine_rank=1`, and sees "
    waits += str(far.run)
    assert set(said) == {waits} and len(said) > 1 and stopping == [[1]]
    view.refresh()
    assert plain_line(view.at_work) == "sft     waiting for machine 1"
    assert states == ["running: waits for machine 1"]

    monkeypatch.setattr(machines, "COME_S", 60.0)
    lines: list[str] = []
    with signals.stopping(
        lambda: True, lambda: None, lines.append, lambda: not RunDirectory(far.run).absent_machines()
    ):
        signal.raise_signal(signal.SIGTERM)
        machines.note_absent(far.run, [])
        signal.raise_signal(signal.SIGTERM)
    assert [line.partition(";")[0] for line in lines] == ["stopping", "stopping after this step, with a checkpoint"]


@pytest.mark.slow
def test_the_first_machine_is_stopped_while_it_waits(tmp_path):
    """By the command, which says what it waits for."""
    (tmp_path / "far.yaml").write_text(yaml.safe_dump(RECIPE))
    first = subprocess.Popen(
        [sys.executable, "-m", "rlhf_pipeline", "run", "far.yaml", "launch.main_process_ip=127.0.0.1"], cwd=tmp_path,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    late = threading.Timer(90, first.kill)
    late.start()
    try:
        said = next((line for line in first.stderr if "waits for" in line), "")
        first.send_signal(signal.SIGTERM)
        rest = first.communicate(timeout=60)[1]
    finally:
        late.cancel()
        first.kill()
    assert said.startswith("machine 0 waits for machine 1; the same command runs there") and first.returncode == 130
    assert "stopping; Ctrl-C once more" in rest and "after this step" not in rest


def test_a_machine_that_is_there_is_not_waited_for_aloud(far):
    first, said = ranks.Ranks(job_of(far), machine=0), list[str]()
    with machines.leading(far), machines.reminding(far, said.append), machines.beating(far.run / ".machines", 1):
        first.listen()
        time.sleep(0.2)
    assert not said and not first.job_file.with_name("progress.json").exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sft.trainer.learning_rate=1e-3", "`sft.trainer.learning_rate` is 0.001 in the recipe here, and nothing in"),
        ("launch.num_processes=4", "`launch.num_processes` is 4 in the recipe here, and 2 in that of machine 0"),
        ("sft.trainer={max_steps: 9}", "`sft.trainer.max_steps` is 9 in the recipe here, and 400 in that of machine 0 "
         "(and 2 more keys)"),
    ],
)  # fmt: skip
def test_a_machine_with_another_recipe_takes_no_part_and_says_why_on_both(far, tmp_path, monkeypatch, override, said):
    job = job_of(far)
    other = recipes.load(str(tmp_path / "far.yaml"), ["launch.machine_rank=1", override])
    monkeypatch.setattr(machines, "_start", lambda *_: pytest.fail("it has begun"))

    def lead() -> None:
        with machines.leading(far):
            machines.announce(far.run, job)
            time.sleep(1.0)

    thread = threading.Thread(target=lead)
    thread.start()
    with pytest.raises(RunError, match=re.escape(f"machine 1: {said}")) as raised:
        machines.follow(other, lambda _: None)
    thread.join()
    first = ranks.Ranks(job, machine=0)
    first.listen()  # which does not wait for it any more
    assert ranks._outcome(first, ranks._wait(first, Launched()), Launched()) == 1  # type: ignore[arg-type]
    result = json.loads(job.with_name("result.json").read_text())
    assert (result["message"], result["hint"]) == (raised.value.message, raised.value.hint)


def job_of(far: recipes.Recipe, address: str = FIRST) -> Path:
    """A job that machine 0 has told of, as a file, with the folder of its ranks."""
    job = far.run / "sft" / "work" / "job.json"
    (job.parent / "ranks").mkdir(parents=True)
    (far.run / ".machines").mkdir(exist_ok=True)
    found = {
        "recipe": far.model_dump(),
        "launch": far.launch_of("sft") | {"main_process_ip": address},
        "log": str(far.run / "sft" / "log.txt"),
    }
    job.write_text(json.dumps(found))
    return job


class Launched:
    """`accelerate launch`, which has ended as all that it started here has."""

    def poll(self) -> int:
        return 0


def test_one_whose_ranks_are_done_waits_while_the_first_still_judges(far, monkeypatch):
    monkeypatch.setattr(ranks, "GRACE_S", 0.1)
    here = ranks.Ranks(job_of(far), machine=1)
    (here.folder / "1.json").write_text('{"code": 0, "at": 1.0}')
    found: list[int] = []
    waiting = threading.Thread(
        target=lambda: found.append(ranks._outcome(here, ranks._wait(here, Launched()), Launched()))  # type: ignore[arg-type]
    )
    waiting.start()
    waiting.join(1.5)
    assert waiting.is_alive() and not found, "for much longer than it waits where something has failed"
    (here.folder / "over").touch()
    waiting.join(5)
    assert found == [0] and not list(here.folder.glob("machine-*"))


def test_why_a_machine_cannot_start_its_ranks_ends_the_first_ones(far, monkeypatch):
    monkeypatch.setattr(ranks, "GRACE_S", 0.1)
    job = job_of(far)
    assert ranks._fail(ranks.Ranks(job, machine=1), "there is no room", "make some") == 1
    first = ranks.Ranks(job, machine=0)
    assert ranks._outcome(first, ranks._wait(first, Launched()), Launched()) == 1  # type: ignore[arg-type]
    result = json.loads(job.with_name("result.json").read_text())
    assert (result["message"], result["hint"]) == ("machine 1: there is no room", "make some")


def test_a_launcher_that_is_killed_is_said(far):
    class Killed(Launched):
        def poll(self) -> int:
            return -9

    first = ranks.Ranks(job_of(far), machine=0)
    assert ranks._outcome(first, {}, Killed()) == 1  # type: ignore[arg-type]
    said = json.loads((first.job_file.parent / "result.json").read_text())["message"]
    assert said == "`accelerate launch` was ended by signal 9, and not all of its processes had ended"


def test_one_that_only_misses_the_store_of_a_stopped_one_has_not_failed(far):
    here = ranks.Ranks(job_of(far), machine=0)
    said = (
        "DistNetworkError: Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown?"
    )
    (here.folder / "1.result.json").write_text(json.dumps({"message": said}))
    ended = {0: {"code": ranks.STOPPED, "at": 1.0}, 1: {"code": 1, "at": 1.1}}
    assert ranks._outcome(here, ended, Launched()) == ranks.STOPPED  # type: ignore[arg-type]


def test_a_machine_that_was_started_anew_has_lost_its_ranks(far):
    first = ranks.Ranks(job_of(far), machine=0)
    folder = far.run / ".machines"
    first._ears = {1: machines.Ear(folder, 1)}
    with machines.beating(folder, 1):
        assert not first.is_over(ended=[])
    with machines.beating(folder, 1):
        assert first.is_over(ended=[])
        assert ranks._outcome(first, {}, Launched()) == 1  # type: ignore[arg-type]
    result = json.loads(first.job_file.with_name("result.json").read_text())
    assert (result["message"], result["known"]) == ("machine 1 was started anew", True)


def test_one_of_the_others_takes_part_in_a_run_that_is_begun_anew(far, monkeypatch):
    """Machine 0 was killed, and started again before it was missed."""
    job, started, said = job_of(far), [], list[str]()

    def start(_recipe: object, told: str, _machine: int) -> subprocess.Popen:
        started.append(told)
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])

    monkeypatch.setattr(machines, "_start", start)

    def lead() -> None:
        with contextlib.suppress(OSError), machines.leading(far):
            machines.announce(far.run, job)
            while not started:
                time.sleep(0.02)
            run = json.loads((far.run / ".machines" / "run.json").read_text())
            (far.run / ".machines" / "run.json").write_text(json.dumps(run | {"id": "another"}))
            machines.announce(far.run, job)
            while len(started) < 2:
                time.sleep(0.02)

    first = threading.Thread(target=lead, daemon=True)
    first.start()
    machines.follow(far, said.append)
    first.join(5)
    assert len(started) == 2 and "machine 0 has begun anew" in said


def test_a_machine_is_missed_only_while_its_ranks_are(far, monkeypatch):
    first = ranks.Ranks(job_of(far), machine=0)
    beat = far.run / ".machines" / "1.beat"
    beat.write_text('{"count": 1}')
    first._ears = {1: machines.Ear(beat.parent, 1)}
    assert not first.is_over(ended=[])
    time.sleep(machines.SILENT_S + 0.1)
    assert not first.is_over(ended=[1]) and first.silent is None
    assert first.is_over(ended=[0]) and first.silent == 1


def test_what_starts_ranks_and_cannot_is_told_of_and_a_new_job_ends_the_former_one(far, monkeypatch):
    job, said = job_of(far), []
    machines_folder = far.run / ".machines"

    def start(_recipe: object, told: str, _machine: int) -> subprocess.Popen:
        said.append(told)
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)" if len(said) > 1 else "exit(7)"])

    monkeypatch.setattr(machines, "_start", start)

    def lead() -> None:
        with machines.leading(far):
            machines.announce(far.run, job)
            deadline = time.monotonic() + 10
            while machines.refusal(job.with_name("ranks"), 1) is None and time.monotonic() < deadline:
                time.sleep(0.02)
            for _ in range(2):
                machines.announce(far.run, job)
                time.sleep(0.4)

    first = threading.Thread(target=lead)
    first.start()
    machines.follow(far, lambda _: None)
    first.join()
    assert said == ["sft/work/job.json"] * 3
    refused = machines.refusal(job.with_name("ranks"), 1)
    assert refused and "machine 1: what starts its processes ended with exit code 7" in refused["message"]
    assert machines_folder.exists()
