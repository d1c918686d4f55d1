"""Evaluation: benchmarks, log-likelihoods, scaling laws."""
