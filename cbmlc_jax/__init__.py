"""CbMLC in JAX: multi-label classification when the labels are noisy."""

__version__ = "0.1.0"
