"""Label noise against its definition: frequencies, invariances and pinned flips."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cbmlc_jax import noise, rngs

FLIPPING = ("ncar", "nar", "single_positive", "combined")
KEY = rngs.stream(0, "noise")


# One shape for most tests: every new one costs a compilation for each kind.
ROWS, LABELS = 3000, 10


def random_labels(rows: int = ROWS, labels: int = LABELS) -> np.ndarray:
    """0/1 labels, three in ten positive; the last row has no positive."""
    draws = rngs.generator(1, "labels", rows, labels).random((rows, labels))
    result = (draws < 0.3).astype(np.uint8)
    result[-1] = 0
    return result


def assert_binomial(successes: int, trials: int, p: float) -> None:
    """Within 5 standard deviations of a binomial's mean."""
    assert abs(successes - trials * p) < 5 * np.sqrt(trials * p * (1 - p)) + 1e-9


@pytest.mark.parametrize("keep_one", [True, False])
@pytest.mark.parametrize("kind, rate", [("none", 0.7), ("ncar", 0.0), ("nar", 0.0)])
def test_no_noise_is_the_identity(kind, rate, keep_one):
    clean = random_labels()
    before = clean.copy()
    noisy = noise.inject(KEY, clean, kind, rate=rate, keep_one=keep_one)
    np.testing.assert_array_equal(noisy, before)
    np.testing.assert_array_equal(clean, before)
    assert noisy.dtype == np.uint8
    assert not np.shares_memory(noisy, clean)


@settings(max_examples=15)
@given(
    st.lists(st.integers(0, 1), min_size=48, max_size=48),
    st.integers(0, 2**32),
    st.sampled_from(["ncar", "nar"]),
)
def test_rate_0_is_the_identity_for_any_labels_and_key(entries, seed, kind):
    clean = np.array(entries, np.uint8).reshape(6, 8)
    noisy = noise.inject(rngs.stream(seed, "noise"), clean, kind, rate=0.0)
    np.testing.assert_array_equal(noisy, clean)


def test_ncar_at_rate_1_is_the_complement():
    clean = random_labels()
    noisy = noise.inject(KEY, clean, "ncar", rate=1.0, keep_one=False)
    np.testing.assert_array_equal(noisy, 1 - clean)


def test_nar_at_rate_1_drops_everything_and_keep_one_restores_one():
    clean = random_labels()
    assert not noise.inject(KEY, clean, "nar", rate=1.0, keep_one=False).any()
    kept = noise.inject(KEY, clean, "nar", rate=1.0, keep_one=True)
    np.testing.assert_array_equal(kept.sum(1), clean.any(1))
    assert not (kept & ~clean & 1).any()


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_ncar_flips_every_entry_with_the_same_probability(rate):
    clean = random_labels()
    flipped = clean != noise.inject(KEY, clean, "ncar", rate=rate, keep_one=False)
    for value in (0, 1):
        where = clean == value
        assert_binomial(flipped[where].sum(), where.sum(), rate)
    for label in range(LABELS):
        assert_binomial(flipped[:, label].sum(), ROWS, rate)
    # Independence: the number of flips of a row has a binomial's variance too.
    variance = flipped.sum(1).var() / (LABELS * rate * (1 - rate))
    assert abs(variance - 1) < 5 * np.sqrt(2.2 / ROWS)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_nar_drops_positives_and_adds_none(rate):
    clean = random_labels()
    noisy = noise.inject(KEY, clean, "nar", rate=rate, keep_one=False)
    assert not ((noisy == 1) & (clean == 0)).any()
    dropped = (clean == 1) & (noisy == 0)
    assert_binomial(dropped.sum(), clean.sum(), rate)
    for label in range(LABELS):
        assert_binomial(dropped[:, label].sum(), clean[:, label].sum(), rate)


@pytest.mark.parametrize("keep_one", [True, False])
def test_single_positive_leaves_one_chosen_uniformly(keep_one):
    row = np.array([0, 1, 1, 0, 1, 1, 0, 1, 0, 0], np.uint8)
    clean = np.tile(row, (ROWS, 1))
    noisy = noise.inject(KEY, clean, "single_positive", keep_one=keep_one)
    assert (noisy.sum(1) == 1).all()
    chosen = noisy.sum(0)
    assert not chosen[row == 0].any()
    assert stats.chisquare(chosen[row == 1]).pvalue > 1e-4


@pytest.mark.parametrize("keep_one", [True, False])
def test_single_positive_leaves_empty_rows_and_lone_positives_alone(keep_one):
    clean = np.zeros((ROWS, LABELS), np.uint8)
    clean[:LABELS] = np.eye(LABELS)
    noisy = noise.inject(KEY, clean, "single_positive", keep_one=keep_one)
    np.testing.assert_array_equal(noisy, clean)


