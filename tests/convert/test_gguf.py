"""GGUF files, read back with the gguf package and compared with what the PyTorch folder says; no llama.cpp needed."""

from __future__ import annotations

import dataclasses
import re
import sys
import tracemalloc
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

from bc2_jax.config import ModelConfig
from bc2_jax.convert.chat_template import CHAT_TEMPLATE
from bc2_jax.convert.gguf import GGUF_TYPES, GGUFType, check_gguf, write_gguf
from bc2_jax.convert.hf import open_folder
from bc2_jax.convert.hf_write import save_folder
from bc2_jax.convert.source import open_source, source_of_params
from bc2_jax.convert.stream import Stream
from bc2_jax.tokenizer import Tokenizer
from tests.convert.models import random_params

UNUSED = 3  # rows of the vocabulary beyond the tokenizer
CONFIGS = {
    scheme: ModelConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4,
        position_embedding=scheme, vocab_size=640 + UNUSED, model_max_length=777, rms_norm_eps=1e-5, rope_theta=5e5,
        pad_token_id=3, bos_token_id=4, eos_token_id=5,
    )
    for scheme, layers in (("rope", 32), ("alibi", 40))
}  # fmt: skip
NAMES = {
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.down_proj": "ffn_down",
    "mlp.up_proj": "ffn_up",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture(scope="module")
def folders(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Position embedding -> a PyTorch folder with a random model."""
    parent = tmp_path_factory.mktemp("models")
    for scheme, config in CONFIGS.items():
        params = random_params(config, np.float32)
        params["lm_head"]["weight"][7] = 0  # a row that NormHead leaves as it is
        save_folder(params, config, parent / scheme, "float32", tokenizer_path=tokenizer.path)
    return {scheme: parent / scheme for scheme in CONFIGS}


def stream_of(folder: Path, **changes: object) -> Stream:
    source = dataclasses.replace(open_source(folder), **changes)
    return Stream(source, np.dtype(np.float32), normalize_head=True)


def export(folder: Path, file: Path, kind: GGUFType = "f16", **changes: object) -> gguf.GGUFReader:
    write_gguf(stream_of(folder, **changes), file, kind)
    return gguf.GGUFReader(file)


def value(reader: gguf.GGUFReader, key: str) -> object:
    return reader.fields[key].contents()


def expected_tensors(folder: Path, config: ModelConfig) -> dict[str, np.ndarray]:
    """GGUF name -> array, from the tensors of the PyTorch folder."""
    heads, half = config.num_attention_heads, config.head_dim // 2
    rows = np.arange(config.hidden_size)
    if config.position_embedding == "rope":
        rows = np.array([2 * half * h + i + other for h in range(heads) for i in range(half) for other in (0, half)])
    expected = {}
    for name, tensor in open_folder(folder).items():
        array, layer = tensor.read(), re.fullmatch(r"model\.layers\.(\d+)\.(.*)\.weight", name)
        if name == "lm_head.weight":
            norms = np.linalg.norm(array, axis=1, keepdims=True)
            expected["output.weight"] = array / np.where(norms == 0, 1, norms)
        elif layer is None:
            expected[{"model.embed_tokens": "token_embd", "model.norm": "output_norm"}[name[:-7]] + ".weight"] = array
        elif layer[2] == "self_attn.W_pack":
            q, k, v = np.split(array, 3)
            for part, letter in ((q[rows], "q"), (k[rows], "k"), (v, "v")):
                expected[f"blk.{layer[1]}.attn_{letter}.weight"] = part
        else:
            expected[f"blk.{layer[1]}.{NAMES[layer[2]]}.weight"] = array
    return expected


@pytest.mark.parametrize("kind", GGUF_TYPES)
@pytest.mark.parametrize("scheme", CONFIGS)
def test_tensors(folders, tmp_path, scheme, kind):
    reader = export(folders[scheme], tmp_path / "a.gguf", kind)
    expected = expected_tensors(folders[scheme], CONFIGS[scheme])
    assert sorted(tensor.name for tensor in reader.tensors) == sorted(expected)
    for tensor in reader.tensors:
        array = expected[tensor.name]
        assert tuple(tensor.shape) == array.shape[::-1]  # GGUF lists the fastest axis first
        stored = tensor.data.tobytes()
        if array.ndim == 1:
            assert tensor.tensor_type == gguf.GGMLQuantizationType.F32 and stored == array.tobytes()
            continue
        assert tensor.tensor_type.name == kind.upper()
        if kind == "q8_0":
            blocks = np.frombuffer(stored, np.dtype([("scale", "<f2"), ("values", "i1", 32)]))
            source = array.reshape(-1, 32)
            scale = np.abs(source).max(axis=1, keepdims=True) / 127
            np.testing.assert_allclose(blocks["scale"], scale[:, 0], rtol=2**-11, atol=2**-25)
            assert np.all(np.abs(blocks["values"] * scale - source) <= 0.501 * scale)
        else:
            dtype = {"f16": np.float16, "bf16": ml_dtypes.bfloat16}[kind]
            values = np.frombuffer(stored, dtype).reshape(array.shape)
            if tensor.name == "output.weight":  # rows of unit length, in fp32 either way, may round the other way
                np.testing.assert_allclose(values.astype(np.float32), array, rtol=2.0**-8, atol=1e-7)
                assert not values[7].any()
            else:
                assert values.tobytes() == array.astype(dtype).tobytes()


@pytest.mark.parametrize("kind", GGUF_TYPES)
@pytest.mark.parametrize("scheme", CONFIGS)
def test_metadata(folders, tmp_path, scheme, kind):
    reader, config = export(folders[scheme], tmp_path / "a.gguf", kind), CONFIGS[scheme]
    expected = {
        "general.architecture": "baichuan", "general.type": "model", "general.quantization_version": 2,
        "general.file_type": {"f16": 1, "bf16": 32, "q8_0": 7}[kind], "baichuan.context_length": 777,
        "baichuan.embedding_length": 64, "baichuan.block_count": config.num_hidden_layers,
        "baichuan.feed_forward_length": 96, "baichuan.attention.head_count": 4, "baichuan.attention.head_count_kv": 4,
        "baichuan.attention.layer_norm_rms_epsilon": pytest.approx(1e-5), "baichuan.rope.dimension_count": 16,
        "baichuan.rope.freq_base": 5e5, "baichuan.vocab_size": 640 + UNUSED, "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default", "tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.padding_token_id": 3,
        "tokenizer.ggml.bos_token_id": 4, "tokenizer.ggml.eos_token_id": 5, "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False, "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }  # fmt: skip
    found = {key: value(reader, key) for key in reader.fields if not key.startswith("GGUF.")}
    arrays = {"tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type"}
    assert found.keys() == expected.keys() | arrays
    assert {key: found[key] for key in expected} == expected


def test_a_source_keeps_its_own_chat_template(folders, tmp_path):
    reader = export(folders["rope"], tmp_path / "a.gguf", chat_template="{{ messages }}")
    assert value(reader, "tokenizer.chat_template") == "{{ messages }}"


def test_tokens_are_the_pieces(folders, tmp_path, tokenizer):
    reader = export(folders["rope"], tmp_path / "a.gguf")
    model = SentencePieceProcessor(model_file=str(tokenizer.path))
    tokens, scores, types = (value(reader, f"tokenizer.ggml.{name}") for name in ("tokens", "scores", "token_type"))
    assert tokens == [model.id_to_piece(i) for i in range(640)] + ["[PAD640]", "[PAD641]", "[PAD642]"]
    assert scores[:640] == [model.get_score(i) for i in range(640)]
    assert len(set(scores[-100:-UNUSED])) > 1 and scores[640:] == [-10_000] * UNUSED
    kinds = [gguf.TokenType(number).name for number in types]
    assert kinds[0] == "UNKNOWN" and kinds[640:] == ["UNUSED"] * UNUSED
    assert {tokens[i] for i in range(640) if kinds[i] == "USER_DEFINED"} == {"\n", "\t"}
    for name, is_kind in (("CONTROL", model.is_control), ("BYTE", model.is_byte)):
        assert [kind == name for kind in kinds[:640]] == [is_kind(i) for i in range(640)]


def test_plain_text_forges_no_role(folders, tmp_path, tokenizer):
    """In the released tokenizer the roles are user-defined pieces, which llama.cpp would find in any text."""
    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.path.read_bytes())
    for piece in model.pieces[3:197]:
        piece.type = model.SentencePiece.USER_DEFINED
    released = tmp_path / "released.model"
    released.write_bytes(model.SerializeToString())
    reader = export(folders["rope"], tmp_path / "a.gguf", tokenizer=released)
    tokens, types = (value(reader, f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    assert tokens[195] == "<reserved_106>"
    assert {gguf.TokenType(types[tokens.index(f"<reserved_{i}>")]).name for i in (106, 107)} == {"CONTROL"}
    assert {tokens[i] for i in range(640) if gguf.TokenType(types[i]).name == "USER_DEFINED"} >= {"\n", "\t"}


def test_only_a_few_tensors_are_in_memory(tmp_path, tokenizer):
    config = dataclasses.replace(CONFIGS["alibi"], hidden_size=128, intermediate_size=384)
    source = source_of_params(random_params(config, np.float32), config, tokenizer.path)
    stream = Stream(source, np.dtype(np.float32), normalize_head=True)
    tracemalloc.start()
    try:
        write_gguf(stream, tmp_path / "a.gguf", "f16")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * config.num_parameters() / 8


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"num_hidden_layers": 2}, "f16", "model.num_hidden_layers = 2 is not valid: llama.cpp's baichuan is RoPE"),
        ({"num_hidden_layers": 40}, "f16", "model.position_embedding = 'rope' is not valid: .* and this model has 40"),
        ({"position_embedding": "alibi"}, "f16", "model.position_embedding = 'alibi' is not valid: .* model has 32"),
        ({}, "q4_0", "type = 'q4_0' is not valid: legal values are f16, bf16, q8_0"),
        ({"hidden_size": 48}, "q8_0", "model.hidden_size = 48 is not valid: q8_0 needs a multiple of 32"),
        ({"intermediate_size": 100}, "q8_0", "model.intermediate_size = 100 is not valid: q8_0 needs"),
    ],
)
def test_models_that_llama_cpp_cannot_run(changes, kind, message):
    with pytest.raises(ValueError, match=rf"^{message}[^.]*(llama\.cpp[^.]*)?\.$"):
        check_gguf(dataclasses.replace(CONFIGS["rope"], **changes), kind)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_models_that_it_can(config):
    for kind in GGUF_TYPES:
        check_gguf(config, kind)
    check_gguf(dataclasses.replace(config, hidden_size=48, intermediate_size=100))


def refused(folder: Path, file: Path, message: str, **changes: object) -> None:
    with pytest.raises(ValueError, match=message):
        export(folder, file, **changes)
    assert not file.exists()


def test_nothing_is_written_without_a_fitting_tokenizer(folders, tmp_path, tokenizer):
    folder, file = folders["rope"], tmp_path / "a.gguf"
    refused(folder, file, "no tokenizer.model", tokenizer=None)
    config = dataclasses.replace(CONFIGS["rope"], vocab_size=639)
    refused(folder, file, "model.vocab_size = 639 is not valid: .* has 640 pieces", config=config)
    other = tmp_path / "other.model"
    other.write_bytes(b"no pieces")
    refused(folder, file, "not a SentencePiece model", tokenizer=other)
    refused(folder, file, "num_hidden_layers = 31", config=dataclasses.replace(config, num_hidden_layers=31))


@pytest.mark.parametrize(
    ("part", "field", "changed", "message"),
    [
        ("trainer_spec", "model_type", 1, "model_type of .* = 'UNIGRAM' is not valid: .* only with BPE"),
        ("trainer_spec", "byte_fallback", False, "byte_fallback of .* = False"),
        ("normalizer_spec", "add_dummy_prefix", True, "add_dummy_prefix of .* = True"),
        ("normalizer_spec", "remove_extra_whitespaces", True, "remove_extra_whitespaces of .* = True"),
    ],
)
def test_tokenizers_that_llama_cpp_reads_otherwise(folders, tmp_path, tokenizer, part, field, changed, message):
    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.path.read_bytes())
    setattr(getattr(model, part), field, changed)
    if field == "byte_fallback":  # SentencePiece loads no byte pieces without it
        for piece in model.pieces[199:455]:
            piece.type = model.SentencePiece.NORMAL
    path = tmp_path / "changed.model"
    path.write_bytes(model.SerializeToString())
    refused(folders["rope"], tmp_path / "a.gguf", message, tokenizer=path)


def test_without_the_package(folders, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(folders["rope"], tmp_path / "a.gguf", r"GGUF needs the gguf package.*pip install 'bc2_jax\[gguf\]'\.$")


def test_streams_of_another_kind(folders, tmp_path):
    source = open_source(folders["rope"])
    for stream in (Stream(source, np.dtype(np.float32)), Stream(source, np.dtype(np.float16), normalize_head=True)):
        with pytest.raises(ValueError, match="float32 with the head normalised"):
            write_gguf(stream, tmp_path / "a.gguf", "f16")
    assert not (tmp_path / "a.gguf").exists()


@pytest.mark.parametrize(("kind", "large"), [("f16", 7e4), ("bf16", 3.4e38), ("q8_0", 1e7)])
def test_overflow_names_the_tensor(folders, tmp_path, kind, large):
    source = open_source(folders["rope"])

    def read(path: str, layer: int | None) -> np.ndarray:
        array = np.array(source.read(path, layer))
        if (path, layer) == ("layers.mlp.down_proj.weight", 9):
            array[3, 5] = -large
        if (path, layer) == ("layers.mlp.down_proj.weight", 2):
            array[0, 0] = np.inf  # was there before, and is named by the stream
        return array

    stream = Stream(dataclasses.replace(source, read=read), np.dtype(np.float32), normalize_head=True)
    with pytest.raises(ValueError, match=rf"layers.mlp.down_proj.weight\[9\] overflows in {kind}: it has the value"):
        write_gguf(stream, tmp_path / "a.gguf", kind)
    assert stream.not_finite == ["layers.mlp.down_proj.weight[2]"]
