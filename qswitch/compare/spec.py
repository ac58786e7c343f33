"""What `qswitch compare` is told: one start, one budget, several cells. Cold."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from qswitch.config import DataSection, RunConfig, Section
from qswitch.data.sources import reference_path
from qswitch.errors import ConfigError, DataError
from qswitch.evaluate.figures import BETTER
from qswitch.evaluate.protocol import PROTOCOLS, make_protocol
from qswitch.layers import build_config, by_section, flatten, stack
from qswitch.outside import user_path
from qswitch.plan.vocabulary import have_one_vocabulary
from qswitch.presets import load_preset
from qswitch.units import MAX_ROWS, MAX_TOKENS, UNLIMITED_STEPS
from qswitch.yaml_file import read_yaml

SFT = "sft"
"""Name of the control cell that every comparison has."""
SFT_ABOUT = "control: fine-tuning on the data alone"
"""What the table says of it, where the file has no such cell."""
CONTROLS = {"teacher": "teacher", "untrained": "base"}
"""Name in the table -> part of a run."""
START = ("model", "revision", "shrink_to_layers", "init_adapter")
"""Settings of the student that every cell shares."""
TEACHER = ("model", "revision", "precision", "adapter")
"""What makes a teacher another one."""
NO_RESULT = ("about", "train.eval_own_prompts", "train.save_steps", "train.save_total_limit", "train.report_to")
"""Settings, or sections, of a run that change no figure."""
MAX_PROBED = 20_000
"""Records of a test set that are read before the first cell is trained."""
BUDGET = ("max_steps", "max_tokens", "max_seconds", "num_epochs")
"""Settings of the train section that the budget stands for."""
TWO_TOKENIZERS = (
    "teacher and student have different tokenizers. A comparison measures every cell against the teacher, token by "
    "token, and beside fine-tuning on the data, both of which need one tokenizer. Train the runs with qswitch distill, "
    "and score them together: qswitch eval RUN RUN --data FILE"
)


class BudgetSection(Section):
    """What every cell may spend."""

    unit: Literal["tokens", "steps", "seconds"] = "steps"
    """tokens: response tokens that were generated, or read from the data where a method generates none.
    steps: optimizer steps. seconds: of training, validation apart."""
    amount: float = Field(gt=0, le=10**15)
    """How many; the step that reaches it is the last."""


class CellSection(Section):
    """One way of training."""

    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings on top of the shared ones, nested or dotted (rollout.decay_rate: 0.2)."""
    seeds: list[int] | None = None
    """Instead of the comparison's seeds."""
    about: str = ""
    """One line for the table."""


class EvaluateSection(Section):
    """How the cells are scored; names and meanings are those of `qswitch eval`."""

    data: list[str] = Field(min_length=1)
    """Test sets."""
    protocol: str = "greedy"
    """Named protocol."""
    seeds: list[int] | None = None
    """Sampling seeds, instead of the protocol's."""
    temperature: float | None = None
    """Instead of the protocol's."""
    template: str | None = None
    """Instead of the protocol's; `own` is that of the run."""
    max_new_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    """Instead of the protocol's."""
    max_prompt_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    """Instead of the protocol's."""
    limit: int | None = Field(default=None, ge=1)
    """First records of each set."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Our field -> column of the file."""
    split: str = "test"
    """Of a hub data set."""
    batch_size: int = Field(default=16, ge=1, le=MAX_ROWS)
    """Rows decoded together; changes figures by rounding alone, which in bf16 makes other samples."""
    device: Literal["cuda", "cpu"] | None = None
    """Instead of the run's."""


class TestSection(Section):
    """A test that is declared before the first result."""

    __test__ = False  # the name is no test class of pytest

    against: list[str] = Field(min_length=1)
    """Cells that the baseline is tested against; the error level of 5 % is shared among them (Bonferroni)."""
    margins: dict[str, float] = Field(min_length=1)
    """Metric -> smallest difference that matters, for instance kl_nats, rouge_l_teacher, own_reverse_kl_nats."""


