"""Writes one GGUF file for llama.cpp with the `gguf` package, with one or two tensors in memory at a time.

llama.cpp runs both sizes as architecture "baichuan" and infers the position embedding from the number of layers: 32 is
RoPE, 40 is ALiBi; with any other number it runs without positions or not at all, depending on its version. It has no
NormHead, so head rows must be normalised.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

import numpy as np
from ml_dtypes import bfloat16

from bc2_jax.config import ModelConfig
from bc2_jax.convert.chat_template import CHAT_TEMPLATE
from bc2_jax.convert.llama_tokenizer import read_sentencepiece
from bc2_jax.convert.stream import Stream, in_order, row_blocks
from bc2_jax.convert.table import TorchTensor, build_tensor, torch_shapes, torch_tensors
from bc2_jax.tokenizer import RESERVED
from bc2_jax.validation import choices, require

GGUFType = Literal["f16", "bf16", "q8_0"]
GGUF_TYPES: tuple[GGUFType, ...] = get_args(GGUFType)

_LAYERS = {"rope": 32, "alibi": 40}
_Q8_0_BLOCK = 32
# llama.cpp rotates pairs (2i, 2i + 1) of a head, we rotate (i, i + H / 2).
_ROTATED = ("layers.self_attn.q_proj.weight", "layers.self_attn.k_proj.weight")
# Smallest value that becomes infinite (in q8_0, in the fp16 scale of its block).
_TOO_LARGE: dict[GGUFType, float] = {"f16": 65520.0, "bf16": 3.3961775e38, "q8_0": 127 * 65520.0}


def check_gguf(config: ModelConfig, kind: GGUFType = "f16") -> None:
    """Raises ValueError if llama.cpp cannot run the model or `kind` cannot hold its tensors."""
    layers = config.num_hidden_layers
    legal = "llama.cpp's baichuan is RoPE with 32 layers or ALiBi with 40"
    require(layers in _LAYERS.values(), "model.num_hidden_layers", layers, legal)
    scheme = config.position_embedding
    require(_LAYERS[scheme] == layers, "model.position_embedding", scheme, f"{legal}, and this model has {layers}")
    require(kind in GGUF_TYPES, "type", kind, f"legal values are {choices(GGUF_TYPES)}")
    if kind == "q8_0":
        for field in ("hidden_size", "intermediate_size"):
            size = getattr(config, field)
            require(size % _Q8_0_BLOCK == 0, f"model.{field}", size, f"q8_0 needs a multiple of {_Q8_0_BLOCK}")


def write_gguf(stream: Stream, file: Path, kind: GGUFType) -> None:
    """Writes the model and its tokenizer to `file`, replacing it if it exists.

    The stream must read float32 with a normalised head. Matrices are stored as `kind`, norms as float32. At most two
    tensors are processed at a time; the largest is the embedding table. Raises ValueError before the file exists as
    `check_gguf`, if there is no tokenizer or llama.cpp would tokenize otherwise, and if the `gguf` package is missing;
    later if a finite value overflows in `kind`, and as `Stream.read`.
    """
    config = stream.source.config
    check_gguf(config, kind)
    if stream.dtype != np.float32 or stream.normalize_head != config.normalize_head:
        raise ValueError("GGUF needs a stream that reads float32 with the head normalised.")
    gguf = _import_gguf()
    vocabulary = _read_vocabulary(stream.source.tokenizer, config)
    matrix_type = gguf.GGMLQuantizationType[kind.upper()]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BAICHUAN, config.num_hidden_layers)
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.BAICHUAN])
    _add_metadata(writer, gguf, config, kind)
    _add_vocabulary(writer, config, vocabulary)
    writer.add_chat_template(stream.source.chat_template or CHAT_TEMPLATE)
    for name, shape in torch_shapes(config, "llama").items():
        stored = matrix_type if len(shape) == 2 else gguf.GGMLQuantizationType.F32
        block, size = gguf.GGML_QUANT_SIZES[stored]
        nbytes = int(np.prod(shape)) // block * size
        writer.add_tensor_info(names.get_name(name, (".weight",)), shape, np.dtype(np.float32), nbytes, stored)

    def encode(part: TorchTensor) -> np.ndarray:
        array = build_tensor(config, stream.read, part)[1]
        if array.ndim == 1:
            return array
        path = part.rules[0].path
        if config.position_embedding == "rope" and path in _ROTATED:
            array = _pair_neighbours(array, config.num_attention_heads)
        name = path if part.layer is None else f"{path}[{part.layer}]"
        block, size = gguf.GGML_QUANT_SIZES[matrix_type]
        out = np.empty((array.shape[0], array.shape[1] // block * size), np.uint8)
        for rows, target in zip(row_blocks(array), row_blocks(array, out), strict=True):
            _check_range(rows, kind, name)
            # The package rounds to bf16 in the same way, 20 times slower.
            with np.errstate(over="ignore", invalid="ignore"):  # the stream records values that are not finite
                encoded = rows.astype(bfloat16) if kind == "bf16" else gguf.quants.quantize(rows, matrix_type)
            target[...] = encoded.view(np.uint8)
        return out

    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for array in in_order(encode, torch_tensors(config, "llama")):
            writer.write_tensor_data(array)
    finally:
        writer.close()


def _import_gguf() -> ModuleType:
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise ValueError(f"GGUF needs the gguf package ({error}): pip install 'bc2_jax[gguf]'.") from error
    return gguf


def _pair_neighbours(rows: np.ndarray, heads: int) -> np.ndarray:
    """[N * H, D]; rows (0, H / 2), (1, H / 2 + 1), ... of each head become neighbours."""
    return rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def _check_range(rows: np.ndarray, kind: GGUFType, name: str) -> None:
    largest = float(np.max(np.abs(rows), where=np.isfinite(rows), initial=0))
    if largest >= _TOO_LARGE[kind]:
        other = "" if kind == "bf16" else "; use bf16"
        raise ValueError(f"{name} overflows in {kind}: it has the value {largest:.6g}{other}.")


def _add_metadata(writer: Any, gguf: ModuleType, config: ModelConfig, kind: GGUFType) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.model_max_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)  # required with ALiBi too
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)


def _read_vocabulary(path: Path | None, config: ModelConfig) -> Any:
    """The SentencePiece model.

    Raises ValueError if there is none, llama.cpp would tokenize otherwise, or there are more pieces than token ids.
    """
    if path is None:
        raise ValueError("GGUF contains the tokenizer, but the model has no tokenizer.model.")
    model = read_sentencepiece(path, "llama.cpp")
    require(
        len(model.pieces) <= config.vocab_size, "model.vocab_size", config.vocab_size,
        f"{path} has {len(model.pieces)} pieces",
    )  # fmt: skip
    return model


def _add_vocabulary(writer: Any, config: ModelConfig, model: Any) -> None:
    """The pieces of a SentencePiece model, padded to the model's vocabulary with unused tokens."""
    kinds, unused = model.SentencePiece, range(len(model.pieces), config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece.piece for piece in model.pieces] + [f"[PAD{i}]" for i in unused])
    writer.add_token_scores([piece.score for piece in model.pieces] + [-10_000.0 for _ in unused])
    # Piece types have the same numbers in both. Role and reserved tokens become control tokens, because plain text
    # could produce user-defined ones and so forge a role.
    types = [kinds.CONTROL if RESERVED.fullmatch(piece.piece) else piece.type for piece in model.pieces]
    writer.add_token_types(types + [kinds.UNUSED for _ in unused])
    writer.add_unk_token_id(model.trainer_spec.unk_id)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_pad_token_id(config.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
