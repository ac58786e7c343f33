"""A teacher that worked earlier: the run without it is the run with it, and a store that does not fit is found."""

from __future__ import annotations

import gc
import json
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from qswitch import run, teach
from qswitch.distill import session, teaching
from qswitch.distill.budget import learning_rate_factor
from qswitch.distill.stored_teacher import About, differs
from qswitch.distill.teaching import PART_SEQUENCES, items_of_a_run
from qswitch.errors import ConfigError, QSwitchError, RunDirError
from qswitch.layers import build_config
from qswitch.models import load
from qswitch.preflight import PreflightError, settings_problems
from qswitch.run_dir import RunDir, locked, make_folder
from qswitch.units import GIB
from tests.distill.test_trainer import folders
from tests.distill.test_training_by_method import with_method
from tests.pretended_cuda import pretended_cuda

__all__ = ["folders"]

STEPS = {"train__max_steps": 4, "train__compute_dtype": "fp64", "rollout__max_new_tokens": 8}


def stored(config: Any, store: Path, **train: Any) -> Any:
    """The same run, its teacher's work read from `store`; what nothing reads then is left out, as by --set."""
    values = config.model_dump(mode="json", exclude_unset=True)
    values["teacher"]["responses"] = str(store)
    values["train"] |= train
    return build_config(values)


@pytest.fixture(scope="module")
def kd(folders: Any, tmp_path_factory: Any) -> tuple[Any, Path]:
    """A configuration of KD and its store, in parts of a few sequences."""
    folder = tmp_path_factory.mktemp("kd")
    config = with_method(folders, "kd", **STEPS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qswitch.distill.teaching.PART_SEQUENCES", 5)
        teach.teach(config, folder / "store")
    return config, folder / "store"


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("kd", {}),
        ("seqkd", {}),
        ("custom", {"rollout__policy": "teacher", "loss__divergence": "forward_kl", "data__ground_truth_mix": 0.5}),
    ],
)
def test_a_run_without_a_teacher_is_the_run_with_it(folders, tmp_path, monkeypatch, method, changes):
    config = with_method(folders, method, **STEPS, **changes)
    monkeypatch.setattr("qswitch.distill.teaching.PART_SEQUENCES", 5)
    live = run.distill(config, tmp_path / "live")
    about = teach.teach(config, tmp_path / "store")
    assert about.complete and len(list((tmp_path / "store").glob("part-*"))) > 2

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("a teacher was loaded")

    monkeypatch.setattr(session, "load_teacher", refuse)
    summary = run.distill(stored(config, tmp_path / "store"), tmp_path / "stored")
    losses = [[line["loss"] for line in RunDir.open(tmp_path / name).read_metrics() if "loss" in line]
              for name in ("live", "stored")]  # fmt: skip
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], abs=1e-10)
    assert summary.kl_before_nats == pytest.approx(live.kl_before_nats, abs=1e-10)
    assert summary.kl_after_nats == pytest.approx(live.kl_after_nats, abs=1e-10)
    ours, theirs = (load_file(tmp_path / n / "adapter" / "adapter_model.safetensors") for n in ("live", "stored"))
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) <= 1e-10


def test_topk_rows_are_stored_as_a_cache_stores_them(folders, tmp_path):
    config = with_method(folders, "kd", **STEPS, cache__format="topk", cache__topk=8)
    run.distill(config, tmp_path / "live")
    teach.teach(config, tmp_path / "store")
    run.distill(stored(with_method(folders, "kd", **STEPS), tmp_path / "store"), tmp_path / "stored")
    losses = [[line["loss"] for line in RunDir.open(tmp_path / name).read_metrics() if "loss" in line]
              for name in ("live", "stored")]  # fmt: skip
    assert losses[1] == pytest.approx(losses[0], rel=1e-6), "log-probabilities are stored in fp32"
    assert not (tmp_path / "store" / "head.safetensors").exists()


