"""What can be evaluated, and how it is read: a run, an adapter folder, a merged folder, any model reference.

A run has three parts: `RUN` is its trained student, `RUN:base` the student before training, `RUN:teacher` its teacher.
Knows nothing of records or scores.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from qswitch.config import RunConfig, TrainSection
from qswitch.distill.recovery import keep_to_free_memory
from qswitch.errors import ModelError, RunDirError
from qswitch.evaluate.marks import TrainedWeights, folder_fingerprint
from qswitch.models.finite import require_finite
from qswitch.models.language_model import LanguageModel, verify_head
from qswitch.models.load import (
    context_tokens,
    load_teacher,
    read_context_tokens,
    read_model,
    read_tokenizer,
    resolve_precision,
)
from qswitch.models.pair import load_pair_tokenizer, teacher_half, template_tokenizer
from qswitch.models.references import ResolvedModel, resolve_reference
from qswitch.models.runtime import Runtime, make_runtime
from qswitch.models.student import ADAPTER_CONFIG, load_adapter, load_student, read_adapter_config
from qswitch.outside import user_path
from qswitch.plan.adapters import find_adapter
from qswitch.run_dir import RunDir

Part = Literal["student", "base", "teacher"]
PARTS = ("base", "teacher")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedSubject:
    """A model ready to answer."""

    model: LanguageModel
    tokenizer: Any
    """Turns text into ids and back."""
    eos_ids: tuple[int, ...]
    """Tokens that end a response."""
    pad_id: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """Something to evaluate, not loaded yet."""

    name: str
    """For tables and folders; unique within an evaluation."""
    reference: str
    """As the user wrote it."""
    kind: Literal["run", "adapter", "model"]
    part: Part
    fingerprint: str
    """Changes when the content of the weights on disk does; hub models are known by id and revision."""
    run_dir: RunDir | None
    precision: str
    trust_remote_code: bool
    trained: TrainedWeights | None = None
    """Of a run's student: the weights that `fingerprint` is from, which are those that are loaded."""

    @property
    def identity(self) -> str:
        """The same for the teachers of two runs that name the same one; for people, and to tell teachers apart."""
        if self.run_dir is None or self.part != "teacher":
            return f"{self.reference} ({self.precision})"
        teacher = self.run_dir.config.teacher
        model = teacher.model if isinstance(teacher.model, str) else " or ".join(teacher.model)
        revision = f"@{teacher.revision}" if teacher.revision else ""
        adapter = f" + {teacher.adapter}" if teacher.adapter else ""
        return f"{model}{revision}{adapter} ({teacher.precision})"

    @property
    def template(self) -> str:
        """data.template of the run, else the chat template of the model."""
        return self.run_dir.config.data.template if self.run_dir is not None else "teacher"

    @property
    def system_prompt(self) -> str | None:
        """data.system_prompt of the run."""
        return self.run_dir.config.data.system_prompt if self.run_dir is not None else None

    def template_kwargs(self, template: str) -> dict[str, Any]:
        """data.template_kwargs of the run, where `template` is the one that it was trained with."""
        config = None if self.run_dir is None else self.run_dir.config
        return {} if config is None or config.data.template != template else config.data.template_kwargs

    def tokenizer(self, template: str) -> Any:
        """The tokenizer, with the chat template that `template` means; loads no weights."""
        if self.run_dir is not None:
            return template_tokenizer(load_pair_tokenizer(self._own_config(self.run_dir)), template)
        return read_tokenizer(self._tokenizer_source(), self.trust_remote_code)

    def context_tokens(self) -> int:
        """The longest sequence that the model was made for, by its configuration; sys.maxsize where it does not say."""
        if self.run_dir is not None:
            config = self.run_dir.config
            return context_tokens(config.teacher if self.part == "teacher" else config.student)
        source = self._base() if self.kind == "adapter" else resolve_reference(self.reference)
        return read_context_tokens(source, self.trust_remote_code)

    def runtime(self, device: str | None) -> Runtime:
        """Device and arithmetic: the run's, unless another device is named; weights asked for in fp32 compute in it."""
        train = self.run_dir.config.train if self.run_dir is not None else TrainSection()
        if self.run_dir is None and self.precision == "fp32":
            train = train.model_copy(update={"compute_dtype": "fp32"})
        return make_runtime(train.model_copy(update={"device": device}) if device is not None else train)

    def load(self, device: str | None = None) -> LoadedSubject:
        """Read the weights, in eval mode.

        Raises:
            ModelError: they cannot be had or read.
        """
        runtime = self.runtime(device)
        keep_to_free_memory(runtime.device, 1 if self.run_dir is None else self.run_dir.config.teacher.num_gpus)
        if self.run_dir is not None:
            return self._load_from_run(self.run_dir, runtime)
        precision = resolve_precision(self.precision, runtime)
        if self.kind == "adapter":
            hf = self._with_adapter(read_model(self._base(), runtime, precision, self.trust_remote_code), runtime)
        else:
            hf = read_model(resolve_reference(self.reference), runtime, precision, self.trust_remote_code)
        tokenizer = read_tokenizer(self._tokenizer_source(), self.trust_remote_code)
        model = LanguageModel(hf, compute_dtype=runtime.compute_dtype)
        model.requires_grad_(False).eval()
        verify_head(model)
        eos = {*model.generation_eos_ids, tokenizer.eos_token_id} - {None}
        ids = tuple(sorted(i for i in eos if i < model.vocab_size))
        return LoadedSubject(model=model, tokenizer=tokenizer, eos_ids=ids, pad_id=tokenizer.pad_token_id)

    def _load_from_run(self, run_dir: RunDir, runtime: Runtime) -> LoadedSubject:
        config = self._own_config(run_dir)
        pair = load_pair_tokenizer(config)
        if self.part == "teacher":
            model = load_teacher(config.teacher, runtime, vocab_size=pair.vocab_size)
        else:
            model = load_student(config, runtime, vocab_size=pair.vocab_size, base_path=run_dir.student_base_path)
            start = config.student.init_adapter
            if self.trained is not None:
                load_adapter(model, self._as_found(self.trained))
            elif start is not None:
                load_adapter(model, find_adapter(start, "student.init_adapter"))
        model.requires_grad_(False).eval()
        return LoadedSubject(model=model, tokenizer=pair.tokenizer, eos_ids=pair.eos_ids, pad_id=pair.pad_id)

    def _as_found(self, trained: TrainedWeights) -> Path:
        """Their folder; a run that goes on meanwhile replaces its checkpoints."""
        if not trained.folder.is_dir():
            raise RunDirError(
                f"{self.reference} went on training, and {trained.folder}, which was to be evaluated, is gone. "
                "Evaluate again, or wait until the run has finished."
            )
        return trained.folder

    def _own_config(self, run_dir: RunDir) -> RunConfig:
        """The run's settings; of a teacher that reads other tokens than the student, its half of them."""
        config = run_dir.config
        return teacher_half(config) if config.passes_text and self.part == "teacher" else config

    def _base(self) -> ResolvedModel:
        base = read_adapter_config(Path(self.reference)).get("base_model_name_or_path")
        if not base:
            raise ModelError(f"{self.reference}/{ADAPTER_CONFIG} names no base model. Name it there.")
        return resolve_reference(base)

    def _tokenizer_source(self) -> ResolvedModel:
        if self.kind != "adapter":
            return resolve_reference(self.reference)
        folder = Path(self.reference)
        if (folder / "tokenizer_config.json").is_file():
            return ResolvedModel(str(folder), None, folder.name)
        return self._base()

    def _with_adapter(self, hf: Any, runtime: Runtime) -> Any:
        import peft

        try:
            adapted = peft.PeftModel.from_pretrained(hf, self.reference, torch_device=str(runtime.device))
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            first = str(error).strip().splitlines()
            raise ModelError(
                f"The adapter {self.reference} does not fit its base {self._base().name}: "
                f"{first[0] if first else type(error).__name__}"
            ) from error
        remedy = "Use another checkpoint, or train it anew."
        require_finite(adapted.named_parameters(), f"the adapter {self.reference}", remedy)
        return adapted


