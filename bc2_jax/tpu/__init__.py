"""TPU generations and the compiler options for each, as data."""
