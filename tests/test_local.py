"""Paths as people write them, on machines where somebody has no home."""

import os
from pathlib import Path

import pytest

from rlhf_pipeline import local


def test_a_home_folder_stands_for_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local.expanded("~/a/b") == tmp_path / "a" / "b"
    assert local.expanded("a/~") == Path("a/~")
    assert local.expanded("~nobody-here/a") == Path("~nobody-here/a")


def test_who_has_no_home_keeps_caches_among_temporary_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a container that runs under a number which no user has."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local.caches() == tmp_path / ".cache"
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_000)
    assert local.caches().is_absolute()
    assert local.caches().name == "cache-4000000000"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert local.caches() == tmp_path / "x"


def test_a_loop_of_links_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert local.resolved(tmp_path / "a").parent == tmp_path
