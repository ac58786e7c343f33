"""What the JSON files that commands leave in a folder hold, for the commands that read them again.

Each class names what is read of a file, with its kind; a file may hold more. `outside.read_json` refuses a file that
is no such thing, and `run_dir.read_lines` leaves such a line out. Cold: knows no reader.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from typing_extensions import NotRequired, Required, TypedDict

Number = Annotated[float, Field(ge=-1e15, le=1e15, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=10**15)]
_BY_POSITION = Field(min_length=6, max_length=6)  # distill/own_text.py says which positions
Writer = Literal["student", "teacher", "mixture"]


class MetricsLine(TypedDict, total=False):
    """A line of metrics.jsonl: a step, or a validation after it."""

    step: Required[Count]
    batch: str | None
    loss: Number | None
    kl_nats: Number | None
    response_loss_nats: Number | None
    teacher_share: Share | None
    jsd_bits: Number | None
    rollout_tokens: Count | None
    loss_tokens: Count | None
    rollout_tokens_per_s: Number | None
    peak_gib: Number | None
    phases_gib: dict[str, dict[str, Number]]
    seconds: dict[str, Number]


class Token(TypedDict):
    """A token of a rollout, with what both models would have written."""

    text: str
    writer: Writer
    jsd: NotRequired[Number | None]
    tau: NotRequired[Number | None]
    student: NotRequired[str | None]
    teacher: NotRequired[str | None]


class RolloutLine(TypedDict):
    """A line of rollouts.jsonl."""

    step: Count
    prompt: str
    tokens: list[Token]


class OwnFigures(TypedDict):
    """What a run measured on the student's own responses, as far as it is read again."""

    reverse_kl_nats: Number
    responses: Count
    length_ratio: Number
    ended_share: Share
    repeated_4grams: Share


class SummaryFile(TypedDict, total=False):
    """summary.json, as far as it is read again."""

    kl_before_nats: Number | None
    kl_after_nats: Number | None
    response_loss_before_nats: Number | None
    response_loss_after_nats: Number | None
    validation_tokens: Count
    validation_bytes: Count | None
    own_before: OwnFigures | None
    own_after: OwnFigures | None
    best_step: int
    steps: Count
    steps_without_loss: Count
    rollout_batches: Count
    validation_prompts: Count
    rollout_tokens: Count
    trained_tokens: Count
    seconds: Number
    peak_gib: Number
    planned_gib: Number
    phases_gib: dict[str, dict[str, Number]]
    device: str
    processes: Count
    versions: dict[str, str]
    commit: str | None


class PlanFile(TypedDict, total=False):
    """plan.json, as far as the report shows it."""

    total_gib: Number | None
    budget_gib: Number | None
    parts: dict[str, Number]
    phases: dict[str, Number]
    notes: list[str]


class AnswerText(TypedDict):
    """One answer to a held-out prompt."""

    text: str
    ended: bool


class Answer(TypedDict):
    """A held-out prompt with its answers; None for one that is not there yet."""

    prompt: str
    before: AnswerText | None
    after: AnswerText | None
    reference: AnswerText | None


class HeldOutFile(TypedDict, total=False):
    """held_out.json."""

    figure: str
    reference: Literal["teacher", "data"]
    tokens: list[Count]
    answers: Required[list[Answer]]
    before_nats: list[Number] | None
    after_nats: list[Number] | None


class PassTimesFile(TypedDict):
    """pass_times.json."""

    rows: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)]
    tokens: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2)]
    teacher: Annotated[list[Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=2)]], Field(min_length=1)]
    student: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)]
    device: str


class ThresholdFile(TypedDict):
    """threshold.json: the state of a threshold that adapts."""

    expected_tokens: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None
    log_factor: Annotated[float, Field(ge=-20, le=20, allow_inf_nan=False)]
    sets: Count
    tokens: Count
    teacher_tokens: Count


class StoreFile(TypedDict):
    """store.json of a teacher's work, as far as it is read before the libraries are there."""

    precision: str
    complete: bool


