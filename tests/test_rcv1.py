"""RCV1: files of the official format, made here, and the real subsets."""

from __future__ import annotations

import gzip
import pathlib
import re
import types

import numpy as np
import pytest
import scipy.sparse

from cbmlc_jax.data import rcv1
from cbmlc_jax.data.dataset import DataError

# Document -> topics, stems, vector; the parts hold one or two documents each.
DOCUMENTS = {
    2286: ("C11 CCAT", ["recov", "excit", "recov", "pet"], "1:.5 7:.1 47236:.25"),
    2287: ("GCAT", ["pet"], "3:1e-1"),
    30001: ("E11 ECAT", ["zinc", "recov"], "3:.4 9:.5"),
    30002: ("ECAT", [], ""),
    30003: ("M11 MCAT", ["excit"] * 400, "47236:1"),
    30004: ("C11 CCAT", ["pet", "zinc"], "2:.3"),
    30005: ("GCAT", ["recov"], "1:.2"),
}
PARTS = {
    "train": [2286, 2287],
    "test_pt0": [30002, 30001],
    "test_pt1": [30003],
    "test_pt2": [30004],
    "test_pt3": [30005],
}


def vectors(documents) -> str:
    return "".join(f"{d}  {DOCUMENTS[d][2]}\n" for d in documents)


def tokens(documents) -> str:
    return "".join(
        f".I {d}\n.W\n{' '.join(DOCUMENTS[d][1][:3])}\n{' '.join(DOCUMENTS[d][1][3:])}"
        "\n\n"
        for d in documents
    )


@pytest.fixture
def folder(tmp_path, monkeypatch) -> pathlib.Path:
    monkeypatch.setattr(rcv1, "ROWS", {"train": 2, "test": 5})
    base = tmp_path / "rcv1"
    base.mkdir()
    for part, documents in PARTS.items():
        text = vectors(documents).encode()
        # One part gzipped, the others plain.
        if part == "test_pt1":
            (base / f"lyrl2004_vectors_{part}.dat.gz").write_bytes(gzip.compress(text))
        else:
            (base / f"lyrl2004_vectors_{part}.dat").write_bytes(text)
        (base / f"lyrl2004_tokens_{part}.dat").write_text(tokens(documents))
    lines = [f"{t} {d} 1\n" for d, v in DOCUMENTS.items() for t in v[0].split()]
    # Topics of a document that is in no part are of no interest.
    (base / "rcv1-v2.topics.qrels").write_text("".join(["GCAT 1 1\n", *lines]))
    return tmp_path


def topics(split, row: int, names) -> set[str]:
    return {names[i] for i in np.flatnonzero(split.labels[row])}


def test_weights(folder):
    dataset = rcv1.load(str(folder))
    assert dataset.name == "rcv1" and dataset.kind == "weighted"
    assert len(dataset.label_names) == 103 == len(dataset.label_texts)
    assert list(dataset.label_names) == sorted(dataset.label_names)
    assert dict(zip(dataset.label_names, dataset.label_texts, strict=True))["C11"] == (
        "strategy plans"
    )
    assert (len(dataset.train), len(dataset.test)) == (2, 5)
    matrix = dataset.train.inputs.matrix(rcv1.NUM_FEATURES).toarray()
    assert matrix[0, [0, 6, 47235]] == pytest.approx([0.5, 0.1, 0.25])
    assert matrix[1, 2] == pytest.approx(0.1) and np.count_nonzero(matrix) == 4
    assert dataset.train.inputs.weights.dtype == np.float32
    # A part's order is kept, and its topics find their rows.
    expected = [30002, 30001, 30003, 30004, 30005]
    for row, document in enumerate(expected):
        found = topics(dataset.test, row, dataset.label_names)
        assert found == set(DOCUMENTS[document][0].split())
    assert dataset.test.inputs.lengths.tolist() == [0, 2, 1, 1, 1]
    swapped = rcv1.load(str(folder), "swapped")
    assert swapped.name == "rcv1-swapped"
    assert (len(swapped.train), len(swapped.test)) == (5, 2)
    np.testing.assert_array_equal(swapped.test.labels, dataset.train.labels)