def find_subject(reference: str, *, precision: str = "auto", trust_remote_code: bool = False) -> Subject:
    """What `reference` means: `NAME=reference` gives it a name of its own; see the module for the parts of a run.

    Raises:
        RunDirError: a run without trained weights.
        ModelError: nothing of that name is here or on the hub.
    """
    name = None
    given, separator, rest = reference.partition("=")
    if separator and re.fullmatch(r"[\w.-]+", given) and not _is_path(reference):
        name, reference = given, rest
    if reference.startswith("~"):  # the shell expands it only where a word begins
        reference = str(user_path(reference))
    path_text, _, part_text = reference.rpartition(":")
    part: Part = "student"
    path = user_path(reference)
    if part_text in PARTS and (user_path(path_text) / "config.yaml").is_file():
        path, part = user_path(path_text), cast(Part, part_text)
    run_dir = trained = None
    kind: Literal["run", "adapter", "model"] = "model"
    if (path / "config.yaml").is_file():
        run_dir, kind = RunDir.open(path), "run"
        if part == "student":
            trained = TrainedWeights.of(run_dir, run_dir.trained_weights())
            weights = _student_weights(run_dir, trained.folder)
        else:
            weights = {"base": _base_weights, "teacher": _teacher_weights}[part](run_dir)
    elif (path / ADAPTER_CONFIG).is_file():
        kind = "adapter"
        base = read_adapter_config(path).get("base_model_name_or_path")
        weights = folder_fingerprint(path) + (f"|{_model_weights(resolve_reference(base))}" if base else "")
    else:
        weights = _model_weights(resolve_reference(reference))
    # A link is called what its owner called it, ".." by the folder that it is.
    label = Path(os.path.abspath(path)).name if path.exists() else reference.rpartition("/")[2]
    if part != "student":
        label = f"{label}-{part}"
    return Subject(
        name=_safe(name or label),
        reference=reference,
        kind=kind,
        part=part,
        fingerprint=hashlib.sha256(f"{weights}|{precision}".encode()).hexdigest()[:16],
        run_dir=run_dir,
        precision=precision,
        trust_remote_code=trust_remote_code,
        trained=trained,
    )


