"""Log-probabilities of tokens: autodiff over whole logits in fp64, PyTorch's logits, meshes, memory, the fused loss."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding

from bc2_jax.config import ComputeConfig
from bc2_jax.data.batch import IGNORED
from bc2_jax.model.baichuan import Params, param_shardings, split_model
from bc2_jax.model.head import normalize_rows
from bc2_jax.model.log_probs import TokenLogProbs, token_log_probs
from bc2_jax.sharding import DEFAULT_RULES, ShardingRules, use_rules
from bc2_jax.train.loss import head_loss

AXES = ("batch", "sequence", "hidden"), ("vocab", "embed"), ("batch", "sequence")
# data, fsdp, tensor, fsdp_inner, context; None is no mesh.
MESHES = [None, (1, 1, 1), (2, 2, 2), (1, 2, 4), (1, 2, 1, 2, 2), (2, 1, 2, 1, 2)]


def whole_logits(h_BTD, rows_VD, labels_BT, chunk=None) -> TokenLogProbs:
    """As `token_log_probs`, from the logits of all tokens."""
    logits_BTV = h_BTD @ rows_VD.T
    labels_BT1 = jnp.where(labels_BT == IGNORED, 0, labels_BT)[..., None]
    log_prob_BT = jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), labels_BT1, axis=-1)[..., 0]
    log_prob_BT = jnp.where(labels_BT == IGNORED, 0, log_prob_BT)
    is_label_BTV = jnp.arange(len(rows_VD)) == labels_BT1
    label_BT, others_BT = (jnp.where(mask, logits_BTV, -jnp.inf).max(-1) for mask in (is_label_BTV, ~is_label_BTV))
    margin_BT = jnp.where(labels_BT == IGNORED, 0, label_BT - others_BT)
    return TokenLogProbs(log_prob_BT, logits_BTV.max(-1), logits_BTV.argmax(-1).astype(jnp.int32), margin_BT)


def values_and_gradients(function, chunk, h_BTD, rows_VD, labels_BT, *weights_BT):
    """What `function` gives, and the gradients of log_prob and largest_logit weighed by `weights_BT`."""

    def differentiable(h_BTD, rows_VD):
        found = function(h_BTD, rows_VD, labels_BT, chunk)
        return found[:2], found

    _, pull_back, found = jax.vjp(differentiable, h_BTD, rows_VD, has_aux=True)
    return found, pull_back(weights_BT)


def random_case(B: int, T: int, D: int, V: int, seed: int = 0, ignored: float = 0.3) -> list[np.ndarray]:
    """h, rows, labels and the weights of log_prob and largest_logit, fp64."""
    rng = np.random.default_rng(seed)
    labels = np.where(rng.random((B, T)) < ignored, IGNORED, rng.integers(0, V, (B, T))).astype(np.int32)
    return [2 * rng.standard_normal((B, T, D)), rng.standard_normal((V, D)), labels, *rng.standard_normal((2, B, T))]


def place(case, mesh):
    """`case` on `mesh`; as it is without one."""
    if mesh is None:
        return [jnp.asarray(x) for x in case]
    axes = *AXES, *[AXES[2]] * (len(case) - 3)
    return [jax.device_put(x, NamedSharding(mesh, DEFAULT_RULES.spec(*a))) for x, a in zip(case, axes, strict=True)]


def use(mesh) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def run(function, chunk, case, mesh=None):
    compiled = jax.jit(values_and_gradients, static_argnums=(0, 1))
    with use(mesh):
        return compiled(function, chunk, *place(case, mesh))


def assert_close(found, expected, tolerance: float):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1, np.abs(b).max()))


@pytest.mark.parametrize(
    ("shape", "chunk"), [*((shape, (5, 100)[i % 2]) for i, shape in enumerate(MESHES)), (None, 100)], ids=str
)
def test_values_and_gradients_are_those_of_autodiff_in_fp64(shape, chunk: int, mesh_of):
    """The vocabulary is cut along tensor, D along fsdp; rows that tie for the largest logit lie on two devices."""
    case = random_case(8, 6, 8, 24)
    case[1][20] = case[1][3]
    case[0][0, :2] = 5 * case[1][3]
    case[2][0, :2] = 3, 20
    mesh = mesh_of(*shape) if shape else None
    with jax.enable_x64(True):
        expected = run(whole_logits, None, case)
        assert expected[0].argmax[0, 0] == 3
        found = run(token_log_probs, chunk, case, mesh)
        assert_close(found, expected, 1e-13)
    if mesh is not None:
        assert {x.sharding.spec for x in found[0]} == {DEFAULT_RULES.spec("batch", "sequence")}
        assert [x.sharding.spec for x in found[1]] == [DEFAULT_RULES.spec(*axes) for axes in AXES[:2]]


@settings(max_examples=10)
@given(
    B=st.integers(1, 3), T=st.integers(1, 17), V=st.integers(1, 40), chunk=st.integers(1, 60),
    ignored=st.sampled_from([0.0, 0.3, 1.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape_and_chunk(B: int, T: int, V: int, chunk: int, ignored: float, seed: int):
    case = random_case(B, T, 4, V, seed, ignored)
    with jax.enable_x64(True):
        assert_close(run(token_log_probs, chunk, case), run(whole_logits, None, case), 1e-13)


@pytest.mark.parametrize("shape", [None, (1, 2, 1, 2, 2), (1, 2, 2)], ids=str)
def test_the_padding_of_the_vocabulary_does_not_count(shape, mesh_of):
    """2600 rows become 3072, or twice 1300 become twice 2048. Logits are negative: a padded one would be first."""
    h, rows, labels, *weights = random_case(4, 6, 8, 2600)
    labels[0, :2] = 1299, 2599  # the last rows of a device
    case = [np.abs(h), -np.abs(rows), labels, *weights]
    with jax.enable_x64(True):
        found = run(token_log_probs, 5, case, mesh_of(*shape) if shape else None)
        assert_close(found, run(whole_logits, None, case), 1e-13)


@pytest.mark.parametrize("shape", [None, (2, 2, 2)], ids=str)
def test_all_labels_ignored(shape, mesh_of):
    """No log-probability and no gradient through it, even for infinite weights; largest logits as ever."""
    case = [x.astype(np.float32) if x.dtype == np.float64 else x for x in random_case(8, 5, 4, 12, ignored=1.0)]
    case[3:] = np.full((8, 5), np.inf, np.float32), np.zeros((8, 5), np.float32)
    found, gradients = run(token_log_probs, 3, case, mesh_of(*shape) if shape else None)
    for x in (found.log_prob, *gradients):
        assert not np.asarray(x).any()
    np.testing.assert_allclose(found.largest_logit, (case[0] @ case[1].T).max(-1), rtol=1e-6)
    np.testing.assert_array_equal(found.argmax, (case[0] @ case[1].T).argmax(-1))


def test_large_logits_keep_their_precision():
    """In fp32 a log-probability near 0 is exact although the largest logit is 10,000 times as large."""
    h, rows = np.array([[[1e4]]], np.float32), np.array([[1.0], [1.0 - 2**-12]], np.float32)
    found = token_log_probs(h, rows, np.array([[0]], np.int32), 1)
    assert float(found.log_prob[0, 0]) == pytest.approx(-np.log1p(np.exp(-1e4 * 2**-12)), rel=1e-6)


def test_equal_largest_logits_share_their_gradient():
    rows = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    h, labels = np.array([[[2, 0]]], np.float32), np.array([[IGNORED]], np.int32)
    largest = lambda h, rows: token_log_probs(h, rows, labels, 1).largest_logit.sum()  # noqa: E731
    d_h, d_rows = jax.grad(largest, (0, 1))(h, rows)
    np.testing.assert_array_equal(d_h, [[[1, 0]]])
    np.testing.assert_array_equal(d_rows, [[1, 0], [1, 0], [0, 0]])


def test_bf16_hidden_states():
    """Values are fp32 and as exact as the logits; the head's gradient is summed in fp32."""
    h, rows, *rest = random_case(4, 64, 16, 50)
    h, rows = jnp.asarray(h / 2, jnp.bfloat16), jnp.asarray(rows / 4, jnp.bfloat16).astype(jnp.float32)
    rest = [jnp.asarray(x, jnp.int32 if x.dtype == np.int32 else jnp.float32) for x in rest]
    found, (d_h, d_rows) = run(token_log_probs, 32, [h, rows, *rest])
    assert [x.dtype for x in found] == [jnp.float32, jnp.float32, jnp.int32, jnp.float32]
    assert (d_h.dtype, d_rows.dtype) == (jnp.bfloat16, jnp.float32)
    expected, (expected_d_h, expected_d_rows) = run(whole_logits, None, [h.astype(jnp.float32), rows, *rest])
    assert_close(found, expected, 1e-6)
    assert np.abs(d_h.astype(jnp.float32) - expected_d_h).max() < 1e-2 * np.abs(expected_d_h).max()
    assert np.abs(d_rows - expected_d_rows).max() < 5e-3 * np.abs(expected_d_rows).max()
    _, (_, whole) = run(token_log_probs, 256, [h, rows, *rest])
    assert np.abs(d_rows - whole).max() < 1e-5 * np.abs(whole).max()  # cut in chunks or not
    _, (_, d_stored) = run(token_log_probs, 32, [h, rows.astype(jnp.bfloat16), *rest])
    np.testing.assert_array_equal(d_stored, d_rows.astype(jnp.bfloat16))  # in the dtype of the weight


