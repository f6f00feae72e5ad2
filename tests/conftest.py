"""Settings of the whole test run; read by pytest before any test module."""

from __future__ import annotations

import atexit
import os
import pathlib
import shutil
import tempfile

import xla

# A wrong mean over devices cannot be seen on one device.  XLA reads this once, when
# its first backend starts.  Compiled is once for all the processes of a run, those of
# pytest-xdist and those that the tests start.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + f" --xla_force_host_platform_device_count=4 {xla.FLAGS}"
).strip()
if "PYTEST_XDIST_WORKER" not in os.environ:  # a worker has its controller's
    _CACHE = tempfile.mkdtemp(prefix="cbmlc-tests-")
    atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

# Workers that each have a thread for matrix products on every core wait for one another
# busily.  Read when NumPy is imported: by the workers, and by what tests start.
os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

# [B, L] + [L] is more often a mistake than a wish.
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile(
    "cbmlc_jax", deadline=None, derandomize=True, database=None
)
hypothesis.settings.load_profile("cbmlc_jax")


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def pictures(tmp_path):
    """Seven images of noise, each of its own size, as inputs of side 32."""
    import numpy as np
    from PIL import Image

    from cbmlc_jax.data.images import Images

    rng = np.random.default_rng(0)
    paths = []
    for i in range(7):
        pixels = rng.integers(0, 256, (40 + i, 60, 3), dtype=np.uint8)
        paths.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(pixels).save(paths[-1])
    return Images(tuple(paths), 32)


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    """The folder with the real data sets; tests that want it skip without it."""
    folder = os.environ.get("CBMLC_DATA_DIR")
    if not folder:
        pytest.skip("CBMLC_DATA_DIR is not set")
    if not os.path.isdir(folder):
        pytest.skip(f"CBMLC_DATA_DIR={folder} is no folder")
    return pathlib.Path(folder)
