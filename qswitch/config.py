"""What a run can be told: one class per section, every field with its unit and effect.

Knows nothing of where the values come from (`layers.py`, `presets.py`), of models or of torch. Settings without effect
are refused by the tables of `rules.py`; tests/test_rules.py watches a run of every method read what is not
refused. The file is long because every setting stands here once, with the docstring that is also its entry in the
reference.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from functools import cache, reduce
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from qswitch import methods, rules
from qswitch.errors import ConfigError
from qswitch.units import MAX_COUNT, MAX_ROWS, MAX_TOKENS, UNLIMITED_STEPS
from qswitch.yaml_file import as_written

ModelReference = str | list[str]
MODULE_NAME = re.compile(r"[A-Za-z_]\w*(\.\w+)*")
"""A module's name, or the end of its path."""


class Section(BaseModel):
    """A block of settings; unknown keys are refused, assignment after loading is too."""

    # Built when RunConfig first validates, not class by class: half of the start-up time of a dry run.
    model_config = ConfigDict(
        extra="forbid", frozen=True, defer_build=True, protected_namespaces=(), allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _as_people_write_it(cls, values: Any) -> Any:
        """YAML 1.1 reads `off` as a boolean and `1e-4` as text; one name is a list of one."""
        fields = cls.model_fields
        return values if not isinstance(values, dict) else {
            name: as_written(fields[name].annotation, value) if name in fields else value
            for name, value in values.items()
        }  # fmt: skip


class AboutSection(Section):
    """What a preset is for; shown by `qswitch presets`, copied into the model card."""

    name: str = "custom"
    """Name of the preset the run started from."""
    description: str = ""
    """One sentence: which pair, for which machine."""
    licences: dict[str, str] = Field(default_factory=dict)
    """Model or data set, as teacher.model, student.model, data.train or data.lm_corpus names it -> its licence. A model
    card gives those of what its run used."""
    gated: bool = False
    """Whether a model of the pair needs an accepted licence and HF_TOKEN."""
    twin: str | None = None
    """For a gated preset: the preset that needs no token."""
    paper: bool = False
    """Whether the hyper-parameters are those of the SWITCH paper."""
    vram: str | None = None
    """The smallest usual card that the preset is for, for example 12GiB; `presets list` plans for it. None: a CPU."""
    shape_sources: dict[str, str] = Field(default_factory=dict)
    """Model id -> where the values of its shape block were read."""


class TeacherSection(Section):
    """The large model; frozen, usually in 4-bit."""

    model: ModelReference
    """Hub id, local folder or `package:module/file.gguf`; of a list the first that is available is used and named."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model."""
    precision: Literal["nf4", "int8", "bf16", "fp32", "stored"] = "nf4"
    """How weights are stored: nf4 is 4-bit with double quantisation, about 0.52 byte per parameter; stored is as the
    checkpoint has them (GPTQ, AWQ, FP8 and others). With a method that loads no teacher, that of the teacher from
    which `qswitch eval` measures the distance of the run."""
    adapter: str | None = None
    """A run of `qswitch sft --model teacher`, or a PEFT folder: attached to quantised weights, merged into others.
    With a method that loads no teacher it is what `qswitch eval` measures the distance from."""
    residency: Literal["resident", "swap"] = "resident"
    """resident: always on the device. swap: it leaves while the student trains; one copy stays in host memory, and it
    is uploaded each time before rollouts are written. Changes memory and time, never the tokens."""
    num_gpus: int = Field(default=1, ge=1, le=64)
    """GPUs of one process over which its layers lie, for a teacher that is larger than one of them. The student is on
    the first, with the teacher's embedding and head; how many layers each GPU gets is the plan's choice."""
    responses: str | None = None
    """A folder of `qswitch teach`: the teacher worked earlier, and is not loaded. For methods of which it writes every
    response itself, or reads the data's."""
    shape: dict[str, Any] | None = None
    """config.json values of the model, so that it can be planned before any download."""


class LoraSection(Section):
    """LoRA adapters of the student (peft LoraConfig)."""

    r: int = Field(default=16, ge=1, le=65_536)
    """Rank."""
    alpha: float = Field(default=32, gt=0)
    """Scale numerator: the update is scaled by alpha / r (alpha / sqrt(r) with use_rslora)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input while training."""
    target_modules: str | list[str] = "all-linear"
    """Module names, or `all-linear` for every linear layer but the head. Other text than names, as one or with commas
    between, is a regular expression for whole module paths."""
    use_dora: bool = False
    """Weight-decomposed adapters: better at low rank, slower."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r)."""
    init_lora_weights: bool | Literal["gaussian", "pissa", "olora", "orthogonal"] = True
    """How adapters start; True leaves the model unchanged at step 0."""
    modules_to_save: list[str] = Field(default_factory=list)
    """Further modules trained in full and saved with the adapter, for example norms."""
    layers_to_transform: list[Annotated[int, Field(ge=0, le=10_000)]] | None = Field(default=None, min_length=1)
    """Only adapt these layers; the first is 0."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=65_536)]] = Field(default_factory=dict)
    """Module name pattern -> rank that differs from r."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Module name pattern -> alpha that differs from alpha."""

    @field_validator("target_modules")
    @classmethod
    def _as_names(cls, value: str | list[str]) -> str | list[str]:
        """peft takes any text but all-linear for an expression, and a name alone matches no whole path."""
        names = [name.strip() for name in value.split(",")] if isinstance(value, str) else []
        return names if names and all(MODULE_NAME.fullmatch(name) for name in names) else value

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _refuse_broken_patterns(cls, patterns: dict[str, Any]) -> dict[str, Any]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern} is no regular expression ({error}); write a module's name") from None
        return patterns


