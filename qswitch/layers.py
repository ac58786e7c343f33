"""How settings from several places become one checked configuration: `stack` lays one layer over another. Cold.

A layer is what one place says, as nested plain values: a preset, a file, a cell of `qswitch compare`, the `--set`
options of a command. All are laid over each other by the same rules, lowest first, on top of the method's bundle
(`methods.py`) and the defaults (`config.py`): mappings merge key by key, null restores the default, and what a higher
layer makes meaningless is not inherited. What a layer itself says without effect is refused (`rules.py`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import ValidationError

from qswitch import methods, rules
from qswitch.config import RunConfig, default_of, known_keys, section_at
from qswitch.errors import ConfigError
from qswitch.units import UNLIMITED_STEPS
from qswitch.yaml_file import parse_yaml

Layer = Mapping[str, Any]

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
    "lora_rank": "student.lora.r",
    "lora_alpha": "student.lora.alpha",
    "lora_dropout": "student.lora.dropout",
    "lora_target_modules": "student.lora.target_modules",
    "use_dora": "student.lora.use_dora",
    "use_rslora": "student.lora.use_rslora",
    "max_new_tokens": "rollout.max_new_tokens",
    "max_prompt_length": "data.max_prompt_tokens",
    "max_completion_length": "rollout.max_new_tokens",
    "beta": "loss.beta",
    "block_size": "loss.lm_passage_tokens",
    "lm_block_tokens": "loss.lm_passage_tokens",
    "round_steps": "rollout.steps_at_once",
    "teacher_model_name_or_path": "teacher.model",
    "model_name_or_path": "student.model",
    "dataset_name": "data.train",
    "lr": "train.learning_rate",
    "epochs": "train.num_epochs",
    "num_train_epochs": "train.num_epochs",
}
"""What Hugging Face's tools, people, or earlier commits call a setting -> where it lives here. Understood wherever
settings are."""


FROM_ELSEWHERE = {
    "lmbda": "set data.ground_truth_mix to 1 - lmbda, the share of batches that the data's own responses make",
    "batch_size": "set train.per_device_train_batch_size for the loss, rollout.batch_size for decoding",
    "temperature": "set rollout.temperature for sampling (GKDConfig means no more), loss.temperature for the loss "
    "(DistillationConfig means both)",
    "bf16": "set train.compute_dtype=bf16, or leave it at auto",
    "fp16": "set train.compute_dtype=fp16, or leave it at auto",
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
    "packing": "responses of like length share a micro-batch instead. Remove it",
    "sample_packing": "responses of like length share a micro-batch instead. Remove it",
    "sequence_len": "set data.max_prompt_tokens and rollout.max_new_tokens",
    "cutoff_len": "set data.max_prompt_tokens and rollout.max_new_tokens",
    "model_max_length": "set data.max_prompt_tokens and rollout.max_new_tokens",
    "val_set_size": "set data.num_validation, a number of prompts",
    "micro_batch_size": "set train.per_device_train_batch_size",
    "warmup_ratio": "set train.warmup_steps to the share, which is below 1",
    "finetuning_type": "set student.adapter=none to train every weight, lora to train an adapter",
    "full_finetuning": "set student.adapter=none to train every weight",
    "use_vllm": "teacher and student write together, token by token, in qswitch itself. Remove it",
    "attn_implementation": "torch's scaled_dot_product_attention is used, which takes the kernel itself. Remove it",
    "flash_attention": "torch's scaled_dot_product_attention is used, which takes the kernel itself. Remove it",
    "flash_attn": "torch's scaled_dot_product_attention is used, which takes the kernel itself. Remove it",
    "neftune_noise_alpha": "there is no noise on embeddings here. Remove it",
    "use_liger_kernel": "the loss runs over chunks of tokens (loss.chunk_tokens) already. Remove it",
    "train_on_inputs": "prompts are read and never learnt. Remove it",
    "dataset_text_field": "set data.columns, for example {prompt: question, response: answer}",
    "chat_template": "set data.template",
    "dataset": "set data.train",
    "datasets": "set data.train",
    "dataset_path": "set data.train",
    "rank": "set student.lora.r",
    "wandb_project": "set train.report_to=wandb; its project is called qswitch",
    "base_model": "set student.model, and teacher.model for the model that teaches it",
    "lora_target_linear": "set student.lora.target_modules=all-linear, the default",
    "push_to_hub": "run qswitch push RUN NAME afterwards",
    "deepspeed": "start several processes with accelerate launch; docs/scale.md",
    "fsdp": "start several processes with accelerate launch; docs/scale.md",
}
"""Settings of other trainers that have no namesake here -> what to do instead."""


OF_THE_NAME = ("model", "revision", "trust_remote_code", "shape")
"""Settings of a section that say which model it is."""
OF_THE_STUDENT = (*OF_THE_NAME, "tokenizer", "shrink_to_layers", "init_adapter")
"""Settings of the student that say what it is; the others say how it learns."""
OF_ONE_MODEL = {
    "teacher": ("shape", "revision", "trust_remote_code", "adapter"),
    "student": ("shape", "revision", "trust_remote_code", "init_adapter"),
}
"""Settings that mean nothing, or something else, for another model than the one they were said of."""


LIKE_ENOUGH = 0.75
"""Similarity of two names above which the one is taken for a slip in the other."""


LIMITS = ("train.max_steps", "train.num_epochs", "train.max_tokens", "train.max_seconds")
"""What ends a run: the highest layer that names one of them says all of them."""


def build_config(*layers: Layer, where: str | None = None, trains: bool = True) -> RunConfig:
    """The checked configuration of layers, the lowest first.

    Without `trains` it is of what has been done, so that settings that only make no run together are no error: an
    earlier version may have allowed them.

    Raises:
        ConfigError: every problem found, each with the dotted key, and the nearest spelling for an unknown one.
    """
    values: dict[str, Any] = {}
    for layer in layers:
        values = stack(values, by_section(layer, where))
    try:
        return RunConfig.model_validate(_resolved(values), context={"trains": trains})
    except ConfigError as error:
        raise ConfigError(error.problems, where) from None
    except ValidationError as error:
        raise ConfigError([_explain(e) for e in error.errors()], where) from None


def reopened(written: Layer, where: str) -> dict[str, Any]:
    """A configuration that a command wrote into its own folder, by section, without settings that nothing reads.

    Such a setting changed nothing of the run. A release that learns to refuse it must still open the run.
    """
    values = by_section(written, where)
    return _without(values, set(rules.unread(_reader(values))))


def stack(below: Layer, above: Layer) -> dict[str, Any]:
    """One layer laid over another, both by section: mappings merge key by key, and null restores the default.

    What `above` makes meaningless is not inherited: another method takes away what says what the method below is,
    another model the shape, revision and adapter of the one below and the permission to run its code (but the ungated
    twin of a preset is the same model), a limit of the run all limits below, and what the result would not read,
    although `below` alone does, goes too.
    """
    method = above.get("method")
    gone = set(methods.OWNED) if method is not None and method != methods.method_of(below) else set()
    for role in ("teacher", "student"):
        old, new = (_at(layer, f"{role}.model") for layer in (below, above))
        if new is not None and old not in (None, new) and not _is_twin(below, above):
            gone |= {f"{role}.{name}" for name in OF_ONE_MODEL[role]}
    if any(_at(above, limit) is not None for limit in LIMITS):
        gone |= set(LIMITS)
    elif not rules.ends_by_steps_alone(_reader(below)) and _at(below, "train.max_steps") == UNLIMITED_STEPS:
        gone.add("train.max_steps")  # written by us where there was none, which it is no longer where the others go
    kept = _without(below, gone)
    merged = _merged(kept, above)
    stale = rules.unread(_reader(merged)).keys() - rules.unread(_reader(below)).keys()
    return _merged(_without(kept, stale), above)


def by_section(settings: Layer, where: str | None = None) -> dict[str, Any]:
    """The settings of one layer as nested mappings, where they may be written with dots or by an alias.

    Raises:
        ConfigError: a setting is written twice, with two values.
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    for path, value in _written(settings, ""):
        *parents, last = path
        node: Any = values
        for parent in parents:
            node = node.setdefault(parent, {}) if isinstance(node, dict) else None
        before = node.get(last, value) if isinstance(node, dict) else node
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            value = {**before, **value}
        elif before != value:
            problems.append(f"{'.'.join(path)} is written twice, as {before} and as {value}; keep one")
        if isinstance(node, dict):
            node[last] = value
    if problems:
        raise ConfigError(problems, where)
    return values


