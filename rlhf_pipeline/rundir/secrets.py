"""Keeping tokens and passwords out of what a run leaves behind. No torch."""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

from rlhf_pipeline import local

REPLACEMENT = "***"
# By its name, the value of an environment variable is secret. A tokenizer is not.
SECRET_NAME = re.compile(
    r"TOKEN(?!IZE)|SECRET|PASSWORD|PASSWD|API_KEY|ACCESS_KEY|CREDENTIAL|_KEY$|_PAT$", re.IGNORECASE
)
SHORTEST = 8  # characters: a shorter value could be any word
# Tokens that nothing else looks like: of Hugging Face, Weights & Biases, OpenAI and Anthropic, AWS.
TOKENS = (
    r"\bhf_[A-Za-z0-9]{30,}\b",
    r"\bwandb_v\d+_[A-Za-z0-9_-]{40,}",
    r"\bsk-(?:proj|svcacct|admin|ant)-[A-Za-z0-9_-]{40,}",
    r"\bsk-[A-Za-z0-9]{48}\b",
    r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
)


def redact(text: str) -> str:
    """`text` with `***` for every secret: what the environment or the Hugging Face login holds, and known tokens."""
    return _pattern().sub(REPLACEMENT, text)


def scrub(file: Path) -> None:
    """Redact a file in place, line by line; it is replaced in one step, and only if it holds a secret.

    Nobody else may be writing to it. It need not be there.
    """
    if not file.exists():
        return
    pattern = _pattern()
    # Other bytes than UTF-8 and all line ends stay as they are.
    with file.open(encoding="utf-8", errors="surrogateescape", newline="") as lines:
        if not any(pattern.search(line) for line in lines):
            return
        lines.seek(0)
        clean = file.with_name(file.name + ".new")
        with clean.open("w", encoding="utf-8", errors="surrogateescape", newline="") as kept:
            kept.writelines(pattern.sub(REPLACEMENT, line) for line in lines)
    shutil.copymode(file, clean)
    clean.replace(file)


def _pattern() -> re.Pattern[str]:
    forms: set[str] = set()
    for secret in _secrets():
        for line in map(str.strip, secret.splitlines()):  # a file is looked through line by line
            if len(line) >= SHORTEST:
                forms |= {line, json.dumps(line)[1:-1], json.dumps(line, ensure_ascii=False)[1:-1], repr(line)[1:-1]}
    longest_first = sorted(forms, key=len, reverse=True)  # one secret may begin with another
    return re.compile("|".join([*map(re.escape, longest_first), *TOKENS]))


def _secrets() -> list[str]:
    found = [value for name, value in os.environ.items() if SECRET_NAME.search(name)]
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{cache}/huggingface"
    login = os.path.expandvars(os.environ.get("HF_TOKEN_PATH") or f"{home}/token")
    with contextlib.suppress(OSError, ValueError):
        found.append(local.expanded(login).read_text(encoding="utf-8"))
    return found
