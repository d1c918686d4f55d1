"""Cross entropy and max-z: PyTorch's values and gradients, plain numpy in fp64, meshes, memory, FLOPs."""

from __future__ import annotations

import contextlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding

from bc2_jax.config import ComputeConfig
from bc2_jax.data.batch import IGNORED
from bc2_jax.model.baichuan import param_shardings
from bc2_jax.sharding import DEFAULT_RULES
from bc2_jax.train.loss import LossSums, count_targets, head_loss
from bc2_jax.train.pretrain import make_loss

RULES = DEFAULT_RULES


def shifted(ids: np.ndarray) -> np.ndarray:
    return np.concatenate([ids[:, 1:], np.full_like(ids[:, :1], IGNORED)], axis=1).astype(np.int32)


def golden_batch(golden, repeat: int = 1, labels: np.ndarray | None = None) -> dict[str, np.ndarray]:
    ids = np.concatenate([golden.arrays["input_ids"]] * repeat).astype(np.int32)
    labels = shifted(ids) if labels is None else labels
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    return {"input_ids": ids, "labels": labels, "positions": positions, "segment_ids": np.ones_like(ids)}


def golden_loss(golden, compute: ComputeConfig, params, batch):
    """((mean loss, parts), gradients)."""
    loss_fn = make_loss(golden.config, compute)

    def mean_loss(params, batch):
        loss, parts = loss_fn(params, {}, batch)
        return loss / count_targets(batch["labels"]), LossSums(**parts.sums, **parts.maxima)

    gradient = jax.value_and_grad(mean_loss, has_aux=True)
    return jax.jit(gradient)(params, batch)


def assert_golden(golden, result):
    (loss, sums), gradients = result
    assert float(loss) == pytest.approx(float(golden.arrays["train_loss"]), abs=1e-5)
    for ours, name in (("cross_entropy", "cross_entropy"), ("max_z", "max_z_term")):
        assert float(getattr(sums, ours) / sums.tokens) == pytest.approx(float(golden.arrays[name]), abs=1e-5)

    def compare(path, gradient, expected):
        error = np.abs(np.asarray(gradient) - expected).max() / np.abs(expected).max()
        assert error < 1e-4, f"{jax.tree_util.keystr(path)}: {error}"

    jax.tree_util.tree_map_with_path(compare, gradients, golden.gradients)


GOLDEN = ("rope-tiny", "alibi-tiny")
REMATS = ("none", "full", "save_dots", "save_projections", "save_attention", "offload", "q,k,gate")
VARIANTS = [
    {"attention": "reference"},
    {"attention": "reference", "scan_layers": False, "remat": "none"},
    {"scan_layers": False, "loss_chunk": 1024},
]


# What a remat policy keeps has the same names in both models.
@pytest.mark.parametrize(
    ("golden", "variant"),
    [(GOLDEN[i % 2], {"remat": remat}) for i, remat in enumerate(REMATS)]
    + [(name, variant) for name in GOLDEN for variant in VARIANTS],
    indirect=["golden"], ids=lambda v: v if isinstance(v, str) else ",".join(map(str, v.values())),
)  # fmt: skip
def test_loss_and_every_gradient_equal_pytorch(golden, variant: dict):
    compute = ComputeConfig(**({"dtype": "float32", "attention_block": 8, "loss_chunk": 13} | variant))
    assert_golden(golden, golden_loss(golden, compute, golden.params, golden_batch(golden)))


@pytest.mark.parametrize(("shape", "remat"), [((1, 4, 2), "full"), ((2, 2, 2), "gate,up,down_proj")], ids=str)
def test_loss_and_every_gradient_on_a_mesh_equal_pytorch(golden, shape: tuple[int, int, int], remat: str, mesh_of):
    mesh, compute = mesh_of(*shape), ComputeConfig(dtype="float32", attention_block=8, loss_chunk=13, remat=remat)
    params = jax.device_put(golden.params, param_shardings(golden.config, mesh))
    batch = jax.device_put(golden_batch(golden, repeat=4), NamedSharding(mesh, RULES.spec("batch", "sequence")))
    with jax.set_mesh(mesh):
        result = golden_loss(golden, compute, params, batch)
    assert_golden(golden, result)
    specs = jax.tree.map(lambda g: g.sharding.spec, result[1])
    assert specs == jax.tree.map(lambda p: p.sharding.spec, params)


def test_ignored_labels_equal_pytorch(golden):
    """The mean is over the targets that remain."""
    batch = golden_batch(golden, labels=shifted(golden.arrays["masked_labels"]))
    _, (sums, _) = jax.jit(make_loss(golden.config, ComputeConfig(dtype="float32")))(golden.params, {}, batch)
    assert float(sums["tokens"]) == (golden.arrays["masked_labels"][:, 1:] != IGNORED).sum()
    assert float(sums["cross_entropy"] / sums["tokens"]) == pytest.approx(
        golden.arrays["masked_cross_entropy"].item(), abs=1e-5
    )


