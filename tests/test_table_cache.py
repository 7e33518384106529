"""Tables by size: made once, few kept, but those that a CUDA graph reads."""

from __future__ import annotations

import pytest
import torch

from cflow_fast.kernels import table_cache
from cflow_fast.kernels.table_cache import MAX_TABLES, TableCache

CARD = torch.device("cuda", 0)


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Its last item says whether the current stream is being captured."""
    state = [False]
    monkeypatch.setattr(table_cache, "in_capture", lambda device: state[-1])
    return state


def test_a_table_is_made_once_and_the_one_unused_for_longest_dropped() -> None:
    cache: TableCache[list[int]] = TableCache(torch.device("cpu"))
    made: list[int] = []

    def get(size: int) -> list[int]:
        return cache.get(size, lambda: made.append(size) or [size])  # type: ignore[func-returns-value]

    first = get(0)
    for size in range(1, MAX_TABLES):
        assert get(size) == [size]
    assert get(0) is first
    get(MAX_TABLES)
    assert len(cache) == MAX_TABLES
    assert 0 in cache
    assert 1 not in cache
    assert made == list(range(MAX_TABLES + 1))


def test_a_table_that_a_graph_reads_is_kept(capturing: list[bool]) -> None:
    cache: TableCache[str] = TableCache(CARD)
    cache.get(0, lambda: "read by a graph")
    capturing.append(True)
    cache.get(0, lambda: pytest.fail("it is there"))
    capturing.append(False)
    for size in range(1, 2 * MAX_TABLES):
        cache.get(size, lambda: "another")
    assert cache.get(0, lambda: "made anew") == "read by a graph"
    assert len(cache) == MAX_TABLES + 1
