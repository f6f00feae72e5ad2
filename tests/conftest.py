"""Settings of the whole test run; read by pytest before any test module."""

from __future__ import annotations

import os
import pathlib

# A wrong mean over devices cannot be seen on one device.  XLA reads this once, when
# its first backend starts.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
).strip()

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

# [B, L] + [L] is more often a mistake than a wish.
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile(
    "cbmlc_jax", deadline=None, derandomize=True, database=None
)
hypothesis.settings.load_profile("cbmlc_jax")


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    """The folder with the real data sets; tests that want it skip without it."""
    folder = os.environ.get("CBMLC_DATA_DIR")
    if not folder:
        pytest.skip("CBMLC_DATA_DIR is not set")
    if not os.path.isdir(folder):
        pytest.skip(f"CBMLC_DATA_DIR={folder} is no folder")
    return pathlib.Path(folder)