# ------------------------------------------------------------------------------------- head_loss against numpy


def numpy_loss(h, rows, labels, z_loss_weight):
    """fp64: (loss, sums) and the gradients of h and rows."""
    h, rows = np.asarray(h, np.float64), np.asarray(rows, np.float64)
    logits, valid = h @ rows.T, labels != IGNORED
    peak = logits.max(-1)
    log_p = logits - peak[..., None] - np.log(np.exp(logits - peak[..., None]).sum(-1, keepdims=True))
    is_label = np.arange(len(rows)) == labels[..., None]
    is_max = logits == peak[..., None]
    cross_entropy, label_is_max = -(log_p * is_label).sum(-1), (is_label & is_max).any(-1)
    sums = [(x * valid).sum() for x in (cross_entropy, peak**2, peak, label_is_max, np.ones_like(peak))]
    sums.append(np.where(valid, peak, -np.inf).max())
    d_logits = np.exp(log_p) - is_label + 2 * z_loss_weight * (peak / is_max.sum(-1))[..., None] * is_max
    d_logits = d_logits * valid[..., None]
    gradients = d_logits @ rows, np.einsum("btv,btd->vd", d_logits, h)
    return (sums[0] + z_loss_weight * sums[1], sums), gradients


def loss_and_gradients(h, rows, labels, z_loss_weight, chunk):
    (loss, sums), gradients = jax.value_and_grad(head_loss, (0, 1), has_aux=True)(h, rows, labels, z_loss_weight, chunk)
    return (loss, list(sums)), gradients


def place(mesh, h, rows, labels):
    """On `mesh` as a step has them."""
    axes = ("batch", "sequence", "hidden"), ("vocab", "embed"), ("batch", "sequence")
    shardings = (NamedSharding(mesh, RULES.spec(*names)) for names in axes)
    return jax.device_put((h, rows, labels), tuple(shardings))


def random_case(B: int, T: int, D: int, V: int, seed: int = 0, ignored: float = 0.3):
    rng = np.random.default_rng(seed)
    labels = np.where(rng.random((B, T)) < ignored, IGNORED, rng.integers(0, V, (B, T))).astype(np.int32)
    return 2 * rng.standard_normal((B, T, D)).astype(np.float32), rng.standard_normal((V, D)).astype(np.float32), labels


def assert_close(result, expected, tolerance: float = 2e-5):
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        largest = np.abs(b).max() if np.isfinite(b).all() else 1
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=tolerance, atol=tolerance * max(1, largest))


