"""The keys of data and the files they name; chat templates: what is taken, what is refused, where."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_pipeline import recipe
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.recipe import data_files
from rlhf_pipeline.recipe.schema import Data

FULL = """\
model: {path: tiny}
evaluate: {data: tiny:heldout, judge: 'a:b'}
stages:
  sft:
    data: DATA
  reward: {data: tiny:preferences}
  ppo: {data: tiny:prompts, ptx_data: tiny:demonstrations, trainer: {ptx_coef: 0.1}}
"""
ROW = '{"prompt": "a", "completion": "b"}\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Data files of every kind beside the recipe."""
    for name in ("a.jsonl", "b.jsonl", "c.json", "d.csv", "A.JSONL", "packed.jsonl.gz", "packed.csv.xz", "notes.txt",
                 "old.jsonl.zst", "t.arrow", "data.jsonl.zip", "all/1.jsonl", "all/2.jsonl", "all/README.md",
                 "all/.hidden.jsonl", "mixed/1.jsonl", "mixed/2.csv", "splits/train-0.jsonl", "splits/test-0.jsonl",
                 "deep/er/1.jsonl", "texts/a.txt", "arrow/data.arrow", "[odd]/1.jsonl", "training/train_a.jsonl",
                 "training/training_b.jsonl", "with-empty/1.jsonl", "mine/my_train.jsonl", "mine/my_test.jsonl",
                 "camel/rowsTrain.jsonl", "camel/rowsVal.jsonl", "more/rows.jsonl", "more/train_2.jsonl",
                 "some/rows.jsonl", "some/more.jsonl", "some/rows-heldout.jsonl", "saved/dataset_info.json",
                 "saved/state.json", "saved/data-00000-of-00001.arrow", "dict/dataset_dict.json",
                 "dict/train/state.json", "dict/test/state.json", "known/1.json", "known/dataset_info.json",
                 "blobs/0f3a"):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(ROW)
    for name in ("empty.jsonl", "with-empty/2.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "nothing").mkdir()
    (tmp_path / "snapshots").mkdir()
    for name, target in (("rows.jsonl", "../blobs/0f3a"), ("gone.jsonl", "../blobs/77ff")):
        (tmp_path / "snapshots" / name).symlink_to(target)
    return tmp_path


def load(folder: Path, data: str, *overrides: str) -> Data:
    (folder / "r.yaml").write_text(FULL.replace("DATA", data))
    return recipe.load(str(folder / "r.yaml"), overrides).stages["sft"].data


def refused(folder: Path, data: str, *overrides: str) -> InputError:
    with pytest.raises(InputError) as caught:
        load(folder, data, *overrides)
    assert len(caught.value.all) == 1, [str(one) for one in caught.value.all]
    return caught.value


@pytest.mark.parametrize(
    ("path", "files"),
    [
        ("a.jsonl", ["a.jsonl"]),
        ("A.JSONL", ["A.JSONL"]),
        ("packed.jsonl.gz", ["packed.jsonl.gz"]),
        ("packed.csv.xz", ["packed.csv.xz"]),
        ("[ab].jsonl", ["a.jsonl", "b.jsonl"]),
        ("all", ["all/1.jsonl", "all/2.jsonl"]),
        ("all/*", ["all/1.jsonl", "all/2.jsonl"]),
        ("all/?.jsonl", ["all/1.jsonl", "all/2.jsonl"]),
        ("deep/**/*.jsonl", ["deep/er/1.jsonl"]),
        ("[odd]", ["[odd]/1.jsonl"]),
        ("[odd]/1.jsonl", ["[odd]/1.jsonl"]),
        ("splits/train*", ["splits/train-0.jsonl"]),
        ("splits/*", ["splits/test-0.jsonl", "splits/train-0.jsonl"]),  # whoever writes a glob has looked
        ("training", ["training/train_a.jsonl", "training/training_b.jsonl"]),
        ("more", ["more/rows.jsonl", "more/train_2.jsonl"]),
        ("known", ["known/1.json"]),  # beside what describes it
        ("snapshots/rows.jsonl", ["snapshots/rows.jsonl"]),  # a link, as in the hub's cache, to what has no such name
    ],
)
def test_a_path_stands_for_one_file_or_for_many(folder, path, files):
    data = load(folder, f"'{path}'")
    assert data_files.is_local(data.path)
    assert [str(file.relative_to(folder)) for file in data_files.matching(data.path)] == files


def test_a_glob_in_a_folder_whose_name_looks_like_one(folder):
    odd = folder / "[odd]"
    (odd / "r.yaml").write_text(FULL.replace("DATA", "'*.jsonl'"))
    data = recipe.load(str(odd / "r.yaml")).stages["sft"].data
    assert data_files.matching(data.path) == [odd / "1.jsonl"]


@pytest.mark.parametrize(
    ("path", "message", "hint"),
    [
        ("gone.jsonl", "there is no data file", "folder of the file"),
        ("packd.jsonl.gz", "there is no data file", "did you mean `packed.jsonl.gz`?"),
        ("gone.txt", "there is no data file", "folder of the file"),
        ("./gone", "there is no data file", "folder of the file"),
        ("https://host/rows.jsonl", "web addresses are not read", "download"),
        ("notes.txt", "data files of type `.txt` are not read", "one JSON object a line"),
        ("old.jsonl.zst", "data files of type `.zst` are not read", "decompress"),
        ("data.jsonl.zip", "data files of type `.zip` are not read", "unpack"),
        ("t.arrow", "data files of type `.arrow` are not read", "to_parquet"),
        ("empty.jsonl", "empty.jsonl is empty", "at least one row"),
        ("nothing", "there are no data files in", ".jsonl, .json, .csv, .parquet"),
        ("texts", "there are no data files in", "one JSON object a line"),
        ("arrow", "there are no data files in", "to_parquet"),
        ("deep", "there are no data files in", "deep/**/*.jsonl"),
        ("gone/*.jsonl", "no data file matches", "folder of the file"),
        ("texts/*", "no data file matches", "one JSON object a line"),
        ("mixed", "has files of several types: .csv, .jsonl", "mixed/*.jsonl"),
        ("mixed/*", "has files of several types: .csv, .jsonl", "*.jsonl"),
        ("splits", "look like splits: test, train", "splits/train*"),
        ("mine", "look like splits: test, train", "mine/*train*"),
        ("camel", "look like splits: train, validation", "camel/rowsTrain.jsonl"),
        ("some", "look like splits: held out, and others, as more.jsonl", "[some/more.jsonl, some/rows.jsonl]"),
        ("saved", "is a dataset that `save_to_disk` wrote", ".to_parquet("),
        ("dict", "is a dataset that `save_to_disk` wrote", "['train'].to_parquet("),
        ("snapshots", "gone.jsonl, only a link to ../blobs/77ff", "dvc pull"),
        ("snapshots/gone.jsonl", "gone.jsonl, only a link to ../blobs/77ff", "dvc pull"),
        ("with-empty", "2.jsonl is empty", "remove it"),
        ("with-empty/*.jsonl", "2.jsonl is empty", "remove it"),
    ],
)
def test_files_that_cannot_be_read_are_refused_with_a_way_out(folder, path, message, hint):
    for data, place in (
        (f"'{path}'", "r.yaml:5:11: stages.sft.data.path"),
        (f"{{path: '{path}'}}", "r.yaml:5:18: stages.sft.data.path"),
        (f"[a.jsonl, '{path}']", "r.yaml:5:21: stages.sft.data.mix.1.path"),
        (f"{{path: a.jsonl, eval_data: '{path}'}}", "r.yaml:5:38: stages.sft.data.eval_data.path"),
    ):
        found = refused(folder, data)
        assert found.place == f"{folder}/{place}"
        assert message in found.message
        assert hint in found.hint


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("stages.sft.data=~nobody-here/a.jsonl", "there is no data file"),
        ("stages.sft.data=loop.jsonl", "loop.jsonl, only a link to loop.jsonl"),
        ("stages.sft.data=gone.jsonl", "gone.jsonl, only a link to moved.jsonl"),
        ("model.path=~nobody-here/model", "there is no model folder"),
        ("model.path=./gone.jsonl", "gone.jsonl, only a link to moved.jsonl"),
        ("model.chat_template=~nobody-here/t.jinja", "there is no chat template"),
        ("model.chat_template=loop.jsonl", "only a link to loop.jsonl"),
        ("output_dir=~nobody-here/runs", "there is no home folder `~nobody-here`"),
        ("stages.sft.init=~nobody-here/adapter", "there is no adapter folder"),
        ("stages.sft.init=./loop.jsonl", "there is no adapter folder"),
    ],
)
def test_homes_of_nobody_and_links_to_nowhere_are_refused_in_a_sentence(folder, keys, message):
    (folder / "loop.jsonl").symlink_to("loop.jsonl")
    (folder / "gone.jsonl").symlink_to("moved.jsonl")
    (folder / "r.yaml").write_text(FULL.replace("DATA", "a.jsonl"))
    with pytest.raises(InputError) as caught:
        recipe.load(str(folder / "r.yaml"), [keys])
    assert message in caught.value.message
    assert "loop.jsonl`?" not in str(caught.value.hint)


