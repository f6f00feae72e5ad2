"""own: your own data; docs/formats.md has the formats.

    python -m cbmlc_jax.main --config=configs/own.py --config.data.path=tickets.csv \\
        --config.data.text_column=text --config.data.label_column=labels --mode=data

Leave out `--mode=data`, which only describes the data, to train.
"""

from cbmlc_jax import config as config_lib


def get_config(preset: str = ""):
    """A small model for two cores, or `images`: on features of a frozen network."""
    c = config_lib.base()
    c.data.name = "own"
    c.preset = preset
    # Where the rows are; the command line is as good a place to say so.
    c.data.path = ""  # "tickets.csv"
    c.data.text_column = ""  # "text"; or image_column, or feature_columns
    c.data.label_column = ""  # "labels", cells such as "late,broken"; or label_columns
    c.data.label_file = ""  # "labels.tsv", lines such as late<TAB>delivery delay
    c.data.stratified = True
    # Nobody knows how noisy the labels are: the rates are estimated.
    c.noise.known = False
    # sequence for texts, set for sparse features, dense for numbers.
    c.model.encoder.name = "auto"
    c.model.encoder.layers = 1
    c.model.encoder.embedding_std = 0.1
    c.model.num_blocks = 1
    c.model.num_heads = 2
    c.model.width = 128
    c.model.ffn_width = 256
    c.optim.learning_rate = 1e-3
    c.train.num_epochs = 10
    if preset == "images":
        c.model.intermediate_weight = 0.0
        c.model.encoder.name = "efficientnet_lite0"
        c.model.encoder.weights = "package"
        c.model.encoder.cache_features = True
        c.model.encoder.frozen_stages = 9
    elif preset:
        raise config_lib.ConfigError(f"configs/own.py has no preset {preset!r}")
    return c
