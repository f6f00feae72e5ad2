"""rcv1: RCV1-v2; 23,149 training and 781,265 test stories, 103 topics.

    python -m cbmlc_jax.main --config=configs/rcv1.py:subsets

`--config.data.variant=swapped` trains on the 781,265, as the paper does.
"""

from cbmlc_jax import config as config_lib
from cbmlc_jax import grids


def get_config(preset: str = ""):
    """The paper's settings on weighted stems, `sequence`: on lists of stems, published
    in scrambled order, or `subsets`: a small model on Mulan's 27,613 stories."""
    c = config_lib.base()
    c.data.name = "rcv1"
    c.preset = preset
    if preset == "sequence":
        c.data.tokens = True
        c.model.encoder.name = "sequence"
    elif preset == "subsets":
        c.data.variant = "subsets"
        c.model.num_blocks = 1
        c.model.encoder.layers = 1
        c.model.num_heads = 1
        c.model.width = 64
        c.model.ffn_width = 128
        c.model.encoder.embedding_std = 0.1
        c.optim.learning_rate = 2e-3
        c.train.num_epochs = 6
    elif preset:
        raise config_lib.ConfigError(f"configs/rcv1.py has no preset {preset!r}")
    return c


GRIDS = {
    "paper": grids.paper(["lamp", "mpvae", {"model.name": "logistic_regression"}]),
    "small": grids.small("subsets", [{"model.name": "logistic_regression"}], "subsets"),
}
