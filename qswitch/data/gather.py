"""Which prompts a run trains on and which it holds out: from the data settings to disjoint sets of token ids.

Of one set, or of several in given shares (`data.weights`). Says what is odd about the data: duplicates, empty
responses, prompts that are in both sets. Knows no model.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from qswitch.config import RunConfig
from qswitch.data.fields import check_columns
from qswitch.data.first_look import missing_responses
from qswitch.data.loader import Mixture
from qswitch.data.prompt_table import PromptTable, prompt_table
from qswitch.data.shares import most_held_out, shares_of
from qswitch.data.sources import Notify
from qswitch.data.template import Prompt, PromptEncoder
from qswitch.errors import DataError
from qswitch.models.pair import TokenizerPair, template_tokenizer

logger = logging.getLogger(__name__)

Prompts = Sequence[Prompt] | Mixture
DRAW = 42
"""Which draw of held-out prompts: that of the default seed. Earlier versions drew by the seed of the run."""


@dataclass(frozen=True)
class DataReport:
    """RUN/data.json: what the data holds, in records."""

    records: int
    training_prompts: int
    held_out_prompts: int
    duplicates: int
    """Same prompt and same response as another record; they are kept."""
    empty_responses: int
    without_response: int
    """With no response to learn from, the empty ones included."""
    too_long: int
    """Dropped for data.max_prompt_tokens."""
    truncated_responses: int
    """Cut to rollout.max_new_tokens, and so without end token."""
    capped_limits: int
    """The record's own max_new_tokens lowered to rollout.max_new_tokens."""
    also_held_out: int
    """Left out of training because data.validation has the same prompt, scored or not."""
    longest_prompt_tokens: int
    """Of the prompts that are trained on or held out."""
    unused_fields: dict[str, int]
    """Columns, and fields of turns, that neither we nor the template read -> records that have them."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class RunPrompts:
    """What `gather_prompts` found."""

    train: Prompts
    held_out: list[Prompt]
    report: DataReport


def load_prompts(config: RunConfig, pair: TokenizerPair) -> tuple[PromptEncoder, Prompts, list[Prompt]]:
    """The encoder, the training prompts and the held-out prompts, which never overlap."""
    encoder = make_encoder(config, pair)
    found = gather_prompts(config, encoder)
    return encoder, found.train, found.held_out


def make_encoder(config: RunConfig, pair: TokenizerPair) -> PromptEncoder:
    """The encoder of data.template."""
    template, kwargs = config.data.template, config.data.template_kwargs
    make = partial(PromptEncoder, template_tokenizer(pair, template), template, end_token_ids=pair.eos_ids)
    if config.passes_text:  # they are for the teacher's template; the student's may know none of them
        reads = make().reads
        kwargs = {name: value for name, value in kwargs.items() if reads(name)}
    return make(template_kwargs=kwargs)


def gather_prompts(config: RunConfig, encoder: PromptEncoder, notify: Notify | None = None) -> RunPrompts:
    """Training and held-out prompts of a run, which never overlap, and what is odd about them.

    `notify` hears how far reading and tokenising are.

    Raises:
        DataError: unreadable data, nothing to train on, or responses missing that the method learns from.
    """
    data = config.data
    check_columns(data)
    groups = data.train_sets
    limits = {"max_prompt_tokens": data.max_prompt_tokens, "max_response_tokens": config.rollout.max_new_tokens}

    def load(reference: str | list[str], split: str, limit: int | None, first_id: int = 0) -> PromptTable:
        dataset = prompt_table(reference, data, encoder, split=split, limit=limit, notify=notify)
        return PromptTable(dataset, **limits, first_id=first_id)

    given = None
    if data.validation is not None:
        given = load(data.validation, data.validation_split or data.split, None)
        _longest_row([given], data.max_prompt_tokens)
    sets: list[PromptTable] = []
    for group in groups:
        sets.append(load(group, data.split, data.limit, sum(s.num_rows for s in sets)))
    longest = _longest_row(sets, data.max_prompt_tokens)
    counts = _count(sets, config.rollout.max_new_tokens)
    total = sum(map(len, sets))

    ranks = [s.text_ranks(held_out_rank) for s in sets]
    if given is None:
        by_set = ranks_to_hold_out(ranks, data.weights or [1.0], data.num_validation)
        held_out, left_out = _first_of_each(sets, ranks, by_set), np.concatenate(by_set)
    else:
        own = given.text_ranks(held_out_rank)
        left_out = np.unique(own)
        held_out = _first_of_each([given], [own], [left_out[: data.num_validation]])
    sets = [s.select(~np.isin(own, left_out)) for s, own in zip(sets, ranks, strict=True)]
    num_training = sum(map(len, sets))
    if not num_training:
        raise DataError("Every training prompt is also in data.validation. Name another file for one of them.")
    for group, prompts in zip(groups, sets, strict=True):
        if not len(prompts):
            raise DataError(f"No prompt of {group} is left to train on: all are held out or too long. Remove it.")
    report = DataReport(
        training_prompts=num_training,
        held_out_prompts=len(held_out),
        also_held_out=0 if given is None else total - num_training,
        longest_prompt_tokens=max([int(s.column("prompt_tokens").max()) for s in sets]
                                  + [len(p.prompt_ids) for p in held_out]),
        **counts,
    )  # fmt: skip
    _refuse_missing_responses(config, report)
    _say(config, report, longest)
    return RunPrompts(sets[0] if data.weights is None else Mixture(sets, data.weights), held_out, report)


def _count(sets: Sequence[PromptTable], max_response_tokens: int) -> dict[str, Any]:
    """What is odd about the records, before any of them is held out."""

    def prompts_where(holds: Any) -> int:
        return sum(int(np.count_nonzero(holds(s))) for s in sets)

    num_rows = sum(s.num_rows for s in sets)
    unused: Counter[str] = Counter()
    for prompts in sets:
        unused.update(prompts.unused_fields())
    return {
        "unused_fields": dict(unused.most_common()),
        "records": num_rows,
        "duplicates": num_rows - len(np.unique(np.concatenate([s.digests() for s in sets]))),
        "too_long": num_rows - sum(map(len, sets)),
        "empty_responses": prompts_where(lambda s: s.column("blank_response")),
        "without_response": prompts_where(lambda s: s.column("response_tokens") < 0),
        "truncated_responses": prompts_where(lambda s: s.column("response_tokens") > max_response_tokens),
        "capped_limits": prompts_where(lambda s: s.column("max_new_tokens") > max_response_tokens),
    }


def held_out_rank(text: str) -> int:
    """64 bits, by which prompts are drawn to be held out, those of the lowest ranks: a function of the text alone.

    So runs with other seeds are scored on the same prompts, a warm start has not seen what a later run holds out, and
    the draw hardly moves when data is added.
    """
    return int.from_bytes(hashlib.blake2b(f"{DRAW}:{text}".encode(), digest_size=16).digest()[:8], "big")


def ranks_to_hold_out(ranks: Sequence[np.ndarray], weights: Sequence[float], num: int) -> list[np.ndarray]:
    """The lowest ranks of each set, uint64 [at most its share of `num`]; no rank is given twice.

    `ranks`, uint64 [prompts] a set, name the texts; every record that repeats a held-out text leaves training too. So
    a set gives none by which it, or another set that has the same prompt, would lose more than `most_held_out` of its
    different prompts.

    Raises:
        DataError: no set has two different prompts.
    """
    distinct = [np.unique(own) for own in ranks]
    room = [most_held_out(len(own)) for own in distinct]
    given = [own[:0] for own in distinct]
    for index, share in enumerate(shares_of(num, weights)):
        candidates = distinct[index]
        while len(given[index]) < share:  # ends: each round but the last leaves a further set without room
            closed = [own for own, left in zip(distinct, room, strict=True) if not left]
            candidates = candidates[~np.isin(candidates, np.concatenate([*closed, *given]))]
            next_ones = candidates[: share - len(given[index])]
            lost = np.stack([np.isin(next_ones, own) for own in distinct])  # [sets, next ones]
            fits = np.logical_and.reduce(lost.cumsum(axis=1) <= np.array(room)[:, None])
            taken = len(fits) if fits.all() else int(fits.argmin())
            if not taken:
                break
            given[index] = np.concatenate([given[index], next_ones[:taken]])
            room = [left - int(by[:taken].sum()) for left, by in zip(room, lost, strict=True)]
    if not any(map(len, given)):
        counted = " and ".join(str(len(own)) for own in distinct)
        raise DataError(
            f"data.num_validation={num} finds nothing to hold out: the data has {counted} distinct prompts, and one of "
            "each entry stays to be trained on. Name a held-out file in data.validation."
        )
    return given


def _first_of_each(
    sets: Sequence[PromptTable], ranks: Sequence[np.ndarray], given: Sequence[np.ndarray]
) -> list[Prompt]:
    """Of every rank that a set has `given`, its first prompt; by rank, so that the first few are a sample too."""
    found: dict[int, Prompt] = {}
    for prompts, own, chosen in zip(sets, ranks, given, strict=True):
        for index in np.flatnonzero(np.isin(own, chosen)):
            rank = int(own[index])
            if rank not in found:
                found[rank] = prompts[int(index)]
    return [found[rank] for rank in sorted(found)]


def _longest_row(sets: Sequence[PromptTable], max_prompt_tokens: int) -> int:
    """Tokens of the longest prompt, of those that are dropped too.

    Raises:
        DataError: all are dropped.
    """
    longest = max(int(s.prompt_tokens.max()) for s in sets)
    if not any(map(len, sets)):
        raise DataError(
            f"No prompt is left: all {sum(s.num_rows for s in sets)} are longer than data.max_prompt_tokens="
            f"{max_prompt_tokens} (the longest has {longest} tokens). Raise data.max_prompt_tokens."
        )
    return longest


def _refuse_missing_responses(config: RunConfig, report: DataReport) -> None:
    if config.reads_responses and report.without_response:
        raise DataError(missing_responses(config, f"{report.without_response} of {report.records} records have none"))


def _say(config: RunConfig, report: DataReport, longest: int) -> None:
    limit = config.rollout.max_new_tokens
    found = {
        f"Dropped %d of {report.records} prompts longer than data.max_prompt_tokens={config.data.max_prompt_tokens} "
        f"(the longest has {longest} tokens).": report.too_long,
        f"Cut %d responses to {limit} tokens; they end without an end token.": report.truncated_responses,
        f"%d of {report.records} responses are empty and count as none.": report.empty_responses,
        f"Lowered max_new_tokens of %d records to rollout.max_new_tokens={limit}, for which the memory is planned.":
            report.capped_limits,
        f"%d of {report.records} records repeat the prompt and response of another one; they are kept.":
            report.duplicates,
        "Left out %d training prompts that data.validation has too.": report.also_held_out,
    }  # fmt: skip
    for text, number in found.items():
        if number:
            logger.warning(text, number)
    if report.unused_fields:
        named = ", ".join(f"{name} ({number})" for name, number in report.unused_fields.items())
        logger.warning("Of %d records these fields are not used: %s.", report.records, named)