def test_a_recipe_whose_file_has_no_name_in_utf_8(folder):
    (folder / os.fsdecode(b"caf\xe9.yaml")).write_text(FULL.replace("DATA", "a.jsonl"))
    with pytest.raises(InputError, match="expected text in UTF-8") as caught:
        recipe.load(str(folder / os.fsdecode(b"caf\xe9.yaml")))
    assert "the run directory is named after it" in str(caught.value.hint)
    assert recipe.load(str(folder / os.fsdecode(b"caf\xe9.yaml")), ["name=cafe"]).name == "cafe"


@pytest.mark.parametrize("path", ["org/name", "name"])
def test_what_is_no_file_is_a_hub_dataset(folder, path):
    data = load(folder, f"{{path: {path}, subset: x, revision: v1, split: 'train[:10%]'}}")
    assert (data.path, data.subset, data_files.is_local(data.path)) == (path, "x", False)


@pytest.mark.parametrize(
    ("data", "key", "message"),
    [
        ("{}", "path", "`path` is missing"),
        ("{path: ''}", "path", "`path` is empty"),
        ("[]", "mix", "`mix` is empty"),
        ("{path: a.jsonl, mix: [b.jsonl]}", "mix", "`path` and `mix` exclude each other"),
        ("{path: a.jsonl, eval_fraction: 0.1, eval_data: b.jsonl}", "eval_fraction", "exclude each other"),
        ("{path: a.jsonl, too_long: drop}", "too_long", "no length limits the rows"),
        ("{path: a.jsonl, split: test}", "split", "a data file has no splits"),
        ("{path: a.jsonl, subset: x}", "subset", "a data file has no subsets"),
        ("{path: a.jsonl, revision: x}", "revision", "a data file has no revisions"),
        ("{path: a.jsonl, eval_data: {path: b.jsonl, split: x}}", "eval_data.split", "a data file has no splits"),
        ("{mix: [a.jsonl], columns: {prompt: x}}", "columns", "no effect beside `mix`"),
        ("{mix: [a.jsonl], limit: 3}", "limit", "no effect beside `mix`"),
        ("{mix: [{path: a.jsonl, revision: x}]}", "mix.0.revision", "a data file has no revisions"),
        ("{mix: [{path: a.jsonl, weight: 1}, b.jsonl]}", "mix.1.weight", "`weight` is missing"),
        ("{path: a.jsonl, columns: {prompt: ''}}", "columns.prompt", "a column without a name"),
        ("{path: a.jsonl, columns: {'': x}}", "columns.", "a column without a name"),
    ],
)
def test_keys_of_data_that_do_not_go_together_are_refused(folder, data, key, message):
    found = refused(folder, data)
    assert found.place.endswith(f": stages.sft.data.{key}")
    assert message in found.message
    assert found.hint


