"""Shapes that libtpu handles well, found by compiling (docs/tpu.md)."""

from __future__ import annotations


def scatterable_columns(rows: int, columns: int, shards: int) -> int:
    """Columns to which a gradient [rows, columns] is padded so that libtpu can scatter it over `shards` chips of v5p.

    The SparseCores cut a shard into pieces of whole tiles (8 x 128 fp32). If the tiles of a row have a prime factor
    that is large beside the tile rows of a shard, libtpu all-reduces the whole gradient, with twice the traffic. More
    than 16 chips span two dimensions of the torus and cut finer.
    """
    tile_rows = rows // shards // 8 if shards > 1 else 0
    if not tile_rows:
        return columns
    limit = max(2.0, tile_rows * (2.75 if shards > 16 else 1.375))
    whole = tiles = -(-columns // 128)
    while _largest_prime_factor(tiles) > limit:
        tiles += 1
    return columns if tiles == whole else 128 * tiles


def _largest_prime_factor(n: int) -> int:
    factor = 2
    while factor * factor <= n:
        if n % factor == 0:
            n //= factor
        else:
            factor += 1
    return n
