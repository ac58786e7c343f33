"""What a run leaves on disk, and how it is written so that a crash cannot spoil it.

Files that are read as a whole are written beside their name, flushed and renamed; logs grow by whole lines. Cold: knows
no torch and no model. The file is long because every file of a run has its name here, and who may write there its rule.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import logging
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from qswitch.aside import PARTIAL, append_text, file_aside, made_folder
from qswitch.config import RunConfig
from qswitch.errors import ConfigError, RunDirError
from qswitch.layers import Layer, build_config, by_section, dump_config, flatten, reopened
from qswitch.limits import lost_limits, shown
from qswitch.manifest import MANIFEST, begins_as, entry_of, find_damage
from qswitch.outside import is_kind, user_path
from qswitch.state_files import MetricsLine, RolloutLine
from qswitch.yaml_file import read_yaml

logger = logging.getLogger(__name__)

UNLEARNT = (
    "about", "teacher.model", "teacher.adapter", "teacher.residency", "teacher.responses", "teacher.num_gpus",
    "teacher.shape", "student.model", "student.init_adapter", "student.gradient_checkpointing", "student.shape",
    "data.train", "data.validation", "data.lm_corpus", "rollout.batch_size", "rollout.block_tokens",
    "rollout.student_graphs", "rollout.teacher_graphs", "loss.chunk_tokens", "cache.device_budget_gib",
    "cache.host_budget_gib", "train.device",
)  # fmt: skip
"""Settings and sections that say where something lies, or change speed and memory only; the data and a store of the
teacher's work have checks of their own."""
KEPT_FILES = (
    "metrics.jsonl", "rollouts.jsonl", "held_out.json", "pass_times.json", "student_graphs.json", "teacher_graphs.json",
)  # fmt: skip
"""What a run goes on with beside its checkpoints, and does not write anew."""
LOCK = ".lock"
"""File whose lock the command that writes to a folder holds."""
STORE = "store.json"
"""What a store of a teacher's work says of itself, and where it says so."""
Command = Literal["distill", "teach"]
"""What makes a folder with a config.yaml."""
CHANGEABLE = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "max_grad_norm", "max_steps", "max_tokens", "max_seconds",
    "eval_steps", "eval_own_prompts", "save_steps", "save_total_limit", "report_to",
)  # fmt: skip
"""Settings of the train section that a run may go on with otherwise than it began: learning rates, limits, and when it
looks, saves and reports."""


