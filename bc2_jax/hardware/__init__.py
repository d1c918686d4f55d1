"""What the devices of this machine compute and reach, beside what the estimate of `bc2_jax.aot` assumes."""
