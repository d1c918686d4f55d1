"""A SentencePiece model as data, for engines that have their own reading of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bc2_jax.tokenizer import Tokenizer
from bc2_jax.validation import require


def read_sentencepiece(path: Path, engine: str) -> Any:
    """The ModelProto of a tokenizer of Baichuan 2's kind.

    Raises FileNotFoundError, or ValueError if it is not such a tokenizer or has a setting with which `engine` would
    give a text other ids.
    """
    from sentencepiece import sentencepiece_model_pb2

    Tokenizer(path)  # refuses what is not a SentencePiece model or has other special ids
    protos: Any = sentencepiece_model_pb2  # made when it is imported, so unknown to type checkers
    model = protos.ModelProto.FromString(path.read_bytes())
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    for field, found, legal in (
        ("model_type", trainer.ModelType.Name(trainer.model_type), "BPE"),
        ("byte_fallback", trainer.byte_fallback, True),
        ("treat_whitespace_as_suffix", trainer.treat_whitespace_as_suffix, False),
        ("precompiled_charsmap", bool(normalizer.precompiled_charsmap), False),
        ("add_dummy_prefix", normalizer.add_dummy_prefix, False),
        ("remove_extra_whitespaces", normalizer.remove_extra_whitespaces, False),
        ("escape_whitespaces", normalizer.escape_whitespaces, True),
    ):
        require(found == legal, f"{field} of {path}", found, f"{engine} gives the same ids only with {legal}")
    return model