class RunDir:
    """RUN/: config.yaml, plan.json, pass_times.json, student_graphs.json, metrics.jsonl, rollouts.jsonl, held_out.json,
    threshold.json, summary.json, checkpoints/, adapter/, student/."""

    def __init__(
        self,
        path: Path,
        config: RunConfig,
        changes: Mapping[str, list[Any]] | None = None,
        *,
        writes: bool = True,
    ) -> None:
        self.path, self.config = path, config
        self.writes = writes
        """Whether logs and JSON files are this process's to write; else the methods that write do nothing."""
        self.changes = dict(changes or {})
        """Settings that differ from RUN/config.yaml: [there, here]."""

    @classmethod
    def create(cls, path: Path, config: RunConfig, command: Command = "distill") -> RunDir:
        """Start a run directory, or the folder of a store; its config.yaml is written first.

        Raises:
            RunDirError: the folder holds something already, or cannot be made.
        """
        make_folder(path)
        cls.refuse_existing(path, command)
        run = cls(path, config)
        write_atomically(run.config_path, dump_config(config))
        return run

    @staticmethod
    def refuse_existing(path: Path, command: Command = "distill") -> None:
        """Nothing, or an error where a new run, or the store that `command` makes, must not be written.

        Raises:
            RunDirError: the path is a file, or a folder that holds something.
        """
        if path.is_file():
            raise RunDirError(f"{path} is a file. Choose another --output-dir.")
        if holds_something(path):
            maker = maker_of(path) or command  # with settings alone it is of the command that is repeated
            begun = (path / "config.yaml").exists()
            remedy = f"Resume it with `qswitch {maker} --resume {path}`" if begun else "Empty it"
            raise RunDirError(f"{path} is not empty. {remedy}, or choose another --output-dir.")

    def discard_unstarted(self) -> None:
        """Remove the folder of a run that was stopped before its first step; one that has steps stays."""
        if not self.has_begun:
            shutil.rmtree(self.path, ignore_errors=True)

    @classmethod
    def open(cls, path: Path, changes: Layer | None = None, *, writes: bool = True, trains: bool = False) -> RunDir:
        """Open an existing run, to look at it, or with `trains` to go on, with its settings changed by `changes`.

        Raises:
            RunDirError: the folder or its config.yaml is missing.
            ConfigError: its config.yaml is not valid, or makes no run that could train where it is to; or a setting may
                not change in a run that has begun.
        """
        path = user_path(path)
        config_path = path / "config.yaml"
        if not config_path.is_file():
            reason = "holds no config.yaml, so it is no run directory" if path.is_dir() else "does not exist"
            raise RunDirError(f"{path} {reason}. Name the folder that `qswitch distill` printed.")
        if maker_of(path) == "teach":
            raise RunDirError(
                f"{path} is a store of a teacher's work, no run. A run learns from it with --set teacher.responses="
                f"{path}; what is missing of it is written by `qswitch teach --resume {path}`."
            )
        written = reopened(read_yaml(config_path), str(config_path))
        config = build_config(written, where=str(config_path), trains=trains and not changes)
        if not changes:
            return cls(path, config, writes=writes)
        allowed = [f"train.{name}" for name in CHANGEABLE]
        refused = sorted(flatten(by_section(changes)).keys() - set(allowed))
        if refused:
            raise ConfigError(
                f"{', '.join(refused)} cannot change in a run that has begun, because what it has learnt depends on "
                f"it. Start a new run. What may change: {', '.join(allowed)}."
            )
        changed = build_config(written, changes, where="--set", trains=trains)
        pairs = {f"train.{n}": [getattr(config.train, n), getattr(changed.train, n)] for n in CHANGEABLE}
        differing = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
        run = cls(path, changed, differing, writes=writes)
        if writes and (lost := lost_limits(config, changed, flatten(by_section(changes)))):
            logger.warning("%s", lost)
        return run

    def record_changes(self) -> None:
        """Make the changes those of the run: its config.yaml, and a line of changes.jsonl that says from where on."""
        if self.changes and self.writes:
            newest = self.latest_checkpoint()
            at = None if newest is None else newest.name
            _append_lines(self.path / "changes.jsonl", [{"resumed_from": at, "changes": self.changes}])
            write_atomically(self.config_path, dump_config(self.config))

    @property
    def has_begun(self) -> bool:
        """Whether a step was taken, or a teacher has written text for it."""
        text = any(self.teacher_text_path.glob("*.jsonl"))
        return text or self.metrics_path.exists() or bool(self.checkpoints())

    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def rollouts_path(self) -> Path:
        return self.path / "rollouts.jsonl"

    @property
    def summary_path(self) -> Path:
        return self.path / "summary.json"

    @property
    def checkpoints_path(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter_path(self) -> Path:
        return self.path / "adapter"

    @property
    def report_path(self) -> Path:
        """One page about the run."""
        return self.path / "report.html"

    @property
    def held_out_path(self) -> Path:
        """Answers to a few held-out prompts before and after training, and the figures of every one of them."""
        return self.path / "held_out.json"

    @property
    def threshold_path(self) -> Path:
        """State of a threshold that adapts, as of the last checkpoint."""
        return self.path / "threshold.json"

    @property
    def student_base_path(self) -> Path:
        """The student's base where it was cut from a larger model for this run."""
        return self.path / "student"

    @property
    def teacher_text_path(self) -> Path:
        """What a teacher with another tokenizer wrote, as records."""
        return self.path / "teacher_text"

    @property
    def pass_times_path(self) -> Path:
        """Seconds of a pass of each model, measured once, from which rollout.block_tokens=auto chooses."""
        return self.path / "pass_times.json"

    @property
    def student_graphs_path(self) -> Path:
        """Whether the student's passes are replayed as CUDA graphs, and why; found out once."""
        return self.path / "student_graphs.json"

    @property
    def teacher_graphs_path(self) -> Path:
        """The same of the teacher's passes."""
        return self.path / "teacher_graphs.json"

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl."""
        if self.writes:
            _append_lines(self.metrics_path, [metrics])

    def append_rollouts(self, rollouts: Iterable[Mapping[str, Any]]) -> None:
        """Lines of rollouts.jsonl."""
        if self.writes:
            _append_lines(self.rollouts_path, rollouts)

    def write_json(self, name: str, value: Any) -> None:
        """RUN/name, whole or not at all."""
        if not self.writes:
            return
        write_atomically(self.path / name, json.dumps(value, indent=1, ensure_ascii=False) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a damaged one is left out and named, the unfinished last one of a crash not."""
        return read_lines(self.metrics_path, MetricsLine)

    def read_rollouts(self) -> list[dict[str, Any]]:
        """The lines of rollouts.jsonl, as `read_metrics`."""
        return read_lines(self.rollouts_path, RolloutLine)

    def truncate_logs(self, step: int) -> None:
        """Drop log lines after `step`, which a resumed run writes again."""
        if not self.writes:
            return
        for path, kind in ((self.metrics_path, MetricsLine), (self.rollouts_path, RolloutLine)):
            if path.exists():
                kept = [line for line in read_lines(path, kind) if line["step"] <= step]
                write_atomically(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))

    def checkpoints(self) -> list[Path]:
        """The checkpoints, oldest first; one that is being written, or was set aside as damaged, is none."""
        return sorted(p for p in self.checkpoints_path.glob("step-*") if p.is_dir())

    def as_written(self) -> dict[str, Any]:
        """What a checkpoint keeps of the rest of the run: its settings, and the files that it has written so far."""
        files = {name: entry_of(self.path / name) for name in KEPT_FILES if (self.path / name).is_file()}
        return {"settings": _settings(self.config), "kept_files": files}

    def changed_since(self, written: Mapping[str, Any]) -> list[str]:
        """What differs from a checkpoint's `as_written`, for the user; nothing of an older checkpoint's.

        Raises:
            RunDirError: config.yaml has other settings than the checkpoint, of those that may not change.
        """
        before, now = written.get("settings", {}), _settings(self.config)
        changed = [key for key in before if key in now and before[key] != now[key]]
        allowed = (*(f"train.{name}" for name in CHANGEABLE), *UNLEARNT)
        refused = [key for key in changed if not any(f"{key}.".startswith(f"{one}.") for one in allowed)]
        if refused:
            listed = ", ".join(f"{key} is {now[key]}, was {before[key]}" for key in refused[:5])
            raise RunDirError(
                f"{self.config_path} is not the one that the newest checkpoint was written with: {listed}. Write them "
                "back; a run with other settings is a new run."
            )
        said = [f"{key} is {shown(key, now)} now, it was {shown(key, before)}" for key in changed]
        for name, entry in written.get("kept_files", {}).items():
            if not begins_as(self.path / name, entry):
                said.append(f"{self.path / name} is not as it was written: what it says of earlier steps may be wrong")
        return said

    def trained_weights(self) -> Path:
        """RUN/adapter, else the adapter of the newest whole checkpoint: what a run has trained, as it was written.

        Raises:
            RunDirError: there is nothing yet, or it is damaged; says what to do.
        """
        if self.adapter_path.is_dir():
            known = (self.adapter_path / MANIFEST).exists()  # older runs have none
            if known and (damage := find_damage(self.adapter_path)) is not None:
                raise RunDirError(
                    f"{self.adapter_path} is not as it was written: {damage}. Remove that folder; `qswitch distill "
                    f"--resume {self.path}` makes it again from the best checkpoint."
                )
            return self.adapter_path
        found = self.checkpoints()
        for folder in reversed(found):
            damage = find_damage(folder)
            if damage is None:
                logger.warning("%s has not finished; the weights of %s are used", self.path, folder.name)
                return folder / "adapter"
            logger.warning("%s is damaged: %s", folder, damage)
        if found:
            raise RunDirError(
                f"No checkpoint in {self.checkpoints_path} is as it was written. Restore one from a copy."
            )
        raise RunDirError(f"{self.path} holds no adapter yet. Wait for its first checkpoint, or resume the run.")

    def latest_checkpoint(self) -> Path | None:
        """The newest checkpoint; None where there is none."""
        found = self.checkpoints()
        return found[-1] if found else None


