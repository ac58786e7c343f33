"""How settings from several places become one checked `RunConfig`: files, presets, `--set`. Cold."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from qswitch import methods
from qswitch.config import RunConfig
from qswitch.errors import ConfigError
from qswitch.inheritance import forget_replaced
from qswitch.yaml_file import parse_yaml

# Hugging Face spelling -> where the setting lives here. Accepted at the top level of a file and in --set.
ALIASES = {
    "per_device_train_batch_size": "train.per_device_train_batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "learning_rate": "train.learning_rate",
    "weight_decay": "train.weight_decay",
    "max_grad_norm": "train.max_grad_norm",
    "max_steps": "train.max_steps",
    "warmup_steps": "train.warmup_steps",
    "lr_scheduler_type": "train.lr_scheduler_type",
    "optim": "train.optimizer",
    "save_steps": "train.save_steps",
    "save_total_limit": "train.save_total_limit",
    "eval_steps": "train.eval_steps",
    "report_to": "train.report_to",
    "gradient_checkpointing": "student.gradient_checkpointing",
    "lora_r": "student.lora.r",
    "lora_alpha": "student.lora.alpha",
    "lora_dropout": "student.lora.dropout",
    "lora_target_modules": "student.lora.target_modules",
    "use_dora": "student.lora.use_dora",
    "use_rslora": "student.lora.use_rslora",
    "max_new_tokens": "rollout.max_new_tokens",
    "temperature": "rollout.temperature",
    "max_prompt_length": "data.max_prompt_tokens",
    "max_completion_length": "rollout.max_new_tokens",
    "beta": "loss.beta",
    "teacher_model_name_or_path": "teacher.model",
    "model_name_or_path": "student.model",
    "dataset_name": "data.train",
}


FROM_ELSEWHERE = {
    "num_train_epochs": "qswitch counts optimizer steps: set train.max_steps, or train.max_tokens",
    "num_epochs": "qswitch counts optimizer steps: set train.max_steps, or train.max_tokens",
    "bf16": "set train.compute_dtype=bf16, or leave it at auto",
    "fp16": "there is no fp16 arithmetic; set train.compute_dtype=bf16 or fp32, or leave it at auto",
    "load_in_4bit": "the teacher's is teacher.precision=nf4 (the default), the student's student.precision=nf4",
    "load_in_8bit": "set teacher.precision=int8",
    "max_length": "set data.max_prompt_tokens and rollout.max_new_tokens",
    "max_seq_length": "set data.max_prompt_tokens and rollout.max_new_tokens",
    "evaluation_strategy": "set train.eval_steps",
    "eval_strategy": "set train.eval_steps",
    "save_strategy": "set train.save_steps",
    "resume_from_checkpoint": "run qswitch distill --resume RUN",
    "output_dir": "it is the option --output-dir",
    "streaming": "data of any size is read from a table on disk, without a setting. Remove it",
    "logging_steps": "every step is logged, in RUN/metrics.jsonl",
}
"""Settings of other trainers that have no namesake here -> what to do instead."""


def sft_config(config: RunConfig, model: Literal["teacher", "student"]) -> RunConfig:
    """The configuration that fine-tunes one model of a pair on its data: method sft, that model being the student.

    The teacher is trained as it is stored: LoRA on NF4 weights is QLoRA.

    Raises:
        ConfigError: the configuration cannot be fine-tuned so.
    """
    values = methods.forget_method(config.model_dump(exclude_unset=True), "sft", ALIASES)
    values["method"] = "sft"
    if model == "teacher":
        if config.teacher.precision == "int8":
            raise ConfigError("teacher.precision=int8 cannot be fine-tuned. Set teacher.precision=nf4 or bf16.")
        teacher = values["teacher"]
        kept = {key: value for key, value in values["student"].items() if key in ("lora", "gradient_checkpointing")}
        same = {key: teacher[key] for key in ("model", "revision", "trust_remote_code", "shape") if key in teacher}
        values["student"] = {**kept, **same, "precision": config.teacher.precision}
        if teacher.get("adapter"):
            values["student"]["init_adapter"] = teacher["adapter"]
    values["teacher"].pop("adapter", None)
    return build_config(values)


def build_config(values: Mapping[str, Any], source: str | None = None) -> RunConfig:
    """Turn nested plain values into a checked `RunConfig`.

    Raises:
        ConfigError: every problem found, each with the dotted key, and the nearest spelling for an unknown one.
    """
    values = methods.with_bundle(_resolve_aliases(dict(values), source))
    try:
        return RunConfig.model_validate(values)
    except ConfigError as error:
        raise ConfigError(error.problems, source) from None
    except ValidationError as error:
        raise ConfigError([_explain(e) for e in error.errors()], source) from None


def apply_overrides(values: Mapping[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Return `values` with `a.b=c` overrides written in; c is read as YAML, so lists and numbers work.

    Raises:
        ConfigError: an override without `=`, or with a value that is no YAML.
    """
    import copy

    result = copy.deepcopy(dict(values))
    problems = []
    for key, _, text in (override.partition("=") for override in overrides):
        if key.strip() == "method":
            result = methods.forget_method(result, text.strip().strip("'\""), ALIASES)
    written: list[tuple[str, Any]] = []
    for override in overrides:
        key, separator, text = override.partition("=")
        key = key.strip()
        if not separator or not key:
            problems.append(f"--set {override!r}: write it as section.key=value, for example train.max_steps=100")
            continue
        try:
            value = parse_yaml(text) if text.strip() else None
        except ValueError:
            problems.append(f"--set {override!r}: the value is not valid YAML; put it in quotes")
            continue
        if isinstance(value, str):
            value = _number_or_text(value)
        written.append((ALIASES.get(key, key), value))
    if problems:
        raise ConfigError(problems)
    above: dict[str, Any] = {}
    for key, value in written:
        _assign(above, key, value)
    result = forget_replaced(result, above)
    for key, value in written:
        _assign(result, key, value)
    return result


