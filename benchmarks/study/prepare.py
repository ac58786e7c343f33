"""Write the studies' data beside this file: Dolly without the training records that recur in an evaluation set.

    python benchmarks/study/prepare.py --train dolly_train.jsonl --eval dolly_eval.jsonl \\
        --selfinst selfinst_eval.jsonl --vicuna vicuna_eval.jsonl --teacher TEACHER_FOLDER --student STUDENT_FOLDER \\
        --round-teacher

All files are JSON lines with instruction, input, output (databricks-dolly-15k, CC BY-SA 3.0; Self-Instruct and Vicuna
questions, Apache-2.0; the last two are needed by the second study's test alone). The evaluation records are divided:
the first SEARCH_RECORDS are search.jsonl, from which the second study chooses, the rest test-dolly.jsonl, which nothing
is chosen by. Of the other two sets some records are taken (TEST_RECORDS). The models are linked, not copied;
the student may come in a second call, since heal.yaml makes one from the teacher and the data. `--round-teacher` writes
teacher-rounded beside them, the teacher with the weights that it has in NF4. Everything goes to benchmarks/study/data/,
which git ignores; docs/study.md says which pair it uses.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

HERE = Path(__file__).parent
SEARCH_RECORDS = 192
"""Of the evaluation set, from its start: those that the first study was scored on, so nothing new is used up."""
TEST_RECORDS = {"selfinst": 32, "vicuna": 27}
"""Of each further set, spread over the whole of it, since both are ordered by what they ask."""


def key(record: dict) -> str:
    """An instruction however it is spaced and cased."""
    return " ".join(record["instruction"].lower().split())


def read(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as handle:
        return [json.loads(line) for line in handle]


def without_recurring(train: list[dict], held_out: list[dict]) -> list[dict]:
    """The training records whose instruction is in no held-out record."""
    seen = {key(record) for record in held_out}
    return [record for record in train if key(record) not in seen]


def spread(records: list[dict], count: int) -> list[dict]:
    """`count` records at equal distances, or all of them."""
    count = min(count, len(records))
    return [records[i * len(records) // count] for i in range(count)]


def round_teacher(source: Path, target: Path) -> None:
    """Write the model with its linear layers rounded to NF4, as bitsandbytes stores them, in bf16 again.

    It computes what the teacher in NF4 does up to rounding, without the time in which a CPU takes every weight out of
    four bits. The head stays as it is, as in every teacher in NF4.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            packed, state = quantize_4bit(module.weight.data, quant_type="nf4", compress_statistics=True)
            module.weight.data = dequantize_4bit(packed, state).to(torch.bfloat16)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


def write(path: Path, records: list[dict]) -> None:
    """The records as JSON lines; says how many and which."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text(text, encoding="utf-8")
    print(f"{path.stem}: {len(records)} records, sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("train", "eval", "selfinst", "vicuna", "teacher", "student"):
        parser.add_argument(f"--{name}", type=Path, required=name in ("train", "eval", "teacher"))
    parser.add_argument("--round-teacher", action="store_true", help="write teacher-rounded, which takes a minute")
    parser.add_argument("--output-dir", type=Path, default=HERE / "data")
    arguments = parser.parse_args()
    out = arguments.output_dir
    out.mkdir(parents=True, exist_ok=True)
    train, held_out = read(arguments.train), read(arguments.eval)
    others = {name: read(getattr(arguments, name)) for name in ("selfinst", "vicuna") if getattr(arguments, name)}
    kept = without_recurring(train, [*held_out, *(record for records in others.values() for record in records)])
    write(out / "train.jsonl", kept)
    write(out / "eval.jsonl", held_out)
    write(out / "search.jsonl", held_out[:SEARCH_RECORDS])
    # A question of the search that the test asks again would have been chosen by.
    write(out / "test-dolly.jsonl", without_recurring(held_out[SEARCH_RECORDS:], held_out[:SEARCH_RECORDS]))
    for name, records in others.items():
        write(out / f"test-{name}.jsonl", spread(records, TEST_RECORDS[name]))
    print(f"left out {len(train) - len(kept)} training records that recur in an evaluation set")
    for name in ("teacher", "student"):
        if getattr(arguments, name) is None:
            continue
        link = out / name
        if link.is_dir() and not link.is_symlink():
            parser.error(f"{link} is a folder, where a link to the {name} would go: move it away")
        link.unlink(missing_ok=True)
        link.symlink_to(getattr(arguments, name).resolve(), target_is_directory=True)
    if arguments.round_teacher:
        round_teacher(arguments.teacher, out / "teacher-rounded")


if __name__ == "__main__":
    main()