def _settings(config: RunConfig) -> dict[str, Any]:
    """Dotted setting -> value, as JSON has it."""
    return {key: json.loads(json.dumps(value)) for key, value in flatten(config.model_dump(mode="json")).items()}


def teacher_share(lines: Iterable[Mapping[str, Any]]) -> float | None:
    """The share of a run's generated tokens that the teacher wrote, by its metrics; None where no step counted it."""
    counted = [(x["teacher_share"], x.get("rollout_tokens") or 0) for x in lines if x.get("teacher_share") is not None]
    tokens = sum(count for _, count in counted)
    return sum(share * count for share, count in counted) / tokens if tokens else None


@contextlib.contextmanager
def folder_of_its_own(named: str | Path | None, label: str = "") -> Iterator[Path]:
    """Where a new run or store is written: `named`, `~` expanded, else runs/<label>-<date>-<time>.

    The latter is made at once, with a number where another began in that second, and vanishes where it stays empty.

    Raises:
        RunDirError: it cannot be made.
    """
    if named is not None:
        yield user_path(named)
        return
    name = f"{label}-" * bool(label) + time.strftime("%Y%m%d-%H%M%S")
    names = (name if n == 1 else f"{name}-{n}" for n in itertools.count(1))
    runs = Path("runs")
    made = [] if runs.exists() else [runs]
    path = next(path for path in (runs / name for name in names) if _make_alone(path))
    try:
        yield path
    finally:
        for folder in (path, *made):
            with contextlib.suppress(OSError):  # it holds something
                folder.rmdir()


