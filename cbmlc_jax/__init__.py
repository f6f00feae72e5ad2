"""CbMLC in JAX: multi-label classification when the labels are noisy."""

__version__ = "0.1.0"


def __getattr__(name: str):
    """`find_label_issues`, imported where it is asked for: the command line is not."""
    if name == "find_label_issues":
        from cbmlc_jax.issues import find_label_issues

        return find_label_issues
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
