"""Which failures a user can mend, and the exit code of each.

Every message says what is wrong (with the numbers), where, and the remedy. `cli.py` is the only place that turns an
exception into an exit code; whoever catches one before has something to do about it, as `chat`, which goes on.
"""

from __future__ import annotations

from typing import Literal


class QSwitchError(Exception):
    """A failure with a message for the user; exit code 2 unless a subclass says otherwise."""

    exit_code = 2


class ConfigError(QSwitchError):
    """The configuration is wrong: unknown keys, bad values, settings that have no effect together."""

    def __init__(self, problems: list[str] | str, where: str | None = None) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        self.where = where
        head = f"{where}: " if where else ""
        if len(self.problems) == 1:
            message = head + self.problems[0]
        else:
            message = f"{head}{len(self.problems)} problems:\n" + "\n".join(f"  - {p}" for p in self.problems)
        super().__init__(message)


class DataError(QSwitchError):
    """A data file cannot be read as prompts; the message names file, line and reason."""


class ModelError(QSwitchError):
    """A model cannot be found, loaded, quantised, adapted, shrunk or exported."""


class TokenizerMismatchError(ModelError):
    """Teacher and student do not map the same text to the same token ids."""


class RunDirError(QSwitchError):
    """The run directory is missing, incomplete, or belongs to another configuration."""


class TrainingError(QSwitchError):
    """Training cannot go on (for instance a non-finite loss); the last checkpoint is intact."""


class NonFiniteError(TrainingError):
    """A model computed NaN or infinity; `role` is the one to blame, teacher or student."""

    def __init__(self, role: Literal["teacher", "student"], what: str) -> None:
        self.role = role
        super().__init__(f"The {role}'s {what} NaN or infinite.")


class Interrupted(KeyboardInterrupt):
    """The user stopped a run, which is no failure; it can be resumed. Its argument is the run directory."""


class PlanError(QSwitchError):
    """The plan does not fit the memory budget."""

    exit_code = 3
