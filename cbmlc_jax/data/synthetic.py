"""The embedded data set: documents about 40 labels in a semantic tree; needs no files.

A document draws one or two topics, one to four labels that are mostly of its topics,
and words: of its labels, of its topics, and of a background that tells nothing.  The
word vectors of the labels follow the same tree, so that a model can gain from them.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

from cbmlc_jax import rngs
from cbmlc_jax.data.dataset import DataError, Dataset, Ragged, Split

# Topic -> labels, the most frequent ones first.
TREE = {
    "computing": ("software", "database", "network", "encryption", "robotics"),
    "finance": ("bank", "stock", "tax", "insurance", "loan"),
    "food": ("bread", "wine", "cheese", "chocolate", "soup"),
    "medicine": ("cancer", "vaccine", "surgery", "diabetes", "virus"),
    "music": ("guitar", "piano", "concert", "jazz", "opera"),
    "nature": ("forest", "ocean", "bird", "volcano", "glacier"),
    "sport": ("football", "tennis", "cycling", "swimming", "hockey"),
    "travel": ("hotel", "beach", "museum", "airport", "passport"),
}
TRAIN_FRACTION = 0.7
WORDS = 26  # drawn for a document, in expectation
LABEL_SHARE, TOPIC_SHARE = 0.25, 0.3  # of these; the rest is background
WORDS_OF = {"label": 6, "topic": 10, "background": 80}  # sizes of their vocabularies
OTHER_TOPIC = 0.02  # weight of a label whose topic the document does not have
VECTOR_WIDTH = 32


def load(seed: int = 0, num_examples: int = 2000) -> Dataset:
    """Draws the data set; the first 70 % of the documents are for training.

    Args:
        seed: of everything.
        num_examples: documents; the words and the vectors do not depend on it.

    Returns:
        L = 40 labels and F = 400 features, both in alphabetical order (the tree cannot
        be read off their order); `word_vectors` float32 [32] of every label.

    Raises:
        DataError: fewer than 2 documents.
    """
    if num_examples < 2:
        raise DataError(f"{num_examples} documents cannot be split; ask for 2 or more")
    names = sorted(label for labels in TREE.values() for label in labels)
    tree = np.array([[name in labels for name in names] for labels in TREE.values()])
    topics, labels = _documents(
        rngs.generator(seed, "synthetic/labels"), names, tree, num_examples
    )
    vocabulary, of_label, of_topic, background = _vocabulary(
        rngs.generator(seed, "synthetic/words"), names
    )
    rates = (
        LABEL_SHARE * _rows_to_one(labels) @ of_label
        + TOPIC_SHARE * _rows_to_one(topics) @ of_topic
        + (1 - LABEL_SHARE - TOPIC_SHARE) * background
    )
    # A word is present if it is drawn at least once, Poisson(WORDS * rate) times.
    generator = rngs.generator(seed, "synthetic/documents")
    present = generator.random(rates.shape) < -np.expm1(-WORDS * rates)
    inputs = Ragged(
        np.nonzero(present)[1].astype(np.int32),
        np.concatenate([[0], np.cumsum(present.sum(1))]).astype(np.int64),
    )
    whole = Split(inputs, labels.astype(np.uint8))
    boundary = max(1, int(TRAIN_FRACTION * num_examples))
    return Dataset(
        name="synthetic",
        train=whole.take(np.arange(boundary)),
        test=whole.take(np.arange(boundary, num_examples)),
        label_names=tuple(names),
        feature_names=tuple(vocabulary),
        label_texts=tuple(names),
        word_vectors=_vectors(rngs.generator(seed, "synthetic/vectors"), names, tree),
    )


def _documents(
    generator: np.random.Generator,
    names: list[str],
    tree: Bool[np.ndarray, "topics labels"],
    rows: int,
) -> tuple[Bool[np.ndarray, "rows topics"], Bool[np.ndarray, "rows labels"]]:
    """Topics and labels of each document, drawn without replacement by weight."""
    topic_weights = 1 / np.sqrt(np.arange(1, len(TREE) + 1))
    count = 1 + (generator.random(rows) < 0.3)
    topics = _draw(generator, np.tile(topic_weights, (rows, 1)), count)
    rank = {label: i for labels in TREE.values() for i, label in enumerate(labels)}
    label_weights = 1 / (1 + np.array([rank[name] for name in names]))
    weights = label_weights * np.where(topics @ tree, 1, OTHER_TOPIC)
    count = generator.choice([1, 2, 3, 4], rows, p=[0.3, 0.35, 0.25, 0.1])
    return topics, _draw(generator, weights, count)


def _draw(
    generator: np.random.Generator,
    weights: Float[np.ndarray, "rows items"],
    count: np.ndarray,
) -> Bool[np.ndarray, "rows items"]:
    """`count` items of each row without replacement (Gumbel top-k)."""
    keys = np.log(weights) + generator.gumbel(size=weights.shape)
    place = np.argsort(np.argsort(-keys, axis=1), axis=1)
    return place < count[:, None]


def _vocabulary(generator: np.random.Generator, names: list[str]):
    """Words; their rates in labels [L, F], in topics [T, F], in the background [F]."""
    owners = (
        [(name, WORDS_OF["label"]) for name in names]
        + [(topic, WORDS_OF["topic"]) for topic in TREE]
        + [("common", WORDS_OF["background"])]
    )
    words = [(owner, f"{owner}_{i:02d}") for owner, size in owners for i in range(size)]
    words.sort(key=lambda pair: pair[1])
    owns = np.array([[word[0] == owner for word in words] for owner, _ in owners])
    # Some words of an owner are frequent and some rare.
    rates = _rows_to_one(owns * generator.gamma(1.0, size=owns.shape))
    labels, topics = rates[: len(names)], rates[len(names) : -1]
    return [word for _, word in words], labels, topics, rates[-1]


def _vectors(
    generator: np.random.Generator,
    names: list[str],
    tree: Bool[np.ndarray, "topics labels"],
) -> dict[str, np.ndarray]:
    """A label's vector is its topic's direction plus a shorter one of its own."""
    topics = 0.4 * generator.standard_normal((len(tree), VECTOR_WIDTH))
    own = 0.25 * generator.standard_normal((len(names), VECTOR_WIDTH))
    vectors = (tree.T @ topics + own).astype(np.float32)
    return dict(zip(names, vectors, strict=True))


def _rows_to_one(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum(1, keepdims=True)
