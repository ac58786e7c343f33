"""What is done to commands, section by section, and what must be the same afterwards.

A section makes an undisturbed run in a workplace and yields its trials; each stands for itself, so that a harness that
was stopped can leave out those that it has. A trial puts a fault into a command, takes the user's next step (the same
command, or --resume), and compares with the undisturbed run: adapter byte for byte, every logged figure, times apart.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from tests.faults import forked
from tests.faults.forked import Ended, Events
from tests.faults.workplace import Workplace, signature

Case = dict[str, Any]
Trial = Callable[[], Case]
NOBODY = 65534


def outcome(ended: Ended, *, good: bool, **facts: Any) -> Case:
    """A case for the result; `good` says whether what was looked at is as it must be."""
    clear = not ended.has_traceback and (ended.code == 0 or bool(ended.message) or ended.code < 0)
    return {**facts, "code": ended.code, "message": ended.message[:300], "passed": good and clear,
            **({} if good and clear else {"output": ended.output[-2500:]})}  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- kills


def kills(place: Workplace, number: int, seed: int) -> Iterator[Trial]:
    """Half at file writes, evenly over the run; half at random times; then go on, and compare with the whole run."""
    place.whole_run()  # a first one imports more
    place.remove("whole")
    started = time.monotonic()
    place.whole_run()
    seconds = time.monotonic() - started
    total = place.count(lambda **how: place.start("counted", **how))
    for i in range(number // 2):
        yield partial(_killed_at_write, place, 1 + (i * total // max(1, number // 2) + 7 * seed) % total, total)
    draw = random.Random(seed)
    for _ in range(number - number // 2):
        yield partial(_killed_at_time, place, draw.uniform(0.05, 1.0) * seconds)


def _killed_at_write(place: Workplace, at: int, total: int) -> Case:
    place.remove("run")
    first = place.start("run", fault=Events(place.folder, at=at, action=forked.kill_here).watch)
    return _gone_on(place, first, kind="kill at a write", event=at, of=total)


def _killed_at_time(place: Workplace, after_s: float) -> Case:
    while True:
        place.remove("run")
        first = place.start("run", kill_after_s=after_s)
        if first.code != 0:
            return _gone_on(place, first, kind="kill at a time", after_s=round(after_s, 2))
        after_s *= 0.8  # it had ended already, which is no kill


def _gone_on(place: Workplace, first: Ended, **facts: Any) -> Case:
    last = place.go_on("run")
    identical = last.code == 0 and place.is_whole("run")
    left = leftovers(place.folder / "run")
    good = first.code == -9 and identical and not left
    return outcome(last, good=good, **facts, killed=first.code, identical=identical, left=left)


def leftovers(folder: Path) -> list[str]:
    """What was written aside and never came to its name."""
    return sorted(path.name for path in folder.rglob("*.partial"))


# ---------------------------------------------------------------------------------------------------------- full disks


def full_disk(name: str, place: Workplace, number: int, seed: int) -> Iterator[Trial]:
    """From each file write of a command on every write fails; then the same command goes on."""
    place.whole_run()
    answers = ("--data", "eval.jsonl", "--max-new-tokens", "4")

    def table(folder: str) -> Any:
        return json.loads((place.folder / folder / "results.json").read_text())["sets"]

    def weights() -> Any:
        files = (place.folder / "merged").glob("*.safetensors")
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    act, made, look = {
        "distill": (partial(place.go_on, "run"), "run", lambda: signature(place.folder / "run")),
        "merge": (partial(place.call, "merge", "whole", "--output-dir", "merged"), "merged", weights),
        "eval": (partial(place.call, "eval", "whole", *answers, "--output-dir", "scores"), "scores",
                 partial(table, "scores")),
        "compare": (partial(place.call, "compare", "study.yaml", "--output-dir", "study"), "study",
                    partial(table, "study")),
    }[name]  # fmt: skip

    place.remove(made)
    total, begun = _counted(place, act, made)
    expected = look()
    assert name != "distill" or place.is_whole(made)

    def full(at: int) -> Case:
        place.remove(made)
        before, saved = max((one for one in begun if one[0] < at), default=(0, None))
        events = Events(place.folder, at=at - before, action=forked.no_more_writes)
        fault = events.watch
        if saved is not None:  # what the command does before, it does in the trials before
            shutil.copytree(saved, place.folder / made)
            fault = partial(forked.on_launch.append, events.watch)
        first = act(fault=fault)
        last = act() if first.code != 0 else first
        same = last.code == 0 and look() == expected and not leftovers(place.folder / made)
        return _after_full_disk(first, last, same, kind=f"full disk, {name}", event=at, of=total)

    every = range(1, total + 1)
    yield from (
        partial(full, at)
        for at in (every if number >= total else sorted({1 + i * total // number for i in range(number)}))
    )


def _counted(place: Workplace, act: Callable[..., Ended], made: str) -> tuple[int, list[tuple[int, Path]]]:
    """How many file events a command has; and a copy of the folder it makes as each of its own processes began, with
    the number of events before."""
    events, copies = Events(place.folder), place.folder.with_name(f"{place.folder.name}-begun")

    def save() -> None:
        shutil.copytree(place.folder / made, copies / str(events.count))

    def fault() -> None:
        forked.on_launch.append(save)
        events.watch()

    ended = act(fault=fault)
    assert ended.code == 0, ended.output
    return events.count, sorted((int(path.name), path) for path in copies.glob("*"))


def small_disk(place: Workplace, number: int, seed: int) -> Iterator[Trial]:
    """Runs on real disks that are too small for them, where this process may mount one."""
    if os.geteuid() == 0:
        place.whole_run()
        yield from (partial(_small_disk, place, kib) for kib in range(40, 40 + 20 * min(number, 20), 20))


def _after_full_disk(first: Ended, last: Ended, same: bool, **facts: Any) -> Case:
    said = not first.has_traceback and (first.code == 0 or bool(first.message))
    return outcome(last, good=same and said, **facts, first_code=first.code, first_message=first.message[:300],
                   identical=same, **({} if said else {"first_output": first.output[-2500:]}))  # fmt: skip


def _small_disk(place: Workplace, kib: int) -> Case:
    """A real disk that is full: a tmpfs too small for a run, made larger afterwards."""
    disk = place.folder / "disk"
    disk.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(disk)], check=True)
    try:
        first = place.start("disk/run")
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        last = place.go_on("disk/run") if first.code != 0 else first
        same = last.code == 0 and place.is_whole("disk/run") and not leftovers(disk)
        return _after_full_disk(first, last, same, kind="small disk, distill", kib=kib)
    finally:
        subprocess.run(["umount", str(disk)], check=False)


# -------------------------------------------------------------------------------------------------------------- damage


def damage(place: Workplace, number: int, seed: int) -> Iterator[Trial]:
    """Every file of a stopped run, and of a finished one, with a flipped bit, cut, emptied, or gone."""
    place.whole_run()
    place.stopped_run("stopped", before="step-000004")
    draw = random.Random(seed)
    cases = [(name, way) for name in _files(place.folder / "stopped") for way in ("flip", "cut", "empty", "gone")]
    draw.shuffle(cases)
    for name, way in cases[:number]:
        yield partial(_resumed_after_damage, place, name, way, draw.random())
    finished = [name for name in _files(place.folder / "whole") if not name.startswith("checkpoints")]
    words = (("report", "run"), ("merge", "run", "--output-dir", "merged"),
             ("generate", "run", "--prompt", "hi", "--max-new-tokens", "2"))  # fmt: skip
    for name in finished:
        way, luck = draw.choice(["flip", "cut", "gone"]), draw.random()
        for word in words:
            yield partial(_read_after_damage, place, name, way, luck, word)


def _resumed_after_damage(place: Workplace, name: str, way: str, luck: float) -> Case:
    spoil(place.copy("stopped", "run") / name, way, luck)
    ended = place.go_on("run")
    identical = ended.code == 0 and place.is_whole("run")
    said = Path(name).name in ended.output or "damaged" in ended.output
    # Same result, a clear stop, or a run that went on and named the file that was not as it was written.
    good = identical or ended.code == 2 or (ended.code == 0 and said)
    return outcome(ended, good=good, kind="damage, then resume", file=name, way=way, identical=identical, said=said)


def _read_after_damage(place: Workplace, name: str, way: str, luck: float, words: tuple[str, ...]) -> Case:
    spoil(place.copy("whole", "run") / name, way, luck)
    place.remove("merged")
    ended = place.call(*words)
    return outcome(ended, good=ended.code in (0, 2), kind=f"damage, then {words[0]}", file=name, way=way)


def _files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.stat().st_size)


def spoil(path: Path, way: str, luck: float) -> None:
    """Damage one file; `luck`, in [0, 1), says which bit is flipped."""
    data = bytearray(path.read_bytes())
    if way == "flip":
        bit = int(luck * len(data) * 8)
        data[bit // 8] ^= 1 << bit % 8
    if way == "gone":
        path.unlink()
    else:
        path.write_bytes({"flip": data, "cut": data[: len(data) // 2], "empty": b""}[way])


# ------------------------------------------------------------------------------------------------------------- weights


def weights(place: Workplace, number: int, seed: int) -> Iterator[Trial]:
    """Weights that turn NaN between a stop and the next start; checkpoints that are damaged while the run goes on."""
    place.whole_run()
    place.stopped_run("stopped", before="step-000003")
    yield partial(_turned_nan, place, "teacher")
    yield partial(_turned_nan, place, "student")
    yield partial(_spoilt_meanwhile, place)


def _turned_nan(place: Workplace, role: str) -> Case:
    from safetensors.torch import load_file, save_file

    file = place.folder / role / "model.safetensors"
    sound = file.read_bytes()
    tensors = load_file(file)
    tensors[next(name for name in tensors if "mlp" in name)][0, 0] = float("nan")
    place.copy("stopped", "run")
    try:
        save_file(tensors, file, metadata={"format": "pt"})
        first = place.go_on("run")
    finally:
        file.write_bytes(sound)
    last = place.go_on("run")
    identical = last.code == 0 and place.is_whole("run")
    named = first.code == 2 and role in first.output and not first.has_traceback
    return outcome(last, good=named and identical, kind="NaN in weights, then mended", role=role,
                   first_code=first.code, first_message=first.message[:300], identical=identical)  # fmt: skip


def _spoilt_meanwhile(place: Workplace) -> Case:
    def spoil_older() -> None:
        def hear(event: str, arguments: tuple[object, ...]) -> None:
            if event == "os.mkdir" and "step-000004" in str(arguments[0]):
                for folder in (place.folder / "run" / "checkpoints").glob("step-*"):
                    spoil(folder / "adapter" / "adapter_model.safetensors", "flip", 0.999)

        sys.addaudithook(hear)

    place.remove("run")
    ended = place.start("run", fault=spoil_older)
    return outcome(ended, good=ended.code == 0, kind="all older checkpoints damaged while the run goes on")


# ---------------------------------------------------------------------------------------------------------- other user


def users(place: Workplace, number: int, seed: int) -> Iterator[Trial]:
    """Every command by a user who may read nothing, or read but not write, what belongs to another."""
    if os.geteuid() != 0:
        return
    place.whole_run()
    place.stopped_run("stopped", before="step-000003")
    for path in [place.folder, *place.folder.rglob("*")]:
        os.chown(path, NOBODY, NOBODY)
    place.folder.chmod(0o755)
    home = place.folder / "home"
    home.mkdir()  # this one is the stranger's
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

    every = ("whole", "stopped", "teacher", "data.jsonl", "run.yaml")
    situations = {
        "another user, who may read": (),
        **{f"another user, {name} closed": (name,) for name in every},
        "another user, two files closed": ("whole/metrics.jsonl", "whole/adapter/adapter_model.safetensors"),
        "another user, no cache": (),
    }

    def by_stranger(situation: str, words: list[str]) -> Case:
        cache = "/proc/nothing" if "no cache" in situation else str(home / "cache")
        with contextlib.ExitStack() as opened_again:
            for path in (place.folder / name for name in situations[situation]):
                opened_again.callback(path.chmod, path.stat().st_mode)
                path.chmod(0)
            ended = place.call(*words, unprivileged=True, environment={"HOME": str(home), "QSWITCH_CACHE": cache})
        return outcome(ended, good=ended.code in (0, 2), kind=situation, command=" ".join(words))

    for situation in situations:
        yield from (partial(by_stranger, situation, words) for words in commands)


# ---------------------------------------------------------------------------------------------------------------- fuzz

BATCH = 500
"""Inputs of one kind that one child process draws."""


def fuzzed(place: Workplace, number: int, seed: int) -> Iterator[Trial]:
    """Inputs by hypothesis, `number` in all: records and references mostly, configurations and states the rest."""
    for words in (["distill", "--config", "run.yaml", "--output-dir", "run"],
                  ["eval", "run", "--data", "eval.jsonl", "--max-new-tokens", "4"],
                  ["merge", "run"]):  # fmt: skip
        ended = place.call(*words)
        assert ended.code == 0, ended.output
    shares = {"state": 0.05, "configuration": 0.15, "records": 0.4, "reference": 0.4}
    left = {kind: round(number * share) for kind, share in shares.items()}
    turn = 0
    while any(left.values()):  # in turns, so that a harness that is stopped has tried some of each kind
        for kind in [kind for kind in left if left[kind]]:
            turn += 1
            count = min(left[kind], BATCH)
            left[kind] -= count
            yield partial(_batch, place, kind, count, 1000 * seed + turn)


def _batch(place: Workplace, kind: str, count: int, seed: int) -> Case:
    """A batch in a child: an input that ends the process itself is a finding like the others."""
    from tests.faults import fuzz

    sound = yaml.safe_load((place.folder / "run.yaml").read_text())
    files = fuzz.state_files(place.folder / "run")

    def draw() -> dict[str, Any]:
        try:
            tried = fuzz.fuzz(kind, place.folder, count, sound=sound, files=files, seed=seed)
            return {"inputs": tried, "output": ""}
        except Exception:
            return {"inputs": 0, "output": traceback.format_exc()[-3000:]}

    found = forked.in_child(draw)
    return {"kind": f"fuzzed {kind}", "seed": seed, "passed": not found["output"], **found}


SECTIONS: dict[str, Callable[[Workplace, int, int], Iterator[Trial]]] = {
    "kills": kills, **{f"disk-{name}": partial(full_disk, name) for name in ("distill", "merge", "eval", "compare")},
    "disk-small": small_disk, "damage": damage, "weights": weights, "users": users, "fuzz": fuzzed,
}  # fmt: skip
