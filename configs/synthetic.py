"""The embedded data set: 40 labels in a semantic tree, 2,000 documents, no files.

python -m cbmlc_jax.main --config.noise.kind=combined
"""

from cbmlc_jax import config as config_lib
from cbmlc_jax import grids


def get_config(preset: str = ""):
    """The only preset is the default one."""
    if preset:
        raise config_lib.ConfigError(f"configs/synthetic.py has no preset {preset!r}")
    c = config_lib.base()
    c.data.name = "synthetic"
    c.model.num_blocks = 1
    c.model.width = 64
    c.model.ffn_width = 128
    c.model.num_heads = 2
    c.model.encoder.layers = 1
    c.model.encoder.embedding_std = 0.1
    c.optim.learning_rate = 4e-3
    c.train.num_epochs = 10
    return c


# Small, and one shape to compile: for trying out a sweep.
_SHORT = {
    "data.length_buckets": 1,
    "model.width": 16,
    "train.num_epochs": 2,
    "train.batch_size": 64,
}
GRIDS = {
    "smoke": [
        grids.Block(
            [_SHORT],
            [("ncar", 0.02), ("combined", None)],
            candidates={"loss.gamma_neg": (1.0, 4.0)},
            seeds=(0, 1),
        ),
        grids.Block(
            [{"model.name": "label_prior"}], [("combined", None)], seeds=(0, 1)
        ),
    ],
}
