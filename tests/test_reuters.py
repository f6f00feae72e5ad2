"""Reuters-21578: the SGML, tokens and ids, every source, and the real files."""

from __future__ import annotations

import gzip
import hashlib
import html
import http.server
import os
import threading

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from cbmlc_jax.data import builders, mulan, reuters
from cbmlc_jax.data.dataset import DataError


def record(
    text="<TITLE>Gold</TITLE><BODY>rises</BODY>",
    topics=("gold",),
    split="TRAIN",
    used="YES",
):
    codes = "".join(f"<D>{t}</D>" for t in topics)
    return (
        f'<REUTERS TOPICS="{used}" LEWISSPLIT="{split}" OLDID="5" NEWID="1">\n'
        "<DATE>26-FEB-1987 15:01:01.79</DATE>\n"
        f"<TOPICS>{codes}</TOPICS>\n<PLACES><D>usa</D></PLACES>\n"
        f"<UNKNOWN>\n&#5;&#5;f f BC-GOLD</UNKNOWN>\n<TEXT>&#2;\n{text}</TEXT>\n"
        "</REUTERS>\n"
    )


def parse(text, path="some.sgm"):
    return list(reuters.parse(text.encode("latin-1"), path))


def rows(ragged):
    return [
        ragged.values[a:b].tolist()
        for a, b in zip(ragged.offsets[:-1], ragged.offsets[1:], strict=True)
    ]


def words(dataset, split):
    names = np.array(dataset.feature_names)
    return [names[row].tolist() for row in rows(getattr(dataset, split).inputs)]


# What stands in for the 22 published files.
SMALL = {
    "reut2-000.sgm": '<!DOCTYPE lewis SYSTEM "lewis.dtd">\n'
    + record("<TITLE>GOLD up</TITLE><BODY>up 3.5 pct</BODY>")
    + record("<TITLE>gold lone</TITLE>", ["gold", "nat-gas", "tin-ore"])
    + record("<TITLE>cocoa up</TITLE>", ["cocoa"])  # on one side only
    + record("<TITLE>no topic</TITLE>", []),
    "reut2-001.sgm": record("<TITLE>novel gold up</TITLE>", split="TEST")
    + record("<TITLE>up</TITLE>", ["rye", "nat-gas", "tin-ore"], "TEST")
    + record("<TITLE>up</TITLE>", used="NO")
    + record("<TITLE>up</TITLE>", split="NOT-USED"),
}


def checksum(text):
    return len(text), hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(reuters, "FILES", {k: checksum(v) for k, v in SMALL.items()})


