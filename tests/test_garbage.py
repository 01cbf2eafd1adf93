"""The collector's threshold is raised once an engine exists, and never lowered."""

import gc

import pytest

from nanovllm.engine.garbage import collect_rarely


@pytest.mark.parametrize(("before", "after"), [(700, 50_000), (2000, 50_000), (100_000, 100_000), (0, 0)])
def test_only_a_lower_threshold_is_raised(before: int, after: int):
    saved = gc.get_threshold()
    try:
        gc.set_threshold(before, 11, 12)
        collect_rarely()
        assert gc.get_threshold() == (after, 11, 12)
    finally:
        gc.set_threshold(*saved)
