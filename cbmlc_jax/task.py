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
from cbmlc_jax.models import READS_LABEL_VECTORS, Meta
from cbmlc_jax.models.baselines.ml_gcn import correlation_adjacency
from cbmlc_jax.thresholds import Rates


@dataclasses.dataclass(frozen=True)
class Task:
    """A data set with its noise drawn and its validation rows set aside.

    Attributes:
        dataset: as read, clean.
        noisy: uint8 [N, L] noisy labels of all official training rows.
        train: training rows with their noisy labels.
        validation: validation rows with the labels that training may see; under
            cross-fitting all training rows, scored by models that did not see them.
        validation_clean: [N_val, L] their clean labels, for the clean_val protocol.
        test: official test rows, never noisy.
        rates: of the noise on the training rows.
        realised: what the noise did, on "train" and "validation".
        prior: float64 [L] mean noisy label of the training rows.
        meta: what the model has to know of the data.
        embeddings: source, width and coverage for the result row; None for models
            without word vectors.
        graph: [L, L] label graph or None.
        widths: bucket widths of the batches.
    """

    dataset: pipeline.Dataset
    noisy: np.ndarray
    train: pipeline.Split
    validation: pipeline.Split
    validation_clean: np.ndarray
    test: pipeline.Split
    rates: Rates
    realised: dict[str, noise.Realised]
    prior: np.ndarray
    meta: Meta
    embeddings: dict[str, object] | None
    graph: np.ndarray | None
    widths: list[int]


def build(config) -> Task:
    """Reads the data, draws noise and split, looks up the word vectors.

    Raises:
        DataError, EmbeddingError: see there.
    """
    folder = config_lib.data_dir(config)
    dataset = pipeline.load(config.data.name, folder)
    # Coins belong to the official row, so that the split does not change them.
    noisy = noise.inject(
        rngs.stream(config.noise.seed, "noise"),
        dataset.train.labels,
        config.noise.kind,
        rate=config_lib.noise_rate(config),
        rates=config.noise.rates,
        keep_one=config.noise.keep_one,
    )
    everything = np.arange(len(noisy))
    if config.train.crossfit:
        train_rows = validation_rows = everything
    else:
        train_rows, validation_rows = pipeline.split_rows(
            noisy,
            fraction=config.data.validation_fraction,
            size=config.data.validation_size,
            seed=config.data.split_seed,
            stratified=config.data.stratified,
        )
    vectors, found = _label_vectors(config, dataset, folder)
    return _on_rows(config, dataset, noisy, vectors, found, train_rows, validation_rows)


def fold(config, task: Task, held_out: np.ndarray) -> Task:
    """The task of one cross-fitting fold: `held_out` rows validate, the others train.

    Everything that is learnt from labels is learnt from the others; the noise rates
    stay those of all rows, which are one injector's.
    """
    others = np.setdiff1d(np.arange(len(task.noisy)), held_out)
    vectors = task.meta.label_vectors
    part = _on_rows(
        config, task.dataset, task.noisy, vectors, task.embeddings, others, held_out
    )
    return dataclasses.replace(part, rates=task.rates)


def _label_vectors(config, dataset, folder) -> tuple[np.ndarray, dict | None]:
    """Word vectors [L, P] and what was found; [L, 1] zeros for models without."""
    if config.model.name not in READS_LABEL_VECTORS:
        return np.zeros((len(dataset.label_names), 1), np.float32), None
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
    return vectors, {
        "source": vocabulary.source,
        "dim": vocabulary.width,
        "coverage": coverage,
    }


def _on_rows(
    config, dataset, noisy, vectors, found, train_rows, validation_rows
) -> Task:
    clean, inputs = dataset.train.labels, dataset.train.inputs
    seen = clean if config.noise.validation == "clean" else noisy
    realised = {
        "train": noise.realised(clean[train_rows], noisy[train_rows]),
        "validation": noise.realised(clean[validation_rows], noisy[validation_rows]),
    }
    train = pipeline.Split(inputs.take(train_rows), noisy[train_rows])
    return Task(
        dataset=dataset,
        noisy=noisy,
        train=train,
        validation=pipeline.Split(inputs.take(validation_rows), seen[validation_rows]),
        validation_clean=clean[validation_rows],
        test=dataset.test,
        rates=Rates(realised["train"].p01, realised["train"].p10, "known"),
        realised=realised,
        prior=train.labels.mean(0),
        meta=Meta(
            num_features=len(dataset.feature_names),
            label_vectors=vectors,
            label_counts=train.labels.sum(0, dtype=np.int64),
            max_labels=int(train.labels.sum(1).max()),
        ),
        embeddings=found,
        graph=_graph(config, train.labels, dataset.label_names),
        widths=pipeline.bucket_widths(train.inputs.lengths, config.data.length_buckets),
    )


def _graph(config, labels: np.ndarray, names: tuple[str, ...]) -> np.ndarray | None:
    """The label graph, learnt from the noisy training labels alone."""
    kind, file = config.model.label_graph, config.model.label_graph_file
    if kind == "correlation":
        settings = config.ml_gcn
        return correlation_adjacency(labels, settings.threshold, settings.weight)
    return pipeline.label_graph(kind, labels, names, file)
