"""What a user can mend, said in one sentence; every part of the package may import this file.

The command line prints the sentence of an `UnderstudyError` and exits with 1. Anything else that reaches it is a
fault of ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UnderstudyError(Exception):
    """Something that the user can mend; its text says what is wrong and what to do."""


class ConfigError(UnderstudyError):
    """A setting that is unknown, out of range, or at odds with another."""


class DataError(UnderstudyError):
    """Images or labels that cannot be used as they are."""


class ModelError(UnderstudyError):
    """A model that cannot be built, loaded, or used with these data."""


class RunError(UnderstudyError):
    """A run folder that cannot be used: it exists, is owned by another process, or is damaged."""


class TrainingError(UnderstudyError):
    """Training that had to stop, such as a loss that is not a number."""


class Interrupted(BaseException):
    """The user asked to stop and what was going on is saved. Not an `Exception`: only the command line catches it."""


def near(name: str, choices: Iterable[str]) -> str:
    """Return `" Did you mean 'x' or 'y'?"` for the choices nearest to `name`, or `""` where none is near."""
    names = list(choices)
    by_lower = {choice.lower(): choice for choice in names}
    close = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.6)
    if not close:
        return ""
    return " Did you mean " + " or ".join(f"'{by_lower[match]}'" for match in close) + "?"


def unknown(kind: str, name: str, choices: Iterable[str]) -> str:
    """Return the sentence for an unknown name: the near matches, or all choices where there are few."""
    names = sorted(choices)
    hint = near(name, names)
    if not hint and len(names) <= 20:
        hint = " Known: " + ", ".join(names) + "."
    return f"Unknown {kind} '{name}'.{hint}"
