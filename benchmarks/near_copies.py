"""Near-duplicate detection alone: text -> tokens -> MinHash signatures -> bands -> components -> what goes.

python tools/curate.py RAW... --out DIR && python benchmarks/near_copies.py DIR

In the pipeline the tokens are hashed once, for filters, signatures and dense features; here they are hashed for the
signatures alone, so this is what finding near copies would cost by itself. Prints seconds and MB/s of text.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).parents[1]))  # to be run as a file
from bc2_jax.curate import minhash
from bc2_jax.curate.config import CopiesConfig
from bc2_jax.curate.copies import band_edges, resolve
from bc2_jax.curate.engine import Engine
from bc2_jax.curate.shards import binary_rows, text_bytes
from bc2_jax.curate.storage import Folder
from bc2_jax.curate.tokens import hash_tokens, pieces


def sign(shards: Folder, out: Folder, name: str) -> dict[str, int]:
    """Signatures and bands of one shard."""
    table = shards.read_table(f"{name}.parquet", ["doc", "text"])
    signature = np.concatenate([minhash.signatures(hash_tokens(piece)) for piece in pieces(table["text"].to_pylist())])
    (out / "signatures").write_table(
        f"{name}.parquet", pa.table({"doc": table["doc"], "signature": binary_rows(signature)})
    )
    index, keys = minhash.bands(signature)
    (out / "bands").write_table(f"{name}.parquet", pa.table({"key": keys, "doc": table["doc"].to_numpy()[index]}))
    return {"bytes": text_bytes(table), "documents": table.num_rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", help="what tools/curate.py wrote, with its folder work")
    shards = Folder(parser.parse_args().dir) / "work" / "filter" / "shards"
    names = [name.removesuffix(".parquet") for name in shards.names(".parquet")]
    engine = Engine("native")
    import daft

    with tempfile.TemporaryDirectory() as temporary:
        out = Folder(temporary)
        begin = time.perf_counter()
        results = [r for _, r in engine.map(functools.partial(sign, shards, out), names)]
        signed = time.perf_counter()
        edges = band_edges(daft.read_parquet((out / "bands").pattern(".parquet")), engine)
        signatures = daft.read_parquet((out / "signatures").pattern(".parquet"))
        copies = resolve(edges, signatures, CopiesConfig().least_similarity, engine).count_rows()
        end = time.perf_counter()
    size = sum(result["bytes"] for result in results) / 1e6
    documents = sum(result["documents"] for result in results)
    print(
        f"{documents:,} documents, {size:.1f} MB: signatures {signed - begin:.2f} s, components and verification "
        f"{end - signed:.2f} s, {size / (end - begin):.0f} MB/s; {copies:,} go"
    )


if __name__ == "__main__":
    main()