@settings(max_examples=10)
@given(
    B=st.integers(1, 3), T=st.integers(1, 17), V=st.integers(1, 40), chunk=st.integers(1, 60),
    ignored=st.sampled_from([0.0, 0.3, 1.0]), z=st.sampled_from([0.0, 2e-4, 0.5]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape_and_chunk(B: int, T: int, V: int, chunk: int, ignored: float, z: float, seed: int):
    h, rows, labels = random_case(B, T, 4, V, seed, ignored)
    expected = numpy_loss(h, rows, labels, z)
    assert_close(
        jax.jit(loss_and_gradients, static_argnums=(3, 4))(h, rows, labels, z, chunk),
        expected,
    )
    assert_close(
        jax.jit(head_loss, static_argnums=(3, 4))(h, rows, labels, z, chunk)[0], expected[0][0]
    )  # no gradients


def test_bf16_is_close_and_its_head_gradient_is_summed_in_fp32():
    h, rows, labels = random_case(4, 128, 16, 50, ignored=0)
    h, rows = jnp.asarray(h, jnp.bfloat16) / 2, jnp.asarray(rows, jnp.bfloat16).astype(jnp.float32) / 4
    (loss, _), (d_h, d_rows) = loss_and_gradients(h, rows, labels, 2e-4, 32)
    (expected, _), (expected_d_h, expected_d_rows) = numpy_loss(h, rows, labels, 2e-4)
    assert loss.dtype == d_rows.dtype == jnp.float32 and d_h.dtype == jnp.bfloat16
    assert float(loss) == pytest.approx(expected, rel=1e-5)  # logits and statistics are fp32
    assert np.abs(np.asarray(d_h, np.float64) - expected_d_h).max() < 1e-2 * np.abs(expected_d_h).max()
    assert np.abs(d_rows - expected_d_rows).max() < 2e-3 * np.abs(expected_d_rows).max()
    (_, _), (_, whole) = loss_and_gradients(h, rows, labels, 2e-4, 512)
    assert np.abs(d_rows - whole).max() < 1e-5 * np.abs(whole).max()  # cut in chunks or not


def test_large_logits_do_not_overflow():
    h, rows, labels = random_case(1, 6, 4, 9)
    result = loss_and_gradients(h * 1e4, rows, labels, 0.0, 4)
    assert_close(result, numpy_loss(h * 1e4, rows, labels, 0.0), 1e-4)


@pytest.mark.parametrize("z_loss_weight", [0.0, 0.1])
def test_all_labels_ignored(z_loss_weight: float):
    h, rows, labels = random_case(2, 5, 4, 9, ignored=1.0)
    (loss, (*sums, largest)), gradients = loss_and_gradients(h, rows, labels, z_loss_weight, 3)
    for leaf in jax.tree.leaves((loss, sums, gradients)):
        assert not np.asarray(leaf).any()
    assert largest == -np.inf


def test_max_z_gradient_against_finite_differences_in_fp64():
    h32, rows32, labels = random_case(1, 4, 3, 7)
    with jax.enable_x64(True):
        h, rows = jnp.asarray(h32, jnp.float64), jnp.asarray(rows32, jnp.float64)

        @jax.jit
        def max_z(h, rows):
            both, cross_entropy = (head_loss(h, rows, labels, weight, 3)[0] for weight in (1.0, 0.0))
            return both - cross_entropy

        assert max_z(h, rows).dtype == jnp.float64
        for argument, gradient in enumerate(jax.grad(max_z, (0, 1))(h, rows)):
            for index in np.ndindex(gradient.shape):
                moved = [
                    [x.at[index].add(e) if i == argument else x for i, x in enumerate((h, rows))] for e in (1e-6, -1e-6)
                ]
                numeric = (max_z(*moved[0]) - max_z(*moved[1])) / 2e-6
                assert float(gradient[index]) == pytest.approx(float(numeric), rel=1e-6, abs=1e-7)


def test_equal_largest_logits_share_the_max_z_gradient():
    rows = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    h, labels = np.array([[[2, 0]]], np.float32), np.array([[2]], np.int32)
    gradients = [loss_and_gradients(h, rows, labels, z, 1)[1] for z in (1.0, 0.0)]
    d_h, d_rows = (a - b for a, b in zip(*gradients, strict=True))
    np.testing.assert_allclose(d_h, [[[4, 0]]], atol=1e-6)  # d max^2 = 2 * max * d max
    np.testing.assert_allclose(d_rows, [[4, 0], [4, 0], [0, 0]], atol=1e-6)


# data, fsdp, tensor, fsdp_inner, context
@pytest.mark.parametrize(
    ("shape", "chunk"),
    [
        ((1, 1, 2), 3), ((1, 1, 4), 100), ((1, 4, 1), 3), ((2, 2, 2), 3), ((2, 2, 2), 100), ((8, 1, 1), 100),
        ((1, 2, 1, 2, 2), 3), ((2, 1, 2, 1, 2), 100),
    ],
    ids=str,
)  # fmt: skip
def test_any_mesh_equals_numpy(shape: tuple[int, ...], chunk: int, mesh_of):
    """The vocabulary is cut along tensor, D along fsdp; rows that tie for the largest logit lie on two devices."""
    h, rows, labels = random_case(8, 6, 8, 24)
    rows[20] = rows[3]
    h[0, 0] = 5 * rows[3]
    labels[0, 0] = 3
    mesh = mesh_of(*shape)
    placed = place(mesh, h, rows, labels)
    with jax.set_mesh(mesh):
        result = jax.jit(loss_and_gradients, static_argnums=(3, 4))(*placed, 0.1, chunk)
    assert_close(result, numpy_loss(h, rows, labels, 0.1))
    assert result[1][1].sharding.spec == RULES.spec("vocab", "embed")
    assert result[1][0].sharding.spec == RULES.spec("batch", "sequence", "hidden")


@pytest.mark.parametrize("chunk", [5, 100], ids=["chunks", "pieces"])
@pytest.mark.parametrize("shape", [None, (1, 2, 1, 2, 2), (1, 2, 2)], ids=str)
def test_a_padded_vocabulary_equals_numpy(shape: tuple[int, ...] | None, chunk: int, mesh_of):
    """5200 rows become 6144, or twice 2600 become twice 3072. All logits are negative: the padding's must not count.

    Tokens in one chunk on a mesh: the vocabulary comes in pieces of 1024 and 2048 rows; largest logits tie over two.
    """
    h, rows, labels = random_case(4, 6, 8, 5200)
    h = np.abs(h)
    rows = -np.abs(rows)
    labels[0, :5] = 1023, 1024, 2599, 2600, 5199  # the last and first rows of a piece and of a device
    rows[700] = rows[2100] = rows.max(0) / 2
    mesh = shape and mesh_of(*shape)
    case = place(mesh, h, rows, labels) if mesh else (h, rows, labels)
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        result = jax.jit(loss_and_gradients, static_argnums=(3, 4))(*case, 0.1, chunk)
    assert_close(result, numpy_loss(h, rows, labels, 0.1))


# ------------------------------------------------------------------------------------------- memory and arithmetic


def abstract_case(B: int, T: int, D: int, V: int, mesh=None):
    def make(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=mesh and NamedSharding(mesh, RULES.spec(*axes)))

    h = make((B, T, D), jnp.bfloat16, "batch", "sequence", "hidden")
    return h, make((V, D), jnp.float32, "vocab", "embed"), make((B, T), jnp.int32, "batch", "sequence")


@pytest.mark.parametrize("shape", [None, (2, 2, 2)], ids=str)
def test_no_logits_of_the_whole_batch_in_memory(shape, mesh_of):
    """The real vocabulary, 4096 tokens per device, without running anything."""
    V, D, chunk = 125_696, 16, 64
    mesh = shape and mesh_of(*shape)
    batch, vocab = (4, 2) if shape else (1, 1)
    with jax.set_mesh(mesh) if mesh else jax.default_matmul_precision("default"):
        lowered = jax.jit(lambda *x: loss_and_gradients(*x, 2e-4, chunk)).lower(*abstract_case(batch, 4096, D, V, mesh))
    used = lowered.compile().memory_analysis().temp_size_in_bytes
    one_chunk, all_logits = 4 * chunk * V // vocab, 4 * 4096 * V // vocab
    assert used < 8 * one_chunk + 4 * 4 * V * D < all_logits / 4


def matmul_flops(jaxpr, width: int) -> int:
    """FLOPs of the matmuls with a dimension of `width`, loops counted as often as they run."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            lhs, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
            if width in (*lhs, *eqn.invars[1].aval.shape, *out):
                total += 2 * math.prod(out) * math.prod(lhs[i] for i in contracted)
        repeats = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        total += repeats * sum(matmul_flops(sub, width) for sub in jaxprs_in_params(eqn.params))
    return total


@pytest.mark.parametrize("chunk", [32, 10_000])
def test_logits_are_computed_once(chunk: int):
    """Three matmuls over the vocabulary: logits, gradient of h, gradient of the rows. Not a fourth."""
    B, T, D, V = 2, 128, 8, 1009
    case = abstract_case(B, T, D, V)
    backward = jax.make_jaxpr(lambda *x: loss_and_gradients(*x, 2e-4, chunk))(*case)
    forward = jax.make_jaxpr(lambda *x: head_loss(*x, 2e-4, chunk))(*case)
    assert matmul_flops(backward.jaxpr, V) == 3 * 2 * B * T * D * V
    assert matmul_flops(forward.jaxpr, V) == 2 * B * T * D * V


def test_rows_that_are_frozen_have_no_gradient_computed():
    B, T, D, V = 2, 128, 8, 1009
    case = abstract_case(B, T, D, V)
    of_h = jax.make_jaxpr(jax.grad(lambda *x: head_loss(*x, 0.0, 32)[0]))(*case)
    assert matmul_flops(of_h.jaxpr, V) == 2 * 2 * B * T * D * V


def test_weights_count_targets_as_often():
    rng = np.random.default_rng(0)
    h, rows = rng.standard_normal((2, 6, 8), np.float32), rng.standard_normal((11, 8), np.float32)
    labels = rng.integers(0, 11, (2, 6)).astype(np.int32)
    labels[0, :2] = IGNORED
    repeats = np.array([[5, 0, 1, 2, 0, 3], [1, 1, 2, 0, 1, 0]])

    def gradients(h, labels, weights):
        return jax.value_and_grad(lambda *x: head_loss(*x, labels, 0.1, 4, weights), (0, 1), has_aux=True)(h, rows)

    (loss, sums), (d_h, d_rows) = gradients(h, labels, repeats.astype(np.float32))
    flat = [(h[i, j], labels[i, j]) for i in range(2) for j in range(6) for _ in range(repeats[i, j])]
    again = gradients(np.stack([x for x, _ in flat])[None], np.array([[y for _, y in flat]]), None)
    np.testing.assert_allclose([loss, *sums], [again[0][0], *again[0][1]], rtol=1e-5)
    np.testing.assert_allclose(d_rows, again[1][1], rtol=1e-4, atol=1e-5)
    places = np.repeat(np.arange(12), repeats.reshape(-1))
    expected = np.zeros((12, 8), np.float32)
    np.add.at(expected, places, np.asarray(again[1][0][0]))
    np.testing.assert_allclose(np.asarray(d_h).reshape(12, 8), expected, rtol=1e-4, atol=1e-5)
