"""What really goes wrong is said in one sentence, and the next run ends as if nothing had gone wrong."""

import ctypes
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import short_run
from processes import Started, WarmLauncher, call, fork_the_server
from safetensors.torch import load_file

from rlhf_pipeline import plan, recipe
from rlhf_pipeline.run.launch import Launcher
from rlhf_pipeline.rundir import durable

pytestmark = pytest.mark.slow

RECIPE = """
name: short
model: {path: tiny, quantization: none, dtype: float32}
lora: {r: 4, target_modules: all-linear}
evaluate: {data: tiny:heldout, judge: "my_judge:judge", n: 4, max_new_tokens: 4, batch_size: 1}
stages:
  sft:
    data: demonstrations.jsonl
    trainer: {max_steps: 4, save_steps: 1, logging_steps: 1, per_device_train_batch_size: 4, save_total_limit: 3}
  dpo:
    data: pairs.jsonl
    trainer: {max_steps: 2, save_steps: 1, per_device_train_batch_size: 4, gradient_checkpointing: false}
  reward:
    init: base
    data: pairs.jsonl
    trainer: {max_steps: 2, save_steps: 1, per_device_train_batch_size: 4, gradient_checkpointing: false}
  ppo:
    data: tiny:prompts
    trainer: {max_steps: 3, save_steps: 1, per_device_train_batch_size: 8, response_length: 8, max_skipped_steps: 2,
              num_sample_generations: 0, gradient_checkpointing: false}
"""
JUDGE = """
    def judge(prompts, completions, **columns):
        return [float(len(text)) for text in completions]
"""
# Named in a condition, when a fault strikes; a row of metrics is written before the checkpoint of its step.
ROWS = 'path.endswith("{}/metrics.jsonl") and lines(path) == {}'
PRELUDE = """
import os, sys


def lines(path):
    return len(open(path).readlines()) if os.path.exists(path) else 0
"""


Command = Callable[..., tuple[int, str]]
Plant = Callable[[str, str], None]


def install_hook() -> None:
    """Have the planted fault, if there is one, strike whenever this process opens a file to write or makes a folder."""
    striking = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal striking
        if striking or event not in ("open", "os.mkdir") or not isinstance(arguments[0], (str, os.PathLike)):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        striking = True
        try:
            planted = Path(os.environ["FAULT"])
            if planted.exists():
                names: dict[str, Any] = {}
                exec(planted.read_text(), names)
                names["fault"](os.fspath(arguments[0]))
        finally:
            striking = False

    sys.addaudithook(hook)