class StudentSection(Section):
    """The small model; trained through adapters, or in full."""

    model: ModelReference
    """As teacher.model. With shrink_to_layers, the model that the student is cut from."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model."""
    tokenizer: Literal["auto", "shared", "own"] = "auto"
    """shared: the teacher's, token for token. own: another one; the teacher writes all its responses first, and they
    reach the student as text, which method=seqkd alone allows. auto: own where the two differ and the method allows it.
    """
    precision: Literal["auto", "bf16", "nf4", "fp32"] = "auto"
    """How frozen weights are stored. bf16: in 16 bits, those of the compute dtype where that is fp16. auto: bf16 where
    the run computes in 16 bits, else fp32."""
    adapter: Literal["lora", "none"] = "lora"
    """lora: train adapters. none: train every weight, kept in fp32."""
    lora: LoraSection = Field(default_factory=LoraSection)
    """Adapter settings, read when adapter is lora."""
    init_adapter: str | None = None
    """A run of `qswitch sft`, or a PEFT folder, whose adapter the run's own starts from; of the same student.lora."""
    base_dropout: float | None = Field(default=None, ge=0, lt=1)
    """Dropout of the base model's own layers while it trains; None: what its config.json says (GPT-2, OPT: 0.1), which
    the run says at its start. 0 switches it off. The adapter's is lora.dropout."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    shrink_to_layers: int | None = Field(default=None, ge=1, le=10_000)
    """Cut the model to this many layers first, keeping those without which its output would change most."""
    shape: dict[str, Any] | None = None
    """config.json values of the model (before shrinking), so that it can be planned before any download."""


RESERVED_TEMPLATE_KWARGS = frozenset({
    "conversation", "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
    "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "tokenizer_kwargs",
})  # fmt: skip
"""Arguments of `apply_chat_template` that are ours to give, or the record's."""


