"""From a config to everything that a run needs: data, noise, vectors, batches.

The one place where labels are corrupted and split; train, eval and predict all start
here or from what was written down here.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.sparse

from cbmlc_jax import backbones, embeddings, noise, repair, rngs
from cbmlc_jax import config as config_lib
from cbmlc_jax.data import pipeline
from cbmlc_jax.models import MODELS, READS_LABEL_VECTORS, Meta
from cbmlc_jax.models.baselines.ml_gcn import correlation_adjacency
from cbmlc_jax.thresholds import Rates

ALL_STAGES = 1 << 30


@dataclasses.dataclass(frozen=True)
class Task:
    """A data set with its noise drawn and its validation rows set aside.

    Attributes:
        dataset: as read, clean.
        inputs: of all official training rows, as the model reads them: those of the
            data set, or what a frozen image network makes of them.
        noisy: uint8 [N, L] noisy labels of all official training rows.
        repaired: what is trained on in their place, or None.
        train: training rows with their noisy labels, or repaired ones: then float32
            where these are soft.
        train_rows: int64, their numbers among the official training rows.
        validation: validation rows with the labels that training may see; under
            cross-fitting all training rows, scored by models that did not see them.
        validation_clean: [N_val, L] their clean labels, for the clean_val protocol.
        test: official test rows, never noisy; inputs as the model reads them.
        rates: of the noise on the training rows.
        realised: what the noise did, on "train" and "validation".
        prior: float64 [L] mean noisy label of the training rows.
        meta: what the model has to know of the data.
        embeddings: source, width and coverage for the result row; None for models
            without word vectors.
        graph: [L, L] label graph, bool or weights; or None.
        widths: bucket widths of the batches.
        added: float32 [N], the share of its negatives that noise turned on in each
            official training row, where that is estimated (config.noise.by_row).
    """

    dataset: pipeline.Dataset
    inputs: pipeline.Inputs
    noisy: np.ndarray
    repaired: repair.Repaired | None
    train: pipeline.Split
    train_rows: np.ndarray
    validation: pipeline.Split
    validation_clean: np.ndarray
    test: pipeline.Split
    rates: Rates
    realised: dict[str, noise.Realised]
    prior: np.ndarray
    meta: Meta
    embeddings: dict[str, object] | None
    graph: scipy.sparse.csr_array | None
    widths: list[int]
    added: np.ndarray | None = None


def build(config, dataset: pipeline.Dataset | None = None) -> Task:
    """Reads the data, draws noise and split, looks up the word vectors.

    Args:
        config: validated.
        dataset: stands for what the config names, where it is at hand.

    Raises:
        DataError, EmbeddingError, WeightsError: see there.
    """
    dataset = dataset or load(config)
    config = config_lib.settled(config, dataset.kind)
    inputs, test = model_inputs(config, dataset.train.inputs, dataset.test.inputs)
    test = dataclasses.replace(dataset.test, inputs=test)
    noisy = noisy_labels(config, dataset)
    train_rows, validation_rows = rows(config, dataset, noisy)
    vectors, found = _label_vectors(config, dataset)
    repaired = None
    if config.noise.repaired:
        repaired = repair.read(config.noise.repaired, noisy, config)
    whole = (dataset, inputs, test, noisy, repaired, vectors, found)
    return _on_rows(config, whole, train_rows, validation_rows)


def load(config) -> pipeline.Dataset:
    """The data set of the config, clean.

    Raises:
        DataError: see `pipeline.load`.
    """
    return pipeline.load(config.data, config_lib.data_dir(config))


def noisy_labels(config, dataset: pipeline.Dataset) -> np.ndarray:
    """uint8 [N, L]: labels of all official training rows, with the config's noise."""
    # Coins belong to the official row, so that the split does not change them.
    return noise.inject(
        rngs.stream(config.noise.seed, "noise"),
        dataset.train.labels,
        config.noise.kind,
        rate=config_lib.noise_rate(config),
        rates=config.noise.rates,
        keep_one=config.noise.keep_one,
    )


