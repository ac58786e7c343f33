"""Replayed passes: the same tokens on every architecture, growing buffers, a model that cannot be recorded.

There is no GPU here, so the recorder of these tests repeats the recorded call over its fixed places; what torch records
on a GPU is that call. `test_a_cuda_graph_gives_the_states_of_a_usual_pass` runs where there is one.
"""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor

from qswitch.layers import build_config
from qswitch.models.language_model import LanguageModel
from qswitch.models.runtime import Runtime
from qswitch.models.student import load_student
from qswitch.rollout import graph_trial, step_graph
from qswitch.rollout.block_length import FixedBlock
from qswitch.rollout.decode import rollout
from qswitch.rollout.graph_trial import try_graphs
from qswitch.rollout.kv_cache import KVState, Prompts
from qswitch.rollout.step_graph import EAGER_PASSES, CudaRecorder, StepGraphs
from tests.rollout.test_engines import ARCHITECTURES, EOS, PAD, POLICIES, draw_requests, make_pair, same, write
from tests.tiny import save_tiny, tiny_model


class Repeater:
    """Records as a CUDA graph does: the answer of every repetition lies in the place of the first."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        place = run()
        self.rows.append(len(place))

        def replay() -> Tensor:
            place.copy_(run())
            return place

        return replay


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_replayed_passes_write_the_same_tokens(arch, monkeypatch):
    """Rows end and are refilled, drafts are taken back, and a recorded pass comes to read more slots."""
    monkeypatch.setattr(step_graph, "SPAN_SLOTS", 16)
    monkeypatch.setattr(step_graph, "EAGER_PASSES", 1)
    pair = make_pair(arch)
    rng = random.Random(f"graphs {arch}")
    recorder, replays = Repeater(), {"teacher": 0, "student": 0}
    graphs = [StepGraphs(model, recorder) for model in pair]
    for name in ("switch", "student", "skd", "adaswitch", "mixture"):
        requests = draw_requests(rng, 12)
        expected, _ = write(pair, POLICIES[name], requests, batch_size=5, drafts=2)
        for model in graphs:
            model.forget()
            recorder.rows.clear()
        written, stats = rollout(
            requests, teacher=pair[0], student=pair[1], policy=POLICIES[name], seed=11, temperature=1.0, eos_ids=[EOS],
            pad_id=PAD, batch_size=5, keep="nothing", blocks=FixedBlock(2), teacher_graphs=graphs[0],
            student_graphs=graphs[1],
        )  # fmt: skip
        assert all(same(a, b) for a, b in zip(expected, written, strict=True)), name
        assert set(recorder.rows) <= {1, 2, 4, 5}, "rows are padded to a power of two, or to all"
        assert 0 < stats.student_replays < stats.student_passes
        replays["student"] += stats.student_replays
        replays["teacher"] += stats.teacher_replays
    assert replays["student"] > 60 and replays["teacher"] > 10


def states(
    model: LanguageModel, num_rows: int, graphs: StepGraphs | None, steps: int, max_rows: int | None = None
) -> Tensor:
    state = KVState(model, max_rows or num_rows, 5 + steps, graphs=graphs)
    prompt = torch.arange(num_rows * 5).view(num_rows, 5) % model.vocab_size
    ones = torch.ones_like(prompt, dtype=torch.bool)
    counts = ones.sum(1).numpy()
    with torch.no_grad():
        state.repack(np.arange(0), Prompts(prompt, ones, counts))
        return torch.cat([state.append(prompt[:, :1], ones[:, :1], counts // 5) for _ in range(steps)], dim=1)


def test_a_pass_that_must_read_more_slots_is_recorded_anew(monkeypatch):
    monkeypatch.setattr(step_graph, "SPAN_SLOTS", 8)
    model = LanguageModel(tiny_model("llama", dtype=torch.float64).eval())
    recorder = Repeater()
    graphs = StepGraphs(model, recorder)
    torch.testing.assert_close(states(model, 3, graphs, 20, 8), states(model, 3, None, 20), rtol=1e-12, atol=1e-12)
    assert recorder.rows == [4, 4], (
        "passes to slots 9 to 16 and 17 to 24; before and after there were too few to record"
    )
    assert graphs.num_replays == 2 * (8 - EAGER_PASSES)


def test_small_buffers_and_what_was_recorded_over_them_are_kept_from_call_to_call():
    """The weights may have changed meanwhile, where they lie; a call with more rows or slots begins anew."""
    teacher, student = make_pair("qwen2")
    requests = draw_requests(random.Random(4), 10)
    recorder = Repeater()
    kept, thrown = (StepGraphs(student, recorder, kept_bytes=size) for size in (2**20, 0))
    num_recorded = []
    for turn in range(3):
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.mul_(1.01)
        expected, _ = write((teacher, student), POLICIES["switch"], requests, batch_size=4, drafts=2, seed=turn)
        for graphs in (kept, thrown):
            before = graphs.num_recorded
            written, stats = rollout(
                requests, teacher=teacher, student=student, policy=POLICIES["switch"], seed=turn, temperature=1.0,
                eos_ids=[EOS], pad_id=PAD, batch_size=4, keep="nothing", blocks=FixedBlock(2), student_graphs=graphs,
            )  # fmt: skip
            assert all(same(a, b) for a, b in zip(expected, written, strict=True))
            assert stats.student_replays > 0
            num_recorded.append(graphs.num_recorded - before)
    assert num_recorded[0] == num_recorded[1] > 0, "the first call"
    assert num_recorded[2] + num_recorded[4] < num_recorded[3] + num_recorded[5]
    makers = kept.layer_makers(4, 64)
    assert kept.layer_makers(3, 32) is makers and kept.layer_makers(5, 64) is not makers


class PlacesOnly:
    """Records as a CUDA graph does in one more way: it knows where the weights lay, and keeps none of them alive."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self.weights: list[list[weakref.ref[Tensor]]] = []

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        place = run()
        self.weights.append([weakref.ref(weight) for weight in self._model.hf.parameters()])

        def replay() -> Tensor:
            place.copy_(run())
            return place

        return replay