class DataSection(Section):
    """Prompts, and ground-truth responses where there are any."""

    train: str | list[str]
    """jsonl, json, csv or parquet file(s), plain or compressed, a folder, a hub id (`owner/name` or
    `owner/name:subset`), or `package:qswitch/...` for files shipped with a package."""
    weights: list[float] | None = None
    """Share of the training examples that comes from each entry of data.train; None: as many as each has."""
    validation: str | list[str] | None = None
    """Held-out prompts, same formats; all of them are left out of training. None: they are drawn from train."""
    split: str = "train"
    """Split of a hub data set, of a saved one, or of a folder whose file names tell splits apart."""
    validation_split: str | None = None
    """Split of data.validation; None: data.split."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Our field (prompt, response, system, instruction, input, output, messages, ...) -> column of the file."""
    template: str = "teacher"
    """teacher or student (that tokenizer's chat template), alpaca, plain (the prompt as it is), or a Jinja file."""
    template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """What the chat template is told beside the turns, for example {enable_thinking: false}. A row's column
    chat_template_kwargs goes before it."""
    system_prompt: str | None = None
    """Put before every conversation that has no system turn of its own."""
    end_tokens: list[str] = Field(default_factory=list)
    """Further tokens that end a response, in rollouts, training and the exported model, for example <end_of_turn>."""
    allow_eos_mismatch: bool = False
    """Train although no end token of one model ends a response of the other; responses end at either's."""
    max_prompt_tokens: int = Field(default=256, ge=1, le=MAX_TOKENS)
    """Records with a longer prompt are dropped and counted."""
    limit: int | None = Field(default=None, ge=1, le=MAX_COUNT)
    """Use only the first N training records; with data.weights, of each entry."""
    num_validation: int = Field(default=32, ge=1, le=100_000)
    """Number of held-out prompts that are scored, drawn by their text; without data.validation at most a fifth of
    each training set, and of a weighted one its share."""
    ground_truth_mix: float = Field(default=0.0, ge=0, le=1)
    """Probability that a batch is ground truth instead of a rollout (0.5 in the paper): 1 - lmbda of TRL. One coin
    decides for a whole optimizer step, where TRL's GKDTrainer tosses one for each micro-batch."""
    adaptive_share: bool = False
    """Instead of a fixed mix: the share of rollout batches starts at 0 and grows when the validation loss rises."""
    share_tolerance_nats: float = Field(default=0.1, ge=0)
    """Rise of the loss on held-out responses at which the share grows by 0.1, nats per token."""
    lm_corpus: str | list[str] | None = None
    """Plain text for an added language-model loss; text, jsonl with `text`, or a hub id."""
    lm_corpus_tokens: int = Field(default=20_000_000, ge=1, le=10**11)
    """Tokens read of lm_corpus, from its start, at most; they stay in host memory, 8 bytes each."""

    @property
    def train_sets(self) -> list[str | list[str]]:
        """What data.limit, an order and its epochs are of: with weights each entry of train, else all as one."""
        return [self.train] if self.weights is None else [*self.train]

    @field_validator("template_kwargs")
    @classmethod
    def _refuse_reserved(cls, values: dict[str, Any]) -> dict[str, Any]:
        for name, value in values.items():
            if name in RESERVED_TEMPLATE_KWARGS:
                raise ValueError(f"{name} is not for the template; the data and the run say it. Remove it")
            if not name.isidentifier():
                raise ValueError(f"{name!r} is no name that a template can read; write letters, digits and _")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} is {value}; a template needs a number, text, a list or a mapping")
        return values

    @field_validator("end_tokens")
    @classmethod
    def _refuse_empty_tokens(cls, tokens: list[str]) -> list[str]:
        if "" in tokens or len(set(tokens)) < len(tokens):
            raise ValueError("every entry must be a token, once; name it as the tokenizer does, such as <end_of_turn>")
        return tokens


