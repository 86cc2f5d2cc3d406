"""A labeller with the gold judge's mind, who clicks through HTTP as a browser does: for the tiny world alone.

rlhf-pipeline label runs/tiny-label          # prints a link
python benchmarks/labeller.py LINK --noise 0.1
"""

import argparse
import html
import random
import re
import time
import uuid
from typing import Any

import httpx2

from rlhf_pipeline.models.tiny import world


def label(link: str, most: int = 100_000, noise: float = 0.0, seed: int = 0) -> dict[str, Any]:
    """Choose until the stage has labels enough, or nothing is left to ask.

    Args:
        link: as `label` prints it.
        most: how many labels at most.
        noise: the share of choices that are drawn instead.
        seed: of these.

    Returns:
        `progress` and `learner` as the page showed them last, and how many `labels` were made.
    """
    draw, address = random.Random(seed), link.partition("/?")[0]
    with httpx2.Client(base_url=address, headers={"origin": address}, timeout=60) as client:
        client.get(link, follow_redirects=True).raise_for_status()
        shown = client.get("/api/session").json()
        count = 0
        while shown["ask"] and not shown["progress"]["reached"] and count < most:
            ask = shown["ask"]
            choice = draw.choice(("left", "right", "tie")) if draw.random() < noise else better(ask)
            body = {"id": str(uuid.UUID(int=draw.getrandbits(128), version=4)), "ask": ask["id"], "choice": choice}
            answer = client.post("/api/label", json=body | {"dimensions": {}, "reason": "", "seconds": 1.0})
            answer.raise_for_status()
            shown, count = answer.json(), count + 1
            assert shown["saved"]
        time.sleep(0.5)  # the last lesson
        last = client.get("/api/session").json()
    return {"progress": last["progress"], "learner": last["learner"], "labels": count}


def better(ask: dict[str, Any]) -> str:
    """Which side the gold judge finds better, of a pair as the page shows it."""
    prompt = "\n".join(text(turn["html"]) for turn in ask["turns"]) if ask.get("turns") else text(ask["prompt"])
    left, right = world.judge(prompts=[prompt] * 2, completions=[text(ask[side]) for side in ("left", "right")])
    return "tie" if left == right else "left" if left > right else "right"


def text(shown: str) -> str:
    """The words of HTML."""
    return html.unescape(re.sub(r"<[^>]*>", "", shown)).strip()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("link")
    parser.add_argument("--most", type=int, default=100_000)
    parser.add_argument("--noise", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(label(options.link, options.most, options.noise, options.seed))