def set_layer(overrides: list[str], named: Layer | None = None) -> dict[str, Any]:
    """The layer that options make: those with a name of their own, and `--set key=value`, whose values are YAML.

    Of two for one setting the later counts, and `--set` is later than an option with a name.

    Raises:
        ConfigError: an option without `=`, or with a value that is no YAML.
    """
    layer = by_section(named or {})
    problems = []
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key.strip():
            problems.append(f"--set {override!r}: write it as section.key=value, for example train.max_steps=100")
            continue
        try:
            layer = _merged(layer, by_section({key.strip(): parse_yaml(text)}), keep_null=True)
        except ValueError:
            problems.append(f"--set {override!r}: the value is not valid YAML; put it in quotes")
    if problems:
        raise ConfigError(problems)
    return layer


def flatten(settings: Layer) -> dict[str, Any]:
    """Dotted setting -> value of settings by section."""
    return {".".join(path): value for path, value in _written(settings, "")}


def dump_config(config: RunConfig) -> str:
    """The configuration as YAML; `build_config(yaml.safe_load(text))` gives an equal one."""
    import yaml

    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def sft_config(config: RunConfig, model: Literal["teacher", "student"], own: Layer | None = None) -> RunConfig:
    """The configuration that fine-tunes one model of a pair on its data: method sft, that model being the student.

    The teacher is trained as it is stored: LoRA on NF4 weights is QLoRA. What a file says of the pair's student beside
    its adapters is not the teacher's; what `own`, the options of the command, say of the student is said of the model
    that learns.

    Raises:
        ConfigError: the configuration cannot be fine-tuned so.
    """
    below = config.model_dump(exclude_unset=True)
    above: dict[str, Any] = {"method": "sft", "teacher": {"adapter": None}}
    if model == "teacher":
        teacher = config.teacher
        kept = {key: value for key, value in below["student"].items() if key in ("lora", "gradient_checkpointing")}
        same = {key: getattr(teacher, key) for key in (*OF_THE_NAME, "precision")}
        said = _mapping(with_teacher_as_student(own or {}), "student")
        below["student"] = kept
        above["student"] = {**same, "init_adapter": teacher.adapter, **said}
        _refuse_to_train(above["student"])
    return build_config(below, above)


