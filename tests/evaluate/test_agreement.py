"""Agreement of two models against numpy on whole logits, on a mesh and without one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bc2_jax.config import ComputeConfig, ModelConfig
from bc2_jax.data.batch import IGNORED
from bc2_jax.evaluate import agreement
from bc2_jax.evaluate.agreement import compare, rows_of_texts, run_reference
from bc2_jax.model.baichuan import param_shardings, split_model
from bc2_jax.model.layout import lay_out

CONFIG = ModelConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, position_embedding="alibi",
    vocab_size=500, model_max_length=64, initializer_range=0.3,
)  # fmt: skip
TEXTS = ["the cat sat on the mat", "白日依山尽", "and the dog sat on the log " * 6, "a"]


@pytest.fixture(scope="module")
def params():
    """Of a model, and of one that differs a little."""
    graphdef, shapes, _ = split_model(CONFIG)
    rng = np.random.default_rng(0)
    first = jax.tree.map(lambda x: (0.3 * rng.standard_normal(x.shape)).astype(np.float32), shapes)
    second = jax.tree.map(lambda x: x + (0.03 * rng.standard_normal(x.shape)).astype(np.float32), first)
    return first, second


def build(params, mesh=None):
    shardings = None if mesh is None else param_shardings(CONFIG, mesh)
    return nnx.merge(split_model(CONFIG, ComputeConfig(dtype="float32"))[0], jax.device_put(params, shardings))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def batches(tokenizer, rows: int = 4):
    return rows_of_texts(tokenizer, TEXTS, length=24, rows=rows, tokens=1000, prefix_id=CONFIG.bos_token_id)


@pytest.mark.parametrize("shape", [None, (2, 2, 2), (1, 2, 1, 1, 2)])
def test_figures_are_those_of_whole_logits(small_tokenizer, params, mesh_of, monkeypatch, shape):
    monkeypatch.setattr(agreement, "CHUNK", 7)
    rows = batches(small_tokenizer)
    exact = []
    for model in map(build, params):
        logits = [model(jnp.asarray(b["input_ids"]), None, jnp.asarray(b["segment_ids"])) for b in rows]
        exact.append(np.concatenate([log_softmax(np.asarray(x, np.float64)) for x in logits]))
    labels = np.concatenate([b["labels"] for b in rows])
    scored = labels != IGNORED
    first, second = (x[scored] for x in exact)
    of_labels = [np.take_along_axis(x, labels[scored][:, None], 1).mean() for x in (first, second)]

    mesh = None if shape is None else mesh_of(*shape)
    reference = build(params[0], mesh)
    kept = run_reference(reference, rows)
    for array in jax.tree.leaves(nnx.state(reference)):
        array.delete()  # it may be used up before the other one exists
    found = compare(kept, build(params[1], mesh))
    assert found.tokens == scored.sum()
    kl = (np.exp(first) * (first - second)).sum(1)
    assert found.kl == pytest.approx(kl.mean(), rel=1e-4)
    assert found.same_top == pytest.approx((first.argmax(1) == second.argmax(1)).mean())
    assert 0.3 < found.same_top < 1
    assert found.reference_nats == pytest.approx(-of_labels[0], rel=1e-5)
    assert found.changed_nats == pytest.approx(-of_labels[1], rel=1e-5)
    assert found.changed_perplexity == pytest.approx(np.exp(-of_labels[1]), rel=1e-4)
    counts = scored.sum(1)
    of_rows = np.array([x.sum() for x in np.split(kl, np.cumsum(counts)[:-1])])[counts > 0]
    n, counts = (counts > 0).sum(), counts[counts > 0]
    spread = ((of_rows - kl.mean() * counts) ** 2).sum() * n / (n - 1)
    assert found.kl_stderr == pytest.approx(np.sqrt(spread) / counts.sum(), rel=1e-3)


def test_a_model_agrees_with_itself(small_tokenizer, params):
    model = build(params[0])
    found = compare(run_reference(model, batches(small_tokenizer)), model)
    assert found.kl == 0 and found.same_top == 1 and found.reference_nats == found.changed_nats


def test_quantized_models_disagree_by_their_bits(small_tokenizer, params):
    model = build(params[0])
    kept = run_reference(model, batches(small_tokenizer))
    eight, four = (compare(kept, lay_out(model, quantize=scheme)).kl for scheme in ("int8", "int4"))
    assert 0 < eight < four / 10


def test_every_token_of_the_texts_is_scored_once(small_tokenizer):
    rows = batches(small_tokenizer, rows=3)
    assert {tuple(b["input_ids"].shape) for b in rows} == {(3, 24)}
    scored = [label for b in rows for row in b["labels"] for label in row if label != IGNORED]
    assert scored == [i for text in TEXTS for i in small_tokenizer.encode(text)]
    for b in rows:
        follows = b["labels"][:, :-1] != IGNORED
        same = (b["segment_ids"][:, 1:] == b["segment_ids"][:, :-1]) & (b["segment_ids"][:, 1:] > 0) & follows
        np.testing.assert_array_equal(b["labels"][:, :-1][same], b["input_ids"][:, 1:][same])
    few = rows_of_texts(small_tokenizer, TEXTS, length=24, rows=3, tokens=5, prefix_id=1)
    assert sum((b["labels"] != IGNORED).sum() for b in few) == 5


def test_no_text_is_an_error(params):
    model = build(params[0])
    with pytest.raises(ValueError, match="The text is empty"):
        compare(run_reference(model, []), model)
