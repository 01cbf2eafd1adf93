"""How a step's attention is cut into pieces of about equal work, on the host, once for all layers."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def split_decodes(lengths: Array, capacity: int, tile: int) -> tuple[Array, Array]:
    """Cut rows of ``lengths`` keys into at most ``capacity`` >= len(lengths) items.

    Every row has an item; long rows have several, of about the same length everywhere: as many keys as the capacity
    that is left beside one item per row allows, in whole tiles.

    ::

        lengths 100 3 700, capacity 6, tile 64:  items of 320    row 0: 100    row 1: 3    row 2: 256 + 256 + 188

    Returns:
        item_start int32 [rows + 1], item_row int32 [capacity] (-1 behind the last item).
    """
    rows = len(lengths)
    spare = capacity - rows
    total = int(lengths.sum())
    per_item = max(1, -(-total // (spare * tile))) * tile if spare else max(1, int(lengths.max(initial=1)))
    # Sum of ceil(length / per_item) <= rows + total / per_item <= rows + spare.
    counts = np.maximum(1, -(-lengths // per_item))
    item_start = np.zeros(rows + 1, np.int32)
    np.cumsum(counts, out=item_start[1:])
    item_row = np.full(capacity, -1, np.int32)
    item_row[: item_start[-1]] = np.repeat(np.arange(rows, dtype=np.int32), counts)
    return item_start, item_row


def cut_queries(query_start: Array, first_row: int, queries: int) -> tuple[Array, Array]:
    """Cut the rows from ``first_row`` on into tiles of ``queries`` queries.

    Returns:
        tile_row and tile_first (query within its row), both int32, longest history last within a row.
    """
    lengths = np.diff(query_start)[first_row:]
    counts = -(-lengths // queries)
    tile_row = np.repeat(np.arange(first_row, first_row + len(lengths), dtype=np.int32), counts)
    within = np.arange(len(tile_row)) - np.repeat(np.cumsum(counts) - counts, counts)
    return tile_row, (within * queries).astype(np.int32)
