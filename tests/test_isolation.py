"""What one test does must not reach the next one in the same process."""

import os

import pytest

from rlhf_pipeline.cli.shared import quiet_libraries


@pytest.mark.parametrize("turn", (1, 2))
def test_a_command_in_this_process_leaves_the_environment_as_it_was(turn):
    assert os.environ.get("ZE_AFFINITY_MASK") is None, f"of turn {turn - 1}"
    with quiet_libraries():
        assert os.environ["ZE_AFFINITY_MASK"] == "0"
