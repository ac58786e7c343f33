"""What a run takes for a pair that no preset describes: precision, adapters, lengths, rows and steps.

The lowest layer of the settings, so that whatever the user says wins. It is chosen from the shapes of the two models,
from a sample of the data and from the memory budget, by the rules of thumb of `parts/instruct.yaml` and the presets;
nothing is measured. Cold: configurations and data files are read, no weights and no tokenizer.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from qswitch.config import DataSection, RunConfig, StudentSection, TeacherSection, TrainSection, reader
from qswitch.data.first_look import TEMPLATE_TOKENS, estimated_tokens, first_records, high, rounded, sampled
from qswitch.data.sources import reference_path
from qswitch.errors import ConfigError, FileError
from qswitch.layers import Layer, build_config, by_section, flatten
from qswitch.outside import read_json, user_path
from qswitch.plan.cost import expected_steps
from qswitch.plan.machine import Machine, describe_machine, find_budget
from qswitch.plan.model_files import chat_template, shape_for
from qswitch.plan.scheduler import plan_run, with_choices
from qswitch.plan.shapes import ModelShape, shared_context
from qswitch.plan.stored import (
    FP16_ONLY,
    UNPACKED_BY_TRANSFORMERS,
    StoredQuantisation,
    missing_packages,
    unfit_device,
)
from qswitch.plan.vocabulary import with_tokenizer
from qswitch.presets import load_run_config, preset_names
from qswitch.rules import has_step_limit
from qswitch.run_dir import STORE
from qswitch.state_files import StoreFile
from qswitch.thinking import THINKING, THINKING_TOKENS, reads_thinking
from qswitch.units import GIB
from qswitch.yaml_file import parse_yaml

MIN_STEPS, MAX_STEPS, EPOCHS = 50, 1000, 3
MOST_TOKENS = 1024
"""Of a prompt, and of a response; where the data has longer ones, the user decides what they may cost."""
CUT_FROM_TEACHER = re.compile(r"shrink(?::(.*))?", re.DOTALL)
"""`--student shrink` and `--student shrink:N`."""
OF_MANY_TOKENIZERS = range(32_000, 32_256)
"""SentencePiece's usual size and what chat models add to it: Llama 2 and OpenLLaMA have it, with other tokens."""
NAMED = {"teacher.model": "--teacher", "student.model": "--student", "data.train": "--data"}


@dataclass(frozen=True, slots=True)
class Choice:
    """One setting that the user left open."""

    setting: str
    value: Any
    because: str


@dataclass(frozen=True, slots=True)
class Chosen:
    """A configuration for a pair, and what of it was chosen rather than said."""

    config: RunConfig
    choices: tuple[Choice, ...]
    said: Mapping[str, Any]
    """Dotted setting -> value, as the user gave them."""

    def render(self, command: str) -> str:
        """A line per reason, then the command that repeats this run with every choice written out."""
        by_reason: dict[str, list[str]] = {}
        for choice in self.choices:
            by_reason.setdefault(choice.because, []).append(f"{choice.setting}={_as_yaml(choice.value)}")
        lines = [f"  {', '.join(settings)}: {because}" for because, settings in by_reason.items()]
        named = {key: names for key in NAMED if (names := _names(key, self.said.get(key)))}
        options = [f"{NAMED[key]} {shlex.quote(name)}" for key, names in named.items() for name in names]
        values = {key: value for key, value in self.said.items() if key not in named}
        values |= {choice.setting: choice.value for choice in self.choices}
        options += [f"--set {shlex.quote(f'{key}={_as_yaml(value)}')}" for key, value in values.items()]
        again = " ".join([f"qswitch {command}", *options])
        return "\n".join(["Chosen for this pair; --set changes any of it:", *lines, f"The same again: {again}"])


