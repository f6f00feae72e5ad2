"""A user's mistake becomes one sentence and a status, never a traceback.

Every exception class that this package or experiments/ defines means a mistake that
the user can mend (ConfigError, DataError, EmbeddingError, CheckpointError, RunError,
DeviceError, ...), as do the operating system's own (no such file, disk full).
Anything else is our bug and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import sys
from collections.abc import Iterator

from absl import flags

from cbmlc_jax import config as config_lib


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Prints the sentence of a user's mistake and exits with 1; 130 when stopped."""
    try:
        yield
    except KeyboardInterrupt:
        print("\nstopped; the same command resumes", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if not is_mistake(error):
            raise
        sys.stdout.flush()
        print(f"error: {sentence(error)}", file=sys.stderr, flush=True)
        # At once: what Orbax and tensorstore had under way would print tracebacks of
        # its own while the interpreter shuts down.
        os._exit(1)


def is_mistake(error: Exception) -> bool:
    """Whether the user can mend it."""
    ours = type(error).__module__.startswith(("cbmlc_jax.", "experiments."))
    return ours or isinstance(error, OSError)


def sentence(error: Exception) -> str:
    """One line of text."""
    if isinstance(error, OSError) and error.strerror:
        name = f"{error.filename}: " if error.filename else ""
        return f"{name}{error.strerror}"
    return " ".join(str(error).split())


@contextlib.contextmanager
def in_flags() -> Iterator[None]:
    """Turns what absl and ml_collections raise on a flag into a ConfigError.

    Raises:
        ConfigError: an unknown flag or key, a wrong type, no such config file.
    """
    try:
        yield
    except config_lib.ConfigError:
        raise
    except flags.UnrecognizedFlagError as error:
        hint = _nearest(error.flagname)
        raise config_lib.ConfigError(
            f"there is no flag --{error.flagname}{hint}"
        ) from error
    except (AttributeError, KeyError) as error:
        text = " ".join(str(error.args[0]).split())
        raise config_lib.ConfigError(f"--config has no key {text}") from error
    except (flags.Error, TypeError, ValueError, OSError, ImportError) as error:
        # A config file's own error arrives as the text of a traceback.
        text = str(error).strip().splitlines()[-1]
        text = text.rpartition("failure to load: ")[2]
        text = re.sub(r"^cbmlc_jax\.config\.ConfigError: ", "", text)
        raise config_lib.ConfigError(text) from error


def _nearest(flag: str) -> str:
    known = [
        *flags.FLAGS,
        *(f"config.{k}" for k in config_lib.flatten(config_lib.base())),
    ]
    near = difflib.get_close_matches(flag, known, 1)
    return f"; did you mean --{near[0]}?" if near else ""
