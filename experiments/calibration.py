"""How near a corrected ECE is to the true one: for runs whose noise was planted.

    python -m experiments.calibration --output=runs/figures WORKDIR ...

reads the validation scores of a run, and its data set for the clean labels, and prints
a JSON line for each kind of calibration:

    noisy      ECE against the noisy labels, uncorrected
    corrected  ECE that `--mode=calibrate` estimates from the noisy labels
    true       ECE against the clean labels of the same rows

all cross-fitted.  With --output also a reliability plot, as PNG and SVG; it needs the
package extra `report`.
"""

from __future__ import annotations

import argparse
import io
import json
import os

from cbmlc_jax import calibration, errors, files, task, validation, workdirs
from cbmlc_jax.evaluate import Validation
from cbmlc_jax.thresholds import Rates
from experiments.figures import COLOURS, SIZE, STYLE

_NONE = Rates(0.0, 0.0)


def compare(kept: Validation, clean) -> list[dict]:
    """The lines of a run.

    Args:
        kept: its validation rows.
        clean: uint8 [N, L] their clean labels.
    """
    rates = kept.rates_for("corrected_val")
    lines = []
    for kind in ("none", *calibration.KINDS):
        p = calibration.cross_fitted(kind, kept.scores, kept.labels, rates)
        found = {
            "noisy": calibration.reliability(p, kept.labels, _NONE),
            "corrected": calibration.reliability(p, kept.labels, rates),
            "true": calibration.reliability(p, clean, _NONE),
        }
        ece = {name: table["ece"] for name, table in found.items()}
        lines.append({"calibration": kind} | ece | {"tables": found})
    return lines


def figure(lines: list[dict], title: str, kind: str) -> bytes:
    """Said probability against the share of labels that hold: corrected, and true."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context(STYLE):
        drawn, axes = pyplot.subplots(figsize=SIZE, layout="constrained")
        axes.plot([0, 1], [0, 1], color="#999999", lw=1)
        for line, colour in zip(lines, COLOURS, strict=False):
            for name, style in (("corrected", "o-"), ("true", "x:")):
                bins = line["tables"][name]["bins"]
                axes.errorbar(
                    [b["mean"] for b in bins],
                    [b["share"] for b in bins],
                    [b["spread"] for b in bins] if name == "corrected" else None,
                    fmt=style,
                    color=colour,
                    ms=4,
                    lw=1,
                    label=f"{line['calibration']}, {name}",
                )
        axes.set(xlabel="probability that is said", ylabel="share of labels that hold")
        axes.set_title(title)
        axes.legend(fontsize=8)
        buffer = io.BytesIO()
        drawn.savefig(
            buffer, format=kind, metadata={"Date": None} if kind == "svg" else {}
        )
        pyplot.close(drawn)
    return buffer.getvalue()


def main() -> None:
    """Prints the lines of the given workdirs; draws them."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.calibration", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR")
    parser.add_argument("--output", help="folder for PNG and SVG files")
    arguments = parser.parse_args()
    with errors.explained():
        for workdir in arguments.workdirs:
            kept = validation.read(workdir)
            built = task.build(workdirs.trained_config(workdir))
            lines = compare(kept, built.validation_clean)
            name = os.path.basename(os.path.normpath(workdir))
            for line in lines:
                shown = {k: v for k, v in line.items() if k != "tables"}
                print(json.dumps({"run": name} | shown), flush=True)
            if arguments.output:
                os.makedirs(arguments.output, exist_ok=True)
                for kind in ("png", "svg"):
                    path = os.path.join(arguments.output, f"reliability-{name}.{kind}")
                    files.write_atomic(path, figure(lines, name, kind))


if __name__ == "__main__":
    main()