@pytest.fixture(scope="module")
def hooks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to plant faults in, as `fault.py`."""
    return tmp_path_factory.mktemp("hooks")


def write_fault(hooks: Path, when: str, code: str) -> None:
    lines = textwrap.indent(textwrap.dedent(code).strip(), "        ")
    (hooks / "fault.py").write_text(f"{PRELUDE}\n\ndef fault(path):\n    if {when}:\n{lines}\n")


@pytest.fixture
def plant(hooks: Path) -> Iterator[Plant]:
    """A function that has code run, with a `path`, at the moment that a condition on that path says."""

    yield functools.partial(write_fault, hooks)
    (hooks / "fault.py").unlink(missing_ok=True)


@pytest.fixture(scope="module")
def warm_server(tmp_path_factory: pytest.TempPathFactory, hooks: Path) -> Iterator[Launcher]:
    """One server for all commands of this file, which has the hook."""
    environment = {"FAULT": str(hooks / "fault.py")}
    with WarmLauncher(tmp_path_factory.mktemp("server") / "log.txt", environment, install_hook) as launcher:
        yield launcher


@pytest.fixture(scope="module")
def command(warm_server: Launcher) -> Command:
    """A function that gives the command in a folder, in this process, and returns its exit code and what it said."""

    return lambda folder, *arguments: short_run.run_warm(warm_server, folder, "recipe.yaml", *arguments)


def write_recipe(folder: Path) -> Path:
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "my_judge.py").write_text(textwrap.dedent(JUDGE))
    rows = [{"prompt": f"question {i}?", "completion": f"answer {i}"} for i in range(40)]
    (folder / "demonstrations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"prompt": f"question {i}?", "chosen": f"answer {i}", "rejected": "no answer"} for i in range(40)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, command: Command) -> Path:
    """A folder with a run that nothing went wrong in."""
    folder = write_recipe(tmp_path_factory.mktemp("unbroken"))
    code, said = command(folder, "--until", "dpo")
    assert code == 0, said
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_recipe(tmp_path)


@pytest.fixture
def finished(unbroken: Path, tmp_path: Path) -> Path:
    """A copy of the unbroken run."""
    return Path(shutil.copytree(unbroken, tmp_path / "copy"))


def rows(file: Path) -> list[dict[str, Any]]:
    return [timeless(json.loads(line)) for line in file.open(encoding="utf-8")]


def timeless(numbers: dict[str, Any]) -> dict[str, Any]:
    """Numbers without those that depend on the clock."""
    timing = ("eps", "seconds", "_runtime", "per_second", "time")
    return {name: value for name, value in numbers.items() if not name.endswith(timing)}


def record(folder: Path, stage: str) -> dict[str, Any]:
    return json.loads((folder / "runs" / "short" / stage / "stage.json").read_text())


def assert_same_end(folder: Path, unbroken: Path, stage: str = "sft") -> None:
    ours, theirs = (path / "runs" / "short" / stage for path in (folder, unbroken))
    weights = "adapter/adapter_model.safetensors"
    assert (ours / weights).read_bytes() == (theirs / weights).read_bytes()
    for file in ("metrics.jsonl", "samples.jsonl"):
        assert rows(ours / file) == rows(theirs / file)
    assert record(folder, stage)["state"] == "done"
    assert timeless(record(folder, stage)["metrics"]) == timeless(record(unbroken, stage)["metrics"])
    assert left_over(folder) == []


def left_over(folder: Path) -> list[str]:
    """What only writing leaves for a moment."""
    return [
        file.name for file in folder.rglob("*") if file.name.startswith((".new-", ".old-")) or file.suffix == ".new"
    ]


def the_sentence(said: str) -> tuple[str, str]:
    """The error and the hint of a command that said just those, apart from a quoted log and its progress."""
    print(said)
    own = [line for line in said.splitlines() if not line.startswith("  | ")]
    assert "Traceback" not in "\n".join(own) and "Exception ignored" not in said, said
    (error,) = [line for line in own if line.startswith("error: ")]
    (hint,) = [line for line in own if line.startswith("hint: ")]
    return error, hint


FILL = """
    try:
        with open({!r}, "wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
    except OSError:
        pass
"""


def test_training_that_breaks_off_again_and_again(folder: Path, unbroken: Path, command: Command, plant: Plant) -> None:
    """Each fault strikes the run that went on after the one before."""
    faults = [
        (
            "import torch; raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a')",
            "the GPU's memory ran out (CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a)",
            "try, in this order, half the `per_device_train_batch_size` with",
        ),
        (
            """
            import resource, torch
            held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (held + 2**26, resource.RLIM_INFINITY))
            torch.ones(2**26)
            """,
            "the machine's memory ran out (",
            "try, in this order, half the `per_device_train_batch_size` with",
        ),
        (
            "os.kill(os.getpid(), 9)",
            "its worker was ended by signal 9, from outside",
            "the same command resumes from here",
        ),
    ]
    for step, (code_of_fault, message, hint) in enumerate(faults, start=1):
        plant(ROWS.format("sft", step), code_of_fault)
        code, said = command(folder, "--until", "sft")
        assert code == 1 and ("resumes from" in said) == (step > 1), said
        error, advice = the_sentence(said)
        assert error.startswith(f"error: stage `sft` failed: {message}") and hint in advice
        assert step == 1 or f"sft     resumes from step {step - 1} of 4\n" in said
        assert left_over(folder) == []
    plant("False", "pass")
    code, said = command(folder, "--until", "sft")
    assert code == 0 and "sft     resumes from step 3 of 4\n" in said
    assert_same_end(folder, unbroken)


def test_a_checkpoint_that_cannot_be_written_whole(
    folder: Path, unbroken: Path, command: Command, plant: Plant
) -> None:
    """By the limit of a file's size, which works everywhere: its weights by safetensors, its optimizer by PyTorch."""
    weights = folder / "runs" / "short" / "sft" / "work" / "checkpoint-1" / "adapter_model.safetensors"
    for step, limit in ((2, "20_000"), (3, f"os.path.getsize({str(weights)!r}) + 10_000")):
        code_of_fault = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))"
        plant(f'path.endswith(".new-checkpoint-{step}")', code_of_fault)
        code, said = command(folder, "--until", "sft")
        error, hint = the_sentence(said)
        assert code == 1 and "error: stage `sft` failed: a file reached the limit of " in error and "ulimit -f" in hint
        assert ("os error 27" if step == 2 else "inline_container") in error
        assert left_over(folder) == []
    assert "sft     resumes from step 1 of 4\n" in said
    plant("False", "pass")
    code, said = command(folder, "--until", "sft")
    assert code == 0 and "sft     resumes from step 2 of 4\n" in said
    assert_same_end(folder, unbroken)


