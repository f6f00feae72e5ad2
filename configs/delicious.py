"""delicious: 12,920 training and 3,185 test pages, 500 words, 983 tags.

    python -m cbmlc_jax.main --config=configs/delicious.py:fast

Expected, clean, one seed, epoch 4 of 4, by corrected_val (which also chooses the
epoch): ebF1 .336, miF1 .351, maF1 .111; about 4.5 minutes an epoch on two cores.
"""

from cbmlc_jax import config as config_lib
from cbmlc_jax import grids


def get_config(preset: str = ""):
    """The paper's settings, or `fast`: one block, width 64, one head."""
    c = config_lib.base()
    c.data.name = "delicious"
    c.preset = preset
    if preset == "fast":
        c.model.num_blocks = 1
        c.model.encoder.layers = 1
        c.model.num_heads = 1
        c.model.width = 64
        c.model.ffn_width = 128
        c.model.encoder.embedding_std = 0.1
        c.optim.learning_rate = 2e-3
        c.train.num_epochs = 8
    elif preset:
        raise config_lib.ConfigError(f"configs/delicious.py has no preset {preset!r}")
    return c


GRIDS = {
    "paper": grids.paper(
        ["mlknn", "sleec", "seq2seq", "lamp", "mpvae", *grids.linear(3)]
    ),
    "small": grids.small("fast", grids.linear(3)),
}