@pytest.mark.parametrize("shape", [None, (2, 2, 2)], ids=str)
def test_of_frozen_rows_no_gradient_is_computed(shape, mesh_of):
    """Three of four matmuls with the vocabulary are left, and the gradient of the hidden states is the same."""
    mesh = mesh_of(*shape) if shape else None
    h, rows, labels, weights, _ = (np.float32(x) if x.dtype == np.float64 else x for x in random_case(8, 16, 128, 96))

    def loss(h, rows, labels, weights):
        return jnp.sum(weights * token_log_probs(h, rows, labels, 128).log_prob)

    with use(mesh):
        case = place([h, rows, labels, weights], mesh)
        of_h, of_both = (jax.jit(jax.grad(loss, asked)).lower(*case).compile() for asked in (0, (0, 1)))
        np.testing.assert_allclose(of_h(*case), of_both(*case)[0], rtol=1e-6, atol=1e-6)
    assert of_h.cost_analysis()["flops"] < 0.8 * of_both.cost_analysis()["flops"]


@pytest.mark.parametrize("shape", [None, (2, 2, 2)], ids=str)
def test_the_fused_loss_is_a_sum_of_these(shape, mesh_of):
    mesh = mesh_of(*shape) if shape else None
    h, rows, labels = random_case(8, 6, 8, 24)[:3]

    def ours(h, rows, labels, z_loss_weight):
        found = token_log_probs(h, rows, labels, 5)
        max_z = jnp.sum(found.largest_logit**2, where=labels != IGNORED)
        return -found.log_prob.sum() + z_loss_weight * max_z

    def fused(h, rows, labels, z_loss_weight):
        return head_loss(h, rows, labels, z_loss_weight, 5)[0]

    with jax.enable_x64(True), use(mesh):
        placed = place([h, rows, labels], mesh)
        for z_loss_weight in (0.0, 1.0):
            found, expected = (
                jax.jit(jax.value_and_grad(f, (0, 1)), static_argnums=3)(*placed, z_loss_weight) for f in (ours, fused)
            )
            assert_close(found, expected, 1e-13)