def test_a_store_that_was_cut_or_damaged_is_found_and_mended(kd, tmp_path):
    config, whole = kd
    parts = sorted(path.name for path in whole.glob("part-*"))
    for spoil, pattern in (
        (lambda store: _flip(store / parts[1] / "rows.safetensors"), "SHA-256 of rows.safetensors"),
        (lambda store: _cut(store / parts[2] / "rows.safetensors"), "rows.safetensors has"),
        (lambda store: shutil.rmtree(store / parts[1]), "part 1 of it is missing"),
        (lambda store: _unfinish(store), "is not finished"),
    ):
        store = tmp_path / "store"
        shutil.copytree(whole, store)
        spoil(store)
        with pytest.raises(QSwitchError, match=pattern) as refused:
            run.distill(stored(config, store), tmp_path / "run")
        assert f"qswitch teach --resume {store}" in str(refused.value) and not (tmp_path / "run").exists()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("qswitch.distill.teaching.PART_SEQUENCES", 5)
            teach.resume(store)
        for part in parts:
            ours, theirs = (load_file(folder / part / "rows.safetensors") for folder in (store, whole))
            assert ours.keys() == theirs.keys()
            assert all((ours[name] - theirs[name]).abs().max() <= 1e-12 for name in ours)
        shutil.rmtree(store)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _unfinish(store: Path) -> None:
    about = json.loads((store / "store.json").read_text())
    (store / "store.json").write_text(json.dumps({**about, "complete": False}))