@pytest.mark.parametrize(
    ("precision", "whole"), [("bf16", []), ("bf16", ["lm_head"]), ("bf16", ["norm"]), ("fp32", [])]
)
def test_kept_passes_of_a_student_with_adapters_read_weights_that_are_still_there(tmp_path, precision, whole):
    """On a GPU they would read what lies in that place by then, and nobody would hear of it."""
    folder = save_tiny(tmp_path / "m", dtype=torch.bfloat16)
    model = {"model": str(folder)}
    config = build_config({
        "teacher": model, "data": {"train": "x.jsonl"},
        "student": {**model, "precision": precision, "lora": {"modules_to_save": whole}},
    })  # fmt: skip
    student = load_student(config, Runtime(device=torch.device("cpu"), compute_dtype=torch.bfloat16))
    recorder = PlacesOnly(student)
    graphs = StepGraphs(student, recorder, kept_bytes=2**20)
    requests = draw_requests(random.Random(4), 6)
    _, stats = rollout(
        requests, teacher=None, student=student, policy=POLICIES["student"], seed=0, temperature=1.0, eos_ids=[EOS],
        pad_id=PAD, batch_size=4, keep="nothing", student_graphs=graphs,
    )  # fmt: skip
    assert stats.student_replays > 0 and graphs.num_recorded == len(recorder.weights) > 0
    gc.collect()
    assert all(weight() is not None for weights in recorder.weights for weight in weights)


def test_eager_attention_has_masks_that_are_added(monkeypatch):
    model = tiny_model("gemma2", dtype=torch.float64).eval()
    model.set_attn_implementation("eager")
    model = LanguageModel(model)
    graphs = StepGraphs(model, Repeater())  # its softmax is in fp32
    torch.testing.assert_close(states(model, 3, graphs, 12), states(model, 3, None, 12), rtol=1e-5, atol=1e-5)
    assert graphs.num_replays == 12 - EAGER_PASSES


