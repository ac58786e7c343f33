"""How long does loading and tokenising take, and how much memory: in memory, and streamed.

    python -m benchmarks.data_loading data.jsonl --tokenizer MODEL_FOLDER
    python -m benchmarks.data_loading --tokenizer MODEL_FOLDER --streamed-records 2000000

Every case runs in a process of its own and is measured from the moment when everything is imported and the tokenizer
is loaded: seconds, and resident memory at its peak beyond what was resident then. The streamed case writes a synthetic
file of that many records, and a tenth of it for comparison, indexes each and draws 10,000 prompts in training order;
since mapped files count as resident while the system has room, it also reports anonymous memory.
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
DRAWN_PROMPTS = 10_000


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


def measure(path: str, tokenizer_folder: str, streaming: bool) -> dict[str, Any]:
    """One case, in this process."""
    from transformers import AutoTokenizer

    from qswitch.data.gather import gather_prompts
    from qswitch.data.loader import PromptLoader
    from qswitch.data.template import PromptEncoder
    from qswitch.layers import build_config

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    encoder = PromptEncoder(tokenizer, "teacher")
    data = {"train": path, "streaming": streaming, "max_prompt_tokens": 512}
    values = {"teacher": {"model": "-"}, "student": {"model": "-"}, "data": data, "rollout": {"max_new_tokens": 512}}
    config = build_config(values)
    notes: list[str] = []
    memory, started = Memory(), time.perf_counter()
    found = gather_prompts(config, encoder, notify=lambda what, done, total: notes.append(what))
    seconds = time.perf_counter() - started
    result: dict[str, Any] = {"seconds": round(seconds, 2), "report": found.report.to_dict()}
    result["progress_notes"] = len(notes)
    if streaming:
        loader = PromptLoader(found.train, config.seed)
        began = time.perf_counter()
        drawn = loader.next(DRAWN_PROMPTS)
        result["drawn_prompts_per_s"] = round(len(drawn) / (time.perf_counter() - began))
    return {**result, **memory.finish()}


def in_a_process(path: Path, tokenizer: str, streaming: bool) -> dict[str, Any]:
    """`measure` in a fresh process."""
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); from benchmarks.data_loading import measure; "
        "print(json.dumps(measure(sys.argv[2], sys.argv[3], sys.argv[4] == 'True')))"
    )
    root = str(Path(__file__).resolve().parents[1])
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "QSWITCH_CACHE": cache}
        arguments = [sys.executable, "-c", code, root, str(path), tokenizer, str(streaming)]
        answer = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    if answer.returncode:
        raise SystemExit(answer.stderr)
    return json.loads(answer.stdout.splitlines()[-1])


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
    parser.add_argument("file", type=Path, nargs="?", help="a data file in any format")
    parser.add_argument("--tokenizer", required=True, help="folder or hub id of a model")
    parser.add_argument("--streamed-records", type=int, default=0, help="size of the synthetic file; 0: none")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    cases: dict[str, Any] = {}
    if arguments.file is not None:
        for name, streaming in (("in_memory", False), ("streamed", True)):
            cases[name] = in_a_process(arguments.file, arguments.tokenizer, streaming)
    if arguments.streamed_records:
        with tempfile.TemporaryDirectory() as folder:
            for records in (arguments.streamed_records // 10, arguments.streamed_records):
                path = Path(folder) / f"{records}.jsonl"
                write_synthetic(path, records)
                cases[f"synthetic_{records}"] = {
                    "file_mib": round(path.stat().st_size / MIB, 1),
                    **in_a_process(path, arguments.tokenizer, streaming=True),
                }
    result = {
        "file": None if arguments.file is None else arguments.file.name,
        "cases": cases,
        "cpus": os.cpu_count(),
    }
    publish(result, arguments.output)


if __name__ == "__main__":
    main()