def combined_rows(rates: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """P(0->1), P(1->0) and the kind (0 ncar, 1 nar, 2 type 3) of each noisy row.

    A row has 600 positives and 600 negatives, so that what is left of it betrays its
    kind: exactly one positive, or false positives, or neither.
    """
    clean = np.zeros((2400, 1200), np.uint8)
    clean[:, ::2] = 1
    noisy = noise.inject(KEY, clean, "combined", rates=rates, keep_one=False)
    added = (noisy[:, 1::2] == 1).sum(1)
    dropped = (noisy[:, ::2] == 0).sum(1)
    kind = np.where(noisy.sum(1) == 1, 2, np.where(added > 0, 0, 1))
    return added / 600, dropped / 600, kind


def test_combined_with_fixed_rates():
    p01, p10, kind = combined_rows("fixed")
    for k in range(3):
        assert_binomial((kind == k).sum(), len(kind), 1 / 3)
    ncar, nar = kind == 0, kind == 1
    assert_binomial(round(p01[ncar].sum() * 600), 600 * ncar.sum(), 0.1)
    assert_binomial(round(p10[ncar].sum() * 600), 600 * ncar.sum(), 0.1)
    assert_binomial(round(p10[nar].sum() * 600), 600 * nar.sum(), 0.5)
    # One rate for all: rows scatter as binomials do, no more.
    assert p01[ncar].std() < 1.2 * np.sqrt(0.1 * 0.9 / 600)
    assert p10[nar].std() < 1.2 * np.sqrt(0.5 * 0.5 / 600)


def test_combined_with_uniform_rates():
    p01, p10, kind = combined_rows("uniform")
    assert_binomial((kind == 2).sum(), len(kind), 1 / 3)
    # ncar: U(0, .1) has mean .05 and standard deviation .1 / sqrt(12), one rate for
    # both sides; a rate near 0 hides among the nar rows, so compare with all rows.
    assert abs(p01.mean() - 0.05 / 3) < 5 * np.sqrt(0.0025 / 3 / 2400)
    for limit in (0.025, 0.05, 0.075):
        assert_binomial((p01 > limit).sum(), 2400, (1 - limit / 0.1) / 3)
    assert p01.max() < 0.15
    ncar = kind == 0
    assert np.corrcoef(p01[ncar], p10[ncar])[0, 1] > 0.8
    # nar: U(0, .5).
    nar = kind == 1
    assert abs(p10[nar].mean() - 0.25) < 5 * 0.5 / np.sqrt(12 * nar.sum()) + 0.005
    for limit in (0.15, 0.25, 0.4):
        assert_binomial((p10[nar] > limit).sum(), nar.sum(), 1 - limit / 0.5)
    assert p10[nar].max() < 0.6


@pytest.mark.parametrize("kind", FLIPPING)
def test_keep_one_changes_only_rows_left_without_any_positive(kind):
    """All coins are drawn: other rows are the same with keep_one on and off."""
    clean = random_labels()
    off = noise.inject(KEY, clean, kind, rate=0.3, keep_one=False)
    on = noise.inject(KEY, clean, kind, rate=0.3, keep_one=True)
    lost = ~off.any(1) & clean.any(1)
    np.testing.assert_array_equal(on[~lost], off[~lost])
    np.testing.assert_array_equal(on[lost].sum(1), 1)
    assert (on[lost] <= clean[lost]).all()
    if kind != "single_positive":
        assert lost.sum() > 5
    # Rows with false positives only are not restored: they are not empty.
    false_only = off.any(1) & clean.any(1) & ~(off & clean).any(1)
    assert false_only.any() == (kind in ("ncar", "combined"))


def test_keep_one_restores_uniformly_and_independently_of_the_flips():
    row = np.array([1, 0, 1, 1, 0, 1, 0, 0, 0, 0], np.uint8)
    clean = np.tile(row, (ROWS, 1))
    restored = noise.inject(KEY, clean, "nar", rate=1.0, keep_one=True)
    assert stats.chisquare(restored.sum(0)[row == 1]).pvalue > 1e-4
    # A key of its own: what single_positive keeps says nothing about it.
    kept = noise.inject(KEY, clean, "single_positive", keep_one=False)
    assert_binomial((restored & kept).sum(), ROWS, 1 / 4)


@pytest.mark.parametrize("kind", FLIPPING)
def test_rows_without_positives_stay_as_drawn(kind):
    """keep_one has nothing to give back to them; false positives stay."""
    clean = np.zeros((ROWS, LABELS), np.uint8)
    off = noise.inject(KEY, clean, kind, rate=0.3, keep_one=False)
    on = noise.inject(KEY, clean, kind, rate=0.3, keep_one=True)
    np.testing.assert_array_equal(on, off)
    assert on.any() == (kind in ("ncar", "combined"))
    assert (~on.any(1)).any()


@pytest.mark.parametrize("kind", FLIPPING)
def test_noise_in_slices_equals_noise_on_the_whole(kind):
    clean = random_labels()
    whole = noise.inject(KEY, clean, kind, rate=0.4)
    parts = [
        noise.inject(
            KEY, clean[start : start + 600], kind, rate=0.4,
            rows=np.arange(start, start + 600),
        )
        for start in range(0, ROWS, 600)
    ]  # fmt: skip
    np.testing.assert_array_equal(np.vstack(parts), whole)


@pytest.mark.parametrize("keep_one", [True, False])
@pytest.mark.parametrize("kind", FLIPPING)
def test_coins_belong_to_row_numbers_not_to_positions(kind, keep_one):
    clean = random_labels()
    order = rngs.generator(2, "order").permutation(ROWS)
    options = {"rate": 0.4, "keep_one": keep_one}
    whole = noise.inject(KEY, clean, kind, **options)
    shuffled = noise.inject(KEY, clean[order], kind, rows=order, **options)
    np.testing.assert_array_equal(shuffled, whole[order])
    assert (shuffled != noise.inject(KEY, clean[order], kind, **options)).any()


def test_equal_rows_get_different_coins_and_keys_differ():
    clean = np.tile(random_labels()[:1], (ROWS, 1))
    noisy = noise.inject(KEY, clean, "ncar", rate=0.5)
    # 3000 throws into 1024 boxes leave 55 of them empty, give or take.
    assert len(np.unique(noisy, axis=0)) > 900
    other = noise.inject(rngs.stream(1, "noise"), clean, "ncar", rate=0.5)
    assert (noisy != other).mean() > 0.4


# Six rows of eight labels; the fifth has no positive.
GOLDEN_CLEAN = [
    "10010010", "01001001", "00100100", "10010010", "00000000", "00100100",
]  # fmt: skip
# At rate .5 with keep_one, under the key of seed 0.
GOLDEN = {
    "ncar": [
        "11111001", "01001111", "10000000", "10101000", "11111011", "10111100",
    ],
    "nar": [
        "10010000", "01001001", "00100000", "10000000", "00000000", "00100100",
    ],
    "single_positive": [
        "10000000", "01000000", "00100000", "10000000", "00000000", "00100000",
    ],
    "combined": [
        "00010000", "00001000", "00100000", "00010010", "00000000", "00100100",
    ],
}  # fmt: skip


def golden_flips(kind: str) -> list[str]:
    """The rows of GOLDEN_CLEAN after noise, as strings of digits."""
    clean = np.array([list(row) for row in GOLDEN_CLEAN], np.uint8)
    noisy = noise.inject(rngs.stream(0, "noise"), clean, kind, rate=0.5)
    return ["".join(map(str, row)) for row in noisy]


@pytest.mark.parametrize("kind", FLIPPING)
def test_flips_are_pinned(kind):
    """A change here changes every noisy result: it is a new version."""
    assert golden_flips(kind) == GOLDEN[kind]


def test_flips_are_the_same_on_another_device():
    with jax.default_device(jax.devices()[-1]):
        assert golden_flips("combined") == GOLDEN["combined"]


def test_flips_are_the_same_in_a_process_with_one_device():
    """This process has four; neither their number nor jit may matter."""
    assert jax.device_count() > 1
    program = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "import jax, test_noise\n"
        "assert jax.device_count() == 1\n"
        "print(test_noise.golden_flips('combined') == test_noise.GOLDEN['combined'])\n"
        "with jax.disable_jit():\n"
        "    print(test_noise.golden_flips('nar') == test_noise.GOLDEN['nar'])\n"
    )
    here = os.path.dirname(os.path.abspath(__file__))
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    finished = subprocess.run(
        [sys.executable, "-c", program, os.path.dirname(here), here],
        env={**environment, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.split() == ["True"] * 2


@pytest.mark.parametrize(
    "kind, options, message",
    [
        ("type1", {}, "type1"),
        ("combined", {"rates": "random"}, "random"),
        ("ncar", {"rate": -0.1}, "-0.1"),
        ("ncar", {"rate": 1.1}, "1.1"),
        ("nar", {"rate": 5.0}, "5.0"),  # per cent by mistake
        ("nar", {"rate": float("nan")}, "nan"),
    ],
)
def test_errors_name_the_bad_value(kind, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        noise.inject(KEY, random_labels(), kind, **options)


@pytest.mark.parametrize("kind", noise.KINDS)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_nothing_in_nothing_out(kind, shape):
    noisy = noise.inject(KEY, np.zeros(shape, np.uint8), kind, rate=0.5)
    assert noisy.shape == shape
    rates = noise.realised(noisy, noisy)
    assert rates.changed == 0 and rates.p01 == rates.p10 == rates.entries == 0


def naive_realised(clean, noisy) -> dict:
    """Counts by loops over entries."""
    rows, labels = clean.shape
    pos, neg = [0] * labels, [0] * labels
    lost, gained = [0] * labels, [0] * labels
    instances = 0
    for i in range(rows):
        changed_here = False
        for l in range(labels):
            if clean[i, l]:
                pos[l] += 1
                lost[l] += not noisy[i, l]
            else:
                neg[l] += 1
                gained[l] += bool(noisy[i, l])
            changed_here |= bool(clean[i, l]) != bool(noisy[i, l])
        instances += changed_here

    def share(a, b):
        return a / b if b else 0.0

    return {
        "p01": share(sum(gained), sum(neg)),
        "p10": share(sum(lost), sum(pos)),
        "p01_per_label": [share(a, b) for a, b in zip(gained, neg, strict=True)],
        "p10_per_label": [share(a, b) for a, b in zip(lost, pos, strict=True)],
        "entries": share(sum(lost) + sum(gained), rows * labels),
        "instances": share(instances, rows),
        "changed": sum(lost) + sum(gained),
    }


def test_realised_rates_by_hand():
    clean = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 0, 0]], np.uint8)
    noisy = np.array([[0, 0, 0], [1, 1, 0], [1, 0, 1], [0, 1, 0]], np.uint8)
    rates = noise.realised(clean, noisy)
    assert rates.p10 == 2 / 4  # (0, 0) and (3, 0) of four positives
    assert rates.p01 == 3 / 8  # (2, 0), (2, 2) and (3, 1) of eight negatives
    np.testing.assert_allclose(rates.p10_per_label, [2 / 3, 0, 0])
    np.testing.assert_allclose(rates.p01_per_label, [1, 1 / 3, 1 / 4])
    assert rates.changed == 5
    assert rates.entries == 5 / 12
    assert rates.instances == 3 / 4
    assert rates.summary() == {
        "p01": 3 / 8,
        "p10": 1 / 2,
        "entries": 5 / 12,
        "instances": 3 / 4,
    }