def choose(own: Layer, *, vram: str | None = None, gpu: str | None = None) -> Chosen:
    """The configuration of a pair and its data, with what `own` leaves open chosen for the budget.

    Raises:
        ConfigError: the teacher, the student or the data is not named, or what is said is wrong. Where the student is
            missing, the message names those that would do.
        DataError: a record of the sample cannot be read.
    """
    said = flatten(by_section(own))
    missing = [setting for setting in NAMED if said.get(setting) is None]
    if missing:
        raise ConfigError(list(_missing(missing, said)))
    own, cut = with_cut_student(own)
    said = flatten(by_section(own))
    asked = build_config(own)  # what is wrong with it comes before what is missing in it
    shapes = {
        f"{role}.shape": block
        for role, section in (("teacher", asked.teacher), ("student", asked.student))
        if (block := _published_shape(section)) is not None
    }
    asked = build_config(shapes, own)
    asked = with_tokenizer(asked)
    teacher, student = shape_for(asked.teacher), shape_for(asked.student)
    tokenizer = [Choice("student.tokenizer", "own", "the tokenizers differ, so the teacher's responses pass as text")]
    found = [
        *(tokenizer if asked.passes_text else []),
        *_of_the_data(asked, teacher, student),
        *_of_the_template(asked),
        *_of_the_student(student, asked.train),
    ]
    found += _precision(build_config(shapes, _layer(found), own), vram=vram, gpu=gpu)
    config = build_config(shapes, _layer(found), own)
    read = reader(config)
    choices = tuple(choice for choice in found if choice.setting not in said and read(choice.setting) == choice.value)
    if cut is not None:
        del said[cut.setting]
        choices = (cut, *choices)
    return Chosen(config, choices, said)


