"""The version of this library, said here alone."""

__version__ = "0.1.0"
