"""Command line: python -m cbmlc_jax.main --config=configs/bibtex.py [--mode=...]."""

from __future__ import annotations

import os
import shlex
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from cbmlc_jax import config as config_lib
from cbmlc_jax import errors

_DEFAULT = os.path.join(
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
    "configs",
    "synthetic.py",
)


def define_flags() -> None:
    """Defines the flags; a config that cannot be read fails here already."""
    text, number = flags.DEFINE_string, flags.DEFINE_float
    config_flags.DEFINE_config_file(
        "config",
        _DEFAULT,
        "A file in configs/, with :preset where it has one.",
        lock_config=True,
    )
    text("workdir", None, "The run's folder; default runs/<config>-<noise>-<seed>.")
    modes = ("train", "eval", "predict", "calibrate", "export", "data", "audit")
    flags.DEFINE_enum(
        "mode",
        "train",
        modes,
        "What to do; data: describe the data; audit: list likely wrong labels.",
    )
    text("input", None, "predict: rows as in training, or JSON lines.")
    text("output", None, "JSON lines, or a JSON file; export: a folder.")
    flags.DEFINE_enum(
        "protocol",
        "auto",
        ("auto", "oracle", "clean_val", "noisy_val", "corrected_val"),
        "predict: whose threshold; auto: corrected_val where the rates are known.",
    )
    flags.DEFINE_enum(
        "metric", "miF1", ("ebF1", "miF1", "maF1"), "predict: the threshold's metric."
    )
    number("threshold", None, "predict: stands over --protocol.", 0.0, 1.0)
    number("precision", None, "predict: the least, promised on validation.", 0.0, 1.0)
    flags.DEFINE_bool("per_label", False, "predict: each label by its expected F1.")
    flags.DEFINE_bool("per_row", False, "predict: each row by its expected F1.")
    kinds = ("none", "temperature", "platt", "isotonic")
    flags.DEFINE_enum("calibrate", "none", kinds, "predict: of the scores written.")
    flags.DEFINE_integer("min_labels", 0, "predict: at least so many of a row.", 0)
    flags.DEFINE_integer("max_labels", None, "predict: at most so many of a row.", 1)
    flags.DEFINE_integer("top_k", None, "predict: write only the best scores.", 1)
    flags.DEFINE_integer("top", 200, "audit: issues on the page.", 1)
    ways = ("none", "drop", "flip", "soft")
    what = "audit: write labels to train on, with the likely wrong ones so treated."
    flags.DEFINE_enum("apply", "none", ways, what)
    text("coordinator", None, "train with others: host:port of process 0, or `auto`.")
    flags.DEFINE_integer("num_processes", None, "train with others: how many.", 1)
    flags.DEFINE_integer("process_id", None, "train with others: this one's, from 0.")


def main(argv: list[str]) -> None:
    """Dispatches on --mode."""
    if len(argv) > 1:
        raise config_lib.ConfigError(f"unknown argument {argv[1]!r}")
    values = flags.FLAGS
    if values.coordinator and values.mode != "train":
        raise config_lib.ConfigError(
            f"--coordinator is for --mode=train: start --mode={values.mode} in one "
            "process"
        )
    if not values["verbosity"].present:
        logging.set_verbosity(logging.FATAL)  # Orbax logs what it raises, too
    config = values.config
    config_lib.settle(config, set(values["config"].override_values))
    path = values["config"].config_filename or _DEFAULT
    workdir = values.workdir or os.path.join("runs", config_lib.run_name(path, config))
    command = "python -m cbmlc_jax.main " + shlex.join(sys.argv[1:])
    if values.mode == "predict":
        from cbmlc_jax import predict

        rule = predict.rule_of(values)
        predict.predict_file(workdir, values.input, values.output, rule, values.top_k)
        return
    if values.mode == "calibrate":
        from cbmlc_jax import predict

        predict.reliability(workdir, values.protocol, values.output)
        return
    if values.mode == "export":
        from cbmlc_jax import export, predict

        export.export_run(workdir, values.output, predict.rule_of(values))
        return
    if values.mode == "data":
        from cbmlc_jax import describe

        describe.run_description(config, values.output)
        return
    if values.mode == "audit":
        from cbmlc_jax import audit, parallel

        parallel.keep_memory()
        audit.run_audit(config, workdir, command, top=values.top, apply=values.apply)
        return
    if values.mode == "eval":
        from cbmlc_jax import run as run_lib

        run_lib.evaluate_checkpoint(workdir, config_lib.data_dir(config), command)
        return
    from cbmlc_jax import fit, parallel, processes, replicas

    parallel.keep_memory()
    if values.coordinator:
        processes.join(values.coordinator, values.num_processes, values.process_id)
    with processes.together():
        if config.train.num_replicas > 1:
            replicas.train_and_evaluate(config, workdir, command)
            return
        done = fit.train_and_evaluate(config, workdir, command)
    if done is None and processes.is_first():
        print(f"{workdir} holds a finished run: see report.txt there")


def _parse(argv: list[str]) -> list[str]:
    with errors.in_flags():
        return flags.FLAGS(argv)


def run() -> None:
    """Entry point: a user's mistake becomes one sentence, not a traceback."""
    with errors.explained():
        with errors.in_flags():
            define_flags()
        app.run(main, flags_parser=_parse)


if __name__ == "__main__":
    run()