def dump_config(config: RunConfig) -> str:
    """The configuration as YAML; `build_config(yaml.safe_load(text))` gives an equal one."""
    import yaml

    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def _number_or_text(text: str) -> Any:
    """YAML 1.1 reads 1e-4 as text; people mean a number."""
    try:
        return float(text)
    except ValueError:
        return text


def _assign(values: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    node = values
    for parent in parents:
        child = node.get(parent)
        if not isinstance(child, dict):
            child = {}
            node[parent] = child
        node = child
    node[last] = value


def _resolve_aliases(values: dict[str, Any], source: str | None) -> dict[str, Any]:
    problems = []
    for name in [n for n in values if n in ALIASES]:
        section, _, key = ALIASES[name].rpartition(".")
        node: Any = values
        for part in section.split("."):
            node = node.setdefault(part, {}) if isinstance(node, dict) else None
        if isinstance(node, dict):
            if key in node and node[key] != values[name]:
                problems.append(f"{name} and {ALIASES[name]} are the same setting with two values; keep one")
            node[key] = values.pop(name)
    if problems:
        raise ConfigError(problems, source)
    return values


def _section_at(path: tuple[Any, ...]) -> type[BaseModel] | None:
    model: Any = RunConfig
    for part in path:
        field = model.model_fields.get(part) if isinstance(part, str) else None
        model = field.annotation if field else None
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return None
    return model


def known_keys() -> list[str]:
    """Every dotted key of the configuration, in order."""

    def walk(model: type[BaseModel], prefix: str):
        for name, field in model.model_fields.items():
            kind = field.annotation
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from walk(kind, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}"

    return list(walk(RunConfig, ""))


def _explain(error: Any) -> str:
    path = tuple(p for p in error["loc"] if not (isinstance(p, str) and ("[" in p or p in ("str", "bool"))))
    dotted = ".".join(str(p) for p in path)
    if error["type"] == "extra_forbidden":
        section = _section_at(path[:-1])
        names = list(section.model_fields) if section else []
        if len(path) == 1:
            names += list(ALIASES)
        if path[-1] in FROM_ELSEWHERE:
            return f"{dotted} is not a setting: {FROM_ELSEWHERE[path[-1]]}."
        near = difflib.get_close_matches(str(path[-1]), names, n=1, cutoff=0.5)
        everywhere = [k for k in known_keys() if k.rpartition(".")[2] == path[-1]]
        if near:
            hint = ".".join([*map(str, path[:-1]), near[0]])
            return f"{dotted} is not a setting. Did you mean {hint}?"
        if everywhere:
            return f"{dotted} is not a setting. Did you mean {everywhere[0]}?"
        return f"{dotted} is not a setting. Known here: {', '.join(names)}."
    if error["type"] == "missing":
        return f"{dotted} is missing. Set it in the file or with --set {dotted}=..."
    value = error.get("input")
    shown = repr(value) if not isinstance(value, dict) else "a mapping"
    return f"{dotted} = {shown}: {error['msg']}."
