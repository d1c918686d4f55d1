"""Scaling laws: from runs of a ladder to the loss of a larger model."""

from bc2_jax.evaluate.scaling.fit import Fit, HeldOut, fit_compute, fit_surface

__all__ = ["Fit", "HeldOut", "fit_compute", "fit_surface"]