@pytest.mark.parametrize(
    "data",
    [
        "{path: a.jsonl, too_long: drop, max_prompt_length: 9}",
        "{path: a.jsonl, too_long: drop, max_completion_length: 9, bad_rows: drop, chat: true, limit: 3, loss: all}",
        "[{path: a.jsonl, weight: 1}, {path: b.jsonl, weight: 0.5, limit: 1, columns: {prompt: x, completion: x}}]",
        "{mix: [a.jsonl, {path: org/name, split: test}], eval_data: {path: org/name, split: test}}",
        "{path: a.jsonl, split: train}",  # as a resolved recipe has it
    ],
)
def test_keys_of_data_that_go_together_are_kept_and_written_down(folder, data):
    loaded = load(folder, data)
    (folder / "again.yaml").write_text(recipe.to_yaml(recipe.load(str(folder / "r.yaml"))))
    assert recipe.load(str(folder / "again.yaml")).stages["sft"].data == loaded


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("evaluate.data.eval_fraction=0.1", "all rows are held out here"),
        ("evaluate.data.eval_data=a.jsonl", "all rows are held out here"),
        ("evaluate.data.too_long=drop", "every prompt that is asked is judged"),
        ("evaluate.data.bad_rows=drop", "every prompt that is asked is judged"),
        ("evaluate.data.max_completion_length=9", "only prompts are read here"),
        ("evaluate.data.loss=all", "only prompts are read here"),
        ("reward.data.loss=all", "it is of demonstrations, and this stage reads preferences"),
        ("ppo.data.loss=all", "it is of demonstrations, and this stage reads prompts"),
        ("ppo.data.max_completion_length=9", "only prompts are read here"),
        ("ppo.ptx_data.eval_fraction=0.1", "nothing evaluates on these rows"),
        ("ppo.ptx_data.eval_data=a.jsonl", "nothing evaluates on these rows"),
    ],
)
def test_keys_that_the_place_of_the_data_makes_idle_are_refused(folder, override, reason):
    found = refused(folder, "a.jsonl", override)
    assert found.message == f"`{override.partition('=')[0].rpartition('.')[2]}` has no effect: {reason}"
    assert found.place == f"override `{override}`"