def test_a_judge_that_fails_costs_no_training(folder: Path, unbroken: Path, command: Command) -> None:
    stage = folder / "runs" / "short" / "sft"
    before: tuple[Any, ...] = ()
    for fails, message in (
        ("raise ValueError('no opinion')", "ValueError: no opinion"),
        ("bytearray(10**14)", "the machine's memory ran out (MemoryError)"),
        ("import torch; torch.ones(10**14)", "the machine's memory ran out ("),
        ("import sys; sys.exit(3)", "the judge called sys.exit(3)"),
        ("import os; os._exit(0)", "its worker ended without a result, with exit code 0"),
    ):
        gives_up = f"def judge(prompts):\n    if len(prompts) < 3:  # the check's\n        return [0, 1]\n    {fails}\n"
        (folder / "my_judge.py").write_text(gives_up)
        code, said = command(folder, "--until", "sft")
        assert code == 1 and said.count("sft     trained, to be judged\n") == bool(before), said
        error, hint = the_sentence(said)
        assert error.startswith(f"error: stage `sft` failed: {message}")
        assert "the trained adapter is kept; the same command resumes with judging it" in hint
        assert "max_length" not in hint and ("evaluate.max_new_tokens" in hint) == ("memory" in message)
        state = made(stage / "work" / "adapter"), made(stage / "metrics.jsonl")
        assert not before or before == state
        before = state
    (folder / "my_judge.py").write_text(textwrap.dedent(JUDGE))
    code, said = command(folder, "--until", "sft")
    assert code == 0 and "sft     trained, to be judged\n" in said
    assert before == (made(stage / "adapter"), made(stage / "metrics.jsonl"))
    assert_same_end(folder, unbroken)


