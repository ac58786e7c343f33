"""results.json of an evaluation as a markdown table. Cold and pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qswitch.evaluate.figures import COLUMNS, OWN_COLUMNS, OWN_TEXT_COLUMNS
from qswitch.evaluate.intervals import Estimate
from qswitch.evaluate.marks import weights_text


def estimate(values: Mapping[str, Any] | None) -> str:
    """`12.30 [11.20, 13.40]`, or nothing."""
    return "" if values is None else str(Estimate(**values))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table, its first column left and the others right aligned."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def protocol_line(protocol: Mapping[str, Any], departures: Sequence[str]) -> str:
    """How the models were asked, and where that differs from the protocol of the name."""
    size = protocol["no_repeat_ngram_size"]
    text = (
        f"Protocol {protocol['name']}: seeds {', '.join(map(str, protocol['seeds']))}, temperature "
        f"{protocol['temperature']:g}, {f'no repeated {size}-grams, ' if size else ''}template {protocol['template']}, "
        f"prompts up to {protocol['max_prompt_tokens']} and responses up to {protocol['max_new_tokens']} tokens.\n"
    )
    if departures:
        text += "\nDiffers from that protocol: " + "; ".join(departures) + ".\n"
    return text


def render(results: Mapping[str, Any]) -> str:
    """All sets of an evaluation: scores, buckets, paired differences."""
    parts = [protocol_line(results["protocol"], results["departures"])]
    if results["teacher"]:
        parts.append(f"Teacher: {results['teacher']}; its own responses at temperature 1 are the yardstick.\n")
    trained = {name: one["trained"] for name, one in results["weights"].items()}
    parts += [f"{name}: {weights_text(one)}.\n" for name, one in trained.items() if one is not None]
    parts.append("Brackets: 95 % bootstrap intervals over records.\n")
    for name, one in results["sets"].items():
        parts.append(_render_set(name, one, results["overlaps_with_training"][name]))
    first = "" if results["limit"] is None else f", the first {results['limit']:,} documents of a task"
    for name, tasks in results.get("lm_eval", {}).items():
        rows = [(task, key, f"{value:.4g}") for task, values in tasks.items() for key, value in values.items()]
        parts.append(f"## lm-eval: {name}{first}\n\n" + markdown_table(("task", "metric", "value"), rows))
    return "\n".join(parts)


def records_text(one: Mapping[str, Any]) -> str:
    """`120 records, 8 left out`: how many a set has; earlier versions did not keep the second number everywhere."""
    return f"{one['records']} records" + (f", {one['left_out']} left out" if one.get("left_out") else "")


def overlap_notes(records: int, overlaps: Mapping[str, int | None]) -> list[str]:
    """Sentences on how many of a set's `records` the models (name -> number, None: not known) were trained on."""
    models: dict[int | None, list[str]] = {}
    for name, num in overlaps.items():
        if num != 0:
            models.setdefault(num, []).append(name)
    notes = []
    for num, names in models.items():
        data = f"also in the training data of {', '.join(names)}"
        if num is None:
            notes.append(f"Whether prompts are {data} is not known.")
        else:
            notes.append(f"{num} of {records} prompts are {data}, whose scores on them say little.")
    return notes


def _render_set(name: str, one: Mapping[str, Any], overlaps: Mapping[str, int | None]) -> str:
    models = one["models"]
    present = [m for m in COLUMNS if any(m in v["metrics"] for v in models.values())]
    text = [f"## {name} ({records_text(one)})\n", *(f"{note}\n" for note in overlap_notes(one["records"], overlaps))]
    header = ["model", *(COLUMNS[m] for m in present), "tokens", "ended", "distinct-1", "distinct-2"]
    rows = [
        [
            model,
            *(estimate(values["metrics"].get(m, {}).get("all")) for m in present),
            f"{values['response_tokens']:.1f}",
            f"{values['ended_share']:.0%}",
            f"{values['distinct_1']:.3f}",
            f"{values['distinct_2']:.3f}",
        ]
        for model, values in models.items()
    ]
    text.append(markdown_table(header, rows))
    buckets = [b for b in _keys(models, present) if b != "all"]
    if len(buckets) > 1:
        text.append("By length of the reference, tokens:\n")
        rows = [
            [
                model,
                bucket,
                str(_records(values, present, bucket)),
                *(estimate(values["metrics"].get(m, {}).get(bucket)) for m in present),
            ]
            for model, values in models.items()
            for bucket in buckets
        ]
        text.append(markdown_table(["model", "bucket", "records", *(COLUMNS[m] for m in present)], rows))
    if own := own_tables(models):
        text.append(own)
    if one["differences"]:
        first = next(iter(models))
        text.append(f"Paired differences from {first} (below zero: lower than {first}):\n")
        rows = [
            [model, bucket, *(estimate(values.get(m, {}).get(bucket)) for m in present)]
            for model, values in one["differences"].items()
            for bucket in ["all", *(buckets if len(buckets) > 1 else [])]
        ]
        text.append(markdown_table(["model", "bucket", *(COLUMNS[m] for m in present)], rows))
        text += filter(None, [own_difference_tables(one, first)])
    return "\n".join(text)


def own_tables(models: Mapping[str, Any]) -> str:
    """What the models write themselves, as a whole and by position; nothing where it was not measured."""
    own = {name: values["own"] for name, values in models.items() if values.get("own")}
    if not own:
        return ""
    columns = OWN_COLUMNS | OWN_TEXT_COLUMNS
    header = ["model", *columns.values(), "tokens"]
    rows = [
        [
            name,
            *(estimate(models[name]["metrics"].get(m, {}).get("all")) for m in columns),
            f"{one['response_tokens']:.1f}",
        ]
        for name, one in own.items()
    ]
    whole = "On the model's own responses, temperature 1, one a record:\n\n" + markdown_table(header, rows)
    rows = [
        [name, position, str(figures["own_reverse_kl_nats"]["records"]), *(estimate(figures[m]) for m in OWN_COLUMNS)]
        for name, one in own.items()
        for position, figures in one["positions"].items()
    ]
    header = ["model", "response tokens", "records", *OWN_COLUMNS.values()]
    return whole + "\nThe same by position in the response:\n\n" + markdown_table(header, rows)


def own_difference_tables(one: Mapping[str, Any], baseline: str) -> str:
    """How the models' own responses differ from those of the baseline, as a whole and by position."""
    columns = OWN_COLUMNS | OWN_TEXT_COLUMNS
    rows = [
        [name, *(estimate(values.get(m, {}).get("all")) for m in columns)]
        for name, values in one["differences"].items()
        if any(m in values for m in columns)
    ]
    if not rows:
        return ""
    text = f"On the models' own responses, paired differences from {baseline}:\n\n"
    text += markdown_table(["", *columns.values()], rows)
    rows = [
        [name, position, str(figures["own_reverse_kl_nats"]["records"]), *(estimate(figures[m]) for m in OWN_COLUMNS)]
        for name, positions in one.get("position_differences", {}).items()
        for position, figures in positions.items()
    ]
    header = ["", "response tokens", "records", *OWN_COLUMNS.values()]
    return text + "\nThe same by position in the response:\n\n" + markdown_table(header, rows)


def _keys(models: Mapping[str, Any], present: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(b for v in models.values() for m in present for b in v["metrics"].get(m, {})))


def _records(values: Mapping[str, Any], present: Sequence[str], bucket: str) -> int:
    return max((values["metrics"].get(m, {}).get(bucket, {"records": 0})["records"] for m in present), default=0)