def rows(
    config, dataset: pipeline.Dataset, noisy: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rows for training and for validation; under cross-fitting all, twice.

    Raises:
        DataError: one of the sides would be empty.
    """
    everything = np.arange(len(noisy))
    if config.train.crossfit:
        return everything, everything
    if dataset.validation is not None:
        return np.setdiff1d(everything, dataset.validation), dataset.validation
    return pipeline.split_rows(
        noisy,
        fraction=config.data.validation_fraction,
        size=config.data.validation_size,
        seed=config.data.split_seed,
        stratified=config.data.stratified,
    )


def split_from(config, dataset: pipeline.Dataset) -> dict[str, str]:
    """Where test and validation rows come from, in words, for the result row."""
    data = config.data
    if config.train.crossfit:
        validation = f"cross-fitting, {config.train.crossfit} folds"
    elif dataset.validation is not None:
        validation = "given"
    else:
        how = "stratified" if data.stratified else "at random"
        share = f"fraction {data.validation_fraction:g}"
        if data.validation_size is not None:
            share = f"{data.validation_size} rows"
        validation = f"drawn ({how}, {share}, seed {data.split_seed})"
    return {"test": dataset.test_from, "validation": validation}


def model_inputs(
    config, *inputs: pipeline.Inputs, keep: bool = True
) -> tuple[pipeline.Inputs, ...]:
    """Inputs as the model of the config reads them.

    The frozen part of an image network is run here, once, where it is to be cached;
    an estimator gets all of the network.

    Args:
        config: validated.
        *inputs: as read.
        keep: keep what was computed in the cache.

    Raises:
        DataError, WeightsError: see `backbones.features`.
    """
    settings, stages = config.model.encoder, frozen_stages(config)
    if not inputs[0].decodes or not stages:
        return inputs
    return tuple(
        backbones.features(
            some,
            settings,
            side=config.data.side,
            stages=stages,
            seed=config.seed,
            batch_size=config.eval.batch_size,
            workers=config.data.workers,
            cache_dir=config_lib.cache_dir(config) if keep else None,
        )
        for some in inputs
    )


def frozen_stages(config) -> int:
    """How many stages of an image network make features for the model of the config,
    which reads these; 0 where it reads the images."""
    if config.model.name not in MODELS:
        return ALL_STAGES
    settings = config.model.encoder
    return settings.frozen_stages if settings.cache_features else 0


def fold(config, task: Task, held_out: np.ndarray) -> Task:
    """The task of one cross-fitting fold: `held_out` rows validate, the others train.

    Everything that is learnt from labels is learnt from the others; the noise rates,
    also of each row, stay those of all rows, which are one injector's.
    """
    others = np.setdiff1d(np.arange(len(task.noisy)), held_out)
    return _again(config, task, task.inputs, task.test, others, held_out)


def with_inputs(config, task: Task, inputs: pipeline.Inputs) -> Task:
    """A task of cross-fitting whose training rows are described otherwise.

    Args:
        config: validated.
        task: the same rows and labels; its test rows stay as they are, for nobody.
        inputs: of all official training rows.
    """
    everything = np.arange(len(task.noisy))
    return _again(config, task, inputs, task.test, everything, everything)


def _again(config, task, inputs, test, train_rows, validation_rows) -> Task:
    whole = (
        *(task.dataset, inputs, test, task.noisy, task.repaired),
        *(task.meta.label_vectors, task.embeddings),
    )
    part = _on_rows(config, whole, train_rows, validation_rows)
    return dataclasses.replace(part, rates=task.rates, added=task.added)


def vocabulary(config, dataset: pipeline.Dataset) -> embeddings.Vocabulary:
    """The word vectors of the config, of the words of the data set's labels.

    Raises:
        EmbeddingError: see `embeddings.load`.
    """
    return embeddings.load(
        config.embeddings.source,
        words=dataset.label_texts,
        path=config.embeddings.path,
        name=config.embeddings.name,
        data_dir=config_lib.data_dir(config),
        width=config.model.width,
        own=dataset.word_vectors,
    )


def _label_vectors(config, dataset) -> tuple[np.ndarray, dict | None]:
    """Word vectors [L, P] and what was found; [L, 1] zeros for models without."""
    names = {config.model.name, *config_lib.members(config)}
    if not names & set(READS_LABEL_VECTORS):
        return np.zeros((len(dataset.label_names), 1), np.float32), None
    known = vocabulary(config, dataset)
    vectors, coverage = embeddings.label_vectors(dataset.label_texts, known)
    if config.embeddings.permuted:
        draw = rngs.generator(config.seed, "permuted vectors")
        vectors = draw.permutation(vectors)
    return vectors, {
        "source": known.source,
        "dim": known.width,
        "coverage": coverage,
    }


def _on_rows(config, whole: tuple, train_rows, validation_rows) -> Task:
    dataset, inputs, test, noisy, repaired, vectors, found = whole
    clean = dataset.train.labels
    seen = clean if config.noise.validation == "clean" else noisy
    realised = {
        "train": noise.realised(clean[train_rows], noisy[train_rows]),
        "validation": noise.realised(clean[validation_rows], noisy[validation_rows]),
    }

    def split(labels: np.ndarray, rows: np.ndarray) -> pipeline.Split:
        whole = dataclasses.replace(dataset.train, inputs=inputs, labels=labels)
        return whole.take(rows)

    train = split(noisy, train_rows)
    if repaired is not None:
        train = _repaired(train, repaired.targets[train_rows], repaired.how)
    hard = train.labels >= 0.5
    return Task(
        dataset=dataset,
        inputs=inputs,
        noisy=noisy,
        repaired=repaired,
        train=train,
        train_rows=train_rows,
        validation=split(seen, validation_rows),
        validation_clean=clean[validation_rows],
        test=test,
        rates=_rates(config, realised["train"]),
        realised=realised,
        prior=noisy[train_rows].mean(0),
        meta=Meta(
            label_vectors=vectors,
            label_counts=hard.sum(0, dtype=np.int64),
            max_labels=int(hard.sum(1).max()),
            **_input_meta(train.inputs, dataset.feature_names),
        ),
        embeddings=found,
        graph=_graph(config, hard.astype(np.uint8), dataset.label_names),
        widths=pipeline.bucket_widths(train.inputs.lengths, config.data.length_buckets),
    )


def _repaired(train: pipeline.Split, targets: np.ndarray, how: str) -> pipeline.Split:
    """The rows with targets for labels; what was dropped is ignored."""
    dropped = np.isnan(targets)
    labels = np.where(dropped, 0, targets)
    if how != "soft":
        labels = labels.astype(np.uint8)
    if train.ignored is not None:
        labels = np.where(train.ignored, 0, labels).astype(labels.dtype)
        dropped |= train.ignored
    ignored = dropped if dropped.any() else None
    return dataclasses.replace(train, labels=labels, ignored=ignored)


def _rates(config, realised: noise.Realised) -> Rates:
    if config.noise.r0 is not None:
        return Rates(config.noise.r0, config.noise.r1, "given")
    return Rates(realised.p01, realised.p10, "known")


def _input_meta(inputs: pipeline.Inputs, feature_names: tuple[str, ...]) -> dict:
    """What Meta says of the inputs."""
    example = inputs.batch(np.array([-1]), 8)
    meta = {
        "num_features": len(feature_names),
        "inputs": {k: (v.shape[1:], str(v.dtype)) for k, v in example.items()},
    }
    if isinstance(inputs, pipeline.Dense) and inputs.values.ndim == 2:
        # In float32 a constant column could have a tiny deviation.
        mean = inputs.values.mean(0, dtype=np.float64)
        deviation = inputs.values.std(0, dtype=np.float64)
        varies = deviation > 1e-6 * np.abs(mean)
        meta["num_features"] = inputs.values.shape[1]
        meta["feature_mean"] = mean.astype(np.float32)
        meta["feature_scale"] = np.where(varies, deviation, 1).astype(np.float32)
    return meta


def _graph(
    config, labels: np.ndarray, names: tuple[str, ...]
) -> scipy.sparse.csr_array | None:
    """The label graph, learnt from the labels that are trained on alone."""
    kind, file = config.model.label_graph, config.model.label_graph_file
    if kind == "correlation":
        settings = config.ml_gcn
        return scipy.sparse.csr_array(
            correlation_adjacency(labels, settings.threshold, settings.weight)
        )
    return pipeline.label_graph(kind, labels, names, file)
