"""Which settings a configuration reads, and which do not go together: two tables, no pydantic, no torch.

`UNREAD` says of every setting that is not always read when it is read, and what to tell somebody who changed it where
it is not. `layers.stack` uses the same table to leave behind what a lower layer said and a higher one made meaningless.
A condition sees a configuration through `read`, which maps a dotted setting to its value; conditions of `UNREAD`
compare for equality only, so that they also work on values that have not been validated. The file is long because every
setting that is not always read, and every conflict, stands here once with what is said to the user.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

from qswitch import methods
from qswitch.units import UNLIMITED_STEPS

Read = Callable[[str], Any]
Condition = Callable[[Read], bool]


class Unread(NamedTuple):
    """Settings, or whole sections, that nothing reads unless `read_when` holds."""

    settings: tuple[str, ...]
    read_when: Condition
    because: str
    """Continues "SETTING has no effect"; `{section.field}` stands for a value."""
    remedy: str = "Remove it."


class Conflict(NamedTuple):
    """Values that are valid one by one and make no run together."""

    when: Condition
    message: str | Callable[[Read], str]
    """With `{section.field}` for values, or what makes it of more than values."""


def is_one_of(setting: str, *values: Any) -> Condition:
    """The condition that a setting has one of these values."""
    return lambda read: read(setting) in values


def writes_rollouts(read: Read) -> bool:
    """Whether any training response is written by a model."""
    return read("data.ground_truth_mix") != 1 or bool(read("data.adaptive_share"))


def reads_responses(read: Read) -> bool:
    """Whether any batch is made of the data's own responses."""
    return read("data.ground_truth_mix") != 0 or bool(read("data.adaptive_share"))


def imitates(read: Read) -> bool:
    """Whether the loss reads the teacher's outputs, rather than the written tokens alone."""
    return read("loss.objective") != "cross_entropy"


def learns_from_teacher(read: Read) -> bool:
    """Whether the teacher writes, is imitated, or both."""
    return imitates(read) or writes_rollouts(read)


def needs_teacher(read: Read) -> bool:
    """Whether the teacher is loaded: it writes or is imitated, and has not done so earlier."""
    return learns_from_teacher(read) and not _stored(read)


def _stored(read: Read) -> bool:
    return read("teacher.responses") is not None


def may_pass_text(read: Read) -> bool:
    """Whether the teacher's text is all that the method learns from: then the student may read other tokens."""
    return not imitates(read) and not reads_responses(read) and read("rollout.policy") == "teacher"


def _passes_text(read: Read) -> bool:
    return read("student.tokenizer") == "own"


OTHER_TOKENIZER_REMEDY = (
    "Set method=seqkd, which learns from the teacher's text with the student's own tokenizer; or take a student of the "
    "teacher's family, or cut one from the teacher (--student shrink, or qswitch shrink)."
)


def why_teacher_is_asked(read: Read) -> str | None:
    """Why a teacher cannot have worked before the run, with the nearest method that allows it; None where it can."""
    policy = read("rollout.policy")
    if read("data.adaptive_share"):
        what, near = "data.adaptive_share lets the student write, and the teacher read it", "method=kd"
    elif writes_rollouts(read) and policy in ("student", "mixture"):
        what, near = f"rollout.policy={policy} lets the student write, and the teacher read it", "method=kd"
    elif writes_rollouts(read) and policy != "teacher":
        what, near = f"rollout.policy={policy} asks the teacher about the student's tokens", "method=seqkd"
    else:
        return None
    other = (
        "the teacher's outputs for the data's responses" if near == "method=kd" else "responses of the teacher's own"
    )
    return f"{what} at every step of the run. {near} learns from {other}, which can be stored"


def drafts_tokens(read: Read) -> bool:
    """Whether the student drafts tokens that the teacher then scores: some of either may end in a response."""
    return writes_rollouts(read) and read("rollout.policy") not in ("student", "teacher")


def _replays(read: Read) -> bool:
    return bool(read("data.adaptive_share")) or (writes_rollouts(read) and read("rollout.reuse") != 1)


def _student_decodes(read: Read) -> bool:
    return writes_rollouts(read) and read("rollout.policy") != "teacher"


def _by_writer(read: Read) -> list[Any]:
    """The divergences of the tokens that train and have their writer's own; None for loss.divergence."""
    if not writes_rollouts(read) or not _two_writers(read):
        return []
    names = _BY_WRITER if read("loss.scope") == "all" else _BY_WRITER[:1]
    return [read(name) for name in names]


