"""`make faults`: kill, fill the disk, damage files, take permissions away, spoil weights; then look what was lost.

    python -m tests.faults --output faults.json                      everything, about an hour on two cores
    python -m tests.faults --sections kills --kills 10 --output k.json

Each section makes a workplace with two-layer models and one undisturbed run, and puts faults into the commands of
others. After a fault the user's next step is taken (the same command, or --resume), and the run is compared with the
undisturbed one: adapter byte for byte, every logged figure, times apart. The result is written after every case. Exit
code 1 where anything was lost, differed in silence, or ended in a traceback.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from benchmarks.provenance import provenance
from tests.faults import forked
from tests.faults.forked import Ended, Events
from tests.faults.workplace import Workplace, signature

NOBODY = 65534


def outcome(ended: Ended, *, good: bool, **facts: Any) -> dict[str, Any]:
    """A case for the result; `good` says whether what was looked at is as it must be."""
    clear = not ended.has_traceback and (ended.code == 0 or bool(ended.message) or ended.code < 0)
    return {**facts, "code": ended.code, "message": ended.message[:300], "passed": good and clear,
            **({} if good and clear else {"output": ended.output[-2500:]})}  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- kills


def kills(place: Workplace, number: int, seed: int) -> Iterator[dict[str, Any]]:
    """Half at file writes, evenly over the run; half at random times; then go on, and compare with the whole run."""
    started = time.monotonic()
    whole = place.start("whole")
    assert whole.code == 0, whole.output
    seconds, reference = time.monotonic() - started, signature(place.folder / "whole")
    total = place.count(lambda **how: place.start("counted", **how))
    draw = random.Random(seed)
    at_writes = [1 + (i * total // max(1, number // 2) + 7 * seed) % total for i in range(number // 2)]
    for at in at_writes:
        events = Events(place.folder, at=at, action=forked.kill_here)
        yield _killed(place, reference, {"kind": "kill at a write", "event": at, "of": total}, fault=events.watch)
    for _ in range(number - len(at_writes)):
        after = draw.uniform(0.05, 1.0) * seconds
        yield _killed(place, reference, {"kind": "kill at a time", "after_s": round(after, 2)}, kill_after_s=after)


def _killed(place: Workplace, reference: Any, facts: dict[str, Any], **how: Any) -> dict[str, Any]:
    place.remove("run")
    first = place.start("run", **how)
    last = place.go_on("run") if first.code != 0 else first
    identical = last.code == 0 and signature(place.folder / "run") == reference
    left = [p.name for p in (place.folder / "run").rglob("*.partial")]
    return outcome(last, good=identical and not left, **facts, killed=first.code, identical=identical, left=left)


# ---------------------------------------------------------------------------------------------------------- full disks


def disks(place: Workplace, number: int, seed: int) -> Iterator[dict[str, Any]]:
    """From each file write of distill, merge, eval and compare on every write fails; then the same command goes on."""
    whole = place.start("whole")
    assert whole.code == 0, whole.output
    reference = signature(place.folder / "whole")

    def distil(**how: Any) -> Ended:
        return place.go_on("run", **how)

    def merge(**how: Any) -> Ended:
        return place.call("merge", "whole", "--output-dir", "merged", **how)

    def evaluate(**how: Any) -> Ended:
        words = ("--data", "eval.jsonl", "--max-new-tokens", "4", "--output-dir", "scores")
        return place.call("eval", "whole", *words, **how)

    def compare(**how: Any) -> Ended:
        return place.call("compare", "study.yaml", "--output-dir", "study", **how)

    def scores() -> Any:
        return json.loads((place.folder / "scores" / "results.json").read_text())["sets"]

    def table() -> Any:
        return json.loads((place.folder / "study" / "results.json").read_text())["sets"]

    def weights() -> Any:
        return sorted((p.name, p.stat().st_size) for p in (place.folder / "merged").glob("*.safetensors"))

    commands: dict[str, tuple[Callable[..., Ended], str, Callable[[], Any]]] = {
        "distill": (distil, "run", lambda: signature(place.folder / "run")),
        "merge": (merge, "merged", weights),
        "eval": (evaluate, "scores", scores),
        "compare": (compare, "study", table),
    }
    for name, (act, made, look) in commands.items():
        place.remove(made)
        total = place.count(act)
        expected = reference if name == "distill" else look()
        every = range(1, total + 1)
        for at in every if number >= total else sorted({1 + i * total // number for i in range(number)}):
            place.remove(made)
            events = Events(place.folder, at=at, action=forked.no_more_writes)
            first = act(fault=events.watch)
            last = act() if first.code != 0 else first
            same = last.code == 0 and look() == expected
            said = not first.has_traceback and (first.code == 0 or bool(first.message))
            yield outcome(last, good=same and said, kind="full disk", command=name, event=at, of=total,
                          first_code=first.code, first_message=first.message[:300], identical=same,
                          **({} if said else {"first_output": first.output[-2500:]}))  # fmt: skip
    yield from _small_disk(place)


def _small_disk(place: Workplace) -> Iterator[dict[str, Any]]:
    """A real disk that is full: a tmpfs too small for a run, where this process may mount one."""
    if os.geteuid() != 0:
        return
    disk = place.folder / "disk"
    disk.mkdir()
    for kib in (40, 120, 200, 320, 480):
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(disk)], check=False)
        if mounted.returncode != 0:
            return
        try:
            ended = place.start("disk/run")
            subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
            last = place.go_on("disk/run") if ended.code != 0 else ended
            same = last.code == 0 and signature(disk / "run") == signature(place.folder / "whole")
            said = not ended.has_traceback and (ended.code == 0 or bool(ended.message))
            yield outcome(last, good=same and said, kind="small disk", kib=kib, first_code=ended.code,
                          first_message=ended.message[:300], identical=same,
                          **({} if said else {"first_output": ended.output[-2500:]}))  # fmt: skip
        finally:
            subprocess.run(["umount", str(disk)], check=False)


# -------------------------------------------------------------------------------------------------------------- damage


def damage(place: Workplace, number: int, seed: int) -> Iterator[dict[str, Any]]:
    """Every file of a stopped run, and of a finished one, with a flipped bit, cut, emptied, or gone."""
    whole = place.start("whole")
    assert whole.code == 0, whole.output
    reference = signature(place.folder / "whole")
    place.stopped_run("stopped", before="step-000004")
    draw = random.Random(seed)
    stopped = _files(place.folder / "stopped")
    cases = [(name, way) for name in stopped for way in ("flip", "cut", "empty", "gone")]
    draw.shuffle(cases)
    for name, way in cases[:number]:
        path = place.copy("stopped", "run") / name
        spoil(path, way, draw)
        ended = place.go_on("run")
        identical = ended.code == 0 and signature(place.folder / "run") == reference
        said = Path(name).name in ended.output or "damaged" in ended.output
        # Same result, a clear stop, or a run that went on and named the file that was not as it was written.
        good = identical or ended.code == 2 or (ended.code == 0 and said)
        yield outcome(ended, good=good, kind="damage, then resume", file=name, way=way, identical=identical, said=said)
    finished = [name for name in _files(place.folder / "whole") if not name.startswith("checkpoints")]
    for name in finished:
        path = place.copy("whole", "run") / name
        spoil(path, draw.choice(["flip", "cut", "gone"]), draw)
        words = [["report", "run"], ["merge", "run", "--output-dir", "merged"],
                 ["generate", "run", "--prompt", "hi", "--max-new-tokens", "2"]]  # fmt: skip
        for word in words:
            place.remove("merged")
            ended = place.call(*word)
            yield outcome(ended, good=ended.code in (0, 2), kind=f"damage, then {word[0]}", file=name)


def _files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.stat().st_size)


def spoil(path: Path, way: str, draw: random.Random) -> None:
    """Damage one file."""
    if way == "gone":
        path.unlink()
        return
    data = bytearray(path.read_bytes())
    if way == "flip":
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data[: len(data) // 2] if way == "cut" else b"" if way == "empty" else bytes(data))


# ------------------------------------------------------------------------------------------------------------- weights


def weights(place: Workplace, number: int, seed: int) -> Iterator[dict[str, Any]]:
    """Weights that turn NaN between a stop and the next start; checkpoints that are damaged while the run goes on."""
    from safetensors.torch import load_file, save_file

    whole = place.start("whole")
    assert whole.code == 0, whole.output
    place.stopped_run("stopped", before="step-000003")
    for role in ("teacher", "student"):
        file = place.folder / role / "model.safetensors"
        sound = file.read_bytes()
        tensors = load_file(file)
        name = next(n for n in tensors if "mlp" in n)
        tensors[name][0, 0] = float("nan")
        save_file(tensors, file, metadata={"format": "pt"})
        place.copy("stopped", "run")
        ended = place.go_on("run")
        yield outcome(ended, good=ended.code == 2 and role in ended.output, kind="NaN in weights", role=role)
        file.write_bytes(sound)
        ended = place.go_on("run")
        same = ended.code == 0 and signature(place.folder / "run") == signature(place.folder / "whole")
        yield outcome(ended, good=same, kind="NaN in weights, mended", role=role, identical=same)

    def spoil_best() -> None:
        def hear(event: str, arguments: tuple[object, ...]) -> None:
            if event == "os.mkdir" and "step-000004" in str(arguments[0]):
                for folder in (place.folder / "run" / "checkpoints").glob("step-*"):
                    path = folder / "adapter" / "adapter_model.safetensors"
                    data = bytearray(path.read_bytes())
                    data[-1] ^= 64
                    path.write_bytes(bytes(data))

        sys.addaudithook(hear)

    place.remove("run")
    ended = place.start("run", fault=spoil_best)
    yield outcome(ended, good=ended.code == 0, kind="all older checkpoints damaged while the run goes on")


# ---------------------------------------------------------------------------------------------------------- other user


def users(place: Workplace, number: int, seed: int) -> Iterator[dict[str, Any]]:
    """Every command by a user who may read nothing, or read but not write, what belongs to another."""
    if os.geteuid() != 0:
        return
    whole = place.start("whole")
    assert whole.code == 0, whole.output
    place.stopped_run("stopped", before="step-000003")
    for path in [place.folder, *place.folder.rglob("*")]:
        os.chown(path, NOBODY, NOBODY)
    home = place.folder / "home"
    home.mkdir()  # this one is the stranger's
    environment = {"HOME": str(home), "QSWITCH_CACHE": str(home / "cache")}
    commands = [
        ["distill", "--config", "run.yaml", "--output-dir", "mine"],
        ["distill", "--config", "run.yaml", "--dry-run", "--output-dir", "mine"],
        ["distill", "--resume", "stopped"],
        ["distill", "--resume", "whole"],
        ["merge", "whole"],
        ["merge", "whole", "--output-dir", "whole/m"],
        ["generate", "whole", "--prompt", "hi", "--max-new-tokens", "2"],
        ["generate", "whole", "--prompts", "eval.jsonl", "--output", "answers.jsonl", "--max-new-tokens", "2"],
        ["eval", "whole", "--data", "eval.jsonl", "--max-new-tokens", "2"],
        ["compare", "study.yaml", "--output-dir", "study"],
        ["compare", "study.yaml", "--dry-run"],
        ["report", "whole"],
        ["fidelity", "whole", "--prompts", "1", "--max-new-tokens", "2", "--precision", "nf4"],
        ["shrink", "teacher", "--layers", "1", "--output-dir", "cut"],
        ["presets", "copy", "smollm2-demo", "copied.yaml"],
        ["push", "whole", "a/b", "--dry-run"],
        ["plan", "--config", "run.yaml"],
    ]  # fmt: skip

    def all_of(what: str) -> Iterator[dict[str, Any]]:
        for words in commands:
            ended = place.call(*words, unprivileged=True, environment=environment)
            yield outcome(ended, good=ended.code in (0, 2), kind=what, command=" ".join(words))

    place.folder.chmod(0o755)
    yield from all_of("another user, who may read")
    for name in ("whole", "stopped", "teacher", "data.jsonl", "run.yaml"):
        mode = (place.folder / name).stat().st_mode
        (place.folder / name).chmod(0)
        yield from all_of(f"another user, {name} closed")
        (place.folder / name).chmod(mode)
    (place.folder / "whole" / "metrics.jsonl").chmod(0)
    (place.folder / "whole" / "adapter" / "adapter_model.safetensors").chmod(0)
    yield from all_of("another user, two files closed")
    environment["QSWITCH_CACHE"] = "/proc/nothing"
    yield from all_of("another user, no cache")


# ---------------------------------------------------------------------------------------------------------------- fuzz


def fuzzed(place: Workplace, number: int, seed: int) -> Iterator[dict[str, Any]]:
    """Inputs by hypothesis, `number` in all: records and references mostly, configurations and states the rest."""
    from tests.faults import fuzz

    for words in (["distill", "--config", "run.yaml", "--output-dir", "run"],
                  ["eval", "run", "--data", "eval.jsonl", "--max-new-tokens", "4"],
                  ["merge", "run"]):  # fmt: skip
        ended = place.call(*words)
        assert ended.code == 0, ended.output
    sound = yaml.safe_load((place.folder / "run.yaml").read_text())
    files = fuzz.state_files(place.folder / "run")
    shares = {"state": 0.05, "configuration": 0.15, "records": 0.4, "reference": 0.4}
    batches = {kind: round(number * share) for kind, share in shares.items()}
    while any(batches.values()):  # in turns, so that a harness that is stopped has tried some of each kind
        for kind, left in batches.items():
            count, tried, failure = min(left, 500), 0, ""
            batches[kind] = left - count
            try:
                tried = fuzz.fuzz(kind, place.folder, count, sound=sound, files=files) if count else 0
            except Exception:
                failure = traceback.format_exc()[-3000:]
            if count:
                yield {"kind": f"fuzzed {kind}", "inputs": tried, "passed": not failure, "output": failure}


SECTIONS: dict[str, Callable[[Workplace, int, int], Iterator[dict[str, Any]]]] = {
    "kills": kills, "disks": disks, "damage": damage, "weights": weights, "users": users,
    "fuzz": fuzzed,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--sections", default=",".join(SECTIONS), help="comma-separated")
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--damage", type=int, default=60)
    parser.add_argument("--disks", type=int, default=1000, help="events of each command at most")
    parser.add_argument("--fuzz", type=int, default=20_000, help="inputs")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    forked.preload()
    found: dict[str, list[dict[str, Any]]] = {}
    started, origin = time.monotonic(), provenance()
    for name in args.sections.split(","):
        folder = Path(tempfile.mkdtemp(prefix=f"qswitch-faults-{name}-"))
        try:
            place = Workplace.make(folder)
            for case in SECTIONS[name](place, getattr(args, name, 0), args.seed):
                found.setdefault(name, []).append(case)
                print(json.dumps({k: v for k, v in case.items() if "output" not in k}), flush=True)
                if args.output is not None:
                    args.output.write_text(json.dumps(_result(found, started, args.seed) | origin, indent=1) + "\n")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    result = _result(found, started, args.seed) | origin
    print(json.dumps({name: one["passed"] for name, one in result["sections"].items()} | {"of": {
        name: one["cases"] for name, one in result["sections"].items()}}))  # fmt: skip
    sys.exit(any(one["passed"] < one["cases"] for one in result["sections"].values()))


def _result(found: dict[str, list[dict[str, Any]]], started: float, seed: int) -> dict[str, Any]:
    sections = {}
    for name, cases in found.items():
        kinds: dict[str, list[int]] = {}
        for case in cases:
            count = kinds.setdefault(case["kind"], [0, 0])
            count[0] += case["passed"]
            count[1] += 1
        sections[name] = {
            "cases": len(cases),
            "passed": sum(case["passed"] for case in cases),
            "passed_of_cases_by_kind": kinds,
            "inputs": sum(case.get("inputs", 0) for case in cases),
            "failed": [case for case in cases if not case["passed"]],
        }
    return {"benchmark": "faults", "seed": seed, "seconds": round(time.monotonic() - started), "sections": sections}


if __name__ == "__main__":
    main()
