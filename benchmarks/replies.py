"""How long it takes to learn what replies of a policy are usually like, and to measure replies against it."""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from rlhf_pipeline.hacking.replies import Reply, Usual

TIMES = 7


def replies(draw: np.random.Generator, prompts: int, rounds: int, length: int) -> list[Reply]:
    """Replies of words as frequent as those of a language are: Zipf's law."""
    words = draw.zipf(1.3, (rounds * prompts, length)) % 20_000
    return [
        Reply(at % prompts, " ".join(f"w{word}" for word in row), row.tolist(), True, float(draw.normal()))
        for at, row in enumerate(words)
    ]


def seconds(do: Callable[[], Any]) -> float:
    """The median of a few times."""
    taken = []
    for _ in range(TIMES):
        began = time.perf_counter()
        do()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def main() -> None:
    """Measure and print."""
    found = {}
    print(f"{'replies':>8} {'tokens':>7} {'learn':>9} {'measure':>9} {'phrases':>9} {'as JSON':>9}")
    for prompts, length in ((104, 20), (256, 300)):
        draw = np.random.default_rng(0)
        start, now = replies(draw, prompts, 4, length), replies(draw, prompts, 1, length)
        usual = Usual.of(start)
        usual.measures(now)
        row = {
            "learn": seconds(lambda start=start: Usual.of(start)),
            "measure": seconds(lambda usual=usual, now=now: usual.measures(now)),
            "phrases": seconds(lambda usual=usual, now=now: usual.new_phrases(now)),
            "bytes": len(json.dumps(usual.as_json())),
        }
        print(
            f"{prompts:>8} {length:>7}",
            *(f"{row[name] * 1e3:>6.0f} ms" for name in ("learn", "measure", "phrases")),
            f"{row['bytes'] / 1e3:>6.0f} kB",
        )
        found[f"{prompts} x {length}"] = row
    print(json.dumps(found))


if __name__ == "__main__":
    main()