def _reads_divergence(read: Read) -> bool:
    """Whether some token trains that does not have its writer's own divergence."""
    return None in (_by_writer(read) or [None]) or reads_responses(read)


def _some_divergence(*names: str) -> Condition:
    """The condition that the divergence of some token that trains has one of these names."""

    def condition(read: Read) -> bool:
        common = [read("loss.divergence")] if _reads_divergence(read) else []
        return any(name in [*_by_writer(read), *common] for name in names)

    return condition


_BY_WRITER = ("loss.divergence_teacher_tokens", "loss.divergence_student_tokens")
_two_writers = is_one_of("rollout.policy", "switch", "random", "skd", "adaswitch")
_switches = is_one_of("rollout.policy", "switch")
_POLICY = "with policy {rollout.policy}"
_SCHEDULE = "with schedule {rollout.schedule}"
_OTHER_POLICY = "Remove it or change the policy."
_OTHER_SCHEDULE = "Remove it or change the schedule."
_OF_ROLLOUTS = (
    "rollout.policy", "rollout.schedule", "rollout.tau_0", "rollout.decay_rate", "rollout.constant_threshold",
    "rollout.relative_decay", "rollout.expected_tokens", "rollout.teacher_share",
    "rollout.teacher_probability", "rollout.mixture_teacher_weight", "rollout.skd_top_k", "rollout.adaswitch_factor",
    "rollout.adaswitch_window", "rollout.reuse", "rollout.block_tokens", "rollout.student_graphs",
    "rollout.teacher_graphs", "rollout.tail_bits", "rollout.temperature", "loss.scope",
    "loss.divergence_teacher_tokens", "loss.divergence_student_tokens",
)  # fmt: skip

