"""CbMLC in JAX: multi-label classification when the labels are noisy."""

import importlib

__version__ = "0.5.0"

# Name -> its module, imported when the name is first used: `import cbmlc_jax` is quick.
_LAZY = {
    "CbMLCClassifier": "estimators",
    "KernelRidgeClassifier": "estimators",
    "LinearKNNClassifier": "estimators",
    "StackClassifier": "estimators",
    "find_label_issues": "issues",
}
__all__ = ["__version__", *_LAZY]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