def _make_alone(path: Path) -> bool:
    """Whether `path` was made here, and not by another process."""
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        return False
    except OSError as error:
        raise RunDirError(f"{path} cannot be made ({error.strerror}). Choose another --output-dir.") from error
    return True


def maker_of(path: Path) -> Command | None:
    """The command whose work a folder holds; None where it holds none of either."""
    if any((path / name).exists() for name in ("data.json", "metrics.jsonl", "checkpoints", "adapter")):
        return "distill"
    return "teach" if (path / STORE).exists() or any(path.glob("part-*")) else None


def holds_something(path: Path) -> bool:
    """Whether a folder is there and holds more than a lock, and what a start that was killed left half-written."""
    return path.is_dir() and any(p.name != LOCK and PARTIAL.fullmatch(p.name) is None for p in path.iterdir())


def make_folder(path: Path) -> Path:
    """`path`, which is a folder now.

    Raises:
        RunDirError: it cannot be made.
    """
    try:
        with made_folder(path):
            return path
    except OSError as error:
        raise RunDirError(f"{path} cannot be made ({error.strerror}). Choose another --output-dir.") from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else writes to `folder` meanwhile; the lock ends with the process, however it ends.

    Raises:
        RunDirError: another command is writing to it.
    """
    import filelock  # asyncio comes with it; most commands lock nothing

    lock = filelock.FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise RunDirError(f"Another qswitch command is writing to {folder}. Wait until it ends, or stop it.") from None
    except (OSError, NotImplementedError) as error:  # filelock's own word for ENOSYS, before its 3.24
        if isinstance(error, OSError) and error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
        yield  # a disk of a network without locks, where nobody can tell
        return
    try:
        yield
    finally:
        lock.release()


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text`, UTF-8: readers see the old or the new file, never a part."""
    with file_aside(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _append_lines(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
    if text:
        append_text(path, text)


def read_lines(path: Path, kind: type[Any]) -> list[dict[str, Any]]:
    """The lines of a file of JSON lines, each of `kind`; a damaged one is left out and named.

    A last line without its end, which a crash cut off, is left out without a word. No file, no lines.
    """
    if not path.exists():
        return []
    # Not splitlines: it also splits at U+2028 and the like, which models write and JSON does not escape.
    *whole, _unfinished = path.read_bytes().split(b"\n")
    lines, damaged = [], []
    for number, text in enumerate(whole, start=1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):  # no JSON, or not even UTF-8
            line = None
        if is_kind(line, kind):
            lines.append(line)
        else:
            damaged.append(number)
    if damaged:
        listed = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
        logger.warning("%s: %d damaged lines are left out (%s)", path, len(damaged), listed)
    return lines
