"""Which prompts a run trains on and which it holds out: from the data settings to encoded, disjoint sets.

In memory, or read as they are needed (`data.streaming`); of one set, or of several in given shares (`data.weights`).
Says what is odd about the data: duplicates, empty responses, prompts that are in both sets. Knows no model.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from qswitch.config import RunConfig
from qswitch.data.loader import Mixture, PromptSet, PromptsInMemory, split_validation
from qswitch.data.records import Record, check_columns, load_records
from qswitch.data.sources import Notify
from qswitch.data.streaming import Counts, Index, StreamedPrompts, build_index, content_digest, json_lines_files
from qswitch.data.template import EncodeCounts, Prompt, PromptEncoder, encode_all
from qswitch.errors import DataError
from qswitch.methods import FIXED
from qswitch.models.gguf_cache import cache_folder
from qswitch.models.pair import TokenizerPair, template_tokenizer

logger = logging.getLogger(__name__)

Prompts = Sequence[Prompt] | PromptSet | Mixture


@dataclass(frozen=True)
class DataReport:
    """RUN/data.json: what the data holds, in records."""

    records: int
    training_prompts: int
    """Beside the held-out ones; with data.streaming including those that turn out too long."""
    held_out_prompts: int
    duplicates: int
    """Same prompt and same response as an earlier record; they are kept."""
    empty_responses: int
    without_response: int
    too_long: int | None
    """Dropped for data.max_prompt_tokens; None with data.streaming, where they are skipped on the way."""
    truncated_responses: int | None
    also_held_out: int | None
    """Left out of training because data.validation has the same prompt; None with data.streaming."""

    def to_dict(self) -> dict[str, int | None]:
        return asdict(self)


@dataclass(frozen=True)
class RunPrompts:
    """What `gather_prompts` found."""

    train: Prompts
    held_out: list[Prompt]
    report: DataReport

    @property
    def longest_prompt_tokens(self) -> int | None:
        """Of all prompts, tokens; None where they are read as they are needed and the longest is not known."""
        if not isinstance(self.train, list):
            return None
        return max((len(p.prompt_ids) for p in [*self.train, *self.held_out]), default=1)


def load_prompts(config: RunConfig, pair: TokenizerPair) -> tuple[PromptEncoder, Prompts, list[Prompt]]:
    """The encoder, the training prompts and the held-out prompts, which never overlap."""
    encoder = make_encoder(config, pair)
    found = gather_prompts(config, encoder)
    return encoder, found.train, found.held_out


def make_encoder(config: RunConfig, pair: TokenizerPair) -> PromptEncoder:
    """The encoder of data.template."""
    template = config.data.template
    return PromptEncoder(template_tokenizer(pair, template), template, end_token_ids=pair.eos_ids)


def gather_prompts(config: RunConfig, encoder: PromptEncoder, notify: Notify | None = None) -> RunPrompts:
    """Training and held-out prompts of a run, which never overlap, and what is odd about them.

    `notify` hears how far reading and tokenising are.

    Raises:
        DataError: unreadable data, nothing to train on, or responses missing that the method learns from.
    """
    data = config.data
    check_columns(data)
    entries = [data.train] if isinstance(data.train, str) else list(data.train)
    groups: list[str | list[str]] = [*entries] if data.weights is not None else [data.train]
    given: _HeldOut | None = None
    if data.validation is not None:
        records = load_records(data, data.validation, split=data.validation_split, notify=notify)
        prompts = _encode(config, encoder, records, notify)[0][: data.num_validation]
        used = {p.example_id for p in prompts}
        given = _HeldOut(prompts, frozenset(r.text for r in records if r.id in used))
    gather = _gather_streamed if data.streaming else _gather_in_memory
    sets, held_out, report = gather(config, encoder, groups, given, notify)
    _refuse_missing_responses(config, report)
    _say(report)
    if data.weights is not None:
        return RunPrompts(Mixture(sets, data.weights), held_out, report)
    only = sets[0]
    return RunPrompts(only.prompts if isinstance(only, PromptsInMemory) else only, held_out, report)


@dataclass(frozen=True)
class _HeldOut:
    """The prompts of data.validation, and the texts of their records before the template."""

    prompts: list[Prompt]
    texts: frozenset[str]


_Gathered = tuple[list[PromptSet], list[Prompt], DataReport]


def _encode(
    config: RunConfig, encoder: PromptEncoder, records: list[Record], notify: Notify | None
) -> tuple[list[Prompt], EncodeCounts]:
    return encode_all(
        records,
        encoder,
        max_prompt_tokens=config.data.max_prompt_tokens,
        max_response_tokens=config.rollout.max_new_tokens,
        notify=notify,
    )


def _gather_in_memory(
    config: RunConfig,
    encoder: PromptEncoder,
    groups: list[str | list[str]],
    given: _HeldOut | None,
    notify: Notify | None,
) -> _Gathered:
    data = config.data
    records: list[Record] = []
    sizes: list[int] = []
    for group in groups:
        found = load_records(data, group, limit=data.limit, first_id=len(records), notify=notify)
        records += found
        sizes.append(len(found))
    digests = {content_digest(record) for record in records}
    prompts, counts = _encode(config, encoder, records, notify)
    total = len(prompts)
    also_held_out = 0
    if given is None:
        # A small file gives at most a fifth of its prompts away.
        num = min(data.num_validation, max(1, total // 5))
        prompts, held_out = split_validation(prompts, num, config.seed)
    else:
        held_out = given.prompts
        texts = {p.text for p in held_out}
        prompts = [p for p in prompts if p.text not in texts]
        also_held_out = total - len(prompts)
        if not prompts:
            raise DataError("Every training prompt is also in data.validation. Name another file for one of them.")
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    sets: list[PromptSet] = [
        PromptsInMemory([p for p in prompts if end - size <= p.example_id < end])
        for size, end in zip(sizes, ends, strict=True)
    ]
    for group, prompt_set in zip(groups, sets, strict=True):
        if not len(prompt_set):
            raise DataError(f"No prompt of {group} is left to train on: all are held out or too long. Remove it.")
    report = DataReport(
        records=len(records),
        training_prompts=len(prompts),
        held_out_prompts=len(held_out),
        duplicates=len(records) - len(digests),
        empty_responses=counts.empty_response,
        without_response=counts.without_response,
        too_long=counts.too_long,
        truncated_responses=counts.truncated_responses,
        also_held_out=also_held_out,
    )
    return sets, held_out, report


def _gather_streamed(
    config: RunConfig,
    encoder: PromptEncoder,
    groups: list[str | list[str]],
    given: _HeldOut | None,
    notify: Notify | None,
) -> _Gathered:
    """Held-out prompts have the lowest ranks over all files, as in memory; ranked by their text before the template."""
    data = config.data
    folder = cache_folder() / "data"
    wanted = 0 if given is not None else data.num_validation
    indices: list[list[Index]] = []
    for group in groups:
        references = [group] if isinstance(group, str) else group
        files = [f for r in references for f in json_lines_files(r, data.split, folder, notify)]
        indices.append([
            build_index(f, data, seed=config.seed, num_lowest=2 * wanted, folder=folder, notify=notify) for f in files
        ])  # fmt: skip

    def make_sets(ranks: frozenset[str], texts: frozenset[str]) -> list[StreamedPrompts]:
        first, made = 0, []
        for own in indices:
            made.append(StreamedPrompts(
                own, encoder, data, seed=config.seed, max_response_tokens=config.rollout.max_new_tokens,
                first_id=first, held_out=ranks, held_out_texts=texts,
            ))  # fmt: skip
            first += len(made[-1])
        return made

    counts = [index.counts for own in indices for index in own]
    if given is None:
        num = min(wanted, max(1, sum(c.records for c in counts) // 5))
        held_out, ranks = _lowest_prompts(make_sets(frozenset(), frozenset()), num)
        sets = make_sets(frozenset(ranks), frozenset())
    else:
        held_out, sets = given.prompts, make_sets(frozenset(), given.texts)
    return [*sets], held_out, _streamed_report(counts, held_out, drawn=given is None)


def _lowest_prompts(sets: list[StreamedPrompts], num: int) -> tuple[list[Prompt], list[str]]:
    """The `num` usable prompts of the lowest ranks, and their ranks; candidates are twice as many."""
    candidates: dict[str, tuple[StreamedPrompts, int]] = {}
    for prompt_set in sets:
        first = 0
        for index in prompt_set.indices:
            for rank, line in index.lowest:
                candidates.setdefault(rank, (prompt_set, first + line))
            first += index.counts.lines
    prompts: list[Prompt] = []
    ranks: list[str] = []
    for rank, (prompt_set, line) in sorted(candidates.items(), key=lambda item: item[0]):
        record = prompt_set.record(line)
        prompt = None if record is None else prompt_set.encode(record)
        if prompt is not None and len(prompts) < num:
            prompts.append(prompt)
            ranks.append(rank)
    if not prompts:
        raise DataError(
            f"None of {len(candidates)} prompts drawn for validation fits data.max_prompt_tokens. Raise it, or name a "
            "held-out file in data.validation."
        )
    return prompts, ranks


def _streamed_report(counts: list[Counts], held_out: list[Prompt], *, drawn: bool) -> DataReport:
    """`drawn`: the held-out prompts are records of this data. Those of a file of their own are met while training."""
    records = sum(c.records for c in counts)
    return DataReport(
        records=records,
        training_prompts=records - len(held_out) if drawn else records,
        held_out_prompts=len(held_out),
        duplicates=sum(c.duplicates for c in counts),
        empty_responses=sum(c.empty_responses for c in counts),
        without_response=sum(c.without_response for c in counts),
        too_long=None,
        truncated_responses=None,
        also_held_out=None,
    )


def _refuse_missing_responses(config: RunConfig, report: DataReport) -> None:
    mix = config.data.ground_truth_mix
    if config.reads_responses and report.without_response:
        setting = "data.adaptive_share" if config.data.adaptive_share else f"data.ground_truth_mix={mix:g}"
        fixed = "data.adaptive_share" if config.data.adaptive_share else "data.ground_truth_mix"
        removable = 0 < mix < 1 and fixed not in FIXED[config.method]
        instead = f"set {fixed}=0" if removable else "choose a method that writes its own, such as switch"
        raise DataError(
            f"method={config.method} with {setting} learns from the data's responses, but {report.without_response} of "
            f"{report.records} records have none. Add them, or {instead}."
        )


def _say(report: DataReport) -> None:
    if report.too_long is None and report.empty_responses:  # in memory the encoder says so
        logger.warning("%d of %d responses are empty and count as none.", report.empty_responses, report.records)
    if report.duplicates:
        logger.warning(
            "%d of %d records repeat the prompt and response of an earlier one; they are kept.",
            report.duplicates, report.records,
        )  # fmt: skip
    if report.also_held_out:
        logger.warning("Left out %d training prompts that are held out for validation.", report.also_held_out)