class RolloutSection(Section):
    """Who writes the training responses, and how they are sampled."""

    policy: Literal["switch", "student", "teacher", "random", "mixture", "skd", "adaswitch"] = "switch"
    """switch: the teacher writes where the divergence exceeds the threshold. The others are the rivals' policies."""
    schedule: Literal["exponential", "relative", "linear", "constant", "growth"] = "exponential"
    """How the threshold moves along the response (policy switch). relative: exponential in the share of the expected
    length that is written, so that long and short responses have like shares of teacher tokens."""
    tau_0: float = Field(default=1.0, gt=0, le=1)
    """Threshold at the first response token, bits (schedules exponential, relative and linear)."""
    decay_rate: float = Field(default=0.1, gt=0)
    """Per response token: tau_0 * exp(-decay_rate * t), or 1 - exp(-decay_rate * (t+1)) with growth."""
    relative_decay: float = Field(default=3.6, gt=0)
    """Over a response of the expected length: tau_0 * exp(-relative_decay * t / length). 3.6 is the paper's 0.1 per
    token over 36 tokens, the middle of the lengths that its shares of teacher tokens are of."""
    expected_tokens: Literal["auto"] | Annotated[int, Field(ge=1, le=MAX_TOKENS)] = "auto"
    """Expected length of a response (schedule relative). auto: the mean of the teacher's answers to the held-out
    prompts, which it writes before the first step."""
    teacher_share: float | None = Field(default=None, gt=0, lt=1)
    """Share of response tokens that the teacher is to write: after each time that rollouts are written the decay
    (or the constant threshold) is adapted to hold it (policy switch). None: the threshold stays as written."""
    constant_threshold: float = Field(default=0.2, ge=0, le=1)
    """Threshold of the constant schedule, bits."""
    tail_bits: float = Field(default=1e-7, ge=1e-7, lt=1)
    """Once the threshold has fallen below this for good, the teacher writes the rest without asking the student, bits.
    1e-7, which fp32 does not resolve, changes nothing; docs/rollouts.md says what more does."""
    teacher_probability: float = Field(default=0.5, ge=0, le=1)
    """Share of tokens the teacher writes (policy random)."""
    mixture_teacher_weight: float = Field(default=0.2, ge=0, le=1)
    """w in w * p + (1 - w) * q (policy mixture)."""
    skd_top_k: int = Field(default=25, ge=1, le=MAX_COUNT)
    """A student token outside the teacher's top k is redrawn from the teacher (policy skd)."""
    adaswitch_factor: float = Field(default=2.0, gt=0)
    """The teacher takes over for good at a divergence above this times the mean of the last ones (policy adaswitch)."""
    adaswitch_window: int = Field(default=16, ge=1, le=MAX_COUNT)
    """Number of earlier divergences in that mean, response tokens (policy adaswitch)."""
    reuse: int = Field(default=1, ge=1, le=10_000)
    """R: every rollout trains R times over the following steps, without either model writing again. At most the
    sequences of a step, of which one is always fresh."""
    replay_capacity: int = Field(default=1000, ge=1, le=MAX_COUNT)
    """Rollouts held for reuse, or for data.adaptive_share; the oldest leave first."""
    replay_max_age_steps: int = Field(default=50, ge=1, le=MAX_COUNT)
    """Optimizer steps after which a rollout is too stale to train on again."""
    block_tokens: Literal["auto"] | Annotated[int, Field(ge=0, le=64)] = "auto"
    """Tokens the student drafts before the teacher scores them in one pass; changes speed, never the tokens. 0: the
    sequential engine. auto: chosen from measured pass times and the acceptance so far; where rounding decides a near
    tie, two runs may then differ, so a run that must repeat bit for bit names a number."""
    student_graphs: Literal["auto", "off"] = "auto"
    """auto: on a GPU, the student's one-token passes are recorded and replayed as CUDA graphs, where a trial at the
    start finds them the same and faster. off: never."""
    teacher_graphs: Literal["auto", "off"] = "auto"
    """The same for the teacher's passes, of one token and of a block."""
    temperature: float = Field(default=1.0, ge=0)
    """Sampling temperature of both writers; 0 is greedy. The divergence is always measured at temperature 1. The loss
    has its own, loss.temperature. Nothing cuts the distribution (no top-p, no top-k)."""
    max_new_tokens: int = Field(default=256, ge=1, le=MAX_TOKENS)
    """Response limit, tokens."""
    batch_size: int = Field(default=8, ge=1, le=MAX_ROWS)
    """Rows decoded together; changes speed and memory, never the tokens."""
    steps_at_once: int = Field(default=1, ge=1, le=10_000)
    """Optimizer steps whose rollouts are written at once; the last of them learns from responses that are
    steps_at_once - 1 updates old."""


DivergenceName = Literal["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation"]


