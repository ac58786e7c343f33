"""What would stop a run, found before any weight is loaded, and all in one list.

`check_settings` needs no library and no network, and reads the first rows of every data file; `prepare` then reads
tokenizers and data, and hands back what it has read. Each finding names the setting, the reason and the remedy. Cold
until `prepare` runs. The file is long because everything that can stop a run is told in one list, and stands in one.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qswitch.config import RunConfig, StudentSection, TeacherSection
from qswitch.data.first_look import data_problems, first_records, unreadable_data
from qswitch.errors import ConfigError, DataError, FileError, ModelError, QSwitchError
from qswitch.hub import has_token
from qswitch.launch import launched
from qswitch.outside import read_json, user_path
from qswitch.run_dir import STORE
from qswitch.state_files import StoreFile
from qswitch.units import GIB

if TYPE_CHECKING:
    from torch import Tensor

    from qswitch.data.gather import RunPrompts
    from qswitch.data.template import PromptEncoder
    from qswitch.models.pair import TokenizerPair
    from qswitch.models.runtime import Runtime
    from qswitch.plan.shapes import ModelShape


NF4_CPU_BLOCK = 64
"""bitsandbytes on CPU reads NF4 in blocks of this many inputs."""
PROBED_RECORDS = 20_000
"""Records read of each data set to find its problem where a run cannot start anyway; about a second."""


class PreflightError(ConfigError):
    """A run that cannot start: every reason found."""


@dataclass(frozen=True)
class Prepared:
    """What a preflight has read: tokenizers and data."""

    pair: TokenizerPair
    encoder: PromptEncoder
    prompts: RunPrompts
    corpus: Tensor | None
    """data.lm_corpus as one stream of token ids."""
    device: Literal["cuda", "cpu"]
    """What torch computes on."""


Sections = list[tuple[str, TeacherSection | StudentSection]]


def sections_to_load(config: RunConfig) -> Sections:
    """The models whose weights a run loads, by role."""
    student: Sections = [("student", config.student)]
    return [("teacher", config.teacher), *student] if config.needs_teacher else student


# ------------------------------------------------------------------------------------------------------ settings alone


def check_settings(config: RunConfig, output_dir: Path | None = None, *, elsewhere: bool = False) -> None:
    """Nothing, or every reason that settings, files and this machine give against the run; no library, no network.

    With `output_dir` there must be room on its disk. With `elsewhere` the run is meant for another machine, and nothing
    is said of this one.

    Raises:
        PreflightError: lists them.
    """
    problems = settings_problems(config, output_dir, elsewhere=elsewhere)
    if problems:
        raise PreflightError(problems)


def check_plannable(config: RunConfig) -> None:
    """Nothing, or every reason that the models' shapes and the first rows of the data give against a run anywhere.

    A plan may be made where neither the run's adapters nor its data are, so nothing is said of files that are not here.

    Raises:
        PreflightError: lists them.
    """
    problems = [*_shapes_and_context(config, elsewhere=True), *data_problems(config)]
    if problems:
        raise PreflightError(problems)


def settings_problems(config: RunConfig, output_dir: Path | None = None, *, elsewhere: bool = False) -> list[str]:
    """What `check_settings` would raise, as a list, for `prepare` to add to; with room on the disk of `output_dir`."""
    problems = [*_adapters(config), *_shapes_and_context(config, elsewhere), *_files(config)]
    problems += data_problems(config)
    if not elsewhere:
        problems += _machine(config)
    if output_dir is not None:
        problems += list(place_problems(output_dir)) or list(_disk(config, output_dir))
    return problems


def _shapes_and_context(config: RunConfig, elsewhere: bool) -> Iterator[str]:
    from qswitch.plan.machine import describe_machine
    from qswitch.plan.model_files import shape_for
    from qswitch.plan.stored import problem_of, unmovable

    tokens = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    for role, section in sections_to_load(config):
        try:
            shape = shape_for(section)
        except ConfigError as error:
            yield from error.problems
            continue
        here = {} if elsewhere else asdict(describe_machine(config.train))
        stored = problem_of(
            shape.stored,
            section.precision,
            device=here.get("device"),
            capability=here.get("capability"),
            compute_dtype=here.get("compute_dtype"),
            trains=role == "student",
        )
        if stored is not None:
            yield f"{role}.model: {_name(section)}: {stored}."
        if role == "teacher" and config.teacher.residency == "swap":
            fixed = unmovable(shape.stored, section.precision)
            if fixed is not None:
                yield fixed
        if shape.max_positions and tokens > shape.max_positions:
            yield (
                f"{role}.model {_name(section)} has a context of {shape.max_positions} tokens, but "
                f"data.max_prompt_tokens ({config.data.max_prompt_tokens}) and rollout.max_new_tokens "
                f"({config.rollout.max_new_tokens}) make {tokens}. Lower one of them."
            )
        if role == "student":
            yield from _unknown_targets(config.student, shape)
        passage = config.loss.lm_passage_tokens
        if role == "student" and config.data.lm_corpus is not None and 0 < shape.max_positions < passage:
            yield (
                f"loss.lm_passage_tokens={passage} is longer than the student's context of {shape.max_positions} "
                "tokens. Lower it."
            )
        if not elsewhere and section.precision == "nf4" and describe_machine(config.train).device == "cpu":
            linears = shape.linears
            odd = sum(m.weight_parameters for m in linears if m.in_features % NF4_CPU_BLOCK)
            if odd > shape.linear_weight_parameters / 2:
                widths = sorted({m.in_features for m in linears if m.in_features % NF4_CPU_BLOCK})
                yield (
                    f"{role}.precision=nf4 is not possible on a CPU for {_name(section)}: most of its linear layers "
                    f"have an input width that is no multiple of {NF4_CPU_BLOCK} ({', '.join(map(str, widths))}). Set "
                    f"{role}.precision=bf16, or use a GPU."
                )


def _unknown_targets(student: StudentSection, shape: ModelShape) -> Iterator[str]:
    """Names in the LoRA settings that no module has; peft passes over one of several in silence.

    Patterns that are no plain name are tried on the model itself, when adapters are put on it.
    """
    lora = student.lora
    if student.adapter != "lora":
        return
    known = shape.linear_names
    others = ("lm_head", "embed_tokens", "wte", "wpe", "embed_out")
    named: dict[str, Sequence[str]] = {
        "target_modules": [] if isinstance(lora.target_modules, str) else lora.target_modules,
        "rank_pattern": [p for p in lora.rank_pattern if p.isidentifier()],
        "alpha_pattern": [p for p in lora.alpha_pattern if p.isidentifier()],
    }
    for setting, names in named.items():
        for name in names:
            if name.rpartition(".")[2] in shape.taken_for_experts:
                yield (
                    f"student.lora.{setting} names {name}, which peft takes for all experts of {_name(student)} at "
                    "once. Remove it; all-linear means every linear module but those."
                )
            elif name.rpartition(".")[2] not in (*known, *others):
                yield (
                    f"student.lora.{setting} names {name}, which {_name(student)} does not have. Its linear modules "
                    f"are {', '.join(dict.fromkeys(known))}."
                )


def _machine(config: RunConfig) -> Iterator[str]:
    from qswitch.models.gguf_cache import why_unreadable
    from qswitch.plan.model_files import gguf_at_hand

    train = config.train
    for role, section in sections_to_load(config):
        file = gguf_at_hand(section) if isinstance(section.model, str) else None  # of a list, the next one may do
        if file is not None and (problem := why_unreadable(file)) is not None:
            yield f"{role}.model: {problem}."
        if section.precision in ("nf4", "int8"):
            if importlib.util.find_spec("bitsandbytes") is None:
                yield (
                    f"{role}.precision={section.precision} needs bitsandbytes, which is not installed: pip install "
                    f"bitsandbytes. Or set {role}.precision=bf16."
                )
            elif platform.machine().lower() not in ("x86_64", "amd64", "aarch64", "arm64"):
                yield (
                    f"{role}.precision={section.precision}: bitsandbytes has no build for {platform.machine()}. Set "
                    f"{role}.precision=bf16."
                )
            if train.compute_dtype == "fp64":
                yield f"{role}.precision={section.precision} cannot compute in fp64. Set {role}.precision=fp32."
    if config.teacher.num_gpus > 1 and launched().count > 1:
        yield (
            f"teacher.num_gpus={config.teacher.num_gpus} is for one process, and {launched().count} were started, with "
            "one GPU each. Start it without accelerate launch or torchrun, or leave teacher.num_gpus out."
        )
    if train.device == "auto":
        from qswitch.plan.machine import failed_driver

        if (failure := failed_driver()) is not None:
            yield (
                f"{failure} Where torch uses the GPU all the same: train.device=cuda, with --vram the memory that is "
                "free. To compute on the CPU: train.device=cpu."
            )
    if train.optimizer == "paged_adamw_8bit" and train.device == "auto":
        from qswitch.plan.machine import describe_machine

        if describe_machine(train).device == "cpu":
            yield "train.optimizer=paged_adamw_8bit needs a GPU, and nvidia-smi shows none. Set train.optimizer=adamw."
    for tracker in train.report_to:
        if importlib.util.find_spec(tracker) is None:
            yield f"train.report_to names {tracker}, which is not installed: pip install {tracker}. Or remove it."


def _adapters(config: RunConfig) -> Iterator[str]:
    from qswitch.plan.adapters import adapter_settings, find_adapter, init_adapter_problem

    try:
        if config.teacher.adapter is not None:
            adapter_settings(find_adapter(config.teacher.adapter, "teacher.adapter"))
    except ConfigError as error:
        yield from error.problems
    try:
        problem = init_adapter_problem(config.student) if config.student.init_adapter is not None else None
    except ConfigError as error:
        yield from error.problems
    else:
        if problem is not None:
            yield problem


def _files(config: RunConfig) -> Iterator[str]:
    from qswitch.data.files import RECORD_SUFFIXES, TEXT_SUFFIXES
    from qswitch.data.sources import reference_path

    data = config.data
    texts = RECORD_SUFFIXES + TEXT_SUFFIXES
    named = {"train": (data.train, RECORD_SUFFIXES), "validation": (data.validation, RECORD_SUFFIXES),
             "lm_corpus": (data.lm_corpus, texts)}  # fmt: skip
    for setting, (references, suffixes) in named.items():
        for reference in [references] if isinstance(references, str) else references or []:
            try:
                reference_path(reference, suffixes)
            except DataError as error:
                yield f"data.{setting}: {error}"
    template = data.template
    if template not in ("teacher", "student", "alpaca", "plain") and not user_path(template).exists():
        yield (
            f"data.template={template}: no such file. Use teacher, student, alpaca, plain, or the path of a Jinja file."
        )
    if config.teacher.responses is not None and config.learns_from_teacher:
        yield from _store(user_path(config.teacher.responses))


def _store(folder: Path) -> Iterator[str]:
    """Whose work it is, is asked when the data is read."""
    if not folder.is_dir():
        yield f"teacher.responses={folder} does not exist. Name a folder of `qswitch teach`."
        return
    try:
        is_complete = read_json(folder / STORE, StoreFile)["complete"]
    except FileError as error:
        yield f"teacher.responses={folder} is no store of a teacher's work: {error} Name a folder of `qswitch teach`."
        return
    if not is_complete:
        yield f"teacher.responses={folder} is not finished. Go on with: qswitch teach --resume {folder}"


def place_problems(output_dir: Path) -> Iterator[str]:
    """Why nothing can be written to a folder that is yet to be made."""
    parent = _existing_parent(output_dir)
    if not parent.is_dir():
        yield f"--output-dir {output_dir}: {parent} is a file. Choose another --output-dir."
        return
    if not os.access(parent, os.W_OK | os.X_OK):
        yield f"--output-dir {output_dir}: {parent} cannot be written. Choose another, or change its permissions."


def free_bytes(output_dir: Path) -> int:
    """What the disk of a folder that is yet to be made has left."""
    return shutil.disk_usage(_existing_parent(output_dir)).free


def _disk(config: RunConfig, output_dir: Path) -> Iterator[str]:
    """Checkpoints are written beside the old ones: one more than are kept, the best one, and RUN/adapter."""
    from qswitch.plan import memory
    from qswitch.plan.model_files import shape_for

    student = config.student
    try:
        shape = shape_for(student)
    except ConfigError:
        return  # reported with the models
    trained = memory.trainable_parameters(shape, student.adapter, student.lora)
    weights = trained * memory.FP32_BYTES
    checkpoint = weights + memory.optimizer_bytes(trained, config.train.optimizer, memory.FP32_BYTES)
    needed = checkpoint * (config.train.save_total_limit + 2) + weights
    if student.shrink_to_layers is not None:
        needed += shape.num_parameters * 2
    free = free_bytes(output_dir)
    if needed > free:
        yield (
            f"The disk of {output_dir} has {free / GIB:.1f} GiB free, but the checkpoints take up to "
            f"{needed / GIB:.1f} ({config.train.save_total_limit + 2} of {checkpoint / GIB:.2f} each). Free some, "
            "choose another --output-dir, or lower train.save_total_limit."
        )


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _name(section: TeacherSection | StudentSection) -> str:
    return section.model if isinstance(section.model, str) else section.model[0]


# --------------------------------------------------------------------------------------- again, with tokenizer and data


def prepare(
    config: RunConfig,
    notify: Callable[[str, int, int | None], None] | None = None,
    known: Sequence[str] = (),
) -> Prepared:
    """Tokenizers and data of a run, read and checked; still no weights.

    Of a run that passes text they are those of its teacher's half; of the student's, whose data is not written yet, the
    tokenizer and the template are checked.

    `notify` hears how far reading the data is. `known` are problems found before, by `settings_problems`: with any,
    the rest is read only as far as it takes to add to them.

    Raises:
        PreflightError: `known` and every problem of models, tokenizers, template and data, in one list.
    """
    from qswitch.data.gather import gather_prompts, make_encoder
    from qswitch.data.template_checks import (
        end_token_problems,
        template_problems,
        warn_of_applied_template,
        warn_of_end_of_turn,
        warn_of_thinking,
    )
    from qswitch.models.pair import load_pair_tokenizer, teacher_half
    from qswitch.models.runtime import make_runtime

    problems = list(known)
    half = teacher_half(config) if config.awaits_text else config

    def attempt(action: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return action(*arguments)
        except QSwitchError as error:
            problems.extend(error.problems if isinstance(error, ConfigError) else [str(error)])
            return None

    runtime = attempt(make_runtime, config.train)
    unreadable = _unreadable_models(config, known, runtime)
    problems += unreadable
    pair = encoder = None
    if not unreadable and not any(_names_model(p, role) for p in known for role in ("teacher", "student")):
        pair = attempt(load_pair_tokenizer, half)
        encoder = attempt(make_encoder, half, pair) if pair is not None else None
        if config.awaits_text and (own := attempt(load_pair_tokenizer, config)) is not None:
            attempt(make_encoder, config, own)
            if config.data.lm_corpus is not None:
                attempt(_corpus, config, own)
    if pair is not None and encoder is not None:
        problems += end_token_problems(half, pair)
        problems += template_problems(half, pair, encoder)
        warn_of_end_of_turn(pair, encoder)
    if pair is None or encoder is None or problems:
        found = data_problems(config, PROBED_RECORDS)
        problems += [problem for problem in found if problem not in problems]
        raise PreflightError(problems)
    prompts = attempt(gather_prompts, half, encoder, notify)
    if prompts is not None:
        first = first_records(half)
        warn_of_applied_template(half, pair, first)
        warn_of_thinking(half, encoder, first)
    if prompts is None:  # of several sets that cannot be read, it named the first
        problems = unreadable_data(config, PROBED_RECORDS) or problems
    corpus = attempt(_corpus, half, pair) if half.data.lm_corpus is not None else None
    if problems:
        raise PreflightError(problems)
    return Prepared(pair, encoder, prompts, corpus, runtime.device.type)


def _names_model(problem: str, role: str) -> bool:
    """Whether a problem of the settings says that the model itself is not there or not to be understood."""
    return problem.startswith((f"The shape of {role}.model", f"{role}.shape", f"{role}.model: "))


def _corpus(config: RunConfig, pair: TokenizerPair) -> Tensor:
    from qswitch.data.loader import PassageLoader, load_corpus_tokens

    assert config.data.lm_corpus is not None
    tokens = load_corpus_tokens(
        config.data.lm_corpus,
        pair.tokenizer,
        split=config.data.split,
        max_tokens=config.data.lm_corpus_tokens,
    )
    PassageLoader(tokens, config.loss.lm_passage_tokens, config.seed)  # refuses a corpus shorter than a passage
    return tokens


def _unreadable_models(config: RunConfig, known: Sequence[str], runtime: Runtime | None) -> list[str]:
    """Models that are not there, gated, or of no use, by role; reads config.json and the weight files' headers.

    Those of which a `known` problem says so already are passed over.
    """
    from qswitch.models.load import read_config
    from qswitch.models.quantise import check_stored
    from qswitch.models.references import resolve_reference
    from qswitch.models.weight_files import check_weight_files, check_whole
    from qswitch.plan.adapters import find_adapter
    from qswitch.plan.counted import unusable_because

    problems: list[str] = []
    loaded = [role for role, _ in sections_to_load(config)]
    seen: set[str] = set()
    for role, section in (("teacher", config.teacher), ("student", config.student)):
        key = repr((section.model, section.revision, section.trust_remote_code, section.precision, role in loaded))
        if key in seen or any(_names_model(problem, role) for problem in known):
            continue
        seen.add(key)
        try:
            resolved = resolve_reference(section.model, section.revision)
            found = read_config(resolved, section.trust_remote_code)
            reason = unusable_because(found)
            if reason is not None:
                raise ModelError(f"{resolved.name} ({found.model_type}) cannot be distilled here: {reason}")
            if role in loaded:
                if runtime is not None:
                    check_stored(found, resolved.name, section.precision, runtime)
                check_weight_files(resolved)
            _refuse_another_shape(section.shape, found, resolved.name)
        except ModelError as error:
            hint = ""
            if config.about.gated and config.about.twin and not has_token():
                hint = f" There is no token for the hub here; the preset {config.about.twin} needs none."
            reason = str(error).rstrip(".")
            problems.append(f"{role}.model: {reason}.{hint}")
    for setting, reference in (("teacher.adapter", config.teacher.adapter),
                               ("student.init_adapter", config.student.init_adapter)):  # fmt: skip
        if reference is not None:
            try:
                check_whole(find_adapter(reference, setting) / "adapter_model.safetensors")
            except ConfigError:
                pass  # reported before any file was read
            except ModelError as error:
                problems.append(f"{setting}: {error}")
    return problems


def _refuse_another_shape(shape: Mapping[str, Any] | None, config: Any, name: str) -> None:
    """A shape block that was left behind when the model was changed would have planned another model."""
    own = config.get_text_config()
    for key in ("hidden_size", "n_embd", "num_hidden_layers", "n_layer"):
        found = getattr(own, key, None)
        if shape is not None and key in shape and found is not None and shape[key] != found:
            raise ModelError(f"its shape block says {key} {shape[key]}, but config.json of {name} says {found}. "
                             "Remove the block; the model's own file is read then.")  # fmt: skip
