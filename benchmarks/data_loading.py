"""How long does it take until the first prompts are there, and how much host memory, for data of any size?

    python -m benchmarks.data_loading --tokenizer MODEL_FOLDER --file data.jsonl --records 100000
    python -m benchmarks.data_loading --tokenizer MODEL_FOLDER --records 1000000 --before OTHER_CHECKOUT

Every case runs in a process of its own and is measured from the moment when everything is imported and the tokenizer
is loaded: seconds until 8 prompts are drawn in training order, seconds for 10,000 of them, and memory at its peak
beyond what was there then. Since mapped files count as resident while the system has room, anonymous memory is the
figure that must fit. `again` is the second start, which finds the first one's work in the cache. With --before the
package of another checkout is measured in the same run, in memory and, where it has that setting, streamed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.provenance import publish

MIB = 2**20
FIRST_BATCH = 8
DRAWN_PROMPTS = 10_000
ROOT = Path(__file__).resolve().parents[1]


class Memory:
    """Peaks of resident and anonymous memory beyond those at the start, sampled in a thread."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self.start = self._read()
        self.peak = dict(self.start)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @staticmethod
    def _read() -> dict[str, int]:
        text = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
        lines = {line.split(":")[0]: line.split() for line in text.splitlines() if ":" in line}
        return {name: int(lines[key][1]) * 1024 for name, key in (("resident", "Rss"), ("anonymous", "Anonymous"))}

    def _watch(self) -> None:
        while not self._stop.wait(0.2):
            for name, size in self._read().items():
                self.peak[name] = max(self.peak[name], size)

    def finish(self) -> dict[str, float]:
        """MiB beyond the start."""
        self._stop.set()
        self._thread.join()
        for name, size in self._read().items():
            self.peak[name] = max(self.peak[name], size)
        # What getrusage saw cannot be missed between two samples.
        self.peak["resident"] = max(self.peak["resident"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return {f"{name}_mib": round((self.peak[name] - self.start[name]) / MIB, 1) for name in self.start}


def measure(path: str, tokenizer_folder: str, settings: dict[str, Any]) -> dict[str, Any]:
    """One case, in this process, with the package that `sys.path` finds first."""
    import datasets  # noqa: F401  # importing it is no part of the loading
    from transformers import AutoTokenizer

    from qswitch.data.gather import gather_prompts
    from qswitch.data.loader import PromptLoader
    from qswitch.data.template import PromptEncoder
    from qswitch.layers import build_config

    encoder = PromptEncoder(AutoTokenizer.from_pretrained(tokenizer_folder), "teacher")
    data = {"train": path, "max_prompt_tokens": 512, **settings}
    values = {"teacher": {"model": "-"}, "student": {"model": "-"}, "data": data, "rollout": {"max_new_tokens": 512}}
    config = build_config(values)
    memory, started = Memory(), time.perf_counter()
    found = gather_prompts(config, encoder)
    loader = PromptLoader(found.train, config.seed)
    loader.next(FIRST_BATCH)
    first_batch = time.perf_counter() - started
    loader.next(DRAWN_PROMPTS)
    drawn = time.perf_counter() - started - first_batch
    return {
        "first_batch_s": round(first_batch, 2),
        "next_10000_prompts_s": round(drawn, 2),
        **memory.finish(),
        "report": found.report.to_dict(),
    }


def in_a_process(path: Path, tokenizer: str, cache: str, checkout: Path = ROOT, **settings: Any) -> dict[str, Any]:
    """`measure` in a fresh process, with the package of `checkout`."""
    code = (
        "import json, sys; sys.path[:0] = sys.argv[1:3]; from benchmarks.data_loading import measure; "
        "print(json.dumps(measure(sys.argv[3], sys.argv[4], json.loads(sys.argv[5]))))"
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "benchmarks").symlink_to(ROOT / "benchmarks")  # this file, whichever package is measured
        arguments = [sys.executable, "-c", code, folder, str(checkout), str(path), tokenizer, json.dumps(settings)]
        environment = {**os.environ, "QSWITCH_CACHE": cache, "PYTHONPATH": ""}
        answer = subprocess.run(arguments, capture_output=True, text=True, env=environment, cwd=folder)
    if answer.returncode:
        raise SystemExit(answer.stderr)
    return json.loads(answer.stdout.splitlines()[-1])


def cases_of(path: Path, tokenizer: str, before: Path | None) -> dict[str, Any]:
    """One file by every way there is."""
    cases: dict[str, Any] = {"file_mib": round(path.stat().st_size / MIB, 1)}
    with tempfile.TemporaryDirectory() as cache:
        cases["first"] = in_a_process(path, tokenizer, cache)
        cases["table_mib"] = round(sum(f.stat().st_size for f in Path(cache).rglob("*.arrow")) / MIB, 1)
        cases["again"] = in_a_process(path, tokenizer, cache)
    if before is not None:
        for name, settings in (("before_in_memory", {}), ("before_streamed", {"streaming": True})):
            with tempfile.TemporaryDirectory() as cache:
                cases[name] = in_a_process(path, tokenizer, cache, before.resolve(), **settings)
    return cases


def write_synthetic(path: Path, records: int) -> None:
    """Records of about 200 bytes, every thousandth a repetition."""
    with path.open("w", encoding="utf-8") as file:
        for i in range(records):
            number = 0 if i % 1000 == 999 else i
            prompt = f"Question {number}: what follows from {number * 7919 % 10007} and {number % 97}, and why so?"
            response = f"From them follows {number * 31 % 1009}, because the sum of both leaves that remainder."
            file.write(json.dumps({"prompt": prompt, "response": response}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="folder or hub id of a model")
    parser.add_argument("--file", type=Path, help="a data file in any format")
    parser.add_argument("--records", type=int, nargs="*", default=[], help="sizes of synthetic files")
    parser.add_argument("--before", type=Path, help="another checkout, measured in the same run")
    parser.add_argument("--note", default="", help="what else the machine did")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    cases: dict[str, Any] = {}
    if arguments.file is not None:
        cases[arguments.file.name] = cases_of(arguments.file.resolve(), arguments.tokenizer, arguments.before)
    with tempfile.TemporaryDirectory() as folder:
        for records in arguments.records:
            path = Path(folder) / f"{records}.jsonl"
            write_synthetic(path, records)
            cases[f"synthetic_{records}"] = cases_of(path, arguments.tokenizer, arguments.before)
    result = {"cases": cases, "cpus": os.cpu_count(), "load_average": os.getloadavg(), "note": arguments.note}
    publish(result, arguments.output)


if __name__ == "__main__":
    main()