def test_lists_of_stems(folder):
    dataset = rcv1.load(str(folder), tokens=True)
    # Two training stories have "pet"; the others are rare or of the test alone.
    assert dataset.feature_names == ("<unk>", "pet") and dataset.kind == "sequence"
    first = dataset.train.inputs.take(np.array([0]))
    assert first.values.tolist() == [0, 0, 0, 1]
    assert dataset.test.inputs.lengths.tolist() == [0, 2, 300, 2, 1]
    swapped = rcv1.load(str(folder), "swapped", tokens=True)
    assert set(swapped.feature_names) == {"<unk>", "recov", "zinc"}
    np.testing.assert_array_equal(swapped.test.labels, dataset.train.labels)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("vectors_train", ("7:", "seven:"), "line 1: expected numbers"),
        ("vectors_train", ("3:1e-1", "3:nan"), "line 2: expected numbers"),
        ("vectors_train", ("3:1e-1", "qid:3 3:1"), "line 2: expected numbers"),
        ("vectors_train", ("7:.1", "# 7:.1"), "line 1: expected numbers"),
        ("vectors_train", ("3:1e-1", "3:1e99"), "line 2: a weight is not finite"),
        ("vectors_train", ("3:1e-1", "3:-.1"), "line 2: a weight is negative"),
        ("vectors_train", ("3:1e-1", "47237:.1"), "line 2: an id is above 47236"),
        ("vectors_train", ("3:1e-1", "0:.1"), "line 2: Invalid index 0"),
        ("vectors_train", ("3:1e-1", "3:.1 2:.1"), "line 2: .* sorted"),
        ("vectors_train", ("3:1e-1", "3:.1:3"), "line 2: could not convert"),
        ("vectors_train", ("3:1e-1", "3"), "line 2: "),
        ("vectors_train", ("2286 ", "\n2286 "), "line 3: a weight is not finite"),
        ("vectors_train", ("2287", "1e300"), "line 2: its first number is not a"),
        ("vectors_train", ("2287", "2.5"), "line 2: its first number is not a"),
        ("vectors_train", ("2287", "-2287"), "line 2: its first number is not a"),
        ("vectors_train", (None, "2286 1:.5\n"), "hold 1 documents, not .* 2:"),
        ("vectors_test_pt3", (None, ""), "pt3.dat has no documents"),
        ("vectors_test_pt0", (None, "30002  \n"), "pt0.* hold 4 .* not .* 5:"),
        ("vectors_test_pt3", ("30005", "2286"), "document 2286 is there twice"),
        ("vectors_test_pt3", ("30005", "9"), "has no topic of document 9 "),
        ("topics", ("M11 ", "M12345 "), "line 8: expected a topic"),
        ("topics", ("C11 2286 1", "C11 2286 0"), "line 2: expected a topic"),
        ("topics", ("C11 2286", "C11 " + "9" * 5000), "line 2: expected a topic"),
        ("topics", (None, "GCAT 1\n"), "line 1: expected a topic"),
        ("topics", (None, "x" * (1 << 20)), "line 1: longer than"),
    ],
)
def test_bad_vectors(folder, file, change, message):
    old, new = change
    name = "rcv1-v2.topics.qrels" if file == "topics" else f"lyrl2004_{file}.dat"
    path = folder / "rcv1" / name
    text = path.read_text()
    assert old is None or old in text
    text = new if old is None else text.replace(old, new)
    if "line 3" in message:  # an empty line is no row, but counts as a line
        text = text.replace("3:1e-1", "3:1e99")
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        rcv1.load(str(folder))
    sentence = str(caught.value)
    assert "\n" not in sentence and str(folder) in sentence
    assert sentence.endswith(f"again from {rcv1.SITE}") or "longer" in sentence


def test_vectors_whose_blanks_are_lost_are_refused_at_once(folder):
    path = folder / "rcv1" / "lyrl2004_vectors_train.dat"
    path.write_text(path.read_text() + "5 1:11111" + ":11111" * 10_000 + "\n")
    with pytest.raises(DataError, match="line 3: could not convert"):
        rcv1.load(str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.replace(".W\n", "", 1), "line 2: expected documents of"),
        (lambda s: s.replace(".I 2286", ".I x"), "line 1: expected"),
        (lambda s: s.replace(".I 2286", ".I " + "9" * 25), "line 1: expected"),
        (lambda s: s.replace(".I 2286", ".I " + "9" * 5000), "line 1: expected"),
        (lambda s: s.split(".W")[0], "ends inside a document"),
        (lambda s: s[: s.index(".I 2287")], "hold 1 documents, not the published 2:"),
        (lambda s: "", "hold 0 documents, not the published 2:"),
        (lambda s: "words\n" + s, "line 1: expected"),
    ],
)
def test_bad_tokens(folder, change, message):
    path = folder / "rcv1" / "lyrl2004_tokens_train.dat"
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match=f"tokens_train.dat,? {message}") as caught:
        rcv1.load(str(folder), tokens=True)
    assert len(str(caught.value)) < 500


def test_truncated_gzip_and_missing_files(folder):
    path = folder / "rcv1" / "lyrl2004_vectors_test_pt1.dat.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[:-6])
    with pytest.raises(DataError, match="pt1.dat.gz is damaged or not complete"):
        rcv1.load(str(folder))
    path.unlink()
    with pytest.raises(DataError, match=r"there is no .*pt1.dat \(nor .gz\): fetch it"):
        rcv1.load(str(folder))
    for arguments, message in (
        ((None, "subsets"), "not downloaded"),
        ((str(folder), "subsets"), r"there is no .*npz \(10 parts are missing\)"),
        ((str(folder), "half"), "'half' is none of rcv1's: standard, swapped, subsets"),
    ):
        with pytest.raises(DataError, match=message):
            rcv1.load(*arguments)
    with pytest.raises(DataError, match="words of RCV1 are not downloaded"):
        rcv1.load(None, tokens=True)