@pytest.fixture
def folder(tmp_path, small):
    """A data folder: one file plain, the other gzipped."""
    target = tmp_path / "data" / "reuters21578"
    target.mkdir(parents=True)
    (target / "reut2-000.sgm").write_text(SMALL["reut2-000.sgm"])
    (target / "reut2-001.sgm.gz").write_bytes(
        gzip.compress(SMALL["reut2-001.sgm"].encode())
    )
    return tmp_path / "data"


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the small files, one of them perhaps changed."""

    def do_GET(self):
        body = SMALL[self.path.removeprefix("/")].encode()
        if self.path == self.server.changed:
            body = body.replace(b"novel", b"naval")
        self.server.requests.append(self.path)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.changed = [], None
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_title_and_body_are_the_text():
    text = (
        "<TITLE>Bahia review</TITLE>\n<AUTHOR>by Jo</AUTHOR>"
        "<DATELINE> SALVADOR, Feb 26 - </DATELINE><BODY>Showers</BODY>"
    )
    (document,) = parse(record(text, ["cocoa", "nat-gas"]))
    assert document == reuters.Document(
        "TRAIN", ("cocoa", "nat-gas"), "Bahia review\nShowers", True
    )


def test_without_a_body_title_or_else_everything():
    brief = "******<TITLE>FED ADDS\n</TITLE>Blah blah blah.\n&#3;\n"
    (title_only,) = parse(record(brief))
    assert (title_only.text, title_only.has_body) == ("FED ADDS\n", False)
    (unprocessed,) = parse(
        record("WEEKLY REPORT\n 1.5 vs 2\n").replace("<TEXT>", '<TEXT TYPE="UNPROC">')
    )
    assert unprocessed.text.split() == ["WEEKLY", "REPORT", "1.5", "vs", "2"]
    assert not unprocessed.has_body


def test_entities_control_characters_and_latin_1():
    text = (
        "<TITLE>S&amp;P &lt;SRD> &lt;BODY></TITLE><BODY>cla&#127;imed \xfc&#3;</BODY>"
    )
    (document,) = parse(record(text))
    assert document.text == "S&P <SRD> <BODY>\nclaimed \xfc"


def test_order_of_attributes_and_other_attributes_do_not_matter():
    text = record().replace(
        'TOPICS="YES" LEWISSPLIT="TRAIN"',
        'CSECS="9" LEWISSPLIT="TEST" CGISPLIT="TRAINING-SET" TOPICS="YES"',
    )
    assert [d.split for d in parse(text)] == ["TEST"]


def test_only_modapte_is_kept():
    assert parse(SMALL["reut2-001.sgm"] + record(used="BYPASS"))[2:] == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("</REUTERS>\n", "", "has no </REUTERS>; the file is cut off"),
        ('LEWISSPLIT="TRAIN" ', "", "its LEWISSPLIT is missing, not one of TRAIN, "),
        ('TOPICS="YES" ', "", "its TOPICS is missing, not one of YES, NO, BYPASS"),
        ('"YES"', '"yes"', "its TOPICS is yes, not one of YES, NO, BYPASS"),
        ("</BODY>", "", "its <BODY> has no </BODY>"),
        ("</TOPICS>", "", "its <TOPICS> has no </TOPICS>"),
        ("<TEXT>", "<TXET>", "it has no <TEXT>"),
        (">", "", "its TOPICS|has no </REUTERS>"),
    ],
)
@pytest.mark.parametrize("last", [False, True])
def test_broken_record_is_named(old, new, message, last):
    broken = record().replace(old, new)
    with pytest.raises(DataError, match=message) as caught:
        parse(record() + record() + broken + ("" if last else record()))
    assert str(caught.value).startswith("some.sgm, record 3: ")
    assert "\n" not in str(caught.value)


def test_no_record_is_an_error():
    with pytest.raises(DataError, match="some.sgm holds no <REUTERS"):
        parse("<html>not found</html>")


@hypothesis.given(st.text(st.characters(max_codepoint=126), max_size=50))
def test_any_text_comes_back(text):
    # Control characters are dropped when they are written as entities, not as such.
    (document,) = parse(record(f"<BODY>{html.escape(text)}</BODY>"))
    assert document.text == text


@hypothesis.given(st.data())
def test_damage_is_an_error_of_ours_or_none(data):
    text = record() + record()
    cut = sorted(data.draw(st.tuples(*[st.integers(0, len(text))] * 2)))
    noise = data.draw(st.text(st.sampled_from('<>/="& #1TD'), max_size=6))
    try:
        documents = parse(text[: cut[0]] + noise + text[cut[1] :])
    except DataError as error:
        assert str(error).startswith("some.sgm") and "\n" not in str(error)
    else:
        assert 1 <= len(documents) <= 2


@pytest.mark.parametrize(
    "flood", ['A="', "A", "A ", "<TEXT ", "<D>", "<REUTERS ", "&", "&#1", "\n", "1."]
)
def test_time_grows_with_the_length_only(flood):
    # A second here; hours, if a pattern tried every start with every end.
    flood *= 200_000
    heads = f"<REUTERS {flood}></REUTERS>"
    for content in (record(flood) + heads, record() + heads, heads + flood):
        with pytest.raises(DataError, match="record"):
            parse(content)
    reuters.tokens(flood)


def test_absurd_entity_is_an_error_of_ours():
    with pytest.raises(DataError, match="some.sgm, record 1: "):
        parse(record("&#" + "1" * 5000))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Showers CONTINUED", ["showers", "continued"]),
        ("5.93 mln 155,221 1986/87 4-3/8", ["<num>", "mln"] + ["<num>"] * 3),
        ("vs.....1,337 M-1", ["vs", "<num>", "<num>"]),
        ("The U.S. and U.K. said.", ["the", "u.s.", "and", "u.k.", "said"]),
        ("company's a S&P x", ["company"]),
        ("<SRD> +superior+ R\xfcckkauf", ["srd", "superior", "r\xfcckkauf"]),
        ("snake_case 3rd", ["snake", "case", "<num>", "rd"]),
        (" \n&#3; ... ", ["<num>"]),
        ("", []),
    ],
)
def test_tokens(text, expected):
    assert reuters.tokens(text) == expected


def test_documents_are_cut_after_300_tokens_in_order():
    text = " ".join(["first", *["7"] * 298, "last", "lost"])
    found = reuters.tokens(text)
    assert (len(found), found[0], found[-1]) == (300, "first", "last")
    documents = parse(record(f"<BODY>{text}</BODY>") * 2 + record(split="TEST"))
    dataset = reuters.build(documents)
    assert dataset.train.inputs.lengths.tolist() == [300, 300]
    assert "lost" not in dataset.feature_names


def test_vocabulary_is_of_training_alone_and_keeps_order_and_repeats(folder):
    dataset = reuters.load(str(folder))
    assert dataset.name == "reuters"
    # "pct" stands in one document, "cocoa up" is in no kept one, "novel" in no
    # training one; "up" is in one training document, although twice.
    assert dataset.feature_names == ("<unk>", "gold")
    assert words(dataset, "train") == [
        ["gold", "<unk>", "<unk>", "<unk>", "<unk>"],
        ["gold", "<unk>"],
    ]
    assert words(dataset, "test") == [["<unk>", "gold", "<unk>"], ["<unk>"]]
    documents = parse(
        record("<TITLE>b a b b</TITLE>".replace("a", "aa").replace("b", "bb")) * 2
        + record("<TITLE>test test bb</TITLE>", split="TEST") * 5
    )
    dataset = reuters.build(documents)
    assert dataset.feature_names == ("<unk>", "aa", "bb")
    assert rows(dataset.train.inputs) == [[2, 1, 2, 2]] * 2
    assert rows(dataset.test.inputs) == [[0, 0, 2]] * 5
    assert dataset.train.inputs.values.dtype == np.int32


def test_topics_are_those_of_both_sides(folder):
    dataset = reuters.load(str(folder))
    assert dataset.label_names == ("gold", "nat-gas", "tin-ore")
    assert dataset.label_texts == ("gold", "natural gas", "tin ore")
    assert dataset.train.labels.tolist() == [[1, 0, 0], [1, 1, 1]]
    assert dataset.test.labels.tolist() == [[1, 0, 0], [0, 1, 1]]
    assert dataset.train.labels.dtype == np.uint8


def test_same_data_same_fingerprint(folder):
    first, second = (reuters.load(str(folder)).fingerprint for _ in range(2))
    assert first == second


def test_missing_file_is_named(folder, tmp_path):
    (folder / "reuters21578" / "reut2-001.sgm.gz").unlink()
    with pytest.raises(
        DataError, match=r"there is no .*reut2-001\.sgm or .*\.gz; set config"
    ):
        reuters.load(str(folder), str(tmp_path / "cache"), "http://127.0.0.1:1")
    assert not (tmp_path / "cache").exists()


def test_truncated_and_broken_gzip_are_named(folder):
    path = folder / "reuters21578" / "reut2-001.sgm.gz"
    whole = path.read_bytes()
    middle = len(whole) // 2
    for broken in (
        whole[:middle],
        whole[:-3],
        b"<html>" + whole,
        whole[:middle] + b"\xff" * 9 + whole[middle + 9 :],
    ):
        path.write_bytes(broken)
        with pytest.raises(DataError, match="reut2-001.sgm.gz is no whole gzip file"):
            reuters.load(str(folder))


def test_changed_file_is_refused(folder):
    path = folder / "reuters21578" / "reut2-000.sgm"
    path.write_text(path.read_text().replace("lone", "loan"))
    with pytest.raises(DataError, match="reut2-000.sgm is not the published file"):
        reuters.load(str(folder))


def test_oversized_file_is_refused_before_it_is_unpacked(folder, monkeypatch):
    monkeypatch.setattr(reuters, "LARGEST_FILE", 10_000)
    path = folder / "reuters21578" / "reut2-001.sgm.gz"
    path.write_bytes(gzip.compress(b"x" * 10_001))
    with pytest.raises(DataError, match="001.sgm.gz holds more than 10000 bytes"):
        reuters.load(str(folder))


def test_download_prepares_a_cache_that_is_enough(tmp_path, folder, server):
    cache = tmp_path / "cache"
    downloaded = reuters.load(None, str(cache), server.url)
    assert server.requests == [f"/{name}" for name in SMALL]
    assert os.listdir(cache / "reuters") == ["1.0.0"]
    for name in SMALL:
        (cache / "downloads" / "reuters21578" / name).unlink()
    cached = reuters.load(None, str(cache), "http://127.0.0.1:1")
    expected = reuters.load(str(folder))
    for dataset in (downloaded, cached):
        assert dataset.fingerprint == expected.fingerprint
        assert dataset.label_texts == expected.label_texts
        assert dataset.name == "reuters"


def test_changed_download_is_refused_and_can_be_tried_again(tmp_path, small, server):
    server.changed = "/reut2-001.sgm"
    with pytest.raises(DataError, match="not the published file") as caught:
        reuters.load(None, str(tmp_path), server.url)
    assert f"cannot download {server.url}/reut2-001.sgm: " in str(caught.value)
    assert "folder that holds reuters21578/reut2-001.sgm" in str(caught.value)
    assert os.listdir(tmp_path / "downloads/reuters21578") == ["reut2-000.sgm"]
    server.changed = None
    server.requests.clear()
    assert len(reuters.load(None, str(tmp_path), server.url).test) == 2
    assert server.requests == ["/reut2-001.sgm"]


def test_larger_download_is_refused(tmp_path, small, server, monkeypatch):
    (size, sha256) = reuters.FILES["reut2-000.sgm"]
    monkeypatch.setitem(reuters.FILES, "reut2-000.sgm", (size - 1, sha256))
    with pytest.raises(DataError, match=f"got {size} or more bytes of {size - 1}"):
        reuters.download(str(tmp_path), server.url)


def test_pins_are_of_22_files_and_builder_knows_the_address():
    assert list(reuters.FILES) == [f"reut2-{i:03}.sgm" for i in range(22)]
    assert all(size < reuters.LARGEST_FILE for size, _ in reuters.FILES.values())
    assert builders.BUILDERS["reuters"].BASE_URL == reuters.BASE_URL
    assert builders.BUILDERS["bibtex"].BASE_URL == mulan.BASE_URL


@pytest.fixture(scope="module")
def documents(data_dir):
    return reuters.read_folder(str(data_dir))


@pytest.fixture(scope="module")
def dataset(documents):
    return reuters.build(documents)


def test_real_documents(documents, dataset):
    topics = set(dataset.label_names)
    for split, everything, kept, bodiless in (
        ("TRAIN", 9603, 7770, 710),
        ("TEST", 3299, 3019, 277),
    ):
        side = [d for d in documents if d.split == split]
        of_r90 = [d for d in side if topics & set(d.topics)]
        assert (len(side), len(of_r90)) == (everything, kept)
        assert sum(not d.has_body for d in of_r90) == bodiless
        assert all(reuters.tokens(d.text) for d in of_r90)


def test_real_labels(dataset):
    assert (len(dataset.train), len(dataset.test)) == (7770, 3019)
    assert dataset.train.labels.shape[1] == len(dataset.label_names) == 90
    # The ten largest topics, as the literature has them to within a document.
    counts = {
        "earn": (2877, 1087),
        "acq": (1650, 719),
        "money-fx": (538, 179),
        "grain": (433, 149),
        "crude": (389, 189),
        "trade": (369, 117),
        "interest": (347, 131),
        "ship": (197, 89),
        "wheat": (212, 71),
        "corn": (181, 56),
    }
    found = zip(dataset.train.labels.sum(0), dataset.test.labels.sum(0), strict=True)
    found = dict(zip(dataset.label_names, found, strict=True))
    assert {name: found[name] for name in counts} == counts
    assert all(min(pair) >= 1 for pair in found.values())
    for split in (dataset.train, dataset.test):
        assert split.labels.any(1).all()


def test_real_label_texts(dataset):
    assert dataset.label_names == tuple(sorted(dataset.label_names))
    assert set(reuters.LABEL_TEXTS) <= set(dataset.label_names)
    for text in dataset.label_texts:
        assert text == text.lower() and "-" not in text and text.strip()
    assert len(set(dataset.label_texts)) == 90


def test_real_inputs(dataset):
    assert len(dataset.feature_names) == 13026
    assert dataset.feature_names[:2] == ("<unk>", "<num>")
    for split in (dataset.train, dataset.test):
        lengths = split.inputs.lengths
        assert (lengths.min() > 0, lengths.max()) == (True, 300)
        assert split.inputs.values.max() < 13026
    # Every name but <unk> is that of a training word, and <unk> stands for the rest.
    assert set(np.unique(dataset.train.inputs.values)) == set(range(13026))
    assert words(dataset, "train")[0][:6] == (
        ["bahia", "cocoa", "review", "showers", "continued", "throughout"]
    )


def test_real_fingerprint(dataset):
    assert dataset.fingerprint == (
        "821ae38fde2140b4d0dfd92b382981030c7303a5857d79598e5e525c778d196f"
    )