class LossSection(Section):
    """What the student is pulled towards, and over which tokens."""

    objective: Literal["divergence", "cross_entropy"] = "divergence"
    """divergence: the teacher's distribution. cross_entropy: the written tokens themselves (SFT, SeqKD)."""
    divergence: DivergenceName = "skew_reverse_kl"
    """p is the teacher, q the student: skew_reverse_kl = KL(q || (1-alpha) p + alpha q)."""
    divergence_teacher_tokens: DivergenceName | None = None
    """The divergence at response tokens that the teacher wrote; None: loss.divergence. The data's own tokens keep
    loss.divergence."""
    divergence_student_tokens: DivergenceName | None = None
    """The divergence at response tokens that the student wrote; None: loss.divergence."""
    alpha: float = Field(default=0.1, ge=0, lt=1)
    """Skew of the skew_ divergences."""
    beta: float = Field(default=0.5, gt=0, lt=1)
    """Weight of the jsd: beta KL(p||m) + (1-beta) KL(q||m), m = beta p + (1-beta) q."""
    temperature: float = Field(default=1.0, gt=0)
    """Softens both distributions inside the loss, which is not multiplied by its square: at 2 the gradient is about a
    quarter of that at 1, beside that of data.lm_corpus and the gradient clip too."""
    scope: Literal["interventions", "all"] = "interventions"
    """interventions: only tokens that the teacher wrote, teacher-free from the cache. all: every response token."""
    lm_coefficient: float = Field(default=1.0, gt=0)
    """Weight of the language-model loss on data.lm_corpus."""
    lm_passage_tokens: int = Field(default=512, ge=8, le=MAX_TOKENS)
    """Length of one passage of data.lm_corpus; one passage per row of the batch."""
    chunk_tokens: int = Field(default=128, ge=1, le=MAX_TOKENS)
    """Loss positions projected to the vocabulary at a time; changes memory, not the value."""

    @property
    def differs_by_writer(self) -> bool:
        """Whether the tokens of one rollout may have different divergences."""
        own = (self.divergence_teacher_tokens, self.divergence_student_tokens)
        return any(name is not None and name != self.divergence for name in own)


class CacheSection(Section):
    """Teacher outputs kept between rollout and training."""

    format: Literal["hidden", "topk"] = "hidden"
    """hidden: final hidden states, exact and small. topk: k log-probabilities and the tail as one event."""
    topk: int = Field(default=64, ge=1, le=MAX_TOKENS)
    """k of the topk format."""
    device_budget_gib: float = Field(default=0.5, ge=0, le=10**6)
    """Rows kept on the accelerator, GiB; more move to host memory."""
    host_budget_gib: float = Field(default=4.0, ge=0, le=10**6)
    """Rows kept in host memory, GiB; more move to a file in the run directory."""


