"""bibtex, delicious and emotions from a folder, a download and the prepared cache."""

from __future__ import annotations

import hashlib
import http.server
import os
import pathlib
import subprocess
import sys
import threading

import numpy as np
import pytest
from tensorflow_datasets.core.utils import gcs_utils

from cbmlc_jax.data import builders, mulan
from cbmlc_jax.data.dataset import DataError

HEADER = (
    "@relation small\n"
    + "".join(f"@attribute word{i} {{0,1}}\n" for i in range(5))
    + "@attribute TAG_b {0,1}\n@attribute TAG_a {0,1}\n@data\n"
)
SMALL = {
    "bibtex-train.arff": HEADER + "{0 1,3 1,6 1}\n{5 1,6 1}\n{1 1}\n" + "{4 1}\n" * 20,
    "bibtex-test.arff": HEADER + "{2 1,5 1}\n{}\n",
    "bibtex.xml": '<labels><label name="TAG_a"/><label name="TAG_b"/></labels>',
}


def checksum(text):
    return len(text), hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture
def small(monkeypatch):
    """Small files stand in for the published ones."""
    monkeypatch.setitem(
        mulan.FILES, "bibtex", {k: checksum(v) for k, v in SMALL.items()}
    )


@pytest.fixture
def folder(tmp_path, small):
    """A data folder with the small files."""
    target = tmp_path / "data" / "mulan" / "bibtex"
    target.mkdir(parents=True)
    for name, text in SMALL.items():
        (target / name).write_text(text)
    return tmp_path / "data"


class Server(http.server.ThreadingHTTPServer):
    """Serves the small files; `fault` breaks the answer for one of them."""

    fault = None
    victim = "bibtex-test.arff"

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests = []
        self.stalled = threading.Event()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        name = os.path.basename(self.path)
        fault = self.server.fault if name == self.server.victim else None
        if fault == "absent" or self.path != f"/bibtex/{name}":
            return self.send_error(404)
        body = SMALL[name].encode()
        if fault == "changed":
            body = body.replace(b"{2 1", b"{3 1")
        if fault == "longer":
            body += b"\n" * (1 << 20)
        self.send_response(200)
        if fault != "endless":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "cut off":
            body = body[: len(body) // 2]
        if fault == "stalled":
            self.wfile.write(body[:10])
            self.wfile.flush()
            self.server.stalled.wait(20)
            return None
        try:
            self.wfile.write(body)
            while fault == "endless":
                self.wfile.write(b"\n" * (1 << 16))
        except ConnectionError:
            pass  # the client has had enough
        return None

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.stalled.set()
    server.shutdown()
    server.server_close()
    thread.join()


def files_below(folder):
    return sorted(
        os.path.relpath(os.path.join(root, file), folder)
        for root, _, files in os.walk(folder)
        for file in files
    )


def test_folder(folder):
    dataset = mulan.load("bibtex", str(folder))
    assert dataset.name == "bibtex"
    assert dataset.label_names == ("TAG_a", "TAG_b")
    assert dataset.label_texts == ("a", "b")
    assert dataset.feature_names == tuple(f"word{i}" for i in range(5))
    assert dataset.train.labels[:3].tolist() == [[1, 0], [1, 1], [0, 0]]
    assert dataset.train.inputs.take(np.arange(3)).values.tolist() == [0, 3, 1]
    assert (len(dataset.train), len(dataset.test)) == (23, 2)


def test_folder_that_lacks_a_file_is_an_error(folder, tmp_path):
    (folder / "mulan" / "bibtex" / "bibtex.xml").unlink()
    with pytest.raises(DataError, match=r"there is no .*bibtex\.xml; set config"):
        mulan.load("bibtex", str(folder), str(tmp_path / "cache"), "http://127.0.0.1:1")
    assert not (tmp_path / "cache").exists()


def test_changed_file_is_refused_and_broken_one_named_by_line(folder):
    path = folder / "mulan" / "bibtex" / "bibtex-train.arff"
    text = path.read_text()
    path.write_text(text.replace("{1 1}", "{2 1}"))
    with pytest.raises(DataError, match="train.arff is not the published file"):
        mulan.load_folder("bibtex", str(folder))
    path.write_text(text[: text.index("}\n{1 1}")])
    with pytest.raises(DataError, match=r"line 11: the row ends without '}'"):
        mulan.load_folder("bibtex", str(folder))


def test_download_prepares_a_cache_that_is_enough(tmp_path, folder, server, capfd):
    cache = tmp_path / "cache"
    downloaded = mulan.load("bibtex", None, str(cache), server.url)
    assert server.requests == [f"/bibtex/{name}" for name in SMALL]
    assert capfd.readouterr().out == ""
    for name, text in SMALL.items():
        assert (cache / "downloads/mulan/bibtex" / name).read_text() == text
        (cache / "downloads/mulan/bibtex" / name).unlink()
    cached = mulan.load("bibtex", None, str(cache), "http://127.0.0.1:1")
    expected = mulan.load_folder("bibtex", str(folder))
    for dataset in (downloaded, cached):
        assert dataset.fingerprint == expected.fingerprint
        assert dataset.label_texts == expected.label_texts
        assert dataset.name == expected.name
        for a, b in ((dataset.train, expected.train), (dataset.test, expected.test)):
            assert a.inputs.values.dtype == b.inputs.values.dtype
            assert a.inputs.offsets.dtype == b.inputs.offsets.dtype
            assert a.labels.dtype == b.labels.dtype


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("absent", "the server says 404"),
        ("changed", "not the published file"),
        ("longer", "or more bytes of"),
        ("endless", "or more bytes of"),
        ("cut off", r"got \d+ bytes of|IncompleteRead"),
        ("stalled", "timed out"),
    ],
)
def test_failed_download_leaves_nothing_and_can_be_tried_again(
    tmp_path, small, server, monkeypatch, fault, message
):
    monkeypatch.setattr(mulan, "STALLED", 0.3)
    cache = tmp_path / "cache"
    server.fault = fault
    with pytest.raises(DataError, match=message) as caught:
        mulan.load("bibtex", None, str(cache), server.url)
    assert f"cannot download {server.url}/bibtex/bibtex-test.arff: " in str(
        caught.value
    )
    assert "set config.data.dir or CBMLC_DATA_DIR to a folder" in str(caught.value)
    # The first file was good, and stays; the second left no trace.
    assert files_below(cache) == ["downloads/mulan/bibtex/bibtex-train.arff"]
    assert os.listdir(cache / "bibtex") == []
    server.fault = None
    server.requests.clear()
    assert len(mulan.load("bibtex", None, str(cache), server.url).train) == 23
    assert server.requests == ["/bibtex/bibtex-test.arff", "/bibtex/bibtex.xml"]