@pytest.mark.parametrize(
    "message",
    [
        "operation not permitted when stream is capturing",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    ],
)
def test_a_model_that_cannot_be_recorded_goes_on_as_usual(caplog, message):
    def refuse(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        run()
        raise RuntimeError(message)

    model = LanguageModel(tiny_model("llama", dtype=torch.float64).eval())
    graphs = StepGraphs(model, refuse)
    torch.testing.assert_close(states(model, 2, graphs, 9), states(model, 2, None, 9), rtol=0, atol=0)
    assert graphs.num_replays == 0 and message in str(graphs.failure)
    assert sum("The student's passes are not recorded as CUDA graphs" in r.message for r in caplog.records) == 1
    trial = try_graphs(model, 2, record=refuse)
    assert not trial.used and message in trial.reason


def test_memory_that_runs_out_costs_the_graphs_and_no_rows(monkeypatch):
    """A recording needs fresh memory where a usual pass does not; if that does not fit either, it says so itself."""
    monkeypatch.setattr(step_graph, "SPAN_SLOTS", 8)

    class NoRoomForTwo(Repeater):
        def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
            if self.rows:
                raise torch.OutOfMemoryError("no room")
            return super().__call__(run)

    model = LanguageModel(tiny_model("llama", dtype=torch.float64).eval())
    graphs = StepGraphs(model, NoRoomForTwo())
    torch.testing.assert_close(states(model, 2, graphs, 20), states(model, 2, None, 20), rtol=1e-12, atol=1e-12)
    assert graphs.num_replays == 8 - EAGER_PASSES and graphs.failure == step_graph.NO_ROOM
    assert not graphs._recorded, "what was recorded gives its memory back"
    full = NoRoomForTwo()
    full.rows.append(0)
    assert try_graphs(model, 2, record=full).reason == step_graph.NO_ROOM


class Driver:
    """What CudaRecorder asks of torch.cuda, so far as which stream is current and what is refused."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.current, self.mode, self.pools = self.Stream(), "default", 0
        self.captures: list[tuple[Driver.Stream, int]] = []
        self.failure: Exception | None = None
        graph = type("CUDAGraph", (), {"replay": lambda _: None})
        for name, value in {
            "Stream": self.Stream, "current_stream": lambda: self.current, "set_stream": self.set_stream,
            "stream": self.stream, "graph": self.graph, "CUDAGraph": graph, "graph_pool_handle": self.pool,
            "get_sync_debug_mode": lambda: self.mode, "set_sync_debug_mode": self.set_mode,
        }.items():  # fmt: skip
            patch.setattr(torch.cuda, name, value)

    class Stream:
        def wait_stream(self, _: object) -> None: ...

    def set_stream(self, stream: Stream) -> None:
        self.current = stream

    def set_mode(self, mode: str) -> None:
        self.mode = mode

    def pool(self) -> int:
        self.pools += 1
        return self.pools

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, _: object, *, pool: int, stream: Stream) -> Iterator[None]:
        """As torch's: where the capture's end fails, its stream stays the current one."""
        before, self.current = self.current, stream
        self.captures.append((stream, pool))
        yield
        if self.failure is not None:
            raise self.failure
        self.current = before

    def item(self) -> bool:
        """Makes the host wait."""
        if self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return False


def test_the_graphs_of_a_model_have_a_stream_and_those_that_go_together_a_pool(monkeypatch):
    """cuBLAS's workspace belongs to the stream; torch may take it away with any graph that was recorded there."""
    driver, place = Driver(monkeypatch), torch.zeros(1)
    teacher, student = CudaRecorder(), CudaRecorder()
    kept = [teacher(lambda: place), student(lambda: place), teacher(lambda: place)]
    (first, a), (second, b), (again, c) = driver.captures
    assert first is again is not second and a == c != b
    del kept[2], kept[0]
    gc.collect()
    teacher(lambda: place)
    student(lambda: place)
    assert driver.captures[3] == (first, 3), "torch can refuse a pool whose graphs have all gone"
    assert driver.captures[4] == (second, b) and kept


def test_a_pass_that_waits_is_not_captured_and_a_failed_capture_leaves_the_stream_as_it_was(monkeypatch):
    driver, place = Driver(monkeypatch), torch.zeros(1)
    record, current = CudaRecorder(), driver.current
    with pytest.raises(RuntimeError, match="synchronizing"):
        record(lambda: driver.item() or place)
    assert (driver.captures, driver.mode, driver.current) == ([], "default", current)
    driver.failure = RuntimeError("capture invalidated")
    with pytest.raises(RuntimeError, match="invalidated"):
        record(lambda: place)
    assert len(driver.captures) == 1 and driver.current is current


def test_one_recorder_serves_a_models_trial_timing_and_rollouts(monkeypatch):
    Driver(monkeypatch)
    models = make_pair("llama")
    recorders = [step_graph._recorder_of(model) for model in (*models, *models)]
    assert recorders[0] is recorders[2] is not recorders[1] is recorders[3]


def test_the_trial_uses_graphs_that_are_right_and_fast_and_no_others(monkeypatch):
    model = LanguageModel(tiny_model("llama", dtype=torch.float64).eval())
    model.train()
    assert try_graphs(model, 2).reason == "no CUDA graphs on cpu"
    monkeypatch.setattr(graph_trial, "WORTHWHILE", 100.0)  # whatever this machine's timing says
    trial = try_graphs(model, 3, tokens=(1, 3), record=Repeater())
    assert trial.used and trial.difference is not None and trial.difference < 1e-12
    assert trial.usual_seconds is not None and 0 < trial.usual_seconds < 1
    assert model.training
    monkeypatch.setattr(graph_trial, "WORTHWHILE", 0.0)
    assert try_graphs(model, 3, record=Repeater()).reason == "recorded passes are not faster here"

    def stale(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        place = run()
        return lambda: place

    monkeypatch.setattr(graph_trial, "WORTHWHILE", 100.0)
    wrong = try_graphs(model, 3, record=stale)
    assert not wrong.used and "differ by" in wrong.reason


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_cuda_graph_gives_the_states_of_a_usual_pass(arch):
    model = LanguageModel(tiny_model(arch, dtype=torch.float32).cuda().eval())
    trial = try_graphs(model, 5)
    assert trial.difference is not None and trial.difference < 1e-4, trial.reason