def test_a_store_for_another_run_is_refused(kd, folders, tmp_path):
    config, store = kd
    longer = stored(config, store, max_steps=40)  # draws prompts that the store has no outputs for
    with pytest.raises(RunDirError, match="holds no outputs for the response of example"):
        run.distill(longer, tmp_path / "run")

    other = tmp_path / "teacher"
    shutil.copytree(folders[0], other)
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor + 0.01 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    others = {"model": str(other), "precision": "fp32", "responses": str(store)}
    changed = build_config({**stored(config, store).model_dump(mode="json", exclude_unset=True), "teacher": others})
    with pytest.raises(RunDirError, match="other weights of the teacher"):
        run.distill(changed, tmp_path / "run")
    (other / "model.safetensors").unlink()  # a machine that has the tokenizer alone
    run.distill(changed, tmp_path / "without-weights")

    data = tmp_path / "data.jsonl"
    data.write_text(Path(folders[2]).read_text().replace("it is 1", "it was 1"))
    with_data = {**stored(config, store).model_dump(mode="json", exclude_unset=True),
                 "data": {"train": str(data), "num_validation": 4}}  # fmt: skip
    with pytest.raises(RunDirError, match="other data"):
        run.distill(build_config(with_data), tmp_path / "run")
    with pytest.raises(PreflightError, match="nowhere does not exist"):
        run.distill(stored(config, tmp_path / "nowhere"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("method", "reason", "near"),
    [("switch", "rollout.policy=switch asks the teacher", "method=seqkd"),
     ("gkd", "rollout.policy=student lets the student write", "method=kd"),
     ("distillm", "data.adaptive_share lets the student write", "method=kd")],
)  # fmt: skip
def test_methods_that_ask_the_teacher_at_each_step_are_refused_with_the_nearest(
    folders, tmp_path, method, reason, near
):
    config = with_method(folders, method, rollout__max_new_tokens=8)
    for attempt in (
        lambda: teach.teach(config, tmp_path / "store"),
        lambda: stored(config, tmp_path / "store"),
    ):
        with pytest.raises(ConfigError) as refused:
            attempt()
        assert reason in str(refused.value) and near in str(refused.value)
    assert not (tmp_path / "store").exists()


def test_a_store_holds_each_sequence_of_the_run_once(kd, folders):
    config, store = kd
    listed = [json.loads((part / "sequences.json").read_text()) for part in sorted(store.glob("part-*"))]
    given = [one["example_id"] for part in listed if part["kind"] == "given" for one in part["sequences"]]
    assert len(given) == len(set(given)) == 16, "four steps of four"
    assert PART_SEQUENCES > 1
    from qswitch.data.gather import load_prompts
    from qswitch.models.pair import load_pair_tokenizer

    _, prompts, _ = load_prompts(config, load_pair_tokenizer(config))
    drawn = [prompt.example_id for _, prompt, _ in items_of_a_run(config, prompts)]
    assert drawn == given


@pytest.mark.parametrize("mix", [0.0, 0.5, 1.0])
def test_a_run_by_tokens_needs_every_prompt_once_and_one_by_steps_what_it_draws(folders, mix):
    """Known without walking the million steps that no limit is written as."""
    custom = {**STEPS, "rollout__policy": "teacher", "loss__divergence": "forward_kl", "data__ground_truth_mix": mix}
    if mix == 1:
        custom = STEPS
    steps = with_method(folders, "kd" if mix == 1 else "custom", **custom)
    from qswitch.data.gather import load_prompts
    from qswitch.models.pair import load_pair_tokenizer

    _, prompts, _ = load_prompts(steps, load_pair_tokenizer(steps))
    tokens = build_config(steps.model_dump(mode="json", exclude_unset=True), {"train.max_tokens": 10**6})
    assert tokens.train.step_limit is None
    kinds = {0.0: ["written"], 0.5: ["given", "written"], 1.0: ["given"]}[mix]
    needed = list(teaching.needed_of_a_store(tokens, prompts))
    assert sorted(needed) == sorted((kind, prompt.example_id) for kind in kinds for prompt in prompts)
    drawn = {(kind, prompt.example_id) for kind, prompt, _ in items_of_a_run(steps, prompts)}
    assert set(teaching.needed_of_a_store(steps, prompts)) == drawn and len(drawn) < len(needed)
    longest = with_method(folders, steps.method, **custom | {"train__max_steps": 999_999})
    assert set(teaching.needed_of_a_store(longest, prompts)) == set(needed), "and ends there"


def test_a_run_by_tokens_learns_from_a_store_of_every_prompt_and_is_told_what_another_lacks(folders, tmp_path, kd):
    by_steps, few = kd
    values = by_steps.model_dump(mode="json", exclude_unset=True)
    config = build_config(values, {"train": {"max_tokens": 120, "warmup_steps": 0.5}})
    assert config.train.step_limit is None
    with pytest.raises(RunDirError, match=r"does not say how many prompts that are\. Set train\.max_steps beside"):
        run.distill(stored(config, few), tmp_path / "run")
    teach.teach(build_config(values, {"train.num_epochs": 1}), tmp_path / "store")
    run.distill(stored(config, tmp_path / "store"), tmp_path / "run")
    lines = [line for line in RunDir.open(tmp_path / "run").read_metrics() if "loss" in line]
    assert len(lines) > 2 and lines[0]["learning_rate"] > 0, "the first step alone is taken at rate 0"
    for line in lines:  # what a step leaves to the next follows what is spent, that step included
        factor = learning_rate_factor(config.train, share=line["spent"])
        assert line["learning_rate"] == pytest.approx(config.train.learning_rate * factor, rel=1e-4, abs=1e-9)


def test_a_store_is_of_its_held_out_prompts_in_whatever_order(folders):
    """Before they were in the order of their rank they were in that of the data, which is what old stores say."""
    config = with_method(folders, "kd", **STEPS)
    from qswitch.data.gather import load_prompts
    from qswitch.models.pair import load_pair_tokenizer

    pair = load_pair_tokenizer(config)
    _, prompts, held_out = load_prompts(config, pair)
    in_order = sorted(held_out, key=lambda prompt: prompt.example_id)
    assert [p.example_id for p in in_order] != [p.example_id for p in held_out], "the draw is by rank"
    said = [teaching.about_run(config, pair, prompts, some).data for some in (held_out, in_order, held_out[::-1])]
    then = zlib.crc32(repr([(p.example_id, p.prompt_ids) for p in in_order]).encode())
    assert said[0] == said[1] == said[2] and said[0][-1] == then
    assert teaching.about_run(config, pair, prompts, held_out[1:]).data != said[0]


def test_a_teacher_that_passes_by_layer_for_layer_says_the_same(folders, tmp_path, monkeypatch):
    """Here the device is the host and the layers that do not fit wait on disk; the dispatch is the same."""
    config = with_method(folders, "seqkd", **{**STEPS, "train__max_steps": 1, "train__compute_dtype": "fp32"})
    custom = build_config({**config.model_dump(mode="json", exclude_unset=True), "method": "custom",
                           "loss": {"objective": "divergence"}})  # fmt: skip
    places: list[dict[str, Any]] = []
    real = load.read_model

    def seen(*args: Any, **options: Any) -> Any:
        model = real(*args, **options)
        places.append(getattr(model, "hf_device_map", {}))
        return model

    monkeypatch.setattr(load, "read_model", seen)
    teach.teach(custom, tmp_path / "whole")
    limits: list[int] = []
    monkeypatch.setattr(load, "spread_limits", lambda _, num_bytes: limits.append(num_bytes) or {"cpu": 250_000})
    teach.teach(custom, tmp_path / "spread", vram="3GiB", spread=True)
    parts = teach.rehearse(custom, vram="3GiB").parts
    assert limits == [3 * GIB - sum(parts.values()) + parts["teacher_weights"]], "what the plan leaves to weights"
    assert "disk" in places[-1].values() and "disk" not in places[0].values()
    parts = sorted(path.name for path in (tmp_path / "whole").glob("part-*"))
    assert len(parts) == 2
    for name in [*(f"{part}/rows.safetensors" for part in parts), "head.safetensors"]:
        ours, theirs = (load_file(tmp_path / store / name) for store in ("whole", "spread"))
        assert all((ours[key] - theirs[key]).abs().max() <= 1e-5 for key in theirs)


@pytest.mark.parametrize("cache", ["hidden", "topk"])
def test_what_a_part_waits_with_lies_in_host_memory(folders, tmp_path, monkeypatch, cache):
    """As a part is encoded a GPU holds the model and no states; the store is that of the CPU, bit for bit."""
    config = with_method(folders, "kd", **{**STEPS, "train__compute_dtype": "fp32"}, cache__format=cache)
    both = build_config({**config.model_dump(mode="json", exclude_unset=True), "method": "custom",
                         "rollout": {"max_new_tokens": 8, "policy": "teacher"},
                         "loss": {"objective": "divergence"}, "data": {**config.data.model_dump(exclude_unset=True),
                                                                       "ground_truth_mix": 0.5}})  # fmt: skip
    teach.teach(both, tmp_path / "cpu")
    held: list[int] = []
    encode = teaching.encode_rows
    on_gpu = both.model_copy(update={"train": both.train.model_copy(update={"device": "cuda"})})
    with pretended_cuda() as seen:

        def encodes(form: str, hidden: Any, *rest: Any, **options: Any) -> Any:
            assert hidden.device.type == "cpu"
            gc.collect()
            held.append(seen.held_bytes)
            return encode(form, hidden, *rest, **options)

        monkeypatch.setattr(teaching, "encode_rows", encodes)
        teach.teach(on_gpu, tmp_path / "gpu")
    assert len(held) == 3 and len(set(held)) == 1 and held[0] > 0, "held out, given and written; the model alone"
    assert seen.memory_fractions == [(pytest.approx((11 - 0.5) / 12), 0), (1.0, 0)]
    files = sorted(path.relative_to(tmp_path / "cpu") for path in (tmp_path / "cpu").rglob("*.safetensors"))
    assert len(files) == (4 if cache == "hidden" else 3)
    for file in files:
        assert (tmp_path / "gpu" / file).read_bytes() == (tmp_path / "cpu" / file).read_bytes(), file


def about(**values: Any) -> About:
    return About(**{"teacher": "Qwen/Qwen2.5-7B-Instruct", "weights": None, "adapter": None, "precision": "nf4",
                    "vocab_size": 10, "eos_ids": [1], "pad_id": 0, "data": [], "rows": "hidden", "head": None,
                    "max_new_tokens": 8, **values})  # fmt: skip


SEVEN, FOURTEEN = "Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-14B-Instruct"


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ({"hub_id": SEVEN}, {}, None),  # as a store of before says it
        ({"hub_id": FOURTEEN, "teacher": FOURTEEN}, {}, "another teacher (teacher"),
        ({"hub_id": FOURTEEN, "teacher": FOURTEEN}, {"hub_id": SEVEN, "weights": "a"}, "another teacher (teacher"),
        ({"hub_id": SEVEN, "weights": "b"}, {"hub_id": SEVEN, "weights": "a"}, "other weights of the teacher"),
        ({"hub_id": SEVEN, "revision": "v2"}, {"hub_id": SEVEN, "revision": "v1"}, "another teacher.revision"),
        ({"hub_id": SEVEN, "revision": "v2"}, {"hub_id": SEVEN}, None),
        ({"teacher": "my-copy", "weights": "a"}, {"hub_id": SEVEN, "weights": "a"}, None),
        ({"teacher": "tokenizer-alone"}, {"hub_id": SEVEN, "weights": "a"}, None),
        ({"hub_id": SEVEN, "precision": "bf16"}, {}, "another teacher.precision (precision: nf4 there, bf16 here)"),
        ({"adapter": "runs/t"}, {}, "another teacher.adapter"),
        ({"adapter": "runs/t", "adapter_weights": "a"}, {"adapter": str(Path("runs/t").absolute())}, None),
        ({"adapter": "runs/t", "adapter_weights": "a"}, {"adapter": "runs/u"}, "another teacher.adapter (adapter:"),
        ({"adapter": "u", "adapter_weights": "a"}, {"adapter": "t", "adapter_weights": "a"}, None),
        ({"adapter": "t", "adapter_weights": "b"}, {"adapter": "t", "adapter_weights": "a"}, "or one that was trained"),
    ],
)
def test_a_store_of_another_teacher_is_told_by_its_marks_and_a_missing_mark_is_no_difference(ours, theirs, said):
    found = differs(about(**ours), about(**theirs))
    assert found is None if said is None else said in str(found)


