"""Attention and loss kernels: local computation on one device's shard, one interface per operation."""
