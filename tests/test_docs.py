"""The pages under docs/ and the README: what they say to type works, and what they name is there.

The commands of docs/ci.md are tried in test_docs_ci.py, the blocks of docs/data.md in reporting/test_data.py.
"""

import dataclasses
import functools
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import short_run
import trl
import typer
import yaml

from rlhf_pipeline import cli, kinds, recipe
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.ppo.config import PPOConfig
from rlhf_pipeline.recipe import TINY, gates, library_keys, schema
from rlhf_pipeline.recipe.yaml import parse_document
from rlhf_pipeline.run.launch import Launcher
from rlhf_pipeline.stages.check import check
from rlhf_pipeline.sweep import check as sweep_check
from rlhf_pipeline.sweep import keys

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
GROUP = typer.main.get_command(cli.app)
TUTORIAL = "docs/tutorial.md"
# Of these, outside the tutorial, options, overrides and recipes are checked: they train, wait for people, read or draw
# much, or want a model from the hub.
NOT_RUN = {
    "run",
    "sweep",
    "label",
    "arena",
    "serve",
    "smoke",
    "validate",
    "forecast",
    "data",
    "shrink",
    "plan",
    "report",
}
KINDS = ("sft", "reward", "ppo", "dpo")


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(name), re.MULTILINE | re.DOTALL)


# Commands


class Step(NamedTuple):
    """A command as it is typed, over several lines where a quote or a here-document is."""

    text: str

    @property
    def words(self) -> list[str]:
        """What a shell makes of it: its words without comment and redirection."""
        words = shlex.split(self.text, comments=True)
        return words[: next((i for i, word in enumerate(words) if word.startswith(">")), len(words))]


def steps(block: str) -> list[Step]:
    """The commands of a block."""
    found: list[str] = []
    ends: str | None = None
    for line in block.splitlines():
        if found and (ends is not None or _is_open(found[-1])):
            found[-1] += "\n" + line
            ends = None if line == ends else ends
        elif line.strip() and not line.lstrip().startswith("#"):
            found.append(line)
            here = re.search(r"<<'(\w+)'", line)
            ends = here[1] if here else None
    return [Step(text) for text in found]


def _is_open(text: str) -> bool:
    """Whether a quote is not closed yet."""
    if "<<" in text:
        return False
    try:
        shlex.split(text, comments=True)
    except ValueError:
        return True
    return False


def all_commands() -> list[tuple[str, Step]]:
    """Every command of ours outside the tutorial, with its page."""
    return [
        (name, step)
        for name in NAMES
        if name != TUTORIAL
        for block in blocks(name, "sh")
        for step in steps(block)
        if step.words[:1] == ["rlhf-pipeline"]
    ]


def typed(server: Launcher, folder: Path, words: list[str]) -> short_run.Said:
    """A command of ours in this process, with workers that are forked from a server which has imported already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO("Q: What color is a lemon?\\nA:\n"))  # for `chat`
        return short_run.ask(folder, *words[1:], server=server)


def understood(words: list[str], extra: list[str] | None = None) -> None:
    """See that a command's options exist, and that its recipe loads with its overrides and has the stages named."""
    name, *arguments = [*words[1:], *(extra or [])]
    with GROUP.commands[name].make_context(name, arguments) as context:
        given = context.params
    if name == "sweep":
        swept, fixed = keys.parse(given["settings"])
        assert sweep_check.Loader(given["recipe"], fixed, swept).all(keys.grid(swept))
    elif "recipe" in given and name != "cp":
        words = given.get("overrides") or given.get("stage_and_overrides") or []
        loaded = recipe.load(given["recipe"], [word for word in words if "=" in word])
        named = [word for word in words if "=" not in word]
        named += [given[key] for key in ("until", "only") if given.get(key)]
        assert set(named) <= set(loaded.stages)