def test_no_other_server_is_asked(tmp_path, small, server, monkeypatch):
    def asked(*_):
        raise AssertionError("TFDS asks its bucket")

    monkeypatch.setattr(gcs_utils, "gcs_dataset_info_files", asked)
    monkeypatch.setattr(gcs_utils, "is_dataset_on_gcs", asked)
    assert len(mulan.load("bibtex", None, str(tmp_path), server.url).test) == 2


def test_slow_download_ends(tmp_path, small, server, monkeypatch):
    monkeypatch.setattr(mulan, "TOO_SLOW", -1)
    with pytest.raises(DataError, match="not complete after -1 seconds"):
        mulan.download("bibtex", str(tmp_path), server.url)
    assert files_below(tmp_path) == []


def test_no_server(tmp_path, small):
    with pytest.raises(DataError, match="cannot download http://127.0.0.1:1/bibtex/"):
        mulan.load("bibtex", None, str(tmp_path), "http://127.0.0.1:1")
    assert files_below(tmp_path) == []


def test_bad_file_among_the_downloads_is_fetched_again(tmp_path, small, server):
    mulan.download("bibtex", str(tmp_path), server.url)
    path = tmp_path / "mulan/bibtex/bibtex.xml"
    path.write_text("half")
    mulan.download("bibtex", str(tmp_path), server.url)
    assert path.read_text() == SMALL["bibtex.xml"]
    assert len(server.requests) == 4