class TrainSection(Section):
    """The optimiser, its schedule, and how often to look and to save."""

    max_steps: int = Field(default=200, ge=1, le=MAX_COUNT)
    """Optimizer steps. Where max_tokens or max_seconds is written and this is not, no number of steps ends the run; it
    is 1000000 then, from where on it is no limit beside theirs. The highest place (a preset, a file, --set, what a run
    is resumed with) that names max_steps, num_epochs, max_tokens or max_seconds says all of them."""
    num_epochs: float | None = Field(default=None, gt=0, le=10**6)
    """Instead of max_steps: how often the training prompts are gone through. Once the data is read, the config.yaml of
    the run says how many steps that is. With data.adaptive_share it is an upper bound: steps that replay rollouts take
    no new prompt, and how many will do so is not known before."""
    max_tokens: int | None = Field(default=None, ge=1, le=10**15)
    """End with the step that reaches this many response tokens, generated or (ground-truth batches) read from the data;
    the learning rate follows the budget that is spent most. Written beside max_steps or num_epochs, whichever is
    reached first ends the run."""
    max_seconds: float | None = Field(default=None, gt=0, le=10**10)
    """The same for seconds of training, validation apart; a resumed run is then not bit for bit the same."""
    per_device_train_batch_size: int = Field(default=4, ge=1, le=MAX_ROWS)
    """Sequences in one forward and backward pass."""
    gradient_accumulation_steps: int = Field(default=4, ge=1, le=MAX_ROWS)
    """Micro-batches per optimizer step, those of all processes; the loss is the token mean over all of them."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after the warm-up; cosine and linear end at 0. The default of Hugging Face's Trainer is linear."""
    warmup_steps: float = Field(default=0.0, ge=0, le=MAX_COUNT)
    """Linear warm-up. Below 1: its share of the training, of whatever unit the budget is (0.05 is a twentieth; in steps
    it is rounded down). From 1 on a whole number of steps, which needs a budget of steps."""
    optimizer: Literal["adamw", "paged_adamw_8bit"] = "adamw"
    """paged_adamw_8bit: bitsandbytes, GPU only, a quarter of the state. The driver may move it to the host when memory
    is short, but not after a resume, when it is read into the GPU's own memory; the plan counts all of it there."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay of matrices; biases and the scales of norms do not decay. The default of Hugging Face's
    Trainer is 0."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradient norm clip."""
    eval_steps: int = Field(default=50, ge=1, le=MAX_COUNT)
    """Steps between validations; also before the first and after the last."""
    eval_own_prompts: int = Field(default=8, ge=0, le=100_000)
    """Held-out prompts that the student answers at every validation, for the teacher to read: the distance on its own
    text, as `qswitch eval` measures it on a test set. 0: none."""
    save_steps: int = Field(default=50, ge=1, le=MAX_COUNT)
    """Steps between checkpoints."""
    save_total_limit: int = Field(default=2, ge=1, le=MAX_COUNT)
    """Checkpoints kept, besides the best."""
    compute_dtype: Literal["auto", "bf16", "fp16", "fp32", "fp64"] = "auto"
    """Arithmetic of both models. auto: bf16 where the device has it natively, fp16 with loss scaling on GPUs that have
    only that (T4, RTX 20), else fp32. fp64 is for tests."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to run."""
    report_to: list[Literal["tensorboard", "wandb"]] = Field(default_factory=list)
    """Trackers beside metrics.jsonl; need the extra `tracking`: `pip install '.[tracking]'`."""

    @model_validator(mode="before")
    @classmethod
    def _end_by_what_is_written(cls, values: Any) -> Any:
        """A budget of tokens or seconds without a number of steps does not end at the default number of steps."""
        if isinstance(values, dict):
            said = {name for name, value in values.items() if value is not None}
            if said & {"max_tokens", "max_seconds"} and not said & {"max_steps", "num_epochs"}:
                return {**values, "max_steps": UNLIMITED_STEPS}
        return values

    @field_validator("warmup_steps")
    @classmethod
    def _refuse_parts_of_steps(cls, warmup: float) -> float:
        if warmup > 1 and not warmup.is_integer():
            raise ValueError("from 1 on it is a number of whole steps; below 1 it is a share of the training")
        return warmup

    @property
    def sequences_per_step(self) -> int:
        """Of all processes together: their number decides who learns from a sequence, never what is learnt."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def ends_by_steps_alone(self) -> bool:
        """Whether the budget is one of steps, not of tokens or seconds."""
        return self.max_tokens is None and self.max_seconds is None

    @property
    def step_limit(self) -> int | None:
        """Optimizer steps after which the run ends at the latest; None where tokens or seconds alone end it."""
        return self.max_steps if self.ends_by_steps_alone or self.max_steps < UNLIMITED_STEPS else None

    @property
    def num_warmup_steps(self) -> int:
        """Of a budget of steps."""
        share = self.warmup_steps * self.max_steps + 1e-9  # 0.29 x 100 is 28.999... in binary
        return int(self.warmup_steps if self.warmup_steps >= 1 else share)


class RunConfig(Section):
    """A whole run. `qswitch distill` writes it, resolved, to RUN/config.yaml, which starts the same run again."""

    method: Literal[
        "switch", "switch-paper", "sft", "kd", "seqkd", "gkd", "imitkd", "distillm", "skd", "adaswitch", "custom"
    ] = "switch"
    """Fills in the defaults of a method (docs/methods.md); what is written in the sections wins. custom: none."""
    about: AboutSection = Field(default_factory=AboutSection)
    teacher: TeacherSection
    student: StudentSection
    data: DataSection
    rollout: RolloutSection = Field(default_factory=RolloutSection)
    loss: LossSection = Field(default_factory=LossSection)
    cache: CacheSection = Field(default_factory=CacheSection)
    train: TrainSection = Field(default_factory=TrainSection)
    seed: int = Field(default=42, ge=0, lt=2**31)
    """Seeds data order, rollouts, adapter initialisation and dropout."""

    @property
    def prompts_per_step(self) -> float:
        """Prompts that an optimizer step takes from the data, in the mean: a step of ground truth takes one for each
        sequence, one of rollouts one for each that trains for the first time. With data.adaptive_share it is the most
        that a step takes, since nobody knows beforehand how many steps replay rollouts alone."""
        mix = self.data.ground_truth_mix
        return self.train.sequences_per_step * (mix + (1 - mix) / self.rollout.reuse)

    def steps_of_epochs(self, num_epochs: float, num_prompts: int) -> int:
        """Optimizer steps that go through the training prompts `num_epochs` times."""
        return max(1, math.ceil(num_epochs * num_prompts / self.prompts_per_step))

    @property
    def writes_rollouts(self) -> bool:
        """Whether any training response is written by a model."""
        return rules.writes_rollouts(reader(self))

    @property
    def reads_responses(self) -> bool:
        """Whether any batch is made of the data's own responses."""
        return rules.reads_responses(reader(self))

    @property
    def learns_from_teacher(self) -> bool:
        """Whether the teacher writes, is imitated, or both."""
        return rules.learns_from_teacher(reader(self))

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher is loaded: to write, to be imitated, or both, and not earlier."""
        return rules.needs_teacher(reader(self))

    @property
    def passes_text(self) -> bool:
        """Whether the teacher's responses reach the student as text, because it reads other tokens."""
        return self.student.tokenizer == "own"

    @property
    def awaits_text(self) -> bool:
        """Whether that is so, and these settings are not yet those of the student's half, which reads the text."""
        return self.passes_text and self.writes_rollouts

    @property
    def drafts_tokens(self) -> bool:
        """Whether the student drafts tokens that the teacher then scores."""
        return rules.drafts_tokens(reader(self))

    @model_validator(mode="after")
    def _refuse_settings_without_effect(self, info: ValidationInfo) -> RunConfig:
        _refuse_what_nothing_reads(self, trains=(info.context or {}).get("trains", True))
        return self