def with_teacher_as_student(own: Layer) -> dict[str, Any]:
    """What is said of a pair, as it is said of its teacher alone, which is to be fine-tuned in the student's place.

    What the pair's student is goes; how it learns is how the teacher learns.

    Raises:
        ConfigError: the teacher is to be stored in a precision that cannot be fine-tuned.
    """
    values = by_section(own)
    teacher, student = dict(_mapping(values, "teacher")), _mapping(values, "student")
    moved = {name: teacher[name] for name in OF_THE_NAME if name in teacher}
    for theirs, ours in (("precision", "precision"), ("adapter", "init_adapter")):
        if theirs in teacher:
            moved[ours] = teacher.pop(theirs)
    learns = {name: value for name, value in student.items() if name not in OF_THE_STUDENT}
    found = {**values, "teacher": teacher, "student": {**moved, **learns}}
    _refuse_to_train(found["student"])
    return found


def _refuse_to_train(student: Layer) -> None:
    precision = student.get("precision")
    if precision in ("int8", "stored"):
        raise ConfigError(f"teacher.precision={precision} cannot be fine-tuned. Set teacher.precision=nf4 or bf16.")


def _mapping(values: Layer, section: str) -> Mapping[str, Any]:
    """A section of a layer; empty where it is not there, or is none, which is said where the layer is checked."""
    found = values.get(section)
    return found if isinstance(found, Mapping) else {}


def cuts_another_student(below: Layer, above: Layer) -> bool:
    """Whether the number of layers that `below` cuts its student to would cut the other one that `above` names."""
    first, second = (_mapping(by_section(layer), "student") for layer in (below, above))
    is_another = second.get("model") not in (None, first.get("model"))
    return is_another and first.get("shrink_to_layers") is not None and "shrink_to_layers" not in second


def _merged(below: Layer, above: Layer, *, keep_null: bool = False) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        if value is None and not keep_null:
            merged.pop(key, None)
        elif isinstance(value, Mapping):
            old = merged.get(key)
            values = keep_null or key == "shape"  # config.json's own null is a value
            merged[key] = _merged(old if isinstance(old, Mapping) else {}, value, keep_null=values)
        else:
            merged[key] = value
    return merged


