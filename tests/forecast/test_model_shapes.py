"""What is counted while a program runs on shapes, and that what is known of an operation changes none of it."""

import torch

from rlhf_pipeline.forecast import shapes
from rlhf_pipeline.forecast.shapes import Ledger, Shape, empty

MIB = 2**20


def _program(ledger):
    """Views, an operation in place, one with several outputs, a result that is dropped, and a real mask."""
    x = empty(256, 1024, dtype=torch.float32)  # 1 MiB
    ledger.count(x, "weights")
    with ledger.during("backward"):
        y = (x.view(1024, 256).t() * 2).relu_()  # 1 MiB more
        first, second = y.chunk(2)  # both are views
        first.add_(second)
        z = torch.cat([first, second]).relu_()  # 1 MiB more
        del y, first, second
        values, places = z.max(1)
        mask = torch.arange(256) < 128
        kept = z[mask]  # half a MiB
        return z.shape, values.shape, places.shape, kept.shape, kept.is_contiguous()


def test_an_operation_that_is_known_counts_as_it_did_the_first_time(monkeypatch):
    monkeypatch.setattr(shapes, "_KNOWN", {})
    runs = []
    for _ in range(3):
        with Ledger(vocabulary=7) as ledger:
            runs.append((_program(ledger), ledger.peaks, ledger.highest["backward"]))
        known = len(shapes._KNOWN)
    assert known > 5
    assert runs[0] == runs[1] == runs[2]
    (whole, values, places, kept, contiguous), peaks, highest = runs[0]
    assert (whole, values, places, kept, contiguous) == ((256, 1024), (256,), (256,), (128, 1024), True)
    assert peaks["backward"] == {"weights": MIB, "activations": highest - MIB}
    assert highest - MIB == 2 * MIB  # `y` and `z`; when `kept` and the rest come, `y` is gone


def test_a_view_of_a_known_operation_shares_memory_and_a_new_tensor_does_not():
    with Ledger(vocabulary=7) as ledger:
        for size in (512, 512, 256):
            x = empty(size, 512, dtype=torch.float32)
            ledger.count(x)
            before = ledger.total
            row = x[3:5].transpose(0, 1)
            assert isinstance(row, Shape)
            assert (row.shape, row.stride(), ledger.total) == ((512, 2), (1, 512), before)
            doubled = x + x
            assert ledger.total == 2 * before == 2 * size * 512 * 4
            del doubled, row, x
            assert ledger.total == 0
