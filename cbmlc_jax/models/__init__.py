"""Neural models as linen modules; arrays of the data arrive as arguments."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from cbmlc_jax.models.baselines.ml_gcn import MLGCN
from cbmlc_jax.models.baselines.mpvae import MPVAE
from cbmlc_jax.models.baselines.pooled_linear import PooledLinear
from cbmlc_jax.models.baselines.seq2seq import Seq2Seq
from cbmlc_jax.models.cbmlc import CbMLC
from cbmlc_jax.models.decoder import LabelGraphDecoder
from cbmlc_jax.models.efficientnet import EfficientNetLite
from cbmlc_jax.models.encoders import DenseEncoder, ImageEncoder, TokenEncoder
from cbmlc_jax.models.outputs import Outputs
from cbmlc_jax.models.resnet import ResNet
from cbmlc_jax.models.stack import Stack

__all__ = [
    "BACKBONES",
    "CONSTANT",
    "ENCODERS",
    "INPUTS",
    "LABEL_NODES",
    "MODELS",
    "READS_LABEL_VECTORS",
    "OWN_OBJECTIVE",
    "Meta",
    "Outputs",
    "create_backbone",
    "create_model",
]

# config.train.matmul_precision -> `dtype` of `ops`.
PRECISIONS = {"float32": None, "bfloat16": jnp.bfloat16}
# The arrays of a batch that a model reads.
INPUTS = ("tokens", "weights", "features", "images", "scores")


@dataclasses.dataclass(frozen=True)
class Meta:
    """What a model has to know of the data.

    Attributes:
        num_features: F, size of the input vocabulary.
        label_vectors: float32 [L, P] word vectors of the labels.
        label_counts: int64 [L] positives of each label in the noisy training rows.
        max_labels: the most labels that a training row has.
        inputs: array of a batch -> (shape of one row, dtype), e.g. {"features":
            ((72,), "float32")}; token rows may have any length.
        feature_mean, feature_scale: float32 [F] mean and deviation of real-valued
            training features; None for other inputs.
    """

    num_features: int
    label_vectors: np.ndarray
    label_counts: np.ndarray
    max_labels: int
    inputs: dict[str, tuple[tuple[int, ...], str]] = dataclasses.field(
        default_factory=lambda: {"tokens": ((8,), "int32")}
    )
    feature_mean: np.ndarray | None = None
    feature_scale: np.ndarray | None = None


def _token_encoder(config, meta: Meta) -> nn.Module:
    settings = config.model
    return TokenEncoder(
        num_tokens=meta.num_features,
        width=settings.width,
        num_blocks=settings.encoder.layers,
        num_heads=settings.num_heads,
        ffn_width=settings.ffn_width,
        dropout=settings.dropout,
        self_attention=settings.encoder.self_attention,
        embedding_std=settings.encoder.embedding_std,
        positions=settings.encoder.name == "sequence",
        dtype=PRECISIONS[config.train.matmul_precision],
    )


def _dense_encoder(config, meta: Meta) -> nn.Module:
    settings = config.model
    return DenseEncoder(
        width=settings.width,
        num_layers=settings.encoder.layers,
        dropout=settings.dropout,
        mean=meta.feature_mean,
        scale=meta.feature_scale,
    )


# Name -> (its builder, what tells it from the others of its kind).
BACKBONES = {
    "resnet18": (ResNet, 18),
    "resnet34": (ResNet, 34),
    "resnet50": (ResNet, 50),
    "resnet101": (ResNet, 101),
    "efficientnet_lite0": (EfficientNetLite, 0),
    "efficientnet_lite1": (EfficientNetLite, 1),
    "efficientnet_lite2": (EfficientNetLite, 2),
}


def create_backbone(settings, start: int = 0) -> nn.Module:
    """The image network of config.model.encoder, from stage `start` on."""
    kind, size = BACKBONES[settings.name]
    whole = kind(size)
    cut = min(settings.frozen_stages, whole.num_stages)
    return kind(size, start=min(start, whole.num_stages), frozen=cut)


def _image_encoder(config, meta: Meta) -> nn.Module:
    settings = config.model.encoder
    start = settings.frozen_stages if "features" in meta.inputs else 0
    # These two classify what the network pools, without a map in between.
    plain = config.model.name in ("ml_gcn", "resnet_bce", "resnet_asl")
    return ImageEncoder(
        backbone=create_backbone(settings, start),
        width=None if plain else config.model.width,
    )


ENCODERS = {
    "set": _token_encoder,
    "sequence": _token_encoder,
    "dense": _dense_encoder,
    **{name: _image_encoder for name in BACKBONES},
}


def _encoder(config, meta: Meta) -> nn.Module:
    return ENCODERS[config.model.encoder.name](config, meta)


def _decoder(config, meta: Meta) -> LabelGraphDecoder:
    settings, vectors = config.model, meta.label_vectors
    return LabelGraphDecoder(
        num_labels=vectors.shape[0],
        embedding_width=vectors.shape[1],
        width=settings.width,
        num_blocks=settings.num_blocks,
        num_heads=settings.num_heads,
        ffn_width=settings.ffn_width,
        dropout=settings.dropout,
        embedding_init=lambda key, shape: jnp.asarray(vectors).reshape(shape),
        dtype=PRECISIONS[config.train.matmul_precision],
    )


def _cbmlc(config, meta: Meta) -> nn.Module:
    settings = config.model
    return CbMLC(
        encoder=_encoder(config, meta),
        decoder=_decoder(config, meta),
        tied=settings.readout_tying,
        token_dropout=settings.token_dropout,
        linear=meta.num_features if settings.linear_path else None,
        intermediate=settings.intermediate_weight > 0,
    )


def _stack(config, meta: Meta) -> nn.Module:
    return Stack(_decoder(config, meta))


def _ml_gcn(config, meta: Meta) -> nn.Module:
    settings = config.ml_gcn
    return MLGCN(
        encoder=_encoder(config, meta),
        label_vectors=meta.label_vectors,
        hidden=settings.hidden,
        width=settings.width,
    )


def _pooled_linear(config, meta: Meta) -> nn.Module:
    return PooledLinear(_encoder(config, meta), len(meta.label_vectors))


def _mpvae(config, meta: Meta) -> nn.Module:
    settings = config.mpvae
    return MPVAE(
        num_features=meta.num_features,
        num_labels=len(meta.label_vectors),
        latent_width=settings.latent_width,
        num_samples=settings.samples,
        dropout=settings.dropout,
    )


def _seq2seq(config, meta: Meta) -> nn.Module:
    # Ties keep the order of the label names.
    order = np.argsort(-meta.label_counts, kind="stable")
    return Seq2Seq(
        num_tokens=meta.num_features,
        label_order=tuple(int(label) for label in order),
        max_labels=meta.max_labels,
        **config.seq2seq,
    )


# LaMP is CbMLC's modules with the settings of config.PUBLISHED: no word vectors, BCE,
# the graph of co-occurrences.
MODELS = {
    "cbmlc": _cbmlc,
    "lamp": _cbmlc,
    "ml_gcn": _ml_gcn,
    "mpvae": _mpvae,
    "resnet_asl": _pooled_linear,
    "resnet_bce": _pooled_linear,
    "seq2seq": _seq2seq,
    "stack": _stack,
}
# Models with `Outputs.loss`; config.loss.name is not theirs.
OWN_OBJECTIVE = ("mpvae", "seq2seq")
# Models that start at word vectors of the labels; the others need none.
READS_LABEL_VECTORS = ("cbmlc", "lamp", "ml_gcn", "stack")
# Models that compute a vector for every label of every row.
LABEL_NODES = ("cbmlc", "lamp", "stack")
# Parameters that are not trained, by their last name.
CONSTANT = ("label_vectors", "feature_mean", "feature_scale")


def create_model(config, meta: Meta) -> nn.Module:
    """The linen module that config.model names."""
    return MODELS[config.model.name](config, meta)
