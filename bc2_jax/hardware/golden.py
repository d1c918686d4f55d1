"""Tiny models with known logits, loss and gradient: on the device against numpy in fp64, written out here.

The numpy model shares no code with the JAX one. It is checked against logits that PyTorch computed (tests/golden).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from bc2_jax.config import ComputeConfig, MeshConfig, ModelConfig
from bc2_jax.hardware.device import Device
from bc2_jax.hardware.kernels import relative_error
from bc2_jax.hardware.results import Outcome
from bc2_jax.model.baichuan import abstract_params, split_model
from bc2_jax.model.position import alibi_slopes
from bc2_jax.sharding import make_mesh

TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}
"""Largest relative errors of logits and loss; the gradient along one direction may be off by ten times as much in
fp32, because finite differences are not exact either."""
LENGTH = 48
_STEP = 1e-4
Weights = dict[str, np.ndarray]


def check_models(device: Device) -> Outcome:
    """Both architectures in fp32 with exact matmuls and in bf16 as in a run; "wrong" if one is out of its tolerance."""
    errors: dict[str, dict[str, float]] = {}
    wrong = []
    for position in ("rope", "alibi"):
        # Heads of 64, which the kernels support.
        model = ModelConfig(
            hidden_size=128, intermediate_size=176, num_hidden_layers=2, num_attention_heads=2, vocab_size=320,
            model_max_length=LENGTH, position_embedding=position,  # type: ignore[arg-type]  # one of its literals
        )  # fmt: skip
        # On a CPU one of each, to save time.
        both = ("float32", "bfloat16")
        for dtype in both if not device.is_small else both[:1] if position == "rope" else both[1:]:
            name = f"{position} {dtype}"
            attention = "reference" if device.is_small or (device.platform == "gpu" and dtype == "float32") else "flash"
            compute = ComputeConfig(dtype=dtype, remat="none", attention=attention)  # type: ignore[arg-type]  # as above
            errors[name] = compare(model, compute)
            limit = TOLERANCES[dtype]
            for what, error in errors[name].items():
                most = 10 * limit if what == "gradient" and dtype == "float32" else limit
                wrong += [] if error <= most else [f"{name}: {what} is off by {error:.1e} (limit {most:.0e})"]
    details = {"errors": errors, "tolerances": TOLERANCES}
    if wrong:
        return Outcome("wrong", "; ".join(wrong), details=details)
    largest = max(max(found.values()) for found in errors.values())
    return Outcome(
        "passed", f"logits, loss and gradient of {len(errors)} models, largest error {largest:.1e}", details=details
    )


def compare(model: ModelConfig, compute: ComputeConfig) -> dict[str, float]:
    """Relative errors of logits, mean cross entropy, and its derivative along a random direction."""
    mesh = make_mesh(MeshConfig(fsdp=1), jax.local_devices()[:1])
    weights, direction = make_weights(model, 0), make_weights(model, 1)
    ids = np.random.default_rng(2).integers(3, model.vocab_size, (2, LENGTH)).astype(np.int32)
    logits = numpy_logits(model, weights, ids)
    moved = [{name: w + sign * _STEP * direction[name] for name, w in weights.items()} for sign in (1, -1)]
    losses = [numpy_loss(numpy_logits(model, w, ids), ids) for w in moved]
    wanted = numpy_loss(logits, ids), (losses[0] - losses[1]) / (2 * _STEP)
    with jax.set_mesh(mesh):
        params, along = (place(model, mesh, values) for values in (weights, direction))
        graphdef = split_model(model, compute)[0]

        def loss(params: Any, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = nnx.merge(graphdef, params)(ids)
            scores = jax.nn.log_softmax(logits[:, :-1])
            is_next = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 2) == ids[:, 1:, None]
            return -jnp.where(is_next, scores, 0).sum() / scores[..., 0].size, logits

        precision = "highest" if compute.dtype == "float32" else None
        with jax.default_matmul_precision(precision):
            (value, found), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, jnp.asarray(ids))
        slope = sum(float((g * d).sum()) for g, d in zip(*map(jax.tree.leaves, (gradient, along)), strict=True))
    return {
        "logits": relative_error(np.asarray(found, np.float64), logits),
        "loss": relative_error(np.asarray(float(value)), np.asarray(wanted[0])),
        "gradient": relative_error(np.asarray(slope), np.asarray(wanted[1])),
    }


def names(model: ModelConfig, mesh: Mesh) -> tuple[list[tuple[str, Any]], Any]:
    """(dotted name, shape and sharding) of each parameter, and the tree they form."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract_params(model, mesh))
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves], tree