def made(path: Path) -> list[tuple[str, bytes, int]]:
    """What a file, or a folder's files, hold, and when they were written."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [(file.name, file.read_bytes(), file.stat().st_mtime_ns) for file in files]


@pytest.mark.parametrize(
    ("stage", "message"),
    [("sft", "the loss became nan at step 2"), ("reward", "the loss became nan at step 2"),
     ("dpo", "the loss became nan at step 2"), ("ppo", "2 optimizer steps in a row had gradients that were not")],
)  # fmt: skip
def test_a_loss_that_is_no_number_ends_the_stage(finished: Path, command: Command, stage: str, message: str) -> None:
    until = ("--until", "ppo") if stage == "ppo" else ("--only", stage)
    code, said = command(finished, *until, f"{stage}.trainer.learning_rate=1e30")
    error, hint = the_sentence(said)
    assert code == 1 and error.startswith(f"error: stage `{stage}` failed: {message}")
    assert "`learning_rate`" in hint + error
    assert "  | " not in said  # a traceback would tell no more
    sound, damaged = durable.newest_sound(finished / "runs" / "short" / stage / "work")
    assert (sound is None) == (stage == "ppo") and not damaged  # PPO takes all those steps in its first update
    for file in sound.glob("*.safetensors") if sound else []:
        assert all(tensor.isfinite().all() for tensor in load_file(file).values())
    code, said = command(finished, "--only", stage, f"{stage}.trainer.learning_rate=1e-4")
    assert code == 0 and "trainer.learning_rate 1e+30 → 0.0001" in said and f"{stage:<7} training, from" in said


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory: pytest.TempPathFactory, command: Command, hooks: Path) -> Path:
    """A folder with an SFT stage that was killed in its last step, after three checkpoints."""
    folder = write_recipe(tmp_path_factory.mktemp("broken_off"))
    write_fault(hooks, ROWS.format("sft", 3), "os.kill(os.getpid(), 9)")
    code, said = command(folder, "--until", "sft")
    (hooks / "fault.py").unlink()
    assert code == 1, said
    return folder


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut_short(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


@pytest.mark.parametrize(
    ("damages", "resumes_from"),
    [
        (
            {
                3: (flip_a_bit, "adapter_model.safetensors", "adapter_model.safetensors has other content than was w"),
                2: (Path.unlink, "scheduler.pt", "scheduler.pt is missing"),
            },
            1,
        ),
        (
            {
                3: (Path.unlink, "manifest.json", "manifest.json is missing"),
                2: (cut_short, "manifest.json", "manifest.json cannot be read"),
                1: (cut_short, "optimizer.pt", "optimizer.pt has "),
            },
            None,
        ),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    broken_off: Path,
    unbroken: Path,
    command: Command,
    tmp_path: Path,
    damages: dict[int, tuple[Callable[[Path], None], str, str]],
    resumes_from: int | None,
) -> None:
    folder = Path(shutil.copytree(broken_off, tmp_path / "copy"))
    stage = folder / "runs" / "short" / "sft"
    for step, (harm, file, _) in damages.items():
        harm(stage / "work" / f"checkpoint-{step}" / file)
    with (stage / "metrics.jsonl").open("ab") as metrics:
        metrics.write(b'\xff\n{"step": 3, "lo\n\0\0\0\n[3]\n\n\0\0')
    code, said = command(folder, "--until", "sft")
    print(said)
    assert code == 0
    for step, (_, _, problem) in damages.items():
        assert f"checkpoint-{step} is damaged: {problem}" in said
    assert (
        f"resumes from step {resumes_from} of 4; " if resumes_from else "sft     is retrained from the start: "
    ) in said
    if resumes_from:
        assert "sft     4 lines of metrics.jsonl cannot be read: now in metrics.jsonl.damaged\n" in said
        assert (stage / "metrics.jsonl.damaged").read_bytes() == b'\xff\n{"step": 3, "lo\n\0\0\0\n[3]\n'
    assert_same_end(folder, unbroken)


def test_a_checkpoint_of_something_else_is_named_and_the_one_before_is_used(
    broken_off: Path, unbroken: Path, command: Command, tmp_path: Path
) -> None:
    """Its manifest is true of its files: only who reads them can tell that they are not this stage's."""
    folder = Path(shutil.copytree(broken_off, tmp_path / "copy"))
    work = folder / "runs" / "short" / "sft" / "work"
    for step, file, content in (
        (3, "trainer_state.json", '{"global_step": 3, "foreign": 1}'),
        (2, "memory.json", '{"means": []}'),
    ):
        (work / f"checkpoint-{step}" / file).write_text(content)
        manifest = json.dumps(durable.contents(work / f"checkpoint-{step}"))
        (work / f"checkpoint-{step}" / "manifest.json").write_text(manifest)
    code, said = command(folder, "--until", "sft")
    assert code == 0, said
    lines = [line for line in said.splitlines() if " is damaged: " in line]
    assert [line.split(": ")[0] for line in lines] == [f"sft     checkpoint-{step} is damaged" for step in (3, 2)]
    assert "'foreign'" in lines[0] and lines[0].endswith("; resumes from step 2 of 4")
    assert lines[1].endswith("; resumes from step 1 of 4") and record(folder, "sft")["resumed_from_step"] == 1
    assert_same_end(folder, unbroken)


@pytest.mark.parametrize("content", ["{half", "", '["a list"]'])
def test_a_record_that_cannot_be_read(
    broken_off: Path, unbroken: Path, command: Command, tmp_path: Path, content: str
) -> None:
    """Of a stage that was interrupted it costs nothing; what a finished stage made is moved aside, and it is said."""
    folder = Path(shutil.copytree(broken_off, tmp_path / "broken_off"))
    (folder / "runs" / "short" / "sft" / "stage.json").write_text(content)
    assert "resumes from step 3 of 4" in planned(folder)["sft"]

    finished = Path(shutil.copytree(unbroken, tmp_path / "finished"))
    run = finished / "runs" / "short"
    before = made(run / "sft" / "adapter")
    (run / "sft" / "stage.json").write_text(content)
    code, said = command(finished, "--until", "sft")
    error, hint = the_sentence(said)
    assert code == 1 and "stage.json" in error
    (aside,) = run.glob("sft.*")
    assert str(aside) in hint and made(aside / "adapter") == before
    assert (aside / "stage.json").read_text() == content and not (run / "sft").exists()
    if content:
        return  # the rest is the same for all, and takes a while
    for one in (folder, finished):
        code, said = command(one, "--until", "sft")
        assert code == 0 and ("resumes from step 3 of 4\n" in said) == (one == folder), said
        assert_same_end(one, unbroken)