def test_without_a_folder_scikit_learn_fetches(monkeypatch):
    import sklearn.datasets

    monkeypatch.setattr(rcv1, "ROWS", {"train": 40, "test": 3})
    rng = np.random.default_rng(0)
    size = 40 + 3
    matrix = scipy.sparse.random_array(
        (size, rcv1.NUM_FEATURES), density=1e-4, rng=rng, dtype=np.float64, format="csr"
    )
    target = np.zeros((size, 103), np.uint8)
    target[np.arange(size), np.arange(size) % 103] = 1
    bunch = types.SimpleNamespace(
        data=matrix,
        target=scipy.sparse.csr_array(target),
        target_names=np.array(list(rcv1.TOPICS), object),
    )
    monkeypatch.setattr(sklearn.datasets, "fetch_rcv1", lambda **_: bunch)
    dataset = rcv1.load(None, "swapped")
    assert (len(dataset.train), len(dataset.test)) == (3, 40)
    np.testing.assert_array_equal(dataset.train.labels, target[-3:])
    whole = dataset.test.inputs.matrix(rcv1.NUM_FEATURES)
    assert matrix.nnz and abs(whole - matrix[:40].astype(np.float32)).sum() == 0
    bunch.data = matrix[:-1]
    with pytest.raises(DataError, match="other topics, documents or features"):
        rcv1.load(None)

    def fail(**_):
        raise OSError("no route to host")

    monkeypatch.setattr(sklearn.datasets, "fetch_rcv1", fail)
    with pytest.raises(DataError, match="could not fetch RCV1 .*no route.*config.data"):
        rcv1.load(None)


# The real subsets.


@pytest.fixture(scope="module")
def subsets(data_dir):
    return rcv1.load(str(data_dir), "subsets")


def test_real_subsets(subsets, data_dir):
    assert len(subsets.train) + len(subsets.test) == 27_613
    assert abs(len(subsets.train) - len(subsets.test)) <= 1
    assert len(subsets.label_names) == 101
    labels = np.concatenate([subsets.train.labels, subsets.test.labels])
    assert labels.sum(1).mean() == pytest.approx(2.91257, abs=1e-4)
    assert subsets.train.labels.any(0).all()
    norms = subsets.train.inputs.matrix(rcv1.NUM_FEATURES).power(2).sum(1)
    np.testing.assert_allclose(norms, 1, atol=1e-3)
    # No story has a topic without the topic above it.
    column = {code: i for i, code in enumerate(subsets.label_names)}
    pairs = 0
    for line in (data_dir / "rcv1" / "rcv1.taxonomy").read_text().splitlines():
        parent, *children = line.split()
        for child in children:
            if parent in column and child in column:
                assert not (labels[:, column[child]] > labels[:, column[parent]]).any()
                pairs += 1
    assert pairs > 80
    other = rcv1.load(str(data_dir), "subsets", split_seed=1)
    assert other.fingerprint != subsets.fingerprint
    texts = (data_dir / "rcv1" / "topics.tsv").read_text().splitlines()[1:]
    for line in texts:
        code, _, text = line.split("\t")[:3]
        assert rcv1.TOPICS[code] == re.sub("[^a-z0-9]+", " ", text.lower()).strip()


def test_real_subsets_fingerprint(subsets):
    assert subsets.fingerprint.startswith("1cf4455e")


def test_a_changed_part_is_refused(data_dir, tmp_path):
    target = tmp_path / "rcv1"
    target.mkdir()
    for name in rcv1.SUBSETS:
        (target / name).symlink_to(data_dir / "rcv1" / name)
    first = next(iter(rcv1.SUBSETS))
    with np.load(target / first) as z:
        content = dict(z)
    (target / first).unlink()
    content["Y"] = content["Y"] ^ 1
    np.savez_compressed(target / first, **content)
    with pytest.raises(DataError, match="is not the published file"):
        rcv1.load(str(tmp_path), "subsets")
    content["Y"] = np.zeros(rcv1.LARGEST_SUBSET + 1, np.uint8)
    np.savez_compressed(target / first, **content)
    with pytest.raises(DataError, match="is damaged .*bytes, decompressed"):
        rcv1.load(str(tmp_path), "subsets")
    whole = (data_dir / "rcv1" / first).read_bytes()
    method = whole.index(b"PK\x01\x02") + 10  # of compression, in the directory
    for damaged in (
        b"PK\x03\x04 cut",
        whole[:-100],
        whole[:method] + b"\x63" + whole[method + 1 :],
    ):
        (target / first).write_bytes(damaged)
        with pytest.raises(DataError, match="0000-2999.npz is damaged .*fetch it ag"):
            rcv1.load(str(tmp_path), "subsets")