class GraphTrialFile(TypedDict):
    """student_graphs.json and teacher_graphs.json."""

    used: bool


# -------------------------------------------------------------------------------------------------------- evaluations


class ProtocolPart(TypedDict):
    """The protocol in eval.json, as far as it is read."""

    seeds: list[int]


class EvalFile(TypedDict):
    """eval.json: what is measured."""

    protocol: ProtocolPart
    sets: dict[str, Any]


class SetFile(TypedDict):
    """sets/SET.json: which records are asked."""

    ids: list[int]
    reference_tokens: dict[str, Count]
    left_out: NotRequired[Count]
    overlaps_with_training: NotRequired[dict[str, Count | None]]


class ResponseLine(TypedDict):
    """A response of a model, or of the teacher."""

    id: int
    seed: int
    response: str
    tokens: Annotated[int, Field(ge=0)]
    ended: bool
    rouge_l: NotRequired[Number]
    response_ids: NotRequired[list[Count]]


class DistanceLine(TypedDict):
    """The distance of a model from the teacher over one response of the teacher."""

    id: int
    tokens: Annotated[int, Field(ge=1)]
    kl_nats: Number
    top1_agreement: Number


class OwnDistanceLine(TypedDict):
    """The distances of the teacher from a model over the model's own response, summed by stretch of positions."""

    id: int
    tokens: Annotated[list[Count], _BY_POSITION]
    reverse_kl_nats: Annotated[list[Number], _BY_POSITION]
    jsd_bits: Annotated[list[Number], _BY_POSITION]
    log_ratio_nats: Annotated[list[Number], _BY_POSITION]


class HarnessLine(TypedDict):
    """What lm-evaluation-harness found."""

    tasks: str
    limit: int | None
    results: dict[str, Any]


class Interval(TypedDict):
    """An estimate with its interval, and nothing else."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]

    mean: Number
    low: Number | None
    high: Number | None
    records: Count


class Mean(TypedDict):
    """A figure of which the mean is read."""

    mean: Number


class ModelScores(TypedDict):
    """A model's scores on a set, in results.json."""

    metrics: dict[str, dict[str, Interval]]
    response_tokens: Number


class SetScoresPart(TypedDict):
    """A set of results.json."""

    models: dict[str, ModelScores]
    records: Count
    left_out: NotRequired[Count]


class ProtocolName(TypedDict):
    """The protocol in results.json."""

    name: str


class TrainedPart(TypedDict):
    """Which of a run's trained weights were measured."""

    mark: str
    step: Count | None
    finished: bool


class MeasuredWeights(TypedDict):
    """Which weights of a model were measured."""

    trained: TrainedPart | None


class ResultsFile(TypedDict):
    """results.json of an evaluation, as the report shows it."""

    protocol: ProtocolName
    sets: dict[str, SetScoresPart]
    departures: NotRequired[list[str]]
    weights: NotRequired[dict[str, MeasuredWeights]]
    overlaps_with_training: NotRequired[dict[str, dict[str, Count | None]]]


class FidelityPart(TypedDict):
    """One precision of fidelity.json."""

    precision: str
    weights_gib: Number
    kl_nats: Interval
    top1_agreement: Interval
    reference_intervention_share: Number
    intervention_share: Number
    changed_decisions: Mean


class ReferencePart(TypedDict):
    """What the precisions were compared with."""

    precision: str


class FidelityFile(TypedDict):
    """fidelity.json."""

    precisions: list[FidelityPart]
    reference: ReferencePart
    prompts: Count
    doubt: NotRequired[str | None]
    origin: str | None
    device: NotRequired[str]
    weights_counted: NotRequired[str]
    student_weights: NotRequired[TrainedPart | None]


class CellFile(TypedDict):
    """cells/CELL-seedN.json: a finished cell of a comparison."""

    settings: dict[str, Any]
    summary: SummaryFile
    teacher_share: Share | None
