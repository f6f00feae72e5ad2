"""The numbers that the paper prints, all of them in this one place.

Source: "Evaluating Multi-label Classifiers with Noisy Labels", Tables 1-4; Figure 4 as
the values in the authors' plotting code.  All were found with thresholds chosen on the
test labels: of ours, only the protocol `oracle` may be held against them.

Data sets and models carry the names of our result rows; the paper's RCV1 is
"rcv1-swapped".  F1s are in the order ebF1, miF1, maF1; None where nothing is printed.
"""

from __future__ import annotations

F1s = tuple[float | None, float | None, float | None]

# Table 1, clean labels.
CLEAN: dict[str, dict[str, F1s]] = {
    "bibtex": {
        "mlknn": (0.1826, 0.1782, 0.0727),
        "sleec": (0.4490, 0.4074, 0.2937),
        "seq2seq": (0.393, 0.384, 0.282),
        "lamp": (0.447, 0.473, 0.376),
        "mpvae": (0.4534, 0.4800, 0.3863),
        "cbmlc": (0.4566, 0.4837, 0.4014),
    },
    "reuters": {
        "seq2seq": (0.8917, 0.8545, 0.4567),
        "lamp": (0.8950, 0.8770, 0.5600),
        "cbmlc": (0.9064, 0.8893, 0.6024),
    },
    "delicious": {
        "mlknn": (0.2590, 0.2639, 0.0526),
        "sleec": (0.3081, 0.3333, 0.1418),
        "seq2seq": (0.320, 0.329, 0.166),
        "lamp": (0.372, 0.386, 0.196),
        "mpvae": (0.3732, 0.3934, 0.1814),
        "cbmlc": (0.3558, 0.3699, 0.1984),
    },
    "rcv1-swapped": {
        "seq2seq": (0.8899, 0.8797, 0.7258),
        "lamp": (0.887, 0.877, 0.740),
        "cbmlc": (0.8868, 0.8735, 0.7460),
    },
    "voc": {
        "ml_gcn": (0.9019, 0.8904, 0.8784),
        "resnet_bce": (0.8903, 0.8800, 0.8657),
        "resnet_asl": (0.8839, 0.8743, 0.8599),
        "cbmlc": (0.9067, 0.8933, 0.8822),
    },
}
# What the paper does not name: the best of the other systems.
BEST_OTHER = "best other"
# Table 2, one positive a row.
SINGLE_POSITIVE: dict[str, dict[str, F1s]] = {
    "bibtex": {
        BEST_OTHER: (None, 0.3572, 0.2387),
        "cbmlc": (None, 0.4210, 0.3049),
    },
    "reuters": {
        BEST_OTHER: (None, 0.8165, 0.4000),
        "cbmlc": (None, 0.8581, 0.4758),
    },
    "delicious": {
        BEST_OTHER: (None, 0.2737, 0.0363),
        "cbmlc": (None, 0.2805, 0.0636),
    },
    "rcv1-swapped": {
        BEST_OTHER: (None, 0.8483, 0.6770),
        "cbmlc": (None, 0.8448, 0.7007),
    },
    "voc": {
        BEST_OTHER: (None, 0.8350, 0.8302),
        "cbmlc": (None, 0.8447, 0.8442),
    },
}
# Table 3, combined noise.
COMBINED: dict[str, dict[str, F1s]] = {
    "bibtex": {
        BEST_OTHER: (None, 0.3238, 0.1888),
        "cbmlc": (None, 0.3282, 0.1993),
    },
    "reuters": {
        BEST_OTHER: (None, 0.7484, 0.2768),
        "cbmlc": (None, 0.8200, 0.3325),
    },
    "delicious": {
        BEST_OTHER: (None, 0.1973, 0.0682),
        "cbmlc": (None, 0.3290, 0.0811),
    },
    "rcv1-swapped": {
        BEST_OTHER: (None, 0.8579, 0.6646),
        "cbmlc": (None, 0.8580, 0.6735),
    },
    "voc": {
        BEST_OTHER: (None, 0.7138, 0.6281),
        "cbmlc": (None, 0.7621, 0.7281),
    },
}
# Table 4, clean labels: the vectors of the label nodes stay fixed, or are regularised.
FIXED, REGULARISED = "fixed", "regularised"
ABLATION: dict[str, dict[str, F1s]] = {
    "bibtex": {
        FIXED: (0.4484, 0.4814, 0.3834),
        REGULARISED: (0.4538, 0.4893, 0.3940),
    },
    "reuters": {
        FIXED: (0.9045, 0.8830, 0.5530),
        REGULARISED: (0.9064, 0.8893, 0.6024),
    },
    "delicious": {
        FIXED: (0.3634, 0.3749, 0.1949),
        REGULARISED: (0.3558, 0.3699, 0.1984),
    },
    "rcv1-swapped": {
        FIXED: (0.8867, 0.8734, 0.7320),
        REGULARISED: (0.8868, 0.8735, 0.7460),
    },
    "voc": {
        FIXED: (0.9023, 0.8901, 0.8797),
        REGULARISED: (0.9049, 0.8919, 0.8822),
    },
}
# Figure 3 where it is printed as numbers: (data set, noise, model) -> {F1: scores at
# RATES}.  The row of delicious under ncar is corrupt in print and left out.
RATES = {"ncar": (0.01, 0.02, 0.03, 0.04, 0.05), "nar": (0.1, 0.2, 0.3, 0.4, 0.5)}
BY_RATE: dict[tuple[str, str, str], dict[str, tuple[float, ...]]] = {
    ("rcv1-swapped", "ncar", "cbmlc"): {
        "miF1": (0.8725, 0.8726, 0.8688, 0.8706, 0.8689),
        "maF1": (0.7372, 0.7249, 0.7242, 0.7212, 0.7236),
    },
    ("rcv1-swapped", "nar", "cbmlc"): {
        "miF1": (0.8720, 0.8710, 0.8712, 0.8674, 0.8658),
        "maF1": (0.7430, 0.7350, 0.7355, 0.7393, 0.7290),
    },
    ("delicious", "nar", "cbmlc"): {
        "miF1": (0.3668, 0.3544, 0.3543, 0.3482, 0.3306),
        "maF1": (0.1933, 0.1911, 0.1839, 0.1763, 0.1708),
    },
    ("delicious", "nar", BEST_OTHER): {
        "miF1": (0.3689, 0.3646, 0.3644, 0.3634, 0.3620),
    },
}
# Figure 4: (regularised, without word vectors).
DISTANCES: dict[str, tuple[float, float]] = {
    "bibtex": (0.418, 0.504),
    "reuters": (0.522, 0.496),
    "delicious": (0.220, 0.399),
    "rcv1-swapped": (0.497, 0.569),
    "voc": (0.695, 0.720),
}
