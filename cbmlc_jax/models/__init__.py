"""Neural models as linen modules; arrays of the data arrive as arguments."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from cbmlc_jax.models.cbmlc import CbMLC, Outputs
from cbmlc_jax.models.decoder import LabelGraphDecoder
from cbmlc_jax.models.encoders import SetEncoder

__all__ = ["MODELS", "ENCODERS", "Meta", "Outputs", "create_model"]


@dataclasses.dataclass(frozen=True)
class Meta:
    """What a model has to know of the data.

    Attributes:
        num_features: F, size of the input vocabulary.
        label_vectors: float32 [L, P] word vectors of the labels.
    """

    num_features: int
    label_vectors: np.ndarray


def _set_encoder(settings, meta: Meta) -> nn.Module:
    return SetEncoder(
        num_tokens=meta.num_features,
        width=settings.width,
        num_blocks=settings.encoder.layers,
        num_heads=settings.num_heads,
        ffn_width=settings.ffn_width,
        dropout=settings.dropout,
        self_attention=settings.encoder.self_attention,
        embedding_std=settings.encoder.embedding_std,
    )


ENCODERS = {"set": _set_encoder}


def _cbmlc(settings, meta: Meta) -> nn.Module:
    vectors = meta.label_vectors
    return CbMLC(
        encoder=ENCODERS[settings.encoder.name](settings, meta),
        decoder=LabelGraphDecoder(
            num_labels=vectors.shape[0],
            embedding_width=vectors.shape[1],
            width=settings.width,
            num_blocks=settings.num_blocks,
            num_heads=settings.num_heads,
            ffn_width=settings.ffn_width,
            dropout=settings.dropout,
            embedding_init=lambda key, shape: jnp.asarray(vectors).reshape(shape),
        ),
        tied=settings.readout_tying,
        intermediate=settings.intermediate_weight > 0,
    )


MODELS = {"cbmlc": _cbmlc}


def create_model(settings, meta: Meta) -> nn.Module:
    """The linen module that `settings` (config.model) describes."""
    return MODELS[settings.name](settings, meta)