def planned(folder: Path) -> dict[str, str]:
    """Why each stage is in the state that it is in, by the plan."""
    return {stage.name: stage.reason for stage in plan.make(recipe.load(str(folder / "recipe.yaml")))}


def test_an_adapter_that_was_changed_is_trained_again_with_what_depends_on_it(
    finished: Path, unbroken: Path, command: Command
) -> None:
    run = finished / "runs" / "short"
    weights = run / "sft" / "adapter" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for harm in (cut_short, flip_a_bit):
        weights.write_bytes(whole)
        harm(weights)
        reasons = planned(finished)
        assert reasons["sft"] == "its adapter/adapter_model.safetensors is not what the stage wrote"
        assert reasons["dpo"] == "sft will run again"
    spoilt = weights.read_bytes()
    code, said = command(finished, "--until", "dpo")
    print(said)
    assert (
        code == 0
        and f"sft     is retrained from the start: {reasons['sft']}; the former results are now in sft." in said
    )
    (aside,), (dpo_aside,) = run.glob("sft.*"), run.glob("dpo.*")
    assert (aside / "adapter" / "adapter_model.safetensors").read_bytes() == spoilt and dpo_aside.is_dir()
    assert_same_end(finished, unbroken)
    assert_same_end(finished, unbroken, "dpo")


def test_a_stage_records_the_data_that_it_read(folder: Path, command: Command, plant: Plant) -> None:
    """Not those that were there when the run began."""
    data = folder / "preferences.jsonl"
    pairs = [{"prompt": f"{i}?", "chosen": "good", "rejected": "bad"} for i in range(20)]
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    plant(ROWS.format("sft", 2), f"open({str(data)!r}, 'a').write(open({str(data)!r}).readline())")
    code, said = command(folder, "--until", "dpo", f"dpo.data={data}")
    assert code == 0, said
    content = data.read_bytes()
    assert content.count(b"\n") == 21
    assert record(folder, "dpo")["inputs"]["data"] == f"preferences.jsonl@{hashlib.sha256(content).hexdigest()[:32]}"


def test_the_server_that_workers_are_forked_from_dies(
    folder: Path, unbroken: Path, hooks: Path, command: Command, plant: Plant
) -> None:
    plant(ROWS.format("sft", 2), "os.kill(os.getppid(), 9); import time; time.sleep(60)")
    with (folder / "said.txt").open("w") as said_to:
        environment = {"FAULT": str(hooks / "fault.py")}
        arguments = ["run", "recipe.yaml", "--until", "sft"]
        real = Started(arguments, folder, environment, said_to.fileno(), prepare=install_hook)
    assert real.wait(120) == 1
    error, hint = the_sentence((folder / "said.txt").read_text())
    assert "the process that starts workers ended unexpectedly" in error and hint
    plant("False", "pass")
    code, said = command(folder, "--until", "sft")
    assert code == 0 and "sft     resumes from step 2 of 4\n" in said, said
    assert_same_end(folder, unbroken)


