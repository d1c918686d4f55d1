"""The GPU's attention: what it hands to cuDNN, computed by JAX's own attention on the CPU, and its calls of cuDNN."""

from __future__ import annotations

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bc2_jax.config import ComputeConfig, DataConfig, MeshConfig, ModelConfig, SourceConfig, TrainConfig
from bc2_jax.kernels.cudnn import add_alibi, check_cudnn, cudnn_attention, head_limit
from bc2_jax.model.position import alibi_slopes
from bc2_jax.sharding import make_mesh
from bc2_jax.train.job import make_train_step
from bc2_jax.train.pretrain import make_step
from tests.kernels.test_attention import KINDS, make_tokens, numpy_attention, random_inputs


def with_gradients(q, k, v, d_out, tokens, slopes):
    @jax.jit
    def run(q, k, v, tokens, d_out):
        attend = lambda *qkv: cudnn_attention(*qkv, tokens, slopes, implementation="xla")  # noqa: E731 one expression
        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(d_out.astype(out.dtype))

    return jax.tree.map(lambda x: np.asarray(x, np.float64), run(q, k, v, tokens, d_out))


@settings(max_examples=5)
@given(
    T=st.integers(1, 20).map(lambda n: 2 * n), N=st.integers(1, 3), kind=st.sampled_from(KINDS), alibi=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_what_cudnn_gets_is_attention_within_segments(T: int, N: int, kind: str, alibi: bool, seed: int):
    q, k, v, d_out = random_inputs((2, T, N, 8), seed)
    tokens, slopes = make_tokens(2, T, kind, seed), jnp.asarray(alibi_slopes(N)) if alibi else None
    out, gradients = with_gradients(q, k, v, d_out, tokens, slopes)
    exact, exact_gradients = numpy_attention(q, k, v, tokens, slopes, d_out)
    assert np.abs(out - exact).max() < 1e-5
    for got, wanted in zip(gradients, exact_gradients, strict=True):
        assert np.abs(got - wanted).max() < 3e-5


@pytest.mark.parametrize("kind", ["full", "packed"])
def test_alibi_in_bf16_is_no_worse_than_rope(kind: str):
    """The columns are bf16 as well, and their products exact."""
    q, k, v, d_out = random_inputs((1, 256, 4, 16), dtype=jnp.bfloat16)
    tokens, slopes = make_tokens(1, 256, kind), jnp.asarray(alibi_slopes(4))
    out, gradients = with_gradients(q, k, v, d_out, tokens, slopes)
    exact, exact_gradients = numpy_attention(q, k, v, tokens, slopes, d_out)
    assert np.abs(out - exact).max() < 0.012
    for got, wanted in zip(gradients, exact_gradients, strict=True):
        assert np.abs(got - wanted).max() < 0.01 * max(np.abs(wanted).max(), 1.0)


def test_columns_hold_the_bias_to_fp32():
    """At 4096 tokens a bf16 bias is wrong by up to 8."""
    T, N = 4096, 8
    slopes, x = alibi_slopes(N), jnp.zeros((1, T, N, 8), jnp.bfloat16)
    q, k = (np.asarray(a, np.float64) for a in add_alibi(x, x, make_tokens(1, T, "full"), jnp.asarray(slopes)))
    assert q.shape == k.shape == (1, T, N, 16)
    bias_NS = np.einsum("nh,snh->ns", q[0, 0], k[0])
    assert np.abs(bias_NS - slopes[:, None].astype(np.float64) * np.arange(T)).max() < 1e-3


def cudnn_calls(text: str) -> list[tuple[str, int, float, str]]:
    """(name, operands, scale, mask) of each call of cuDNN in a lowered program."""
    found = re.findall(r'@__cudnn\$(\w+)\(([^)]*)\).*?backend_config = "(.*?)(?<!\\)"', text)
    calls = []
    for name, operands, config in found:
        values = json.loads(config.replace("\\22", '"'))["cudnn_fmha_backend_config"]
        calls.append((name, operands.count("%"), values["fmha_scale"], values["mask_type"]))
    return calls


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces as on a GPU with cuDNN."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91_000)
    monkeypatch.setattr("bc2_jax.model.attention.platform", lambda: "gpu")


@pytest.mark.parametrize(("position", "policy"), [("rope", "save_attention"), ("alibi", "full")])
def test_the_step_calls_cudnn_forward_and_backward(gpu, position: str, policy: str):
    config = TrainConfig(
        name="gpu", num_steps=1, mesh=MeshConfig(fsdp=1),
        model=ModelConfig(
            hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64,
            position_embedding=position,  # type: ignore[arg-type]  # one of its literals
        ),
        data=DataConfig(
            sources=(SourceConfig(path="none"),), tokenizer="none", sequence_length=32, global_batch_size=2
        ),
        compute=ComputeConfig(attention="flash", remat=policy),  # type: ignore[arg-type]  # as above
    )  # fmt: skip
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        step = make_step(config.resolve(1), mesh)
        traced = jax.jit(make_train_step(step.objective, step.optimizer)).trace(step.state, {}, step.batch)
        calls = cudnn_calls(traced.lower(lowering_platforms=("cuda",)).as_text())
    assert {(scale, mask) for _, _, scale, mask in calls} == {(64**-0.5, "CAUSAL")}
    names = sorted((name, operands) for name, operands, _, _ in calls)
    # Rows of one document, and of several with their mask; q, k, v, then for the gradient log-sum-exp, result, its own.
    forward = [("fmhaScaleBiasSoftmax", 4), ("fmhaSoftmax", 3)]
    backward = [("fmhaScaleBiasSoftmaxBackward", 7), ("fmhaSoftmaxBackward", 6)]
    again = forward if policy == "full" else []
    assert names == sorted([*forward, *again, *backward])


def test_what_it_does_not_support_is_refused():
    legal = ("bfloat16", 64, True, 128)
    check_cudnn(*legal)
    for wrong, words in (
        (("float32", 64, True, 128), "not in float32"),
        (("bfloat16", 60, False, 128), "multiple of 8, not of 60"),
        (("bfloat16", 128, True, 128), "at most 128 on this GPU, not heads of 128 and the 8 columns of ALiBi"),
    ):
        with pytest.raises(ValueError, match=words):
            check_cudnn(*wrong)
    check_cudnn("bfloat16", 128, True, 256)
    q = jnp.zeros((1, 7, 1, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="row length = 7 is not valid: .* even"):
        cudnn_attention(q, q, q, make_tokens(1, 7, "full"), None)


def test_wide_heads_need_hopper():
    class Gpu:
        def __init__(self, capability: str):
            self.compute_capability = capability

    assert [head_limit([Gpu(name)]) for name in ("8.0", "9.0", "12.0")] == [128, 256, 256]
    assert head_limit([Gpu("9.0"), Gpu("8.6")]) == 128