def test_an_adapter_is_known_by_its_files_wherever_they_lie(folders, tmp_path):
    marks = []
    for name, weights in (("a", b"one"), ("b", b"one"), ("a", b"trained again")):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "adapter_config.json").write_text("{}")
        (tmp_path / name / "adapter_model.safetensors").write_bytes(weights)
        marks.append(teaching.adapter_fingerprint(with_method(folders, "kd", teacher__adapter=str(tmp_path / name))))
    assert marks[0] == marks[1] != marks[2] and teaching.adapter_fingerprint(with_method(folders, "kd")) is None


def test_a_store_that_is_not_there_or_not_finished_is_said_before_any_data_is_read(folders, tmp_path):
    config = stored(with_method(folders, "kd", **STEPS), tmp_path / "store")

    def said() -> str:
        (problem,) = settings_problems(config)
        with pytest.raises(PreflightError, match=re.escape(problem)):
            run.rehearse(config)
        return problem

    assert "does not exist. Name a folder of `qswitch teach`" in said()
    (tmp_path / "store").mkdir()
    assert "is no store of a teacher's work" in said()
    for complete in (False, True):
        (tmp_path / "store" / "store.json").write_text(json.dumps({"precision": "nf4", "complete": complete}))
        if not complete:
            assert f"is not finished. Go on with: qswitch teach --resume {tmp_path / 'store'}" in said()
    assert settings_problems(config) == []


