"""The llama layout and its tokenizer as `transformers` reads them: the same logits, the same ids."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer, LlamaForCausalLM

from bc2_jax.align.chat import encode_conversation, encode_prompt
from bc2_jax.config import BAICHUAN2_7B, ModelConfig
from bc2_jax.convert import hf_config
from bc2_jax.convert.hf_write import write_folder
from bc2_jax.convert.llama_tokenizer import llama_tokenizer, write_llama_tokenizer
from bc2_jax.convert.pretrained import load_pretrained
from bc2_jax.convert.source import open_source, source_of_params
from bc2_jax.convert.stream import Stream
from bc2_jax.tokenizer import Tokenizer
from tests.convert.models import GOLDEN, random_params

WIDER = ModelConfig(
    hidden_size=256, intermediate_size=344, num_hidden_layers=3, num_attention_heads=8, position_embedding="rope",
    vocab_size=1000, rope_theta=3e4, rms_norm_eps=1e-5,
)  # fmt: skip
TEXTS = [
    "Hello world",
    "你好，世界！",
    "  two spaces before, and two behind  ",
    " one",
    "\n\n\tdef f(x):\n\t\treturn x ** 2  # 平方\r\n",
    "tabs\t\tand\n\n\nnewlines\n",
    "a    b     c      d",
    "12345.678e-9",
    "emoji 😀👨\u200d👩\u200d👧 and rare 𠮷野家 龘",
    "\ufb01 ligature A\u030a e\u0301 \u3000\u00a0\ufeff",
    "登鹳雀楼->王之涣\n夜雨寄北->",
    "\u2581 \u2581\u2581",
    "<reserved_106>你好<reserved_107> hi </s><s> x <unk>",
    "",
]


def as_llama(folder: Path, out: Path, dtype: hf_config.HFDType = "float32") -> Path:
    stream = Stream(open_source(folder), np.dtype(dtype), normalize_head=True)
    write_folder(stream, out, dtype, "llama", max_shard_bytes=100_000)
    return out


def llama_logits(folder: Path, input_ids: np.ndarray) -> np.ndarray:
    model, found = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(found.values()), found  # no missing, unexpected or misshapen tensor
    with torch.inference_mode():
        return model.eval()(torch.from_numpy(input_ids)).logits.numpy()


def test_golden_model(tmp_path):
    arrays = np.load(GOLDEN / "rope-tiny" / "golden.npz")
    logits = llama_logits(as_llama(GOLDEN / "rope-tiny", tmp_path / "llama"), arrays["input_ids"])
    np.testing.assert_allclose(logits, arrays["eval_logits"], rtol=0, atol=1e-4)
    ours = load_pretrained(GOLDEN / "rope-tiny")(jnp.asarray(arrays["input_ids"]))
    np.testing.assert_allclose(logits, np.asarray(ours), rtol=0, atol=1e-4)


def test_wider_model(tmp_path):
    params = random_params(WIDER, np.float32)
    for name in ("self_attn", "mlp"):
        for weight in params["layers"][name].values():
            weight["weight"] *= 0.1
    params["lm_head"]["weight"] *= np.logspace(-2, 2, WIDER.vocab_size, dtype=np.float32)[:, None]
    write_folder(Stream(source_of_params(params, WIDER)), tmp_path / "baichuan2", "float32")
    input_ids = np.random.default_rng(1).integers(WIDER.vocab_size, size=(2, 70))
    logits = llama_logits(as_llama(tmp_path / "baichuan2", tmp_path / "llama"), input_ids)
    ours = np.asarray(load_pretrained(tmp_path / "baichuan2")(jnp.asarray(input_ids)))
    np.testing.assert_allclose(logits, ours, rtol=0, atol=1e-4)
    assert 1 < np.abs(ours).max() < 100  # neither all alike nor so large that the tolerance means nothing


@pytest.fixture(scope="module")
def released_like(tokenizer, tmp_path_factory) -> Tokenizer:
    """Like the released file in what matters to merging: reserved pieces are user-defined, and the ids of the learned
    pieces are not in the order of their scores.
    """
    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.path.read_bytes())
    kinds = model.SentencePiece
    learned = [dict(piece=p.piece, score=p.score) for p in model.pieces if p.type == kinds.NORMAL]
    order = iter(np.random.default_rng(0).permutation(len(learned)))
    for piece in model.pieces:
        if piece.type == kinds.NORMAL:
            other = learned[next(order)]
            piece.piece, piece.score = other["piece"], other["score"]
        elif piece.piece.startswith("<reserved_"):
            piece.type = kinds.USER_DEFINED
    path = tmp_path_factory.mktemp("released_like") / "tokenizer.model"
    path.write_bytes(model.SerializeToString())
    return Tokenizer(path)


@pytest.fixture(scope="module", params=["tokenizer", "released_like"])
def both(request, tmp_path_factory):
    """(our tokenizer, the one of `transformers` from the files we write)."""
    ours: Tokenizer = request.getfixturevalue(request.param)
    config = dataclasses.replace(WIDER, vocab_size=ours.vocab_size)
    folder = tmp_path_factory.mktemp("llama")
    write_llama_tokenizer(ours.path, config, folder)
    hf_config.write_config(config, folder, layout="llama")
    shutil.copy(ours.path, folder / "tokenizer.model")
    return ours, AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text(both, text):
    ours, theirs = both
    ids = ours.encode(text, parse_special=True)
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ours.encode(text), skip_special_tokens=True) == ours.decode(ours.encode(text))


def test_ids_of_code(both, modules):
    ours, theirs = both
    assert theirs(modules)["input_ids"] == ours.encode_batch(modules)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.text("aet \n\t_(。的", max_size=60))
def test_ids_of_any_text(both, text):
    ours, theirs = both
    assert theirs(text)["input_ids"] == ours.encode(text, parse_special=True)


def test_nothing_is_added_and_models_take_it(both):
    ours, theirs = both
    assert len(theirs) == ours.vocab_size
    assert theirs("the", "self").keys() == {"input_ids", "attention_mask"}
    assert theirs.padding_side == "left"
    found = (theirs.pad_token_id, theirs.unk_token_id, theirs.bos_token_id, theirs.eos_token_id)
    assert found == (0, 0, 1, 2)
    padded = theirs(["the", "the self the self"], padding=True)
    assert padded["input_ids"][0][0] == 0 and padded["attention_mask"][0][0] == 0


def test_chat_prompt(both):
    ours, theirs = both
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "你好\n"},
        {"role": "assistant", "content": " Hello!"},
        {"role": "user", "content": "def f(x):"},
    ]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == encode_prompt(ours, messages, 0, 4096)
    ids = theirs.apply_chat_template(messages[:3], return_dict=True)["input_ids"]
    assert ids == encode_conversation(ours, messages[:3])[0]
    # An answer that is begun is continued.
    ids = theirs.apply_chat_template(messages[:3], continue_final_message=True, return_dict=True)["input_ids"]
    assert ids == encode_prompt(ours, messages[:3], 0, 4096)


def test_released_settings(tokenizer, tmp_path):
    write_llama_tokenizer(tokenizer.path, BAICHUAN2_7B, tmp_path)
    raw = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert raw["model_max_length"] == 4096 and not raw["add_bos_token"]


def test_refuses_a_tokenizer_that_reads_text_otherwise(tokenizer, tmp_path):
    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.path.read_bytes())
    model.normalizer_spec.add_dummy_prefix = True
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match="add_dummy_prefix of .* = True is not valid: .* only with False"):
        llama_tokenizer(path)
