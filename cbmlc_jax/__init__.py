"""CbMLC in JAX: multi-label classification when the labels are noisy."""
