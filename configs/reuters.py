"""reuters: Reuters-21578, ModApte split, 90 topics; 7,770 training, 3,019 test stories.

    python -m cbmlc_jax.main --config=configs/reuters.py:fast

Stories are sequences of at most 300 tokens.
"""

from cbmlc_jax import config as config_lib
from cbmlc_jax import grids


def get_config(preset: str = ""):
    """The paper's settings, or `fast`: one block, width 64, for two cores."""
    c = config_lib.base()
    c.data.name = "reuters"
    c.preset = preset
    c.model.encoder.name = "sequence"
    if preset == "fast":
        c.model.num_blocks = 1
        c.model.encoder.layers = 1
        c.model.num_heads = 1
        c.model.width = 64
        c.model.ffn_width = 128
        c.model.encoder.embedding_std = 0.1
        c.optim.learning_rate = 2e-3
        c.train.num_epochs = 6
    elif preset:
        raise config_lib.ConfigError(f"configs/reuters.py has no preset {preset!r}")
    return c


GRIDS = {
    "paper": grids.paper(["seq2seq", "lamp", "mpvae", *grids.linear(3)]),
    "small": grids.small("fast", grids.linear(3)),
}
