"""Training: loss, optimizer, step, loop, metrics."""
