"""CbMLC in JAX: multi-label classification when the labels are noisy."""

import os
from importlib import metadata

__version__ = "0.1.0"


def _prepare_xla() -> None:
    """Sets the XLA flags that this package wants, before jax starts a backend.

    XLA:CPU of jax 0.10 runs batched matrix products on one core unless this fusion is
    off; later versions do not know the flag and would abort.
    """
    flag = "--xla_cpu_experimental_ynn_fusion_type"
    flags = os.environ.get("XLA_FLAGS", "")
    if metadata.version("jaxlib").startswith("0.10.") and flag not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}=".strip()


_prepare_xla()