def _is_path(reference: str) -> bool:
    """Whether a file of that name is there, taken whole or without a run's part."""
    whole, _, part = reference.rpartition(":")
    return Path(reference).exists() or (part in PARTS and Path(whole).exists())


def _student_weights(run_dir: RunDir, trained: Path) -> str:
    own = folder_fingerprint(trained)
    return own if run_dir.config.student.adapter == "none" else f"{own}|{_untrained_weights(run_dir)}"


def _base_weights(run_dir: RunDir) -> str:
    return _untrained_weights(run_dir) + _adapter_weights(run_dir.config.student.init_adapter, "student.init_adapter")


def _untrained_weights(run_dir: RunDir) -> str:
    student, cut = run_dir.config.student, run_dir.student_base_path
    if cut.is_dir():
        return f"{folder_fingerprint(cut)}|{student.precision}"
    return f"{_model_weights(resolve_reference(student.model, student.revision))}|{student.precision}"


def _teacher_weights(run_dir: RunDir) -> str:
    teacher = run_dir.config.teacher
    return f"{_model_weights(resolve_reference(teacher.model, teacher.revision))}|{teacher.precision}" + (
        _adapter_weights(teacher.adapter, "teacher.adapter")
    )


def _adapter_weights(reference: str | None, setting: str) -> str:
    return "" if reference is None else f"|{folder_fingerprint(find_adapter(reference, setting))}"


def _model_weights(resolved: ResolvedModel) -> str:
    """A folder's files; a hub model by id and revision."""
    folder = Path(resolved.path)
    return folder_fingerprint(folder) if folder.is_dir() else f"{resolved.path}@{resolved.revision}"


def _safe(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"