# --------------------------------------------------------------------------------------------------- the model


class ModelCase(NamedTuple):
    tokens: list[np.ndarray]
    """ids, labels, weights of log_prob and of largest_logit."""
    gradient: Callable
    """(params, *tokens, function) -> gradients of the weighted sum, (what `function` gives, hidden states)."""
    params: Params
    expected: Params


@pytest.fixture(scope="module")
def model_case(golden) -> ModelCase:
    """The layers are fp32; what follows them, NormHead and `function`, is fp64."""
    ids = np.concatenate([golden.arrays["input_ids"]] * 4).astype(np.int32)
    labels = np.concatenate([ids[:, 1:], np.full_like(ids[:, :1], IGNORED)], axis=1)
    labels[:, ::5] = IGNORED
    tokens = [ids, labels, *np.random.default_rng(0).standard_normal((2, *ids.shape))]
    graphdef = split_model(golden.config, ComputeConfig(dtype="float32", attention="reference"))[0]

    def weighed(params, ids, labels, weights, largest_weights, function):
        model = nnx.merge(graphdef, params)
        h_BTD = model.hidden_states(ids).astype(jnp.float64)
        found = function(h_BTD, model.lm_head.rows(), labels, 13)
        return jnp.sum(weights * found.log_prob + largest_weights * found.largest_logit), (found, h_BTD)

    gradient = jax.jit(jax.grad(weighed, has_aux=True), static_argnums=5)
    with jax.enable_x64(True):
        params = golden.params | {"lm_head": {"weight": jnp.asarray(golden.params["lm_head"]["weight"], jnp.float64)}}
        return ModelCase(tokens, gradient, params, gradient(params, *map(jnp.asarray, tokens), whole_logits)[0])


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2), (1, 2, 4)], ids=str)
def test_a_models_log_probs_are_pytorchs_and_its_gradients_those_of_autodiff(golden, model_case, shape, mesh_of):
    """RoPE and ALiBi; the gradients are of all weights, NormHead outside of the function."""
    mesh, labels = mesh_of(*shape), model_case.tokens[1]
    # Six heads can't be cut in four; the vocabulary still is.
    uneven = golden.config.num_attention_heads % shape[2]
    rules = ShardingRules(heads=None, attention_heads=None) if uneven else DEFAULT_RULES
    with jax.enable_x64(True), use_rules(rules), jax.set_mesh(mesh):
        params = jax.device_put(model_case.params, param_shardings(golden.config, mesh))
        tokens = [jax.device_put(x, NamedSharding(mesh, rules.spec(*AXES[2]))) for x in model_case.tokens]
        gradients, (found, h_BTD) = model_case.gradient(params, *tokens, token_log_probs)
    with jax.enable_x64(True):
        # The layers add up in another order on a mesh, in fp32.
        assert_close(gradients, model_case.expected, 1e-5)
        weight = model_case.params["lm_head"]["weight"]
        rows = np.asarray(normalize_rows(weight) if golden.config.normalize_head else weight)
        assert_close(found, whole_logits(np.asarray(h_BTD), rows, labels), 1e-13)
    logits = np.concatenate([golden.arrays["train_logits"]] * 4)
    expected = whole_logits(logits, np.eye(logits.shape[-1], dtype=np.float32), labels)
    np.testing.assert_array_equal(found.argmax, expected.argmax)
    for a, b in zip(found[:2], expected[:2], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- programs


def abstract_case(B: int, T: int, D: int, V: int, mesh=None):
    def make(shape, dtype, axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=mesh and NamedSharding(mesh, DEFAULT_RULES.spec(*axes)))

    shapes = ((B, T, D), jnp.bfloat16), ((V, D), jnp.float32), ((B, T), jnp.int32), *[((B, T), jnp.float32)] * 2
    return [make(*x, axes) for x, axes in zip(shapes, (*AXES, AXES[2], AXES[2]), strict=True)]


def compile_case(function, case, mesh):
    with use(mesh):
        return jax.jit(function).lower(*case).compile()


@pytest.mark.parametrize("shape", [None, (2, 2, 2)], ids=str)
@pytest.mark.parametrize("gradients", [False, True])
def test_no_logits_of_the_whole_batch_in_memory(gradients: bool, shape, mesh_of):
    """The real vocabulary, 4096 tokens per device, without running anything."""
    V, D, T, chunk = 125_696, 16, 4096, 64
    mesh = shape and mesh_of(*shape)
    batch, vocab = (4, 2) if shape else (1, 1)
    function = lambda *x: values_and_gradients(token_log_probs, chunk, *x)[gradients]  # noqa: E731
    compiled = compile_case(function, abstract_case(batch, T, D, V, mesh), mesh)
    one_chunk, all_logits = 4 * chunk * V // vocab, 4 * T * V // vocab
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * one_chunk + 4 * 4 * V * D < all_logits / 4
    sizes = [np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(r"\w\[([\d,]+)\]", compiled.as_text())]
    assert max(sizes) < T * V // vocab / 16


def test_the_largest_logit_costs_nothing_where_its_gradient_is_not_used(mesh_of):
    """The second pass over the logits, and its collectives, are not in the program."""
    mesh = mesh_of(2, 2, 2)
    h, rows, labels, weights, _ = abstract_case(8, 64, 16, 64, mesh)

    def weighed(h, rows, labels, weights, with_largest):
        found = token_log_probs(h, rows, labels, 32)
        return jnp.sum(weights * (found.log_prob + found.largest_logit if with_largest else found.log_prob))

    counts = []
    for with_largest in (True, False):
        gradient = jax.grad(lambda *x, use=with_largest: weighed(*x, use), (0, 1))
        counts.append(compile_case(gradient, (h, rows, labels, weights), mesh).as_text().count(" all-reduce("))
    assert counts[0] == counts[1] + 2


def test_a_frozen_head_has_no_gradient_in_the_program(mesh_of):
    mesh = mesh_of(2, 2, 2)
    h, rows, labels, weights, _ = abstract_case(8, 64, 16, 64, mesh)
    weighed = lambda h, rows, labels, w: jnp.sum(w * token_log_probs(h, rows, labels, 32).log_prob)  # noqa: E731
    scatters = [
        compile_case(jax.grad(weighed, arguments), (h, rows, labels, weights), mesh).as_text().count("reduce-scatter(")
        for arguments in ((0, 1), 0)
    ]
    assert scatters[0] > 0 and scatters[1] == 0


def test_the_rules_in_use_hold_for_the_backward_pass(mesh_of):
    """The vocabulary whole, the model dimension cut along tensor too; the gradient is taken outside of the context."""
    rules = ShardingRules(vocab=None, ffn=None, heads=None)
    mesh = mesh_of(2, 2, 2)
    case = random_case(8, 6, 8, 24)
    h, rows, labels, *weights = (np.asarray(x, np.float32) if x.dtype == np.float64 else x for x in case)
    axes = (*AXES, AXES[2], AXES[2])
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(x, NamedSharding(mesh, rules.spec(*a)))
            for x, a in zip((h, rows, labels, *weights), axes, strict=True)
        ]
        with use_rules(rules):
            found, pull_back = jax.vjp(lambda h, rows: token_log_probs(h, rows, placed[2], 5)[:2], *placed[:2])
        gradients = pull_back(tuple(placed[3:]))
    expected, expected_gradients = run(whole_logits, None, [h, rows, labels, *weights])
    assert_close((found, gradients), (tuple(expected[:2]), expected_gradients), 2e-5)
    assert gradients[1].sharding.spec == rules.spec("vocab", "embed")


def test_bad_arguments_are_named():
    h, rows, labels = (x.astype(np.float32) for x in random_case(2, 3, 4, 5)[:3])
    labels = labels.astype(np.int32)
    with pytest.raises(ValueError, match="chunk = 0 is not valid: it must be positive"):
        token_log_probs(h, rows, labels, 0)
    for bad in ((h, rows, labels.T), (h, rows.T, labels)):
        with pytest.raises(ValueError, match=r"they must be \[B, T\] and \[V, D\]"):
            token_log_probs(*bad, 1)
