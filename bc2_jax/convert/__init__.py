"""Checkpoints in the released PyTorch layout <-> our parameters. Needs numpy and ml_dtypes, no torch."""
