"""qswitch from Python: the steps of the command line as functions, re-exported by the package.

    configure -> plan -> distill -> Run.generate, Run.merge

Everything that a command refuses raises here: a `QSwitchError` whose message has the remedy. Nothing is printed but the
progress of training, on stderr. Cold: torch is imported when something trains, generates or merges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qswitch.config import RunConfig
from qswitch.layers import build_config, set_layer
from qswitch.outside import read_json, user_path
from qswitch.presets import load_preset
from qswitch.run_dir import RunDir, folder_of_its_own
from qswitch.state_files import SummaryFile

if TYPE_CHECKING:
    from qswitch.export.merge_report import MergeReport
    from qswitch.plan.run_plan import Plan
    from qswitch.rollout.generate import Generation

Source = RunConfig | str | Path | Mapping[str, Any]
"""A checked configuration; or the name of a preset, a YAML file, or settings by section, as a file has them."""


def configure(
    source: Source | None = None,
    *,
    teacher: str | None = None,
    student: str | None = None,
    data: str | Sequence[str] | None = None,
    method: str | None = None,
    settings: Mapping[str, Any] | None = None,
    vram: str | None = None,
    gpu: str | None = None,
) -> RunConfig:
    """The checked configuration of a run, from a preset, a file, a mapping, or only the names of two models.

    Args:
        source: what to start from. Without it `teacher`, `student` and `data` must be there, and everything else is
            chosen from the shapes of the models, the data and the memory.
        teacher, student: hub id, folder or GGUF file, in place of those of `source`. The student may be `shrink` or
            `shrink:N`: the teacher, cut to two thirds of its layers or to N.
        data: prompts: file, folder or hub id, or several.
        method: switch, gkd, kd, sft, and so on; docs/methods.md has them.
        settings: anything else, as `{"train.max_steps": 100}` or `{"train": {"max_steps": 100}}`.
        vram, gpu: the memory that is chosen for where there is no `source`, for example 12GiB or rtx3060-12gb; both:
            so much of that card; neither: what is free on this machine.

    Raises:
        ConfigError: every problem found, each with its setting.
    """
    named = {"teacher.model": teacher, "student.model": student, "method": method,
             "data.train": data if data is None or isinstance(data, str) else list(data)}  # fmt: skip
    own = set_layer([], {**{key: value for key, value in named.items() if value is not None}, **(settings or {})})
    from qswitch.choose import choose, with_cut_student

    if source is None:
        return choose(own, vram=vram, gpu=gpu).config
    if isinstance(source, RunConfig):
        if not own:
            return source
        below: Mapping[str, Any] = source.model_dump(exclude_unset=True)
    else:
        below = source if isinstance(source, Mapping) else load_preset(source)
    above, _ = with_cut_student(own, below)
    return build_config(below, above, where=str(source) if isinstance(source, str | Path) else None)


def plan(config: Source, *, vram: str | None = None, gpu: str | None = None) -> Plan:
    """What a run would take: memory by part and phase, sizes, time. Loads no weights and no torch.

    The result has `fits`, `total_gib`, `num_steps`, `step_seconds` and `seconds`, `choices`, `config` with the chosen
    sizes written in, and `to_dict()`, which is what `qswitch plan --json` prints, where it adds `data`. Both times are
    None for a CPU, and `seconds` and `num_steps` where nobody has counted the prompts of train.num_epochs.

    Args:
        config: as `configure` takes it.
        vram: budget, for example 12GiB; gpu: a card of the table, for example rtx3060-12gb, by itself for all that it
            leaves free. Neither: what is free on this machine.

    Raises:
        ConfigError: the configuration is wrong, the shape of a model is not known, or the first records of data on
            this disk cannot be read or lack what the method learns from.
    """
    from qswitch.run import preview

    return preview(configure(config), vram=vram, gpu=gpu).plan


def distill(config: Source, output_dir: str | Path | None = None, *, vram: str | None = None) -> Run:
    """Train a student of a teacher in a new folder and return the finished run.

    Args:
        config: as `configure` takes it.
        output_dir: run directory, which must not hold anything; default: runs/<date>-<time>. Of several processes that
            torchrun started the first one's is the run's.
        vram: budget, for example 12GiB; default: what is free.

    Raises:
        PreflightError: what would stop the run, all in one list; no weight was loaded.
        PlanError: no sizes fit the memory; no weight was loaded.
        DataError, ModelError, TrainingError: as their messages say.
        Interrupted: Ctrl-C came, after which a checkpoint was written; `load_run(output_dir).resume()` goes on.
    """
    from qswitch import run
    from qswitch.distill.processes import joined

    with joined() as processes, ExitStack() as held:
        path = processes.from_first(lambda: held.enter_context(folder_of_its_own(output_dir)))
        run.distill(configure(config), path, vram=vram)
        return load_run(path)


def load_run(path: str | Path) -> Run:
    """A run that exists, finished or not.

    Raises:
        RunDirError: `path` is no run directory.
    """
    run_dir = RunDir.open(user_path(path))
    return Run(run_dir.path, run_dir.config)


@dataclass(frozen=True, slots=True)
class Run:
    """A run directory: what the run was told, what it did, and its student."""

    path: Path
    config: RunConfig

    @property
    def summary(self) -> dict[str, Any] | None:
        """RUN/summary.json, for instance `kl_before_nats` and `kl_after_nats`; None while the run has not ended."""
        path = RunDir(self.path, self.config).summary_path
        return dict(read_json(path, SummaryFile)) if path.exists() else None

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of RUN/metrics.jsonl, one a step."""
        return RunDir(self.path, self.config).read_metrics()

    def resume(self, *, settings: Mapping[str, Any] | None = None, vram: str | None = None) -> Run:
        """Go on from the newest checkpoint; `settings` may change learning rates, limits, and when it looks and saves.

        Raises:
            ConfigError: a setting may not change in a run that has begun.
            and what `distill` raises.
        """
        from qswitch import run

        run.resume(self.path, vram=vram, changes=set_layer([], settings))
        return load_run(self.path)

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        seed: int = 0,
        show_writers: bool = False,
    ) -> list[Generation]:
        """The student's answer to each prompt, with `text` and the writer of every token.

        Args:
            prompts: questions, without a template.
            max_new_tokens, temperature: None: the run's.
            seed: another seed, other answers.
            show_writers: let the run's policy write, the teacher included.

        Raises:
            RunDirError: there is no adapter and no checkpoint yet.
            ConfigError: a prompt fills the context of the models.
        """
        from qswitch.rollout.generate import generate_from_run

        asked = [prompts] if isinstance(prompts, str) else list(prompts)
        return generate_from_run(
            self.path, asked, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
            show_writers=show_writers,
        )  # fmt: skip

    def merge(self, output_dir: str | Path | None = None, *, dtype: Literal["bf16", "fp32"] = "bf16") -> MergeReport:
        """Write the student as a plain transformers folder, by default RUN/merged, and compare it with the adapter.

        Raises:
            PlanError: the memory is not there; nothing was read.
            ModelError: there is no adapter yet, or merging changes the logits (then nothing is written).
        """
        from qswitch.export.merge import merge_run

        return merge_run(self.path, output_dir, dtype=dtype)

    def report(self, output: str | Path | None = None) -> Path:
        """Write the page about the run anew, by default RUN/report.html, and return its path."""
        from qswitch.report.page import write_report

        return write_report([self.path], None if output is None else Path(output))
