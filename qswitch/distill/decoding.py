"""How rollouts are decoded in a run: draft length and CUDA graphs, from measurements that are taken once and kept."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from pathlib import Path

import torch

from qswitch.aside import file_aside
from qswitch.config import RunConfig
from qswitch.distill.processes import Processes
from qswitch.distill.progress import Progress
from qswitch.models.gguf_cache import cache_folder
from qswitch.models.host_memory import freed_memory_kept
from qswitch.models.language_model import LanguageModel
from qswitch.outside import read_json
from qswitch.plan.memory import KEPT_BUFFER_BYTES
from qswitch.rollout.block_length import (
    Acceptance,
    AutoBlock,
    BlockLength,
    FixedBlock,
    PassTimes,
    drafts_within_scratch,
)
from qswitch.rollout.graph_trial import try_graphs
from qswitch.rollout.pass_times import LIMIT_S, measure_pass_times
from qswitch.rollout.step_graph import StepGraphs
from qswitch.run_dir import RunDir
from qswitch.state_files import GraphTrialFile, PassTimesFile

TRIED_BLOCK = 4
"""Tokens of the teacher's longer pass in the trial of its graphs."""


class Decoding:
    """What changes the speed of rollouts and, rounding apart, none of their tokens. A resumed run chooses as before."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: RunDir,
        *,
        teacher: LanguageModel | None,
        student: LanguageModel,
        num_rows: int,
        progress: Progress,
        processes: Processes | None = None,
    ) -> None:
        """`teacher` is None where the policy asks none; `num_rows` are decoded together. The first process measures."""
        self._config, self._run_dir, self._progress = config, run_dir, progress
        processes = processes or Processes()
        self._teacher, self._student = teacher, student
        self.acceptance = Acceptance()
        rollout, drafts = config.rollout, config.rollout.block_tokens != 0
        # Kept from call to call only where the weights stay in their place: a teacher that is swapped comes back
        # elsewhere, and a student that trains every weight decodes with copies.
        teacher_stays, student_stays = config.teacher.residency == "resident", config.student.adapter == "lora"
        self.student_graphs = self._graphs(
            "student", student, rollout.student_graphs, run_dir.student_graphs_path, num_rows, (1,), student_stays,
            processes,
        )  # fmt: skip
        """What replays the student's passes; None where that is off, not possible or of no use."""
        self.teacher_graphs = self._graphs(
            "teacher", teacher, rollout.teacher_graphs, run_dir.teacher_graphs_path, num_rows,
            (1, TRIED_BLOCK) if drafts else (1,), teacher_stays, processes,
        )  # fmt: skip
        """The same of the teacher's, one token or a block."""
        self.blocks = self._make_blocks(num_rows, processes)

    def _graphs(
        self,
        role: str,
        model: LanguageModel | None,
        setting: str,
        path: Path,
        num_rows: int,
        tokens: tuple[int, ...],
        stays: bool,
        processes: Processes,
    ) -> StepGraphs | None:
        """Graphs of one model, where a trial of passes over `tokens` tokens finds them right and faster."""
        wanted = setting == "auto" and self._config.writes_rollouts
        if model is None or not wanted or model.device.type != "cuda":
            return None
        if role == "teacher" and self._config.teacher.num_gpus > 1:
            self._progress.say("CUDA graphs for the teacher: off, its layers lie on several GPUs")
            return None

        def pays() -> bool:
            if not path.exists():
                trial = try_graphs(model, num_rows, tokens=tokens)
                self._run_dir.write_json(path.name, trial.to_dict())
                self._progress.say(f"CUDA graphs for the {role}: {'on' if trial.used else 'off'}, {trial.reason}")
            return read_json(path, GraphTrialFile)["used"]

        if not processes.from_first(pays):
            return None
        return StepGraphs(model, role=role, kept_bytes=KEPT_BUFFER_BYTES if stays else 0)

    def _make_blocks(self, num_rows: int, processes: Processes) -> BlockLength:
        config, settings = self._config, self._config.rollout
        if settings.block_tokens != "auto":
            return FixedBlock(settings.block_tokens)
        teacher = self._teacher
        if teacher is None or not config.writes_rollouts:
            return FixedBlock(0)
        times = PassTimes.from_dict(processes.from_first(lambda: self._kept_times(teacher, num_rows).to_dict()))
        return AutoBlock(times, self.acceptance, drafts_within_scratch(settings.batch_size, self._student.vocab_size))

    def _kept_times(self, teacher: LanguageModel, num_rows: int) -> PassTimes:
        """Those of this run, measured where it has none yet."""
        path = self._run_dir.pass_times_path
        if path.exists():
            return _read(path)
        times = self._times_of_this_machine(teacher, num_rows)
        self._run_dir.write_json(path.name, times.to_dict())
        return times

    def _times_of_this_machine(self, teacher: LanguageModel, num_rows: int) -> PassTimes:
        """Pass times of this pair, measured once on a machine and kept; not where it was too busy to measure all."""
        kept = cache_folder() / "pass_times" / f"{self._key(teacher, num_rows)}.json"
        if kept.exists():
            self._progress.say(f"pass times of this pair on this machine are known ({kept})")
            return _read(kept)
        self._progress.say(f"measuring passes of both models for rollout.block_tokens=auto, {LIMIT_S:.0f} s at most")
        started = time.perf_counter()
        with freed_memory_kept(self._student.device):  # as they will be in the rollouts
            times = measure_pass_times(
                teacher,
                self._student,
                num_rows,
                teacher_graphs=self.teacher_graphs is not None,
                student_graphs=self.student_graphs is not None,
            )
        seconds = time.perf_counter() - started
        if seconds <= LIMIT_S:
            with file_aside(kept) as partial:
                partial.write_text(json.dumps(times.to_dict(), indent=1) + "\n", encoding="utf-8")
        else:
            self._progress.say(f"passes are slow, other work may be running: a part was measured in {seconds:.0f} s")
        return times

    def _key(self, teacher: LanguageModel, num_rows: int) -> str:
        """What pass times depend on: the two models and their precision, the device, the libraries."""
        device = self._student.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} {os.cpu_count()}"
        models = [f"{m.hf.config.to_json_string()} {m.compute_dtype}" for m in (teacher, self._student)]
        precisions = (self._config.teacher.precision, self._config.student.precision)
        graphs = (self.student_graphs is not None, self.teacher_graphs is not None)
        facts = (name, torch.get_num_threads(), torch.__version__, num_rows, *graphs, precisions, models)
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _read(path: Path) -> PassTimes:
    return PassTimes.from_dict(dict(read_json(path, PassTimesFile)))