def test_a_folder_that_another_command_is_filling_stays(folders, tmp_path):
    config = with_method(folders, "kd", **STEPS)
    with locked(make_folder(tmp_path / "store")):
        with pytest.raises(RunDirError, match="Another qswitch command is writing to"):
            teach.teach(config, tmp_path / "store")
        assert (tmp_path / "store").is_dir()


def test_a_disk_on_which_a_store_may_not_fit_is_said_and_one_for_checkpoints_is_not_asked_for(
    folders, tmp_path, monkeypatch, caplog
):
    """How long responses become nobody knows, so the most that a store can take refuses nothing."""
    config = with_method(folders, "kd", **STEPS)
    monkeypatch.setattr("qswitch.preflight.free_bytes", lambda _: 0)  # not even a checkpoint has room
    monkeypatch.setattr("qswitch.teach.free_bytes", lambda _: 1000)
    plan = teach.rehearse(config, tmp_path / "store")
    assert plan.disk_bytes > 1000 and "The store may take up to 0.0 GiB" in caplog.text
    caplog.clear()
    teach.teach(config, tmp_path / "store")
    assert "The store may take up to" in caplog.text
    (tmp_path / "file").touch()
    with pytest.raises(PreflightError, match="is a file"):
        teach.rehearse(config, tmp_path / "file" / "store")