def make_weights(model: ModelConfig, seed: int) -> Weights:
    """fp64 values that fp32 holds exactly, by dotted name; the same on every machine."""
    mesh = make_mesh(MeshConfig(fsdp=1), jax.local_devices()[:1])
    rng = np.random.default_rng(seed)
    weights = {}
    for name, leaf in names(model, mesh)[0]:
        values = rng.standard_normal(leaf.shape) * 0.08 + ("norm" in name)
        weights[name] = values.astype(np.float32).astype(np.float64)
    return weights


def place(model: ModelConfig, mesh: Mesh, weights: Weights) -> Any:
    """The parameters in fp32 on the mesh."""
    leaves, tree = names(model, mesh)
    arrays = [jax.device_put(weights[name].astype(np.float32), leaf.sharding) for name, leaf in leaves]
    return jax.tree.unflatten(tree, arrays)


# --------------------------------------------------------------------------------------------------------------- numpy


def numpy_logits(model: ModelConfig, weights: Weights, ids: np.ndarray) -> np.ndarray:
    """fp64 logits [B, T, V] of one document a row, without a head's cache (paper section 2.3 and 2.4)."""
    eps, T, H = model.rms_norm_eps, ids.shape[1], model.head_dim
    h = weights["embed_tokens.weight"][ids]

    def normed(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight

    angles = np.arange(T)[:, None] * model.rope_theta ** -(np.arange(0, H, 2) / H)

    def rotated(x: np.ndarray) -> np.ndarray:
        if model.position_embedding == "alibi":
            return x
        a, b = x[..., : H // 2], x[..., H // 2 :]
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    distance = np.arange(T) - np.arange(T)[:, None]
    for layer in range(model.num_hidden_layers):
        w = {name.removeprefix("layers."): x[layer] for name, x in weights.items() if name.startswith("layers.")}
        x = normed(h, w["input_layernorm.weight"])
        q, k, v = (np.einsum("btd,dnh->btnh", x, w[f"self_attn.{name}_proj.weight"]) for name in "qkv")
        scores = np.einsum("btnh,bsnh->bnts", rotated(q), rotated(k)) * H**-0.5
        if model.position_embedding == "alibi":
            scores += alibi_slopes(model.num_attention_heads).astype(np.float64)[:, None, None] * distance
        scores = np.where(distance > 0, -np.inf, scores)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        h = h + np.einsum("bnts,bsnh,nhd->btd", shares, v, w["self_attn.o_proj.weight"], optimize=True)
        x = normed(h, w["post_attention_layernorm.weight"])
        gate = x @ w["mlp.gate_proj.weight"]
        h = h + (gate / (1 + np.exp(-gate)) * (x @ w["mlp.up_proj.weight"])) @ w["mlp.down_proj.weight"]
    head = weights["lm_head.weight"]
    if model.normalize_head:
        head = head / np.linalg.norm(head, axis=-1, keepdims=True)
    return normed(h, weights["norm.weight"]) @ head.T


def numpy_loss(logits: np.ndarray, ids: np.ndarray) -> float:
    """Mean cross entropy of the next token."""
    peak = logits.max(-1, keepdims=True)
    logs = logits - peak - np.log(np.exp(logits - peak).sum(-1, keepdims=True))
    return float(-np.take_along_axis(logs[:, :-1], ids[:, 1:, None].astype(np.int64), -1).mean())