def with_cut_student(own: Layer, below: Layer | None = None) -> tuple[Layer, Choice | None]:
    """`own` with the student `shrink` or `shrink:N` written out: the teacher, cut to N or two thirds of its layers.

    `below` is what `own` is laid over, and may name the teacher. The choice is the number of layers where it is ours.

    Raises:
        ConfigError: N is no number of layers, or the settings are wrong.
    """
    values, below = by_section(own), by_section(below or {})
    asked = flatten(values).get("student.model")
    match = CUT_FROM_TEACHER.fullmatch(asked) if isinstance(asked, str) else None
    if match is None:
        return own, None
    teacher = build_config(below, values).teacher
    same = teacher.model_dump(include={"model", "revision", "trust_remote_code", "shape"}, exclude_unset=True)
    student = {**values["student"], **same}
    choice = None
    if match[1] is not None:
        if "shrink_to_layers" in student or not re.fullmatch(r"[1-9][0-9]{0,3}", match[1]):
            raise ConfigError(f"--student {asked}: write shrink, or shrink:N with the number of layers to keep, once.")
        student["shrink_to_layers"] = int(match[1])
    elif "shrink_to_layers" not in student:
        whole = shape_for(teacher.model_copy(update={"shape": teacher.shape or _published_shape(teacher)})).num_layers
        because = f"two thirds of the teacher's {whole} layers"
        choice = Choice("student.shrink_to_layers", max(1, whole * 2 // 3), because)
        student["shrink_to_layers"] = choice.value
    return {**values, "student": student}, choice


def _published_shape(section: TeacherSection | StudentSection) -> Mapping[str, Any] | None:
    """The shape block of a preset for a model whose config.json is neither here nor to be had; None where it is."""
    try:
        shape_for(section.model_copy(update={"shrink_to_layers": None}))
        return None
    except ConfigError:
        for preset in preset_names():
            config = load_run_config(preset)
            for known in (config.teacher, config.student):
                if known.shape is not None and known.model == section.model and known.revision == section.revision:
                    return known.shape
        raise


def _layer(choices: list[Choice]) -> dict[str, Any]:
    return by_section({choice.setting: choice.value for choice in choices})


def _of_the_student(student: ModelShape, train: TrainSection) -> Iterator[Choice]:
    billions = student.num_parameters / 1e9
    rank, rate = (64, 1e-4) if billions >= 1 else (32, 2e-4) if billions >= 0.3 else (16, 5e-4)
    size = f"the student has {billions:.2f} billion parameters"
    yield Choice("student.lora.r", rank, size)
    yield Choice("student.lora.alpha", float(2 * rank), size)
    yield Choice("train.learning_rate", rate, size)
    yield Choice("rollout.batch_size", train.sequences_per_step, "the sequences of a step; the plan changes it to fit")


def _of_the_data(config: RunConfig, teacher: ModelShape, student: ModelShape) -> Iterator[Choice]:
    lengths = _lengths(config.data)
    most_prompt, most_response = _room(config, teacher, student)
    limit, num_sets = config.data.limit, len(config.data.train_sets)
    if lengths is None:
        prompt, response, because = 256, 256, "data on the hub is not read before the run"
        count, is_whole = None if limit is None else limit * num_sets, True
        if count is not None:
            because += f"; data.limit leaves at most {count} records"
    else:
        prompts, responses, is_whole = lengths
        count = len(prompts)
        prompt = min(MOST_TOKENS, rounded(high(prompts) + TEMPLATE_TOKENS))
        response = min(MOST_TOKENS, rounded(high(responses))) if responses else 256
        many = f"{'' if is_whole else 'at least '}{count} records"
        because = f"{many}, of which 95 % have at most {high(prompts)} prompt tokens by their bytes"
        if high(prompts) + TEMPLATE_TOKENS > (most := min(MOST_TOKENS, most_prompt)):
            because += f"; at most {most:,} are chosen, and longer prompts are left out"
    validation = 64 if count is None else max(2, min(64, count // 10))
    training = None if count is None else max(1, count - validation)
    yield Choice("data.max_prompt_tokens", min(prompt, most_prompt), because)
    yield Choice("rollout.max_new_tokens", min(response, most_response), because)
    yield Choice("data.num_validation", validation, because)
    if "max_new_tokens" not in config.rollout.model_fields_set:
        config = with_choices(config, {"rollout.max_new_tokens": min(response, most_response)})
    yield from _of_the_steps(config, training, because, is_whole=is_whole)


def _of_the_steps(config: RunConfig, training: int | None, because: str, *, is_whole: bool) -> Iterator[Choice]:
    """For so many prompts to train on, as far as that is known: all of them, or the first."""
    train, is_limited = config.train, has_step_limit(reader(config))
    yield Choice("train.warmup_steps", 0.05, "a twentieth of the training")
    if not is_limited and train.max_seconds is not None:
        return  # nobody knows how many steps that is
    if "max_steps" in train.model_fields_set:
        steps = train.max_steps
    elif train.num_epochs is not None and training is None:
        return  # nobody knows yet
    elif train.num_epochs is not None:
        steps = config.steps_of_epochs(train.num_epochs, training or 1)
    elif training is None or not is_whole:
        steps = MAX_STEPS
    else:
        steps = max(MIN_STEPS, min(MAX_STEPS, config.steps_of_epochs(EPOCHS, training)))
    if is_limited:
        yield Choice("train.max_steps", steps, because)
    steps, first = expected_steps(with_choices(config, {"train.max_steps": steps}), None)
    tenth = "a tenth of the steps"
    if first == "max_tokens":
        tenth = f"a tenth of the {steps:,} steps that train.max_tokens is with responses of full length"
    for setting in ("train.eval_steps", "train.save_steps"):
        yield Choice(setting, max(1, steps // 10), tenth)


def _room(config: RunConfig, teacher: ModelShape, student: ModelShape) -> tuple[int, int]:
    """The most tokens for prompts and for responses: half of the context, or what a length that was said leaves."""
    context = shared_context(teacher, student) or 4096
    data, rollout = config.data, config.rollout
    said_prompt = data.max_prompt_tokens if "max_prompt_tokens" in data.model_fields_set else context - context // 2
    said_response = rollout.max_new_tokens if "max_new_tokens" in rollout.model_fields_set else context - context // 2
    return max(1, context - said_response), max(1, context - said_prompt)


def _of_the_template(config: RunConfig) -> Iterator[Choice]:
    """No thinking, where the template lets a model think unless it is told otherwise, and the data's answers do not."""
    data = config.data
    roles: dict[str, TeacherSection | StudentSection] = {"teacher": config.teacher, "student": config.student}
    section = roles.get(data.template)
    if section is None or THINKING in data.template_kwargs or not _may_think(section):
        return
    if config.reads_responses and any(record.shows_thinking for record in first_records(config)):
        return
    yield Choice(
        f"data.template_kwargs.{THINKING}",
        False,
        f"the {data.template}'s chat template lets it think before it answers; --set data.template_kwargs.{THINKING}="
        f"true --set rollout.max_new_tokens={THINKING_TOKENS} distils the thinking as well",
    )


def _may_think(section: TeacherSection | StudentSection) -> bool:
    """Whether the model's chat template has the choice; of one that is not to be had, whether a preset makes it."""
    template = chat_template(section)
    if template is not None:
        return reads_thinking(template)
    for preset in preset_names():
        config = load_run_config(preset)
        if section.model in (config.teacher.model, config.student.model) and THINKING in config.data.template_kwargs:
            return True
    return False


def _lengths(data: DataSection) -> tuple[list[int], list[int], bool] | None:
    """Tokens of the sampled prompts and responses, estimated by their bytes, and whether they are all; None for data on
    the hub."""
    references = [data.train] if isinstance(data.train, str) else data.train
    if any(reference_path(reference) is None for reference in references):
        return None
    by_entry, is_whole = sampled(data)
    records = [record for some in by_entry for record in some]
    responses = [estimated_tokens(record.response) for record in records if record.response is not None]
    return [estimated_tokens(record.text) for record in records], responses, is_whole


def _precision(config: RunConfig, *, vram: str | None, gpu: str | None) -> Iterator[Choice]:
    """Of the teacher, or of the student where no teacher is loaded: 16 bits where that fits without giving up anything,
    else 4-bit, which a CPU reads in few shapes and slowly; of weights that are stored quantised, theirs, and of a
    teacher that worked earlier, the one it had then."""
    if (store := config.teacher.responses) is not None and config.learns_from_teacher:
        with suppress(FileError):  # that it is no store, the preflight says
            then = read_json(user_path(store) / STORE, StoreFile)["precision"]
            yield Choice("teacher.precision", then, f"the teacher of {store} worked so")
            return
    setting, exact = ("teacher.precision", "bf16") if config.learns_from_teacher else ("student.precision", "auto")
    if not config.learns_from_teacher:
        yield Choice("teacher.precision", "bf16", "the method loads no teacher")
        if config.student.adapter != "lora":
            return  # all weights are trained, and none are frozen
    stored = shape_for(config.teacher if config.learns_from_teacher else config.student).stored
    budget = find_budget(config.train, vram=vram, gpu=gpu, num_gpus=config.teacher.num_gpus)
    if stored is not None:
        if config.learns_from_teacher:
            here, there = describe_machine(config.train), describe_machine(config.train, budget.device, budget.gpu)
            is_here = gpu is None and here.device == there.device  # --vram may leave room on the card that is here
            yield from _as_stored(stored, here if is_here else there, is_here=is_here)
        return
    exactly = with_choices(config, {setting: exact})
    plan = plan_run(exactly, budget_bytes=budget.num_bytes, device=budget.device, gpu=budget.gpu)
    machine = describe_machine(config.train, budget.device, budget.gpu)
    asked = plan_run(exactly, device=budget.device, gpu=budget.gpu)
    form = "bf16" if config.learns_from_teacher else "16 bits" if machine.device == "cuda" else "full precision"
    gib = f"{asked.total_gib:.1f} GiB with it in {form}, {budget.num_bytes / GIB:.1f} in the budget"
    if plan.fits and (machine.device == "cpu" or asked.total_bytes <= budget.num_bytes):
        yield Choice(setting, exact, f"the run takes {gib}")
    else:
        yield Choice(setting, "nf4", f"the run would take {gib}")


def _as_stored(stored: StoredQuantisation, machine: Machine, *, is_here: bool) -> Iterator[Choice]:
    """As the files have them, with the arithmetic that takes; unpacked where the machine cannot compute with them.

    Of a machine that is not here nobody knows the packages.
    """
    unfit = unfit_device(stored, machine.device, machine.capability) or (missing_packages(stored) if is_here else None)
    if unfit is not None and stored.method in UNPACKED_BY_TRANSFORMERS:
        yield Choice("teacher.precision", "bf16", f"it is stored in {stored.method} and unpacked: {unfit}")
        return
    because = f"its weights are stored quantised ({stored.method})"
    yield Choice("teacher.precision", stored.precision, because)
    if stored.method in FP16_ONLY and machine.device == "cuda" and machine.compute_dtype == "bf16":
        yield Choice("train.compute_dtype", "fp16", f"on a GPU weights in {stored.method} are computed with in fp16")


# ------------------------------------------------------------------------------------------------- what was not named


def _missing(missing: list[str], said: Mapping[str, Any]) -> Iterator[str]:
    for setting in missing:
        if setting == "student.model" and "teacher.model" not in missing:
            yield _students_for(said)
        else:
            yield f"{NAMED[setting]} is missing: name it so, or with --set {setting}=..., a preset or a file."


def _students_for(said: Mapping[str, Any]) -> str:
    """Smaller models with the teacher's tokenizer that a preset knows, and the way to cut one from the teacher."""
    values = {key.partition(".")[2]: value for key, value in said.items() if key.startswith("teacher.")}
    section = TeacherSection.model_validate({key: values[key] for key in ("model", "revision") if key in values})
    shape = shape_for(section.model_copy(update={"shape": _published_shape(section)}))
    students: dict[str, str] = {}
    for _, preset, name in sorted(_smaller(section, shape)):
        students.setdefault(name, preset)
    known = [f"{name} (preset {preset})" for name, preset in students.items()]
    siblings = f"With the teacher's tokenizer the presets know {', '.join(known)}. " if known else ""
    return (
        f"--student is missing. {siblings}{'Or cut' if known else 'Cut'} one from the teacher: --student shrink keeps "
        f"two thirds of its {shape.num_layers} layers, --student shrink:N keeps N."
    )


def _smaller(teacher: TeacherSection, shape: ModelShape) -> Iterator[tuple[bool, str, str]]:
    """(False, preset, student) where a preset teaches with this model; (True, preset, student) where with another one
    of its family, whose vocabulary has a size that tells the tokenizer."""
    names = {teacher.model} if isinstance(teacher.model, str) else set(teacher.model)
    for preset in preset_names():
        config = load_run_config(preset)
        models: list[TeacherSection | StudentSection] = [config.teacher, config.student]
        named = [[model.model] if isinstance(model.model, str) else model.model for model in models]
        if config.student.shrink_to_layers is not None or names & set(named[1]):
            continue
        own = shape_for(config.student)
        # Checkpoints of one family pad the same vocabulary to different multiples.
        same = own.model_type == shape.model_type and abs(own.vocab_size - shape.vocab_size) < 256
        is_named = bool(names & set(named[0]))
        tells = shape.vocab_size not in OF_MANY_TOKENIZERS
        if (is_named or (same and tells)) and own.num_parameters < shape.num_parameters:
            yield not is_named, preset, named[1][0]


def _names(setting: str, value: Any) -> list[str]:
    """What the option of a setting is given, once or several times; nothing where it cannot say the value."""
    if isinstance(value, str):
        return [value]
    return list(value) if setting == "data.train" and isinstance(value, list) else []


def _as_yaml(value: Any) -> str:
    """A value as `--set` reads it: texts without quotes, where YAML takes them for themselves."""
    import json

    import yaml

    if not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    with suppress(ValueError):
        if parse_yaml(value) == value:
            return value
    return yaml.safe_dump(value, default_style='"', allow_unicode=True, width=math.inf).rstrip("\n")
