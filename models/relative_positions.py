"""Buckets of relative positions, for T5's and MPNet's attention biases."""

import numpy as np


def relative_buckets(
    length: int, num_buckets: int = 32, max_distance_tokens: int = 128
) -> np.ndarray:
    """Bucket of each key's position relative to each query's, both directions.

    Half of the buckets of each direction hold one distance each; the others grow
    logarithmically up to the maximum distance, and the last one holds all beyond.
    Raffel et al. 2020, section 2.1; MPNet uses the same buckets.

    Args:
      length: number of positions.
      num_buckets: number of buckets; the upper half is for keys behind the query.
      max_distance_tokens: distance from which on all share a bucket.

    Returns:
      (length, length) int32, by query and key.

    >>> from models.relative_positions import relative_buckets
    >>> relative_buckets(200)[0, [0, 1, 7, 8, 11, 12, 16, 199]]
    array([ 0, 17, 23, 24, 24, 25, 26, 31], dtype=int32)
    >>> relative_buckets(200)[[1, 199], 0]
    array([ 1, 15], dtype=int32)
    """
    positions = np.arange(length)
    offsets = positions[None, :] - positions[:, None]
    half = num_buckets // 2
    exact = half // 2
    distances = np.abs(offsets)
    # log2 is exact at powers of two, where buckets begin.
    octaves = np.log2(np.maximum(distances, exact) / exact)
    steps = octaves / np.log2(max_distance_tokens / exact) * (half - exact)
    coarse = np.minimum(exact + steps.astype(np.int32), half - 1)
    buckets = np.where(distances < exact, distances, coarse)
    return (buckets + half * (offsets > 0)).astype(np.int32)