@pytest.fixture
def folder(tmp_path: Path, tiny_run: Path) -> Path:
    """A folder with what the commands name: finished runs, files of rows, and copies of shipped recipes."""
    for name in ("tiny", "hacked", "milder"):
        shutil.copytree(tiny_run, tmp_path / "runs" / name)
    pairs = (TINY / "data" / "preferences.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:4]
    (tmp_path / "preferences.jsonl").write_text("".join(pairs), encoding="utf-8")
    replies = ({"prompt": row["prompt"], "completion": row["chosen"]} for row in map(json.loads, pairs))
    (tmp_path / "replies.jsonl").write_text("".join(json.dumps(row) + "\n" for row in replies))
    pq.write_table(pa.Table.from_pylist([json.loads(pair) for pair in pairs]), tmp_path / "pairs-1.parquet")
    (tmp_path / "qa.csv").write_text("question,answer\nWhat color is a lemon?, It is yellow.\n")
    return tmp_path


@pytest.mark.parametrize(("page", "step"), all_commands(), ids=lambda one: one if isinstance(one, str) else one.text)
def test_a_command_does_what_it_says(page, step, folder, warm_server, monkeypatch):
    command, own = step.words[1], f"{step.words[2]}" if len(step.words) > 2 else ""
    shipped = recipe.shipped().get(own.removesuffix(".yaml"))
    if own.endswith(".yaml") and shipped:  # the page has made it with `cp` before
        shutil.copy(shipped, folder / own)
    if command in NOT_RUN:
        monkeypatch.chdir(folder)
        understood(step.words)
        return
    done = typed(warm_server, folder, step.words)
    assert done.code == 0, done.err
    assert "error" not in done.err
    made = [word for option, word in zip(step.words, step.words[1:], strict=False) if option in ("-o", "--out")]
    assert done.out.strip() or made
    assert all((folder / name).stat().st_size for name in made)


def test_a_command_that_is_wrong_would_be_found(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for line in ("rlhf-pipeline run tiny --unti sft", "rlhf-pipeline data tiny sfx", "rlhf-pipeline plan tiny ppo.x=1"):
        with pytest.raises(Exception, match=r"unti|sfx|ppo\.x"):
            understood(Step(line).words)


def test_every_key_at_the_top_of_a_recipe_is_explained():
    explained = recipe.shipped()["full-pipeline"].read_text(encoding="utf-8")
    table = (ROOT / "docs/recipes.md").read_text(encoding="utf-8").partition("\n## Keys\n")[2]
    for key in recipe.Recipe.model_fields:
        assert re.search(rf"^(# )?{key}:", explained, re.MULTILINE), key
        assert re.search(rf"^\|.*`{key}[`.].* \|", table, re.MULTILINE), key


SECTIONS = [one for one in vars(schema).values() if isinstance(one, type) and issubclass(one, schema._Strict)]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_key_is_in_the_recipe_that_explains_all(section):
    explained = recipe.shipped()["full-pipeline"].read_text(encoding="utf-8")
    assert [key for key in section.model_fields if not re.search(rf"(?<![\w-]){key}:", explained)] == []


@pytest.mark.parametrize(
    ("row", "section"),
    [("stages.NAME", schema.Stage), ("model", schema.Model), ("evaluate", schema.Evaluate), ("watch", schema.Watch),
     ("rounds", schema.Rounds)],
)  # fmt: skip
def test_the_row_of_a_section_names_all_of_its_keys(row, section):
    table = (ROOT / "docs/recipes.md").read_text(encoding="utf-8").partition("\n## Keys\n")[2]
    said = re.search(rf"^\| `{row}` \| (.*) \|$", table, re.MULTILINE)[1]
    assert [key for key in section.model_fields if f"`{key}`" not in said] == []


# The tutorial, from top to bottom

# What a reader types and this cannot: it installs, or sets up the reader's own shell.
IN_THE_SHELL = ("make demo", ". .venv/bin/activate", "export OMP_NUM_THREADS=1")
# So that it takes seconds.
SHORTER = [
    "evaluate.n=4",
    "evaluate.along=1",
    "sft.trainer.num_train_epochs=2",
    "reward.trainer.num_train_epochs=1",
    "reward.gates={}",
    "ppo.trainer.total_episodes=12",
    "ppo.trainer.response_length=8",
    "dpo.trainer.num_train_epochs=1",
]


class File(NamedTuple):
    """A file that the page shows, its name in the first line."""

    name: str
    text: str


def tutorial() -> Iterator[Step | File]:
    """Its commands, and the files that it shows, in order."""
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```", text_of(TUTORIAL), re.MULTILINE | re.DOTALL):
        if language == "sh":
            yield from steps(block)
        else:
            assert language == "yaml"
            yield File(block.split()[1], block)


def test_the_tutorial_from_top_to_bottom(tmp_path, tiny_run, warm_server):
    shutil.copytree(tiny_run, tmp_path / "runs" / "tiny")  # what `make demo` leaves, of fewer steps
    here, ran = tmp_path, []
    said: dict[str, short_run.Said] = {}
    for step in tutorial():
        if isinstance(step, File):
            (here / step.name).write_text(step.text, encoding="utf-8")
            continue
        words = step.words
        if step.text.startswith(IN_THE_SHELL):
            print(f"not run: {step.text}")
        elif words[0] == "cd":
            here = here / words[1]
        elif words[0] != "rlhf-pipeline":
            subprocess.run(["bash", "-e", "-c", step.text], cwd=here, check=True, timeout=60)
        elif words[1] == "smoke":  # imports torch anew; run/test_smoke.py has it
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(here)
                understood(words)
            print(f"checked, not run: {step.text}")
        else:
            takes_overrides = any(argument.name in ("overrides", "stage_and_overrides")
                                  for argument in GROUP.commands[words[1]].params)  # fmt: skip
            # What the reader's own settings say counts: it comes last.
            shorter = SHORTER if takes_overrides and words[2] == "brisk.yaml" else []
            done = typed(warm_server, here, [*words[:3], *shorter, *words[3:]])
            assert done.code == 0, f"{step.text}\n{done.err}"
            said[step.text] = done
            ran.append(words[1])
    assert set(ran) >= {
        "report", "compare", "chat", "ls", "cp", "plan", "data", "validate", "run", "prune", "score", "export"
    }  # fmt: skip
    run = tmp_path / "brisk" / "runs" / "brisk"
    assert [stage["state"] for stage in states(run)] == ["done"] * 4
    assert (run / "report.html").stat().st_size > 1000
    assert (tmp_path / "brisk" / "brisk-dpo" / "config.json").is_file()
    assert "shorter in 100%" in said[next(text for text in said if text.startswith("rlhf-pipeline data"))].out
    changed = said["rlhf-pipeline plan brisk.yaml ppo.trainer.learning_rate=2e-3"].out
    assert "0.001 → 0.002" in " ".join(changed.split())
    assert re.findall(r" (nothing|train) ", changed) == ["nothing", "nothing", "train", "nothing"]


def states(run: Path) -> list[dict[str, Any]]:
    return [json.loads((run / kind / "stage.json").read_text()) for kind in KINDS]


# Recipes that are shown

ROWS = {"demonstrations": "demonstrations", "preferences": "preferences", "prompts": "prompts", "feedback": "thumbs",
        "candidates": "preferences"}  # fmt: skip
# docs/ci.md shows a workflow, docs/data.md values of one key, docs/tutorial.md a file that is run.
ELSEWHERE = {"docs/ci.md", "docs/data.md", TUTORIAL}
SHOWN = [(name, i, block) for name in NAMES if name not in ELSEWHERE for i, block in enumerate(blocks(name, "yaml"))]


def runnable(content: dict[str, Any]) -> dict[str, Any]:
    """A part of a recipe made whole, over the tiny model and its data."""
    if "stages" not in content:
        of_stages = content.keys() <= set(kinds.NAMES)
        content = {"stages": content} if of_stages else {**content, "stages": {"sft": {}}}
    content["model"] = {"path": "tiny", "quantization": content.get("model", {}).get("quantization", "none")}
    if "evaluate" in content:
        content["evaluate"]["data"] = "tiny:heldout"
    stages = content["stages"]
    for name, stage in stages.items():
        if stage is None:
            continue
        kind = stage.setdefault("kind", name)
        data = stage.get("data", {"eval_fraction": 0.1} if "gates" in stage and kind != "ppo" else {})
        data = {"path": data} if isinstance(data, str) else data
        data.pop("columns", None)
        stage["data"] = data | {"path": f"tiny:{ROWS[kinds.get(kind).reads]}"}
        if "ptx_data" in stage:
            stage["ptx_data"] = "tiny:demonstrations"
        if "human" in stage:
            stage["human"] = "tiny:preferences"
    samples = any(kinds.get(stage["kind"]).samples for stage in stages.values() if stage)
    if samples and "reward" not in stages and "extends" not in content:
        reward = {"kind": "reward", "init": "base", "data": "tiny:preferences"}
        content["stages"] = {"reward": reward} | stages
    named = {stage.get("init") for stage in stages.values() if stage}
    if "sft" in named and "sft" not in stages and "extends" not in content:
        content["stages"] = {"sft": {"kind": "sft", "data": "tiny:demonstrations"}} | content["stages"]
    return content


@pytest.mark.parametrize(("name", "i", "block"), SHOWN, ids=[f"{name}-{i}" for name, i, _ in SHOWN])
def test_a_recipe_that_is_shown_loads(name, i, block, tmp_path):
    content = parse_document(block, name)[0]
    if "extends" in content:  # of another on the same page
        below = next(one for page, _, one in SHOWN if page == name and "name: support-bot" in one)
        (tmp_path / content["extends"]).write_text(json.dumps(runnable(parse_document(below, name)[0])))
    (tmp_path / "shown.yaml").write_text(json.dumps(runnable(content)))
    recipe.load(str(tmp_path / "shown.yaml"))


def test_the_recipe_on_the_front_page_works_as_printed_with_one_file_of_pairs(tmp_path):
    """But for its model, which is on the hub; no stage is left to a learning rate for full fine-tuning."""
    (block,) = (block for block in blocks("README.md", "yaml") if block.startswith("# support-bot.yaml"))
    (tmp_path / "support-bot.yaml").write_text(block, encoding="utf-8")
    shutil.copy(TINY / "data" / "preferences.jsonl", tmp_path / "preferences.jsonl")
    loaded = recipe.load(str(tmp_path / "support-bot.yaml"), ["model.path=tiny", "model.quantization=none"])
    warnings = check(loaded, list(loaded.stages))
    assert list(loaded.stages) == list(KINDS)
    assert [line for line in warnings if "learning_rate" in line] == []


def test_every_page_that_the_package_names_is_there_and_printed(capsys):
    """Texts name a page by the command that prints it: docs/ travels in the package, and has no address of its own."""
    named = set()
    for file in (ROOT / "rlhf_pipeline").rglob("*.py"):
        named |= set(re.findall(r"`rlhf-pipeline docs (\w+)", file.read_text(encoding="utf-8")))
    assert {"json", "data", "ppo"} <= named
    for page in named:
        GROUP.main(["docs", page], standalone_mode=False)
        assert capsys.readouterr().out == text_of(f"docs/{page}.md")
    with pytest.raises(InputError, match="has no page `pppo`") as error:
        GROUP.main(["docs", "pppo"], standalone_mode=False)
    assert error.value.hint == "did you mean `ppo`?"


@pytest.mark.parametrize("kind", [*KINDS, "kto", "grpo", "rloo"])
def test_the_usual_learning_rate_is_the_one_on_the_stages_page(kind):
    (table,) = (one for one in tables(f"docs/{kind}.md") if one[0][:2] == ["key", "TRL's default"])
    (row,) = (row for row in table if row[0] == "`learning_rate`")
    assert kinds.get(kind).learning_rate == row[2]


@pytest.mark.parametrize("name", [*NAMES, "CONTRIBUTING.md"])
def test_nobody_is_told_to_install_what_has_our_name_on_the_index(name):
    """The project is not there, and anyone may take the name."""
    assert not re.search(r"(pip|uv|pipx)[\w -]* install[^\n`]* [\"']?rlhf-pipeline(\[|[\"'\s`]|==|$)", text_of(name))


def test_what_the_pages_say_of_the_tiny_world_is_what_the_benchmarks_measured():
    """A run of it takes minutes; the table of benchmarks/README.md is made of such runs, and the pages quote it."""
    table = next(one for one in tables("benchmarks/README.md") if one[0][:2] == ["seed", "gold SFT"])
    columns = {name: [float(row[i]) for row in table[1:] if row[0].isdigit()] for i, name in enumerate(table[0]) if i}
    words = " ".join(text_of("docs/choosing.md").split())
    number = r"(\d\.\d+)"
    found = re.search(rf"SFT {number} to {number}, DPO {number} to {number}, PPO {number} to {number}", words)
    assert found
    measured = [end(columns[f"gold {kind}"]) for kind in ("SFT", "DPO", "PPO, 0.5") for end in (min, max)]
    assert [float(one) for one in found.groups()] == pytest.approx(measured, abs=0.0051)
    # The run whose numbers docs/ppo.md shows is the one of the picture on the front page.
    picture = re.sub(r"<[^>]+>", "", text_of("docs/images/run.svg")).replace("&#160;", " ")
    start = re.search(r"done in [^,]+, judge ([\d.]+) ±", picture)
    shown = re.search(r"judge ([\d.]+) → ([\d.]+)\.", text_of("docs/ppo.md"))
    assert start and shown and float(shown[1]) == pytest.approx(float(start[1]), abs=0.0051)


# Links


def anchors(name: str) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    without_blocks = re.sub(r"^```.*?^```", "", text_of(name), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", without_blocks, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", [*NAMES, "CONTRIBUTING.md", "benchmarks/README.md"])
def test_every_link_within_the_repository_leads_somewhere(name):
    without_blocks = re.sub(r"^```.*?^```", "", text_of(name), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", without_blocks):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), f"{name}: {link}"
        if anchor:
            assert anchor in anchors(target.resolve().relative_to(ROOT).as_posix()), f"{name}: {link}"


def test_the_index_has_every_page():
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", text_of("docs/README.md")))
    assert linked == {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}


# Names of metrics and keys

# What the short run lacks, since it has no such setting: what decides whether a gate may name it knows it.
CONDITIONAL = {
    "loss/ptx": "no `ptx_data`",
    "eval_loss": "`sft` holds nothing out",
    "kl_budget/best_step": "no `kl_budget`",
    "eval_disagreement": "no `members`",
    "eval_margin_disagreement": "no `members`",
    "member/2/eval_accuracy": "no `members`",
    "member/2/loss": "no `members`",
}
BOOKKEEPING = re.compile(r"(step|time|epoch|total_flos|(eval|train)_(runtime|\w+_per_second)|train_\w+)$")


@pytest.fixture(scope="module")
def logged(tiny_run: Path) -> dict[str, set[str]]:
    """The metrics of a real run, those along the way and the final ones, by kind of stage."""
    found = {}
    for kind in KINDS:
        rows = [json.loads(line) for line in (tiny_run / kind / "metrics.jsonl").open(encoding="utf-8")]
        final = json.loads((tiny_run / kind / "stage.json").read_text(encoding="utf-8"))["metrics"]
        found[kind] = set(final).union(*rows)
    return found


def in_backticks(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text)


def tables(name: str) -> list[list[list[str]]]:
    """The tables of a page, each as its rows, the head first, each a list of cells."""
    found = re.findall(r"(?:^\|.*\n)+", text_of(name), re.MULTILINE)
    cells = [[[cell.strip() for cell in row.strip("|").split(" | ")] for row in table.splitlines()] for table in found]
    return [[table[0], *table[2:]] for table in cells]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stages_page_names_its_metrics_and_no_others(kind, logged):
    """Each number that a real run logs stands on the page, and what its tables of numbers name is one of them."""
    rows = [row for table in tables(f"docs/{kind}.md") if table[0][0] == "name" for row in table[1:]]
    named = {name for row in rows for name in in_backticks(row[0])}
    assert len(named) > 8
    patterns = {name.removesuffix("…") for name in named if name.endswith("…")}
    names = {name for name in named if not name.endswith("…") and not name.startswith("_")}
    real = logged[kind] | set(CONDITIONAL) | {"lr_value"}
    assert names - real == set()
    told = {name for name in logged[kind] if any(name.startswith(pattern) for pattern in patterns)}
    suffixes = tuple(name for name in named if name.startswith("_"))
    undocumented = {name for name in logged[kind] - names - told if not BOOKKEEPING.match(name)}
    # Held-out numbers of the same name, and pairs written as `…_mean`, `_max`.
    undocumented -= {f"eval_{name}" for name in names} | {
        name for name in undocumented if name.endswith(suffixes or "?")
    }
    assert undocumented == set()


def test_the_page_of_kto_names_its_metrics_and_no_others():
    """It is not among the stages of the run; a real stage has what a gate may name, by stages/test_gate_metrics.py."""
    known = gates.known_metrics(recipe.load("tiny-kto"), "kto")
    rows = [row for table in tables("docs/kto.md") if table[0][0] == "name" for row in table[1:]]
    named = {name for row in rows for name in in_backticks(row[0])} - {"eval_…"}
    real = {name for name in known if not BOOKKEEPING.match(name)}
    assert named - real == set()
    assert real - named == {f"eval_{name}" for name in kinds.get("kto").batch_metrics}


@pytest.mark.parametrize("name", NAMES)
def test_what_looks_like_a_metric_is_one(name, logged):
    families = "objective|policy|value|val|loss|rewards?|logps|logits|rollout|optimise|reply|gold|kl_budget"
    for text in in_backticks(text_of(name)):
        if re.fullmatch(rf"(eval_)?({families})/[a-z_0-9]+", text):
            assert text in set().union(*logged.values()) | set(CONDITIONAL) | of_rows(), f"{name}: {text}"


@functools.cache
def of_rows() -> set[str]:
    """The metrics of stages that make rows, which the run does not have."""
    stages = {"tiny-best-of-n": "candidates", "tiny-rlaif": "feedback", "tiny-constitution": "revisions"}
    loaded = {name: recipe.load(name) for name in stages}
    found = [
        gates.known_metrics(loaded[name], stage) | gates.possible_metrics(loaded[name], stage)
        for name, stage in stages.items()
    ]
    return set().union(*found)


def test_metrics_under_conditions_are_ones():
    known = gates.OF_KL_BUDGET | {f"eval_{name}" for name in gates.OF_STEPS} | {"loss/ptx"}
    ensemble = recipe.load("tiny-ensemble")
    known |= gates.known_metrics(ensemble, "reward") | gates.possible_metrics(ensemble, "reward")
    assert set(CONDITIONAL) <= known


CONFIGS = {
    "sft": trl.SFTConfig, "reward": trl.RewardConfig, "ppo": PPOConfig, "dpo": trl.DPOConfig, "kto": trl.KTOConfig,
    "grpo": trl.GRPOConfig, "rloo": trl.RLOOConfig,
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_keys_on_a_stages_page_can_be_set_and_have_the_defaults_that_it_says(kind):
    defaults = {
        field.name: field.default_factory() if callable(field.default_factory) else field.default
        for field in dataclasses.fields(CONFIGS[kind])
    }
    (table,) = (one for one in tables(f"docs/{kind}.md") if one[0][:2] == ["key", "TRL's default"])
    compared = 0
    for row in table[1:]:
        keys = in_backticks(row[0])
        for key in keys:
            config, _, name = key.rpartition(".")
            if key not in ("eval_fraction", "data") and ":" not in key:
                assert name in library_keys.settable(config or kind), key
        ours = [key for key in keys if key in defaults]
        values = [value.strip("` ") for value in re.split(r", | \u00d7 ", row[1])]
        if ours and row[1]:
            for key, value in zip(ours, values, strict=False):
                expected = getattr(defaults[key], "value", defaults[key])
                said = None if value == "none" else yaml.safe_load(value)
                said = float(said) if isinstance(expected, float) else said
                assert said == expected, f"{key}: {value}, not {expected}"
                compared += 1
    assert compared >= 4
