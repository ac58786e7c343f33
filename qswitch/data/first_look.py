"""What data on this disk says of a run before a tokenizer is there, from its first records.

Which records cannot be read, whether responses are missing that the method learns from, how many prompts are too long,
and how many prompts there are where the records end soon. Knows no tokens: it estimates them by bytes and characters,
and so carefully that what it calls too long is. Of data on the hub, and of what only `datasets` can read, it says
nothing. Cold.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from qswitch.config import DataSection, RunConfig
from qswitch.data.fields import check_columns
from qswitch.data.records import Record, iter_records, load_records
from qswitch.data.shares import most_held_out, shares_of
from qswitch.data.sources import is_saved_dataset, reference_path
from qswitch.errors import DataError
from qswitch.methods import FIXED

SAMPLED_RECORDS = 5_000
"""Records read of the training data for lengths and numbers; about 0.2 s."""
FIRST_RECORDS = 32
"""Records read of each set before anything else: a wrong column or encoding, and shown thinking, show at once."""
BYTES_PER_TOKEN = 3
"""Of UTF-8. Of English text it is about 4, of code less, and a character of Chinese, Japanese or Hindi, three bytes, is
about a token; too low a figure only reserves more room."""
MOST_CHARACTERS_PER_TOKEN = 6
"""Few texts have as many: a prompt that is too long by this figure is too long."""
TEMPLATE_TOKENS = 32
"""What a chat template puts around a prompt, roughly."""
HARDLY_ANY = 0.1
"""Where at most this share of the prompts is left, a run is not what somebody wanted."""


@dataclass(frozen=True, slots=True)
class FirstLook:
    """How many prompts the training data has, and how many of them are too long."""

    num_records: int
    num_too_long: int
    """Longer than data.max_prompt_tokens by their characters; they are left out."""
    is_whole: bool
    """Whether these are all records, rather than the first."""
    max_prompt_tokens: int
    longest_tokens: int
    """Of the longest prompt, by a careful estimate."""
    enough_tokens: int | None
    """A larger data.max_prompt_tokens, with which 95 % of the prompts are kept; None where the limit keeps as many, and
    where the context of the models does not hold that beside a response."""
    num_training: int
    """Prompts left to train on, without those that are held out; at most, since some may be too long by their tokens
    alone or repeat a held-out one."""

    @property
    def leaves_hardly_any(self) -> bool:
        """Whether nearly all prompts are too long."""
        return self.num_records - self.num_too_long <= HARDLY_ANY * self.num_records

    def to_dict(self) -> dict[str, int | bool]:
        """For `qswitch plan --json`, in records."""
        return {"records": self.num_records, "too_long": self.num_too_long, "is_whole": self.is_whole}

    def render(self) -> str | None:
        """A sentence about prompts that are left out; None where none is."""
        if not self.num_too_long:
            return None
        which = "" if self.is_whole else "first "
        counted = f"{self.num_too_long} of the {which}{self.num_records} prompts"
        left = self.num_records - self.num_too_long
        start = f"{'Hardly anything' if left else 'Nothing'} to train on" if self.leaves_hardly_any else "Left out"
        advice = f"The longest has about {self.longest_tokens:,} tokens."
        if self.enough_tokens is not None:
            advice = f"For nearly all of them: --set data.max_prompt_tokens={self.enough_tokens}."
        return (
            f"{start}: {counted} are longer than data.max_prompt_tokens={self.max_prompt_tokens}, by their characters. "
            f"{advice}"
        )


def first_look(config: RunConfig, context: int | None = None) -> FirstLook | None:
    """What the first records of the training data say; None where they are not on this disk.

    `context`: tokens of prompt and response that the models take, where that is known.

    Raises:
        DataError: one of them cannot be read.
    """
    data = config.data
    references = [data.train] if isinstance(data.train, str) else data.train
    if not all(map(_is_here, references)):
        return None
    entries, is_whole = sampled(data)
    sets = entries if data.weights is not None else [list(chain.from_iterable(entries))]
    texts = [record.text for records in sets for record in records]
    if not texts:
        return None
    limit = data.max_prompt_tokens
    kept = [sum(len(one.text) <= limit * MOST_CHARACTERS_PER_TOKEN for one in records) for records in sets]
    shares = shares_of(data.num_validation, data.weights or [1.0]) if data.validation is None else [0] * len(sets)
    held_out = sum(min(share, most_held_out(num)) for share, num in zip(shares, kept, strict=True))
    tokens = [estimated_tokens(text) for text in texts]
    enough = rounded(high(tokens) + TEMPLATE_TOKENS)
    is_advice = enough > limit and (context is None or enough + config.rollout.max_new_tokens <= context)
    return FirstLook(
        num_records=len(texts),
        num_too_long=len(texts) - sum(kept),
        is_whole=is_whole,
        max_prompt_tokens=limit,
        longest_tokens=max(tokens) + TEMPLATE_TOKENS,
        enough_tokens=enough if is_advice else None,
        num_training=sum(kept) - held_out,
    )


def sampled(data: DataSection) -> tuple[list[list[Record]], bool]:
    """The first records to train on, by entry of data.train, of each as many; and whether they are all.

    Raises:
        DataError: one of them cannot be read.
    """
    entries = [data.train] if isinstance(data.train, str) else data.train
    is_part = len(entries) > 1 and data.weights is None  # of one set, which has one limit and one look at its columns
    by_entry: list[list[Record]] = []
    is_whole = True
    left = data.limit
    for number, entry in enumerate(entries):
        sample = (SAMPLED_RECORDS - sum(map(len, by_entry))) // (len(entries) - number)
        found = list(iter_records(data, entry, limit=left, sample=sample, is_part=is_part))
        is_whole &= len(found) < sample or len(found) == left
        by_entry.append(found)
        if is_part and left is not None:
            left -= len(found)
    return by_entry, is_whole


def counted_prompts(look: FirstLook | None) -> int | None:
    """The prompts to train on, at most; None where they are not all counted, or hardly any is left."""
    return None if look is None or not look.is_whole or look.leaves_hardly_any else look.num_training


def estimated_tokens(text: str) -> int:
    """Tokens of a text, rather too many than too few."""
    return -(-len(text.encode("utf-8", "replace")) // BYTES_PER_TOKEN)


def high(values: list[int]) -> int:
    """The 95th percentile."""
    return sorted(values)[(len(values) - 1) * 95 // 100]


def rounded(num_tokens: int) -> int:
    """A limit for so many tokens: a multiple of 64."""
    return max(64, -(-num_tokens // 64) * 64)


def data_problems(config: RunConfig, num_records: int = FIRST_RECORDS) -> list[str]:
    """Why the data that lies on this disk is not for this run, by its first `num_records` records of each set."""
    problems, missing = _read(config, num_records)
    if missing is not None:
        problems.append(missing_responses(config, f"{missing.source} has none"))
    return problems


def unreadable_data(config: RunConfig, num_records: int) -> list[str]:
    """The first problem of every data set that lies on this disk, read up to `num_records` records."""
    return _read(config, num_records)[0]


def first_records(config: RunConfig) -> list[Record]:
    """The first records to train on of every set that lies on this disk.

    Raises:
        DataError: one of them cannot be read.
    """
    data = config.data
    references = filter(_is_here, [data.train] if isinstance(data.train, str) else data.train)
    return [record for one in references for record in iter_records(data, one, sample=FIRST_RECORDS, is_part=True)]


def _read(config: RunConfig, num_records: int) -> tuple[list[str], Record | None]:
    """What cannot be read, and the first record to train on that has no response where the method needs one.

    A set that is not there has been reported before, a hub that does not answer costs minutes, and what `datasets`
    saved is read when the libraries are there.
    """
    data = config.data
    try:
        check_columns(data)
    except DataError as error:
        return [str(error)], None
    problems: list[str] = []
    missing = None
    named = ((data.train, data.split, data.limit), (data.validation, data.validation_split or data.split, None))
    for references, split, limit in named:
        listed = [references] if isinstance(references, str) else references or []
        is_part = len(listed) > 1 and (references is not data.train or data.weights is None)
        for reference in listed:
            if not _is_here(reference):
                continue
            try:
                records = load_records(data, reference, limit=limit, sample=num_records, is_part=is_part, split=split)
            except DataError as error:
                problems.append(str(error))
                continue
            if references is data.train and missing is None:
                missing = next(_without_response(config, records), None)
    return problems, missing


def missing_responses(config: RunConfig, found: str) -> str:
    """What to say where the method learns from responses that the data does not have; `found` says which."""
    mix = config.data.ground_truth_mix
    setting = "data.adaptive_share" if config.data.adaptive_share else f"data.ground_truth_mix={mix:g}"
    fixed = "data.adaptive_share" if config.data.adaptive_share else "data.ground_truth_mix"
    removable = 0 < mix < 1 and fixed not in FIXED[config.method]
    instead = f"set {fixed}=0" if removable else "choose a method that writes its own, such as switch"
    return (
        f"method={config.method} with {setting} learns from the data's responses, but {found}. Add them, or {instead}."
    )


def _without_response(config: RunConfig, records: list[Record]) -> Iterator[Record]:
    """Those that would be trained on and have none; one that is likely too long is left out before anybody asks."""
    if config.reads_responses:
        limit = config.data.max_prompt_tokens
        yield from (r for r in records if not r.has_response and estimated_tokens(r.text) <= limit)


def _is_here(reference: str) -> bool:
    try:
        path = reference_path(reference)
    except DataError:  # reported with the files
        return False
    return path is not None and not is_saved_dataset(path)