def _refuse_what_nothing_reads(config: RunConfig, *, trains: bool = True) -> None:
    read = reader(config)
    changed = [key for key in known_keys() if read(key) != default_of(key, config.method)]
    if problems := list(rules.problems(read, changed, trains=trains)):
        raise ConfigError(problems)


def as_text(config: RunConfig) -> RunConfig:
    """The configuration with student.tokenizer=own.

    Raises:
        ConfigError: it has settings that nothing reads then.
    """
    found = config.model_copy(update={"student": config.student.model_copy(update={"tokenizer": "own"})})
    _refuse_what_nothing_reads(found)
    return found


def reader(config: RunConfig) -> rules.Read:
    """What maps a dotted setting, or a key of a setting's mapping, to its value."""
    return lambda key: reduce(_part, key.split("."), config)


def _part(node: Any, name: str) -> Any:
    return node.get(name) if isinstance(node, dict) else getattr(node, name)


def section_at(key: str) -> type[Section] | None:
    """The class of a dotted section, of the whole configuration for an empty name; None where there is no section."""
    model: Any = RunConfig
    for part in key.split(".") if key else ():
        field = model.model_fields.get(part) if model is not None else None
        model = field.annotation if field is not None and _is_section(field.annotation) else None
    return model


@cache
def known_keys() -> tuple[str, ...]:
    """Every dotted setting, in order."""
    return tuple(_leaves(RunConfig, ""))


@cache
def default_of(key: str, method: str) -> Any:
    """The value that a dotted setting has where nothing is written: that of the method's bundle, or of its class."""
    bundle = dict(methods.bundle_values(method))
    if key in bundle:
        return bundle[key]
    section, _, name = key.rpartition(".")
    model = section_at(section)
    assert model is not None
    return model.model_fields[name].get_default(call_default_factory=True)


def _leaves(model: type[Section], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        if _is_section(field.annotation):
            yield from _leaves(field.annotation, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            yield f"{prefix}{name}"


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)