class CompareSection(Section):
    """The file of `qswitch compare`."""

    run: str
    """The configuration that all cells share: a preset, or a YAML file beside this one."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings on top of it for every cell, nested or dotted."""
    budget: BudgetSection
    """The same for every cell."""
    seeds: list[int] = Field(default_factory=lambda: [1], min_length=1)
    """One run per cell and seed."""
    cells: dict[str, CellSection] = Field(min_length=1)
    """Name -> what this cell changes."""
    baseline: str | None = None
    """The cell that the others are compared with, paired; default: the first."""
    evaluate: EvaluateSection
    """How they are scored."""
    test: TestSection | None = None
    """A declared test of the baseline."""

    @field_validator("cells", mode="before")
    @classmethod
    def _empty_cells(cls, cells: Any) -> Any:
        """`switch:` with nothing behind it is a cell that changes nothing."""
        return {n: {} if c is None else c for n, c in cells.items()} if isinstance(cells, Mapping) else cells


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a comparison."""

    name: str
    seed: int
    config: RunConfig
    settings: dict[str, Any]
    """Dotted setting -> value of everything that decides the result: configuration, budget, evaluation."""

    @property
    def label(self) -> str:
        """Name of its run, its folder and its JSON file."""
        return f"{self.name}-seed{self.seed}"

    def changed(self, saved: Mapping[str, Any]) -> list[str]:
        """Settings in which a cell that was started before, by this version or another, differs from this one.

        A setting that only one of the versions knows counts where this cell does not leave it at its default.
        """
        here = json.loads(json.dumps(self.settings))
        written = flatten(self.config.model_dump(mode="json", exclude_defaults=True))
        changed = {key for key, value in saved.items() if key in here and here[key] != value}
        return sorted(changed | {key for key in written if key not in saved and not is_cosmetic(key)})


@dataclass(frozen=True, slots=True)
class Comparison:
    """A checked comparison."""

    section: CompareSection
    cells: list[Cell]
    baseline: str
    notes: tuple[str, ...] = ()
    """What was changed so that cells are alike."""

    def seeds_of(self, name: str) -> list[int]:
        """The training seeds of a cell; none of a control."""
        return [cell.seed for cell in self.cells if cell.name == name]


def read_comparison(path: Path) -> Comparison:
    """The comparison in a YAML file, every cell's configuration checked, the SFT control added where it is missing.

    Raises:
        ConfigError: every problem found, each with the cell it belongs to.
    """
    values = read_yaml(path)
    try:
        section = CompareSection.model_validate(values)
    except ValidationError as error:
        raise ConfigError([_explain(e) for e in error.errors()], str(path)) from None
    source = path.parent / section.run if section.run.endswith((".yaml", ".yml")) else section.run
    run = stack(load_preset(source), by_section(section.settings, f"{path}, settings"))
    ranked: list[tuple[int, Cell]] = []
    problems: list[str] = []
    notes: list[str] = []
    named = dict(section.cells)
    if any(_has_own_tokenizer(run, cell) for cell in named.values()):
        raise ConfigError(TWO_TOKENIZERS, str(path))  # before the SFT control, which would be blamed for it
    if not any(_is_sft(cell, run) for cell in named.values()):
        if SFT in named:
            problems.append(f"the cell {SFT} is not the SFT control: set its settings.method to sft, or rename it")
        named[SFT] = CellSection(settings={"method": "sft"}, about=SFT_ABOUT)
    for name, cell in named.items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            problems.append(f"cells.{name}: use letters, digits, dots and dashes, a letter or digit first")
        if name in CONTROLS:
            problems.append(f"cells.{name} is the name of a control, which stands in every table. Rename the cell")
        if len(set(cell.seeds or section.seeds)) < len(cell.seeds or section.seeds):
            problems.append(f"cells.{name}: a seed is named twice; the second run would be the first again")
        problems += [
            f"cells.{name}: train.{setting} is the budget's, which is the same for every cell. Leave it out"
            for setting in _own_budget(cell)
        ]
        for rank, seed in enumerate(cell.seeds or section.seeds):
            try:
                config, note = _cell_config(run, cell, seed, section.budget)
            except ConfigError as error:
                problems += [f"cells.{name}: {p}" for p in error.problems]
                break
            notes += [] if note is None else [f"{name}: {note}"]
            ranked.append((rank, Cell(name, seed, config, _settings(config, section))))
    # One seed of every cell before the next: the table of an unfinished comparison compares like with like.
    cells = [cell for _, cell in sorted(ranked, key=lambda item: item[0])]
    baseline = section.baseline or next(iter(section.cells))
    if baseline not in named:
        problems.append(f"baseline: there is no cell {baseline}. Cells: {', '.join(named)}")
    if section.test is not None:
        known = [*named, *CONTROLS]
        problems += [f"test.against: there is no cell {n}" for n in section.test.against if n not in known]
        problems += [
            f"test.margins.{m}: choose among {', '.join(BETTER)}" for m in section.test.margins if m not in BETTER
        ]
        problems += [
            f"test.against: {n} is named twice, and the error level of 5 % is shared among all that are named"
            for n, count in Counter(section.test.against).items()
            if count > 1
        ]
    problems += _unlike_evaluations(cells, section)
    problems += _bad_evaluation(section)
    if section.test is not None:
        if baseline in section.test.against:
            problems.append(f"test.against: {baseline} is the baseline itself. Name other cells")
        problems += [f"test.margins.{m}: must be above 0" for m, margin in section.test.margins.items() if margin <= 0]
        seeds = {n: set(c.seeds or section.seeds) for n, c in named.items()}
        problems += [
            f"test.against: {n} has other training seeds than {baseline}; the test pairs them by number"
            for n in section.test.against
            if n in seeds and seeds[n] != seeds.get(baseline)
        ]
    if problems:
        raise ConfigError(problems, str(path))
    return Comparison(section, cells, baseline, tuple(dict.fromkeys(notes)))


def _unlike_evaluations(cells: list[Cell], section: CompareSection) -> Iterator[str]:
    """Cells that could not be scored together, found before one of them has trained for hours."""
    if not cells:
        return
    first = cells[0]
    if have_one_vocabulary(first.config.teacher, first.config.student) is False:
        yield TWO_TOKENIZERS
    for cell in {cell.name: cell for cell in cells}.values():  # its seeds differ in nothing else
        if any(getattr(cell.config.teacher, n) != getattr(first.config.teacher, n) for n in TEACHER):
            yield (
                f"cells.{cell.name} has another teacher than {first.name} (model, revision, precision or adapter): all "
                "are measured against one. Set it in settings: for every cell"
            )
        starts = [{n: getattr(c.config.student, n) for n in START} for c in (first, cell)]
        changed = [n for n in START if starts[0][n] != starts[1][n]]
        if changed:
            yield (
                f"cells.{cell.name} starts from another student than {first.name} (student."
                f"{', student.'.join(changed)}): a comparison has one start. Set it in settings: for every cell, or "
                "compare the runs with qswitch eval"
            )
        ours, theirs = (_asked_with(c.config.data, section.evaluate) for c in (first, cell))
        unlike = [name for name in ours if ours[name] != theirs[name]]
        if unlike:
            named = "Name a template in evaluate.template, or set" if unlike[0] == "template" else "Set"
            yield (
                f"cells.{cell.name} has another data.{', data.'.join(unlike)} than {first.name}, but all answer the "
                f"same prompts. {named} it in settings: for every cell"
            )


def _asked_with(data: DataSection, evaluate: EvaluateSection) -> dict[str, Any]:
    """What an evaluation of a run that was trained with `data` makes its prompts with; see `Subject`."""
    named = PROTOCOLS.get(evaluate.protocol)  # an unknown one has a problem of its own
    fixed = evaluate.template or (named.template if named is not None else None)
    template = data.template if fixed in (None, "own") else fixed
    return {
        "template": template,
        "template_kwargs": data.template_kwargs if data.template == template else {},
        "system_prompt": data.system_prompt,
    }


def _bad_evaluation(section: CompareSection) -> Iterator[str]:
    evaluate = section.evaluate
    try:
        make_protocol(
            evaluate.protocol, seeds=None if evaluate.seeds is None else tuple(evaluate.seeds),
            temperature=evaluate.temperature, max_new_tokens=evaluate.max_new_tokens,
            max_prompt_tokens=evaluate.max_prompt_tokens,
        )  # fmt: skip
    except ConfigError as error:
        yield f"evaluate: {error}"
    from qswitch.data.fields import check_columns
    from qswitch.evaluate.testset import clash_of_names, load_test_set

    for reference in evaluate.data:
        try:
            if reference_path(reference) is not None:  # a hub that does not answer costs minutes
                data = DataSection(train=reference, columns=evaluate.columns, split=evaluate.split)
                check_columns(data)
                load_test_set(data, reference, limit=min(evaluate.limit or MAX_PROBED, MAX_PROBED))
        except DataError as error:
            yield f"evaluate.data: {error}"
    clash = clash_of_names(evaluate.data)
    if clash is not None:
        yield f"evaluate.data: {clash}"
    template = evaluate.template
    named = template in (None, "own", "teacher", "student", "alpaca", "plain")
    if not named and not user_path(str(template)).exists():
        yield f"evaluate.template: {template} is no file. Use own, teacher, student, alpaca, plain, or a Jinja file"


def _cell_config(
    run: Mapping[str, Any], cell: CellSection, seed: int, budget: BudgetSection
) -> tuple[RunConfig, str | None]:
    """A cell's run, and what was changed so that it warms up over the same share of the budget as the others.

    Its steps are those of no other cell where the budget is tokens or seconds, so that a warm-up counted in steps would
    be another share of the training for each.
    """
    steps = int(budget.amount) if budget.unit == "steps" else UNLIMITED_STEPS
    train: dict[str, Any] = dict.fromkeys(BUDGET) | {"max_steps": steps}  # null: no limit of a lower layer stays
    if budget.unit == "tokens":
        train["max_tokens"] = int(budget.amount)
    elif budget.unit == "seconds":
        train["max_seconds"] = budget.amount
    note = None
    if budget.unit != "steps":
        written = build_config(run, cell.settings).train
        if written.warmup_steps >= 1 and written.num_epochs is None and written.step_limit is not None:
            train["warmup_steps"] = written.warmup_steps / written.max_steps
            note = (
                f"train.warmup_steps={written.warmup_steps:g} of train.max_steps={written.max_steps} is taken as a "
                f"share of the budget, {train['warmup_steps']:g}"
            )
    return build_config(run, cell.settings, {"seed": seed, "train": train}), note


def _own_budget(cell: CellSection) -> list[str]:
    """Settings of a cell that say how long it trains."""
    try:
        train = by_section(cell.settings).get("train")
    except ConfigError:
        return []  # which building its configuration says
    return [name for name in BUDGET if name in train] if isinstance(train, Mapping) else []


def _has_own_tokenizer(run: Mapping[str, Any], cell: CellSection) -> bool:
    try:
        student = stack(run, by_section(cell.settings)).get("student")
    except ConfigError:
        return False  # likewise
    return isinstance(student, Mapping) and student.get("tokenizer") == "own"


def _is_sft(cell: CellSection, run: Mapping[str, Any]) -> bool:
    return cell.settings.get("method", run.get("method")) == "sft"


def _settings(config: RunConfig, section: CompareSection) -> dict[str, Any]:
    found = {k: v for k, v in flat_settings(config).items() if not is_cosmetic(k)}
    for name, values in (
        ("budget", section.budget.model_dump()),
        ("evaluate", section.evaluate.model_dump(exclude={"batch_size", "device"})),
    ):
        found |= {f"{name}.{key}": value for key, value in values.items()}
    return found


def is_cosmetic(key: str) -> bool:
    """Whether a setting changes no figure."""
    return key.partition(".")[0] in NO_RESULT or key in NO_RESULT


def flat_settings(config: RunConfig) -> dict[str, Any]:
    """Dotted setting -> value of a whole configuration, fit for JSON."""
    return flatten(config.model_dump(mode="json"))


_SECTIONS: dict[str, type[Section]] = {
    "budget": BudgetSection,
    "cells": CellSection,
    "evaluate": EvaluateSection,
    "test": TestSection,
}


def _explain(error: Any) -> str:
    dotted = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        within = _SECTIONS[error["loc"][0]] if len(error["loc"]) > 1 else CompareSection
        return f"{dotted} is not a setting of a comparison. Known: {', '.join(within.model_fields)}."
    if error["type"] == "missing":
        return f"{dotted} is missing."
    return f"{dotted}: {error['msg']}."