@pytest.mark.parametrize("kind", FLIPPING)
def test_realised_rates_equal_naive_counts(kind):
    clean = random_labels()
    clean[:, 0], clean[:, 1] = 0, 1  # no positive, no negative
    noisy = noise.inject(KEY, clean, kind, rate=0.3)
    rates = noise.realised(clean, noisy)
    for name, expected in naive_realised(clean, noisy).items():
        np.testing.assert_allclose(getattr(rates, name), expected, err_msg=name)
    assert rates.changed > 0


@pytest.fixture(scope="module")
def bibtex_labels(data_dir) -> np.ndarray:
    """[4880, 159] training labels, read from the ARFF file by pattern."""
    text = (data_dir / "mulan/bibtex/bibtex-train.arff").read_text("latin-1")
    header, body = re.split(r"(?im)^@data\s*$", text, maxsplit=1)
    attributes = re.findall(r"(?im)^@attribute\s+(\S+)", header)
    first = next(i for i, a in enumerate(attributes) if a.startswith("TAG_"))
    rows = re.findall(r"\{(.*?)\}", body)
    labels = np.zeros((len(rows), len(attributes) - first), np.uint8)
    for i, row in enumerate(rows):
        for index in re.findall(r"(\d+)\s+1\b", row):
            if int(index) >= first:
                labels[i, int(index) - first] = 1
    assert labels.shape == (4880, 159)
    return labels


def test_keep_one_weakens_nar_on_bibtex(bibtex_labels):
    """A nominal .5 becomes .32-.38 where rows have few positives (spec section 5)."""
    drawn = [
        noise.realised(
            bibtex_labels,
            noise.inject(KEY, bibtex_labels, "nar", rate=0.5, keep_one=keep_one),
        )
        for keep_one in (True, False)
    ]
    assert 0.32 <= drawn[0].p10 <= 0.38
    assert_binomial(
        round(drawn[1].p10 * bibtex_labels.sum()), int(bibtex_labels.sum()), 0.5
    )
    assert drawn[0].p01 == drawn[1].p01 == 0


def test_combined_noise_leaves_every_bibtex_row_a_positive(bibtex_labels):
    assert bibtex_labels.any(1).all()
    assert noise.inject(KEY, bibtex_labels, "combined").any(1).all()