def _without(values: Layer, gone: set[str], prefix: str = "") -> dict[str, Any]:
    return {
        key: _without(value, gone, f"{prefix}{key}.") if isinstance(value, Mapping) else value
        for key, value in values.items()
        if f"{prefix}{key}" not in gone
    }


def _resolved(values: Layer) -> dict[str, Any]:
    """`values` over the bundle of their method."""
    method = methods.method_of(values)
    return _merged({"method": method, **methods.METHODS.get(method, {})}, values)


def _reader(values: Layer) -> rules.Read:
    resolved = _resolved(values)
    return lambda key: _at(resolved, key, default_of(key, methods.CUSTOM))


def _at(values: Layer, key: str, default: Any = None) -> Any:
    node: Any = values
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return default
        node = node[part]
    return node


def _is_twin(below: Layer, above: Layer) -> bool:
    """Whether `above` is the ungated twin of the preset below: the same models under other names."""
    twin = _at(below, "about.twin")
    return twin is not None and twin == _at(above, "about.name")


def _written(settings: Layer, section: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, value) of every setting below a section; the keys of a setting's own mapping are its value."""
    model = section_at(section)
    assert model is not None
    parents = tuple(section.split(".")) if section else ()
    inside = f"{section}." if section else ""
    for written, value in settings.items():
        name = str(written)
        alias = ALIASES.get(name)
        if alias is not None and name not in model.model_fields and alias.startswith(inside):
            name = alias.removeprefix(inside)
        first, dot, rest = name.partition(".")
        value = {rest: value} if dot else value
        here = f"{inside}{first}"
        if section_at(here) is not None and isinstance(value, Mapping) and value:
            yield from _written(value, here)
        else:
            yield (*parents, first), value


def _explain(error: Any) -> str:
    # Beside keys stand the members of a union that were tried, such as list[str].
    path = [str(p) for p in error["loc"] if not (isinstance(p, str) and ("[" in p or p in ("str", "bool")))]
    if error["type"] == "extra_forbidden":
        unknown = str(error["loc"][-1])  # a user's own, which may look like a type
        path = [*path[: -1 if path[-1:] == [unknown] else None], unknown]
        return f"{'.'.join(path)} is not a setting{_hint(path, error.get('input'))}"
    dotted = ".".join(path)
    if error["type"] == "missing":
        return f"{dotted} is missing. Set it in the file or with --set {dotted}=..."
    value = error.get("input")
    if error["type"] == "literal_error" and isinstance(value, str):
        near = difflib.get_close_matches(value, re.findall(r"'([^']+)'", error["ctx"]["expected"]), n=1)
        meant = f" Did you mean {near[0]}?" if near else ""
        return f"{dotted} = {value!r}: {error['msg']}.{meant}"
    if error["type"] in ("int_parsing", "float_parsing") and value in ("true", "false"):
        return f"{dotted} = {value}: expected a number."
    shown = repr(value) if not isinstance(value, dict) else "a mapping"
    return f"{dotted} = {shown}: {error['msg']}."


def _hint(path: list[str], value: Any) -> str:
    """What somebody may have meant who wrote a setting that does not exist; rather nothing than something else."""
    *parents, last = path
    if last in FROM_ELSEWHERE:
        return f": {FROM_ELSEWHERE[last]}."
    inside = "".join(f"{parent}." for parent in parents)
    section = section_at(".".join(parents))
    names = list(section.model_fields) if section is not None else []
    is_mapping = isinstance(value, dict)  # which settings are too, but a section is never anything else
    meant = {name: inside + name for name in names if is_mapping or section_at(inside + name) is None}
    longer = [name for name in meant if name.startswith(f"{last}_")]
    if not parents and not is_mapping:
        meant |= {key.rpartition(".")[2]: key for key in known_keys()} | {alias: alias for alias in ALIASES}
    elif not is_mapping:
        meant |= {alias: key for alias, key in ALIASES.items() if key.startswith(inside)}
    near = difflib.get_close_matches(last, meant, n=1, cutoff=LIKE_ENOUGH) or (longer if len(longer) == 1 else [])
    keys = [key.split(".") for key in known_keys()]
    elsewhere = [".".join(key[: key.index(last) + 1]) for key in keys if last in key]
    if not elsewhere and last in ALIASES:
        elsewhere = [ALIASES[last]]
    found = elsewhere or [meant[name] for name in near]
    return f". Did you mean {' or '.join(dict.fromkeys(found))}?" if found else f". Known here: {', '.join(names)}."
