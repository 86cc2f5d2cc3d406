"""Numbers over the processes that train together."""

import torch
from together import connect, together

from rlhf_pipeline import ranks


def seen() -> dict[str, object]:
    before = ranks.count(), ranks.index()
    connect()
    mine = torch.tensor([1.0 + ranks.index(), 10.0])
    added = mine.clone()
    ranks.add_up(added)
    asked: list[int] = []
    return {
        "before": before,
        "index": ranks.index(),
        "first": ranks.is_first(),
        "total": ranks.total(mine).tolist(),
        "mine": mine.tolist(),
        "added": added.tolist(),
        "from first": ranks.from_first(lambda: asked.append(1) or f"by rank {ranks.index()}"),
        "asked": len(asked),
        "gathered": ranks.gathered(f"rank {ranks.index()}"),
        "any": [ranks.any_of(ranks.index() == 1), ranks.any_of(False)],
        "share": [list(range(rows)[ranks.share(rows)]) for rows in (6, 5, 2, 1)],
    }


def test_three_ranks_have_the_same_numbers():
    found = together(seen, processes=3)
    for rank, one in enumerate(found):
        assert one["before"] == (1, 0)
        assert (one["index"], one["first"]) == (rank, rank == 0)
        assert (one["total"], one["mine"]) == ([6.0, 30.0], [1.0 + rank, 10.0])
        assert one["added"] == one["total"]
        assert (one["from first"], one["asked"]) == ("by rank 0", 1 if rank == 0 else 0)
        assert one["gathered"] == ["rank 0", "rank 1", "rank 2"]
        assert one["any"] == [True, False]
    for rows, number in enumerate((6, 5, 2, 1)):
        shares = [one["share"][rows] for one in found]
        assert [row for share in shares for row in share] == list(range(number))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_is_all_there_is():
    values = torch.tensor([1.0])
    assert (ranks.count(), ranks.index(), ranks.is_first()) == (1, 0, True)
    assert ranks.total(values) is values
    assert ranks.gathered("one") == ["one"]
    assert ranks.from_first(lambda: "one") == "one"
    assert ranks.any_of(True) and not ranks.any_of(False)
    assert ranks.share(5) == slice(0, 5)
