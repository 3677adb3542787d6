"""Cutting a shard's queries into units."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def cut_units(
    pairs: npt.NDArray[np.int64], rows: npt.NDArray[np.int64], row_group_ends: Sequence[int], unit_pairs: int
) -> list[int]:
    """Cut a shard's queries into units: indexes of first queries, and the number of queries at the end.

    A unit ends when it has `unit_pairs` pairs, or at the end of a row group once it has half of them, so that a row
    group is seldom decoded for two units. A query is never cut; one that fills a unit is a unit of its own.
    """
    ends = set(row_group_ends)
    cuts, count = [0], 0
    for query, size in enumerate(pairs.tolist()):
        if count and size >= unit_pairs:
            cuts.append(query)
            count = 0
        count += size
        full = count >= unit_pairs or (2 * count >= unit_pairs and int(rows[query + 1]) in ends)
        if full or query == len(pairs) - 1:
            cuts.append(query + 1)
            count = 0
    return cuts