@pytest.mark.parametrize(
    ("limit", "message", "advice"),
    [
        ("ulimit -n 8", "too many files are open at once, and the limit is 8", "raise it: `ulimit -n 4096`"),
        ("ulimit -f 0", "there is no folder to write temporary files to", "set TMPDIR to one that has room"),
    ],
)
def test_the_command_itself_is_short_of_something(folder: Path, limit: str, message: str, advice: str) -> None:
    """In a process that a shell has prepared; it comes to no training."""
    words = ["sh", "-c", f'{limit} && exec "$@"', "sh", sys.executable, "-m", "rlhf_pipeline", "run", "recipe.yaml"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    error, hint = the_sentence(done.stderr)
    assert (done.returncode, error) == (1, f"error: {message}")
    assert hint == f"hint: {advice}; stages that are done stay usable; the same command resumes from here"
    assert not (folder / "runs" / "short" / "sft").exists()


# What follows needs a small disk and a root without power over files' modes, so it runs in processes of its own.


@pytest.mark.parametrize("name", ["full_disk", "read_only"])
def test_on_a_small_disk_without_privileges(tmp_path: Path, unbroken: Path, hooks: Path, name: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if not call(without_privileges, disk):
        pytest.skip("no small disk can be mounted here")
    call(try_there, name, disk, unbroken, hooks)


def without_privileges(disk: Path) -> bool:
    """Mount a disk of 3 MB there, seen by this process alone, and be a root that modes of files bind.

    Returns:
        Whether that is possible.
    """
    new_mounts, new_users = 0x00020000, 0x10000000  # CLONE_NEWNS and CLONE_NEWUSER in <linux/sched.h>
    user, group, libc = os.getuid(), os.getgid(), ctypes.CDLL(None, use_errno=True)
    if libc.unshare(new_mounts | new_users):
        return False
    try:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    except OSError:
        return False
    if libc.mount(b"small", os.fsencode(disk), b"tmpfs", 0, b"size=3m"):
        return False
    version, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()  # _LINUX_CAPABILITY_VERSION_3
    return not libc.capset(version, nothing)


def try_there(name: str, disk: Path, unbroken: Path, hooks: Path) -> None:
    """In a process of its own: one of the functions below."""
    assert without_privileges(disk)
    os.environ["FAULT"] = str(hooks / "fault.py")
    install_hook()
    fork_the_server()
    with Launcher(disk.with_name("log.txt")) as server:

        def command(folder: Path, *arguments: str) -> tuple[int, str]:
            return short_run.run_warm(server, folder, "recipe.yaml", *arguments)

        plant = functools.partial(write_fault, hooks)
        try:
            {"full_disk": on_a_full_disk, "read_only": in_read_only_folders}[name](disk, unbroken, command, plant)
        finally:
            (hooks / "fault.py").unlink(missing_ok=True)


def on_a_full_disk(disk: Path, unbroken: Path, command: Command, plant: Plant) -> None:
    folder = write_recipe(disk)
    filler = folder / "filler"
    fill = FILL.format(str(filler))
    at_record = 'path.endswith("sft/stage.json.new") and os.path.exists(os.path.dirname(path) + "/adapter")'
    for when, goes_on in (
        (None, None),  # from the start
        ('path.endswith(".new-checkpoint-2")', None),
        (ROWS.format("sft", 2), "resumes from step 1 of 4"),
        (at_record, "resumes from step 2 of 4"),  # by the runner, of the stage that is done
    ):
        exec(textwrap.dedent(fill)) if when is None else plant(when, fill)
        code, said = command(folder, "--until", "sft")
        error, hint = the_sentence(said)
        assert code == 1 and f"the disk of {folder}/runs/short" in error and " is full (" in error
        assert "free some space there" in hint and "resumes from here" in hint
        assert (f"sft     {goes_on}\n" in said) if goes_on else ("resumes from step" not in said)
        assert left_over(folder) == []
        filler.unlink()
    plant("False", "pass")
    code, said = command(folder, "--until", "sft")
    assert code == 0 and "sft     trained, to be published\n" in said
    assert_same_end(folder, unbroken)


def in_read_only_folders(disk: Path, unbroken: Path, command: Command, plant: Plant) -> None:
    folder = write_recipe(disk)
    run = folder / "runs" / "short"
    work = run / "sft" / "work"
    run.mkdir(parents=True)

    def fails(place: Path, goes_on: str | None) -> None:
        code, said = command(folder, "--until", "sft")
        error, hint = the_sentence(said)
        assert code == 1 and f"{place} cannot be written to ([Errno 13] Permission denied" in error
        assert "resumes from here" in hint
        assert (f"sft     {goes_on}\n" in said) if goes_on else ("resumes from step" not in said)
        assert left_over(folder) == []
        place.chmod(0o755)

    run.chmod(0o555)
    fails(run, None)
    # That a log takes no more lines ends nothing; that no checkpoint can be written does.
    log = ROWS.format("sft", 1)
    plant(f'path.endswith(".new-checkpoint-2") or {log}', f"os.chmod(path if {log} else {str(work)!r}, 0o555)")
    fails(work, None)
    assert "warning: metrics.jsonl cannot be written to (Permission denied)" in (run / "sft" / "log.txt").read_text()
    assert [row["step"] for row in rows(run / "sft" / "metrics.jsonl")] == [1]
    plant("False", "pass")
    (run / "sft").chmod(0o555)
    fails(run / "sft", "resumes from step 1 of 4")
    (run / "sft" / "stage.json").chmod(0o444)  # is replaced, not written to
    code, said = command(folder, "--until", "sft")
    assert code == 0 and "sft     resumes from step 1 of 4\n" in said, said
    assert_same_end(folder, unbroken)