UNREAD = (
    Unread(_OF_ROLLOUTS, writes_rollouts, "with method={method}: no rollout is written, data.ground_truth_mix is 1"),
    Unread(
        ("rollout.schedule", "rollout.tau_0", "rollout.decay_rate", "rollout.constant_threshold",
         "rollout.relative_decay", "rollout.expected_tokens", "rollout.teacher_share", "rollout.tail_bits"),
        _switches, _POLICY, _OTHER_POLICY,
    ),
    Unread(
        ("rollout.tau_0",), is_one_of("rollout.schedule", "exponential", "relative", "linear"), _SCHEDULE,
        _OTHER_SCHEDULE,
    ),
    Unread(
        ("rollout.relative_decay", "rollout.expected_tokens"), is_one_of("rollout.schedule", "relative"), _SCHEDULE,
        "Set rollout.schedule=relative, or remove it.",
    ),
    Unread(
        ("rollout.teacher_share",), is_one_of("rollout.schedule", "exponential", "relative", "constant"), _SCHEDULE,
        _OTHER_SCHEDULE,
    ),
    Unread(
        ("rollout.tail_bits",), is_one_of("rollout.schedule", "exponential", "relative", "linear"), _SCHEDULE,
        _OTHER_SCHEDULE,
    ),
    Unread(("rollout.decay_rate",), is_one_of("rollout.schedule", "exponential", "growth"), _SCHEDULE, _OTHER_SCHEDULE),
    Unread(("rollout.constant_threshold",), is_one_of("rollout.schedule", "constant"), _SCHEDULE, _OTHER_SCHEDULE),
    Unread(("rollout.teacher_probability",), is_one_of("rollout.policy", "random"), _POLICY, _OTHER_POLICY),
    Unread(("rollout.mixture_teacher_weight",), is_one_of("rollout.policy", "mixture"), _POLICY, _OTHER_POLICY),
    Unread(("rollout.skd_top_k",), is_one_of("rollout.policy", "skd"), _POLICY, _OTHER_POLICY),
    Unread(
        ("rollout.adaswitch_factor", "rollout.adaswitch_window"),
        is_one_of("rollout.policy", "adaswitch"), _POLICY, _OTHER_POLICY,
    ),
    Unread(("rollout.block_tokens",), drafts_tokens, f"{_POLICY}: the two models do not write in turns"),
    Unread(("rollout.student_graphs",), _student_decodes, f"{_POLICY}: the student writes nothing"),
    Unread(
        ("rollout.teacher_graphs",), lambda read: read("rollout.policy") != "student",
        f"{_POLICY}: the teacher writes nothing",
    ),
    Unread(("loss.scope",), _student_decodes, f"{_POLICY}: every token is the teacher's"),
    Unread(
        ("rollout.reuse",), is_one_of("data.adaptive_share", False), "with data.adaptive_share, which replays by itself"
    ),
    Unread(
        ("rollout.replay_capacity", "rollout.replay_max_age_steps"), _replays,
        "with rollout.reuse=1, where every rollout trains once",
    ),
    Unread(
        ("teacher.responses",), learns_from_teacher, "with method={method}, which learns from no teacher"
    ),
    Unread(
        ("rollout.steps_at_once", "teacher.residency", "teacher.num_gpus", "train.eval_own_prompts"), needs_teacher,
        "where no teacher is loaded",
    ),
    Unread(
        ("rollout.temperature", "rollout.reuse", "rollout.teacher_graphs", "cache"), lambda read: not _stored(read),
        "with teacher.responses={teacher.responses}, which was written earlier",
    ),
    Unread(
        ("rollout.steps_at_once", "teacher.residency", "train.eval_own_prompts", "rollout.reuse",
         "rollout.teacher_graphs"),
        lambda read: not _passes_text(read),
        "with student.tokenizer=own: the teacher writes everything first, and has left when the student learns",
    ),
    Unread(
        ("loss.divergence", *_BY_WRITER, "loss.alpha", "loss.beta", "loss.temperature"), imitates,
        "with loss.objective=cross_entropy",
    ),
    Unread(
        _BY_WRITER, _two_writers,
        f"{_POLICY}, whose tokens are all of one kind", "Set loss.divergence.",
    ),
    Unread(
        ("loss.divergence",), _reads_divergence,
        "with loss.scope={loss.scope}: every token that trains has the divergence of its writer",
    ),
    Unread(
        ("loss.divergence_student_tokens",), is_one_of("loss.scope", "all"),
        "with loss.scope=interventions, which trains on no token of the student's", "Set loss.scope=all.",
    ),
    Unread(
        ("loss.alpha",), _some_divergence("skew_forward_kl", "skew_reverse_kl"),
        "with the divergences that train", "Use a skew_ divergence or remove it.",
    ),
    Unread(
        ("loss.beta",), _some_divergence("jsd"),
        "with the divergences that train", "Use jsd or remove it.",
    ),
    Unread(("cache",), imitates, "with loss.objective=cross_entropy, which reads no teacher outputs"),
    Unread(("cache.topk",), is_one_of("cache.format", "topk"), "with cache.format={cache.format}"),
    Unread(
        ("data.ground_truth_mix",), is_one_of("data.adaptive_share", False), "with data.adaptive_share, which adapts it"
    ),
    Unread(
        ("data.share_tolerance_nats",), is_one_of("data.adaptive_share", True), "without data.adaptive_share",
        "Remove it, or set method=distillm.",
    ),
    Unread(
        ("data.template_kwargs",), lambda read: read("data.template") not in ("alpaca", "plain"),
        "with data.template={data.template}, which is no chat template",
    ),
    Unread(
        ("data.validation_split",), lambda read: read("data.validation") is not None, "without data.validation",
        "Remove it, or set data.validation.",
    ),
    Unread(
        ("data.lm_corpus_tokens", "loss.lm_coefficient", "loss.lm_passage_tokens"),
        lambda read: read("data.lm_corpus") is not None, "without data.lm_corpus",
    ),
    Unread(
        ("train.max_steps",), lambda read: read("train.num_epochs") is None,
        "with train.num_epochs, which sets the steps", "Remove one of the two.",
    ),
    Unread(
        ("student.lora",), is_one_of("student.adapter", "lora"), "with student.adapter=none", "Remove one of the two."
    ),
    Unread(
        ("student.init_adapter",), is_one_of("student.adapter", "lora"), "with student.adapter=none",
        "Merge it first (qswitch merge) and name the result in student.model.",
    ),
)  # fmt: skip


def ends_by_steps_alone(read: Read) -> bool:
    """Whether the budget is one of steps or epochs, not of tokens or seconds."""
    return read("train.max_tokens") is None and read("train.max_seconds") is None


def has_step_limit(read: Read) -> bool:
    """Whether steps or epochs end the run, if tokens or seconds have not done so before."""
    return (
        ends_by_steps_alone(read) or read("train.num_epochs") is not None or read("train.max_steps") < UNLIMITED_STEPS
    )


def _sequences_per_step(read: Read) -> int:
    return read("train.per_device_train_batch_size") * read("train.gradient_accumulation_steps")


