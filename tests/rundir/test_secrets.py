"""Secrets are found wherever they stand, and nothing else is taken for one."""

import json
import os
import stat
import tracemalloc
from pathlib import Path

import pytest

from rlhf_pipeline.rundir.secrets import redact, scrub

VALUE = "correct-horse-42"


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """No secrets but those of the test."""
    for name in list(os.environ):
        if any(word in name for word in ("TOKEN", "SECRET", "PASS", "KEY", "CREDENTIAL")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID",
        "DB_PASSWORD", "MYSQL_PASSWD", "MY_CREDENTIALS", "SIGNING_KEY", "GITHUB_PAT", "hf_token", "CLIENT_SECRET_2",
    ],
)  # fmt: skip
def test_what_is_secret_by_its_name_is_replaced(monkeypatch, name):
    monkeypatch.setenv(name, VALUE)
    assert redact(f"Bearer {VALUE}! {VALUE}") == "Bearer ***! ***"


@pytest.mark.parametrize("name", ["HOME_FOLDER", "TOKENIZER_FILE", "TOKENIZERS_PARALLELISM", "KEYBOARD", "PATTERN"])
def test_what_is_not_is_kept(monkeypatch, name):
    monkeypatch.setenv(name, VALUE)
    assert redact(f"at {VALUE}") == f"at {VALUE}"


@pytest.mark.parametrize(("value", "kept"), [("1234567", True), ("12345678", False), ("", True), ("  7 x  \n", True)])
def test_a_value_that_could_be_any_word_is_kept(monkeypatch, value, kept):
    monkeypatch.setenv("HF_TOKEN", value)
    assert (redact(f"a {value} b") == f"a {value} b") == kept


def test_a_secret_that_begins_with_another_is_replaced_whole(monkeypatch):
    monkeypatch.setenv("A_TOKEN", VALUE)
    monkeypatch.setenv("B_TOKEN", VALUE + "-and-more")
    assert redact(f"{VALUE}-and-more {VALUE}") == "*** ***"


def test_a_secret_with_quotes_is_found_as_libraries_print_it(monkeypatch):
    value = "p\\\"ss'wörd\t42"
    monkeypatch.setenv("DB_PASSWORD", value)
    shown = [value, json.dumps({"e": value}), json.dumps([value], ensure_ascii=False), repr([value]), repr({1: value})]
    for text in shown:
        assert "ss" not in redact(text) and "***" in redact(text), text


def test_a_secret_of_several_lines_is_found_line_by_line(monkeypatch, tmp_path):
    monkeypatch.setenv("DEPLOY_KEY", "first-half-of-it\nsecond-half-of-it\n")
    file = tmp_path / "log.txt"
    file.write_text("first-half-of-it\r\nthen second-half-of-it.\n", newline="")
    scrub(file)
    assert file.read_bytes() == b"***\r\nthen ***.\n"


@pytest.mark.parametrize("where", ["HF_TOKEN_PATH", "HF_HOME", "XDG_CACHE_HOME", "HOME"])
def test_the_token_of_a_login_counts(monkeypatch, tmp_path, where):
    file = {
        "HF_TOKEN_PATH": "own", "HF_HOME": "token", "XDG_CACHE_HOME": "huggingface/token",
        "HOME": ".cache/huggingface/token",
    }[where]  # fmt: skip
    for name in ("HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(VALUE + "\n")
    monkeypatch.setenv(where, str(tmp_path / file if where == "HF_TOKEN_PATH" else tmp_path))
    assert redact(f"sent {VALUE}") == "sent ***"


@pytest.mark.parametrize(
    "token",
    [
        "hf_" + "aB3dE6gH9jK2" * 3,
        "wandb_v1_" + "aB3dE6gH9_" * 6,
        "sk-proj-" + "aB3-dE6_gH" * 8,
        "sk-" + "aB3dE6gH" * 6,
        "AKIA" + "IOSFODNN7EXAMPLE",
    ],
)
def test_known_tokens_are_replaced_wherever_they_come_from(token):
    for text in ("{}", "token={}, next", '"{}"', "https://user:{}@host/path", "({})"):
        assert redact(text.format(token)) == text.format("***")


@pytest.mark.parametrize(
    "text",
    [
        "commit 0123456789abcdef0123456789abcdef01234567",
        "sha256:" + "0123456789abcdef" * 4,
        "https://huggingface.co/Qwen/Qwen3-4B/resolve/main/model-00001-of-00003.safetensors",
        "hf_hub_download hf_transfer hf_device_map_of_the_model_that_was_loaded",
        "task-oriented-dialogues-with-very-long-names-that-go-on-and-on-and-on",
        "sk-learn-like-pipelines-with-very-long-names-that-go-on-and-on-and-on",
        "the AKIAS of old; ASIA",
        "tokenizer_config.json special_tokens_map.json num_tokens=123456789",
    ],
)
def test_what_only_looks_a_little_like_a_token_is_kept(text):
    assert redact(text) == text


def test_a_file_is_scrubbed_in_place_and_keeps_the_rest_to_the_byte(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", VALUE)
    file = tmp_path / "log.txt"
    file.write_bytes(b"50%\r100%\r\n\xff\xfe \xc3\xa4\n\n" + VALUE.encode() + b"\xff no newline " + VALUE.encode())
    file.chmod(0o640)
    scrub(file)
    assert file.read_bytes() == b"50%\r100%\r\n\xff\xfe \xc3\xa4\n\n***\xff no newline ***"
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_without_secrets_is_not_touched(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", VALUE)
    file = tmp_path / "log.txt"
    file.write_bytes(b"nothing\r\n\xff here")
    before = file.stat()
    scrub(file)
    after = file.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_scrub_that_is_cut_short_leaves_the_file_whole(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", VALUE)
    file = tmp_path / "log.txt"
    file.write_text(f"{VALUE}\n" * 3)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", fail)
        scrub(file)
    assert file.read_text() == f"{VALUE}\n" * 3
    scrub(file)
    assert file.read_text() == "***\n" * 3
    assert list(tmp_path.iterdir()) == [file]


def test_a_long_log_takes_no_more_memory_than_a_short_one(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", VALUE)
    file = tmp_path / "log.txt"
    with file.open("w") as lines:
        for i in range(50_000):
            lines.write(f"step {i}: loss 0.6931 and so on, and so on\n")
        lines.write(VALUE)
    assert file.stat().st_size > 2e6
    tracemalloc.start()
    scrub(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e5
    with file.open() as lines:
        assert sum(1 for _ in lines) == 50_001
    assert file.read_text().endswith("***")


def test_a_file_that_is_not_there_holds_no_secret(tmp_path):
    scrub(tmp_path / "log.txt")
    assert list(tmp_path.iterdir()) == []
