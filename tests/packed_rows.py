"""Packed rows of some texts, made as users make them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

from bc2_jax.data.corpus import list_parts
from bc2_jax.data.packing import RowManifest, load_manifest
from bc2_jax.data.tokenization import Settings, tokenize_corpus
from bc2_jax.tokenizer import Tokenizer


def pack_texts(
    texts: Iterable[str], tokenizer: Tokenizer, out: str | Path, sequence_length: int, *,
    validation_fraction: float = 0.01, rows_per_file: int = 65_536,
) -> RowManifest:  # fmt: skip
    """Writes rows of one source and one quality to `out`, without a corpus around them."""
    out = Path(out)
    settings = Settings(sequence_length, 1, validation_fraction, rows_per_file)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=out.parent) as folder:
        file = Path(folder, "texts.jsonl")
        with file.open("w") as lines:
            lines.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        tokenize_corpus([file], tokenizer.path, Path(folder, "corpus"), settings)
        (part,) = list_parts(Path(folder, "corpus"))
        part.path.rename(out)
    return load_manifest(out)
