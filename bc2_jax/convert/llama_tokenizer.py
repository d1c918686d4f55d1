"""Tokenizer files for LlamaForCausalLM, tokenizer_config.json and tokenizer.json, and the SentencePiece model as data.

tokenizer.model alone is not enough: `transformers` 5 derives its merges in the order of the ids, and the last 25,728
ids of the released vocabulary are not in score order, so some text gets other ids. With the merges of tokenizer.json it
gives exactly SentencePiece's ids and does not need `sentencepiece`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bc2_jax.config import ModelConfig
from bc2_jax.convert.chat_template import CHAT_TEMPLATE
from bc2_jax.convert.hf_config import write_json
from bc2_jax.tokenizer import Tokenizer
from bc2_jax.validation import require

_SPACE = "\u2581"


def read_sentencepiece(path: Path, engine: str) -> Any:
    """The ModelProto of a Baichuan 2 tokenizer.

    Raises FileNotFoundError, or ValueError if it is not such a tokenizer or has a setting with which `engine` gives
    other ids.
    """
    from sentencepiece import sentencepiece_model_pb2

    Tokenizer(path)  # raises if it is not a SentencePiece model or has other special ids
    protos: Any = sentencepiece_model_pb2  # generated at import, so unknown to type checkers
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


def llama_tokenizer_config(config: ModelConfig, chat_template: str = CHAT_TEMPLATE) -> dict[str, Any]:
    """tokenizer_config.json: nothing is added to a text, neither special tokens nor a leading space.

    PreTrainedTokenizerFast uses tokenizer.json as it is; LlamaTokenizer rebuilds it, in version 4 only with
    `sentencepiece` and tokenizer.model.
    """
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],  # by default also token_type_ids, which LLaMA refuses
        "padding_side": "left",  # as generation needs it
        "add_prefix_space": False,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<unk>",
        "model_max_length": config.model_max_length,
        "chat_template": chat_template,
    }


def llama_tokenizer(tokenizer: Path) -> dict[str, Any]:
    """tokenizer.json of a SentencePiece model, for the `tokenizers` library: the same ids for any text.

    As in the released class, control and user-defined pieces spelled out in a text become their ids. Raises
    FileNotFoundError, or ValueError if it is not a Baichuan 2 tokenizer.
    """
    model = read_sentencepiece(tokenizer, "tokenizer.json")
    kinds = model.SentencePiece
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == kinds.NORMAL}
    # Two pieces merge if their concatenation is a piece, highest score first.
    merges = [
        (whole[:i], whole[i:])
        for whole in sorted(scores, key=scores.__getitem__, reverse=True)
        for i in range(1, len(whole))
        if whole[:i] in scores and whole[i:] in scores
    ]
    added = [
        {
            "id": token_id,
            "content": piece.piece,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": piece.type != kinds.USER_DEFINED,  # special ones are left out of decoded text
        }
        for token_id, piece in enumerate(model.pieces)
        if piece.type in (kinds.UNKNOWN, kinds.CONTROL, kinds.USER_DEFINED)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": "never", "split": False},
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece.piece: token_id for token_id, piece in enumerate(model.pieces)},
            "merges": merges,
        },
    }


def write_llama_tokenizer(
    tokenizer: Path, config: ModelConfig, folder: Path, chat_template: str = CHAT_TEMPLATE
) -> None:
    """Writes tokenizer_config.json and tokenizer.json; raises as `llama_tokenizer`."""
    made = llama_tokenizer(tokenizer)
    write_json(folder / "tokenizer_config.json", llama_tokenizer_config(config, chat_template))
    text = json.dumps(made, ensure_ascii=False, separators=(",", ":"))
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
