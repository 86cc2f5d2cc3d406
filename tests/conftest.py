"""Which tests are slow, how they are shared out, and where what they have in common comes from: `shared.py`."""

import gc
import os
import signal
from collections.abc import Iterator

import pytest

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# The files that take longest, the longest first.
LONG = (
    "test_sharded", "test_tiny_run", "test_faults", "test_several_ranks", "test_over_ranks", "test_two_machines",
    "test_sweep", "test_resumable", "test_watching", "test_two_processes", "test_ranks_at_work", "test_runner",
    "test_stop", "test_bad", "test_memory_forecast", "test_gate_metrics", "test_stages", "test_docs", "test_training",
    "test_loading", "test_recipes", "test_shrink", "test_roles", "test_groups", "test_measure", "test_report_page",
    "test_resume", "test_kill", "test_architectures", "test_check", "test_smoke", "test_launch", "test_evaluation",
    "test_closed_form", "test_ensemble", "test_served", "test_packaging", "test_safe_to_open", "test_plan",
    "test_checkpoints", "test_page", "test_report_many", "test_report_browser", "test_cli",
)  # fmt: skip
START_PROCESSES = {"warm_server", "tiny_run"}  # fixtures


def pytest_configure(config: pytest.Config) -> None:
    """Import what the tests share, which takes seconds; not where other processes run them."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a shell: commands would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        gc.disable()  # a collector that walks what is being imported takes a fifth of the time
        config.pluginmanager.import_plugin("shared")


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    """Mark the slow ones, and share the tests out so that `--dist worksteal` does not end with a process left alone.

    It gives each process as many of them in a row, and whoever has finished takes over half of what another has left,
    from its end. So each gets some of the long files, first, and then short tests.
    """
    for item in items:
        if START_PROCESSES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
    yield
    count = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    hands: list[list[pytest.Item]] = [[] for _ in range(count)]
    order = [*range(count), *reversed(range(count))]
    for number, name in enumerate(LONG):
        hands[order[number % len(order)]] += [item for item in items if item.path.stem == name]
    rest = [item for item in items if item.path.stem not in LONG]
    left = len(items)
    for number, hand in enumerate(hands):
        share = left // (count - number)
        left -= share
        more = max(share - len(hand), 0)
        hand += rest[:more]
        del rest[:more]
    items[:] = [item for hand in hands for item in hand] + rest


def pytest_collection_finish() -> None:
    """Keep the garbage collector from all that is there now: trainers call it, and it would walk a million objects."""
    gc.enable()
    gc.freeze()