def _steps_to_reuse(read: Read) -> float:
    """Steps in which a rollout trains `rollout.reuse` times, where a share of the steps is ground truth."""
    return read("rollout.reuse") / (1 - read("data.ground_truth_mix"))


def _reuses(read: Read) -> bool:
    return read("rollout.reuse") > 1 and writes_rollouts(read) and not read("data.adaptive_share")


def _pure_student(read: Read) -> bool:
    return writes_rollouts(read) and read("rollout.policy") in ("student", "mixture")


def _num_entries(read: Read) -> int:
    return 1 if isinstance(read("data.train"), str) else len(read("data.train"))


NO_STEP_LIMIT = (
    "train.max_tokens or max_seconds does not say how many responses the run will draw. Set train.max_steps or "
    "train.num_epochs beside it."
)

CONFLICTS = (
    Conflict(
        lambda read: _stored(read) and learns_from_teacher(read) and why_teacher_is_asked(read) is not None,
        lambda read: (
            f"teacher.responses cannot be used: {why_teacher_is_asked(read)}. Set it, or leave teacher.responses out."
        ),
    ),
    Conflict(
        lambda read: _passes_text(read) and not may_pass_text(read),
        f"student.tokenizer=own cannot be combined with method={{method}}, which needs one for both models. "
        f"{OTHER_TOKENIZER_REMEDY}",
    ),
    Conflict(
        lambda read: _passes_text(read) and _stored(read),
        "teacher.responses holds tokens of the teacher, which mean nothing to a student with student.tokenizer=own. "
        "Leave teacher.responses out: the run lets the teacher write text by itself.",
    ),
    Conflict(
        lambda read: methods.writes_rollouts(read("method")) and not writes_rollouts(read),
        "data.ground_truth_mix=1 contradicts method={method}: no rollout is written. Set it below 1.",
    ),
    Conflict(
        lambda read: (
            bool(read("data.adaptive_share"))
            and dict(methods.bundle_values(read("method"))).get("data.ground_truth_mix", 0) != 0
        ),
        "data.adaptive_share contradicts method={method}, which has its own data.ground_truth_mix. Remove it, or set "
        "method=distillm.",
    ),
    Conflict(
        lambda read: read("rollout.steps_at_once") > 1 and _replays(read),
        "rollout.steps_at_once={rollout.steps_at_once} cannot be combined with rollout.reuse > 1 or "
        "data.adaptive_share: both let a rollout train later. Set rollout.steps_at_once=1.",
    ),
    Conflict(
        lambda read: _reuses(read) and read("rollout.reuse") > _sequences_per_step(read),
        lambda read: (
            f"rollout.reuse={read('rollout.reuse')} is out of reach with {_sequences_per_step(read)} sequences a step "
            "(train.per_device_train_batch_size x train.gradient_accumulation_steps): one of them is always fresh, so "
            f"that a rollout trains {_sequences_per_step(read)} times at most. Set rollout.reuse="
            f"{_sequences_per_step(read)} or lower, or take more sequences a step."
        ),
    ),
    Conflict(
        lambda read: _reuses(read) and _steps_to_reuse(read) > read("rollout.replay_max_age_steps"),
        lambda read: (
            f"rollout.reuse={read('rollout.reuse')} with data.ground_truth_mix={read('data.ground_truth_mix'):g} takes "
            f"about {math.ceil(_steps_to_reuse(read))} steps, but rollout.replay_max_age_steps="
            f"{read('rollout.replay_max_age_steps')} drops a rollout before. Lower the one, or raise the other."
        ),
    ),
    Conflict(
        lambda read: not imitates(read) and _pure_student(read),
        "loss.objective=cross_entropy with rollout.policy={rollout.policy} would train the student on its own samples, "
        "which teaches it nothing. Set rollout.policy=teacher, or loss.objective=divergence.",
    ),
    Conflict(
        lambda read: imitates(read) and read("loss.scope") == "interventions" and _pure_student(read),
        "loss.scope=interventions means nothing with rollout.policy={rollout.policy}: the teacher never writes a token "
        "of its own. Set loss.scope=all.",
    ),
    Conflict(
        lambda read: (
            read("rollout.teacher_share") is not None
            and read("rollout.schedule") == "constant"
            and read("rollout.constant_threshold") == 0
        ),
        "rollout.teacher_share adapts rollout.constant_threshold by a factor, which leaves 0 at 0. Set it above 0.",
    ),
    Conflict(
        lambda read: read("cache.format") == "topk" and read("loss.temperature") != 1,
        "cache.format=topk holds probabilities at temperature 1. Set loss.temperature=1 or cache.format=hidden.",
    ),
    Conflict(
        lambda read: read("data.weights") is not None and len(read("data.weights")) != _num_entries(read),
        lambda read: (
            f"data.weights has {len(read('data.weights'))} entries, but data.train {_num_entries(read)}. Give one "
            "weight for each."
        ),
    ),
    Conflict(
        lambda read: min(read("data.weights") or [1]) <= 0,
        "data.weights = {data.weights}: every weight must be above 0. Remove the entries you do not want.",
    ),
    Conflict(
        lambda read: len(read("data.weights") or []) == 1 == _num_entries(read),
        "data.weights has no effect with one entry in data.train. Remove it.",
    ),
    Conflict(
        lambda read: read("student.adapter") == "none" and read("student.precision") == "nf4",
        "student.precision=nf4 cannot be trained in full. Set student.adapter=lora or student.precision=bf16.",
    ),
    Conflict(
        lambda read: (
            ends_by_steps_alone(read)
            and read("train.num_epochs") is None
            and 1 <= read("train.warmup_steps") >= read("train.max_steps")
        ),
        lambda read: (
            f"train.warmup_steps ({read('train.warmup_steps'):g}) must be below train.max_steps "
            f"({read('train.max_steps')}). Below 1 it is a share of the training, whatever its length: 0.05."
        ),
    ),
    Conflict(
        lambda read: not ends_by_steps_alone(read) and read("train.warmup_steps") >= 1,
        lambda read: (
            f"train.warmup_steps={read('train.warmup_steps'):g} counts steps, but train.max_tokens or max_seconds ends "
            "the run, after nobody knows how many. Write a share of the training: train.warmup_steps=0.05."
        ),
    ),
    Conflict(
        lambda read: _passes_text(read) and writes_rollouts(read) and not has_step_limit(read),
        f"Between two tokenizers the teacher writes before the student learns, and {NO_STEP_LIMIT}",
    ),
    Conflict(
        lambda read: read("teacher.num_gpus") > 1 and read("teacher.residency") == "swap",
        "teacher.residency=swap cannot be combined with teacher.num_gpus={teacher.num_gpus}: layers on other GPUs are "
        "not in the student's way. Remove one of the two.",
    ),
    Conflict(
        lambda read: read("teacher.num_gpus") > 1 and read("train.device") == "cpu",
        "teacher.num_gpus={teacher.num_gpus} needs GPUs, and train.device is cpu. Remove one of the two.",
    ),
    Conflict(
        lambda read: read("train.optimizer") == "paged_adamw_8bit" and read("train.device") == "cpu",
        "train.optimizer=paged_adamw_8bit needs a GPU. Set train.optimizer=adamw.",
    ),
)


