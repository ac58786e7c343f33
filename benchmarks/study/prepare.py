"""Write the study's data beside this file: Dolly without the training records that recur in the evaluation set.

    python benchmarks/study/prepare.py --train dolly_train.jsonl --eval dolly_eval.jsonl \\
        --teacher TEACHER_FOLDER --student STUDENT_FOLDER

Both files are JSON lines with instruction, input, output (databricks-dolly-15k, CC BY-SA 3.0). The models are linked,
not copied; the student may come in a second call, since heal.yaml makes one from the teacher and the data. Everything
goes to benchmarks/study/data/, which git ignores; docs/study.md says which pair it uses.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

HERE = Path(__file__).parent


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("train", "eval", "teacher", "student"):
        parser.add_argument(f"--{name}", type=Path, required=name != "student")
    parser.add_argument("--output-dir", type=Path, default=HERE / "data")
    arguments = parser.parse_args()
    out = arguments.output_dir
    out.mkdir(parents=True, exist_ok=True)
    train, held_out = read(arguments.train), read(arguments.eval)
    kept = without_recurring(train, held_out)
    for name, records in (("train", kept), ("eval", held_out)):
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (out / f"{name}.jsonl").write_text(text, encoding="utf-8")
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        print(f"{name}: {len(records)} records, sha256 {digest}")
    print(f"left out {len(train) - len(kept)} training records that recur in the evaluation set")
    for name in ("teacher", "student"):
        if getattr(arguments, name) is None:
            continue
        link = out / name
        link.unlink(missing_ok=True)
        link.symlink_to(getattr(arguments, name).resolve(), target_is_directory=True)


if __name__ == "__main__":
    main()
