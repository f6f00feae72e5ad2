"""From a config to everything that a run needs: data, noise, vectors, batches.

The one place where labels are corrupted and split; train, eval and predict all start
here or from what was written down here.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from cbmlc_jax import config as config_lib
from cbmlc_jax import embeddings, noise, rngs
from cbmlc_jax.data import pipeline
from cbmlc_jax.models import Meta
from cbmlc_jax.thresholds import Rates


@dataclasses.dataclass(frozen=True)
class Task:
    """A data set with its noise drawn and its validation rows set aside.

    Attributes:
        dataset: as read, clean.
        train: training rows with their noisy labels.
        validation: validation rows with the labels that training may see.
        validation_clean: [N_val, L] their clean labels, for the clean_val protocol.
        test: official test rows, never noisy.
        rates: of the noise on the training rows.
        realised: what the noise did, on "train" and "validation".
        prior: float64 [L] mean noisy label of the training rows.
        meta: what the model has to know.
        embeddings: source, width and coverage, for the result row.
        graph: bool [L, L] or None.
        widths: bucket widths of the batches.
    """

    dataset: pipeline.Dataset
    train: pipeline.Split
    validation: pipeline.Split
    validation_clean: np.ndarray
    test: pipeline.Split
    rates: Rates
    realised: dict[str, noise.Realised]
    prior: np.ndarray
    meta: Meta
    embeddings: dict[str, object]
    graph: np.ndarray | None
    widths: list[int]


def build(config) -> Task:
    """Reads the data, draws noise and split, looks up the word vectors.

    Raises:
        DataError, EmbeddingError: see there.
    """
    folder = config_lib.data_dir(config)
    dataset = pipeline.load(config.data.name, folder)
    clean = dataset.train.labels
    # Coins belong to the official row, so that the split does not change them.
    noisy = noise.inject(
        rngs.stream(config.noise.seed, "noise"),
        clean,
        config.noise.kind,
        rate=config_lib.noise_rate(config),
        rates=config.noise.rates,
        keep_one=config.noise.keep_one,
    )
    train_rows, validation_rows = pipeline.split_rows(
        noisy,
        fraction=config.data.validation_fraction,
        size=config.data.validation_size,
        seed=config.data.split_seed,
        stratified=config.data.stratified,
    )
    realised = {
        "train": noise.realised(clean[train_rows], noisy[train_rows]),
        "validation": noise.realised(clean[validation_rows], noisy[validation_rows]),
    }
    train = pipeline.Split(dataset.train.inputs.take(train_rows), noisy[train_rows])
    seen = clean if config.noise.validation == "clean" else noisy
    vocabulary = embeddings.load(
        config.embeddings.source,
        words=dataset.label_texts,
        path=config.embeddings.path,
        name=config.embeddings.name,
        data_dir=folder,
        width=config.model.width,
        own=dataset.word_vectors,
    )
    vectors, coverage = embeddings.label_vectors(dataset.label_texts, vocabulary)
    return Task(
        dataset=dataset,
        train=train,
        validation=pipeline.Split(
            dataset.train.inputs.take(validation_rows), seen[validation_rows]
        ),
        validation_clean=clean[validation_rows],
        test=dataset.test,
        rates=Rates(realised["train"].p01, realised["train"].p10, "known"),
        realised=realised,
        prior=train.labels.mean(0),
        meta=Meta(len(dataset.feature_names), vectors),
        embeddings={
            "source": vocabulary.source,
            "dim": vocabulary.width,
            "coverage": coverage,
        },
        graph=pipeline.label_graph(
            config.model.label_graph,
            train.labels,
            dataset.label_names,
            config.model.label_graph_file,
        ),
        widths=pipeline.bucket_widths(train.inputs.lengths, config.data.length_buckets),
    )
