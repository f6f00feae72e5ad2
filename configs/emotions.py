"""emotions: 391 training and 202 test songs, 72 real-valued features, 6 moods.

    python -m cbmlc_jax.main --config=configs/emotions.py

Sizes were chosen by 5-fold cross-validation within the training rows, clean labels.
"""

from cbmlc_jax import config as config_lib
from cbmlc_jax import grids


def get_config(preset: str = ""):
    """Small and strongly regularised, for few rows; there is no preset."""
    c = config_lib.base()
    c.data.name = "emotions"
    c.preset = preset
    c.model.encoder.name = "dense"
    c.model.encoder.layers = 2
    c.model.num_blocks = 1
    c.model.width = 64
    c.model.ffn_width = 128
    c.model.num_heads = 2
    c.model.dropout = 0.4
    c.optim.learning_rate = 1e-3
    c.train.num_epochs = 60
    if preset:
        raise config_lib.ConfigError(f"configs/emotions.py has no preset {preset!r}")
    return c


GRIDS = {
    "paper": grids.paper(["mlknn", "sleec", "mpvae", *grids.linear(5)]),
    "small": grids.small("", grids.linear(5)),
}