def test_every_turn_of_ptx_data_may_be_learned(folder):
    (folder / "r.yaml").write_text(FULL.replace("DATA", "a.jsonl"))
    loaded = recipe.load(str(folder / "r.yaml"), ["ppo.ptx_data.loss=all"])
    assert (loaded.stages["ppo"].ptx_data.loss, loaded.stages["sft"].data.loss) == ("all", "last")


def test_dropping_what_is_too_long_of_prompts_needs_their_length(folder):
    """A limit on replies would not help where only prompts are read."""
    found = refused(folder, "a.jsonl", "ppo.data.too_long=drop")
    assert found.hint == "set `max_prompt_length`, or remove it"
    load(folder, "a.jsonl", "ppo.data.too_long=drop", "ppo.data.max_prompt_length=9")


def test_a_metric_of_held_out_rows_may_come_from_eval_data(folder):
    gate = "reward.gates={eval_accuracy: '> 0'}"
    assert "`eval_fraction`" in refused(folder, "a.jsonl", gate).hint
    load(folder, "a.jsonl", gate, "reward.data.eval_data=tiny:preferences")


@pytest.mark.parametrize(
    "template",
    [
        "{% for message in messages %}{{ message.content }}{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}",
    ],
)
def test_a_chat_template_is_a_file_beside_the_recipe(folder, template):
    (folder / "chat.jinja").write_text(template)
    load(folder, "a.jsonl", "model.chat_template=chat.jinja")
    loaded = recipe.load(str(folder / "r.yaml"), ["model.chat_template=chat.jinja"])
    assert loaded.model.chat_template == str(folder / "chat.jinja")
    assert "chat_template:" not in recipe.to_yaml(recipe.load(str(folder / "r.yaml")))
    (folder / "again.yaml").write_text(recipe.to_yaml(loaded))
    assert recipe.load(str(folder / "again.yaml")).model == loaded.model


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no chat template"),
        (b"{{ '\xe9' }}", "cannot be read"),
        (b" \n", "is empty"),
        (b"a\n{% for m in messages %}", "is no Jinja template: Unexpected end of template"),
        (b"a\n{{ m.content | }}", "is no Jinja template"),
        (b"a\n{{ m | no_such_filter }}", "No filter named 'no_such_filter'. (line 2)"),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_refused(folder, content, message):
    if content is not None:
        (folder / "chat.jinja").write_bytes(content)
    found = refused(folder, "a.jsonl", "model.chat_template=chat.jinja")
    assert message in found.message
    assert found.place == "override `model.chat_template=chat.jinja`"


def test_neither_globs_nor_templates_import_torch(folder):
    (folder / "chat.jinja").write_text("{{ messages }}")
    load(folder, "all")
    code = (
        "import sys\nfrom rlhf_pipeline import recipe\nrecipe.load('r.yaml', ['model.chat_template=chat.jinja'])\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'trl', 'peft', 'numpy', 'pyarrow'} & sys.modules.keys()))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, env=os.environ, timeout=60)
    assert done.stdout == "[]\n"
