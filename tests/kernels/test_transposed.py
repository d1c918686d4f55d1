"""Matmuls with a transposed left side, against numpy in fp64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bc2_jax.kernels.transposed import multiply_transposed

SIZES = {"B": 2, "N": 3, "T": 5, "S": 7, "D": 4, "H": 6, "V": 9}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("equation", ["TD,TV->DV", "BTD,BTNH->DNH", "BTNH,BTD->NHD", "BNTS,BNTH->BNSH"])
def test_equals_numpy(equation: str, dtype):
    rng = np.random.default_rng(0)
    x, y = (
        jnp.asarray(rng.normal(size=[SIZES[dim] for dim in dims]), dtype) for dims in equation.split("->")[0].split(",")
    )
    expected = np.einsum(equation, *(np.asarray(z, np.float64) for z in (x, y)))
    found = multiply_transposed(equation, x, y)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # XLA would swap the operands if it could see that the result is transposed.
    np.testing.assert_allclose(jax.jit(lambda *xy: multiply_transposed(equation, *xy).T)(x, y), expected.T, atol=1e-5)