def unread(read: Read) -> dict[str, str]:
    """Setting, or section, that nothing would read -> what to say to somebody who changed it."""
    found: dict[str, str] = {}
    for rule in UNREAD:
        if not rule.read_when(read):
            for setting in rule.settings:
                found.setdefault(setting, f"{setting} has no effect {_filled(rule.because, read)}. {rule.remedy}")
    return found


def problems(read: Read, changed: Iterable[str], *, trains: bool = True) -> Iterator[str]:
    """What is wrong with a configuration whose values are valid one by one.

    Args:
        read: a dotted setting's value.
        changed: the dotted settings that differ from their defaults.
        trains: whether a run is to train by it; what goes together matters to no other.
    """
    own = dict(methods.bundle_values(read("method")))
    fixed = {setting for setting in methods.FIXED[read("method")] if read(setting) != own[setting]}
    for setting in sorted(fixed):
        yield (
            f"{setting}={_shown(read(setting))} contradicts method={read('method')}, which is {_shown(own[setting])} "
            "there. Remove it, or set method=custom."
        )
    said = unread(read)
    blamed = [[name for name in said if _covers(name, setting)][:1] for setting in changed if setting not in fixed]
    yield from (said[name] for name in dict.fromkeys(chain.from_iterable(blamed)))
    if trains:
        yield from (_filled(conflict.message, read) for conflict in CONFLICTS if conflict.when(read))


def _covers(name: str, setting: str) -> bool:
    """Whether a setting is the one of that name, or one of the section of that name."""
    return setting == name or setting.startswith(f"{name}.")


def _filled(text: str | Callable[[Read], str], read: Read) -> str:
    if callable(text):
        return text(read)
    return re.sub(r"{([a-z_.]+)}", lambda match: _shown(read(match[1])), text)


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