def test_full_disk_leaves_no_part(tmp_path, small, server, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        mulan.download("bibtex", str(tmp_path), server.url)
    assert files_below(tmp_path) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / "dataset_info.json").unlink(),
        lambda f: (f / "metadata.json").write_text("{"),
        lambda f: (f / "bibtex-train.array_record-00000-of-00001").unlink(),
        lambda f: (f / "bibtex-test.array_record-00000-of-00001").write_bytes(
            b"x" * 99
        ),
        lambda f: (f / "metadata.json").write_text(
            (f / "metadata.json").read_text().replace("word4", "word5")
        ),
    ],
    ids=["no info", "half metadata", "no rows", "broken rows", "other names"],
)
def test_damaged_cache_is_named(tmp_path, small, server, damage):
    mulan.load("bibtex", None, str(tmp_path), server.url)
    folder = tmp_path / "bibtex" / "1.0.0"
    damage(folder)
    with pytest.raises(DataError, match="is broken .* delete that folder") as caught:
        mulan.load("bibtex", None, str(tmp_path), server.url)
    assert str(folder) in str(caught.value)


def test_two_processes_prepare_at_once(tmp_path, small, server):
    # The other one ends while this one is between its look and its rename.
    builder = builders.Bibtex(
        data_dir=str(tmp_path), file_format="array_record", base_url=server.url
    )
    generate = builder._generate_examples

    def late(split):
        mulan.load("bibtex", None, str(tmp_path), server.url)
        return generate(split)

    builder._generate_examples = late
    builders._prepare(builder)
    assert os.listdir(tmp_path / "bibtex") == ["1.0.0"]
    assert len(mulan.load("bibtex", None, str(tmp_path), server.url).train) == 23


def test_default_cache_follows_the_environment_and_tfds_is_imported_late(tmp_path):
    code = """
import sys
from cbmlc_jax.data import mulan
assert "tensorflow_datasets" not in sys.modules
try:
    mulan.load("delicious", base_url="http://127.0.0.1:1")
except mulan.DataError:
    assert "tensorflow" not in sys.modules
    print("refused")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TFDS_DATA_DIR": str(tmp_path)},
        cwd=pathlib.Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.stdout == "refused\n", done.stderr
    assert (tmp_path / "delicious").is_dir()


# Of names, inputs and labels.  A change here makes results of earlier runs another
# data set's.
FINGERPRINTS = {
    "bibtex": "d7fea06c20cc192f71ef72539d935e5d60732529266f15baf8bedd4ea10cf6a1",
    "delicious": "d61806402f5a291ec6301d709e8fc321cbe5c10c0919a6178633ebd8173fba84",
    "emotions": "922759208d6c21d3d6737cb18c5426f3c957d55d9949b5676100f0100185bb44",
}


@pytest.mark.parametrize("name", list(mulan.FILES))
def test_pinned_files_are_the_real_ones(data_dir, tmp_path, name, monkeypatch):
    for file, (size, sha256) in mulan.FILES[name].items():
        content = (data_dir / "mulan" / name / file).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (size, sha256)
    # A file:// address downloads the real files; the cache holds the same data.
    url = (data_dir / "mulan").as_uri()
    expected = mulan.load(name, str(data_dir))
    assert expected.fingerprint == FINGERPRINTS[name]
    prepared = mulan.load(name, None, str(tmp_path), url)
    assert prepared.fingerprint == expected.fingerprint
    assert prepared.label_texts == expected.label_texts
    for a, b in ((prepared.train, expected.train), (prepared.test, expected.test)):
        assert type(a.inputs) is type(b.inputs)
        assert a.inputs.values.dtype == b.inputs.values.dtype


def test_real_moods_have_words_that_are_in_a_dictionary(data_dir):
    dataset = mulan.load("emotions", str(data_dir))
    # As published, two of them misspelt; what is looked up is not.
    assert (dataset.label_names[0], dataset.label_names[5]) == (
        "amazed-suprised",
        "angry-aggresive",
    )
    assert dataset.label_texts == (
        "amazed surprised",
        "happy pleased",
        "relaxing calm",
        "quiet still",
        "sad lonely",
        "angry aggressive",
    )
    assert dataset.train.inputs.values.shape == (391, 72)
    assert dataset.test.inputs.values.shape == (202, 72)
