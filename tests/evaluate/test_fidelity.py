"""`qswitch fidelity`: figures against direct computations, the note on the weights' origin, precisions that fail."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import qswitch.evaluate.fidelity as module
from qswitch.cli import run
from qswitch.data.gather import load_prompts
from qswitch.distill.answers import _without_template, doubt_of_held_out
from qswitch.errors import ModelError, PlanError, RunDirError
from qswitch.evaluate.fidelity import Decisions, Tokens, fidelity, origin_note, render, summarise
from qswitch.manifest import write_manifest
from qswitch.run_dir import RunDir
from tests.evaluate.runs import make_run


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("fidelity"), rollout__max_new_tokens=24).path


def test_the_figures_of_a_precision_are_token_means():
    tokens = [
        Tokens(torch.tensor([1.0, 3.0], dtype=torch.float64), torch.tensor([True, False])),
        Tokens(torch.linspace(0, 1, 10, dtype=torch.float64), torch.ones(10, dtype=torch.bool)),
    ]
    decisions = [
        Decisions(torch.tensor([0.2, 0.6]), torch.tensor([0.4, 0.7]), torch.tensor([0.3, 0.3])),
        Decisions(torch.tensor([0.5]), torch.tensor([0.1]), torch.tensor([0.3])),
    ]
    report = summarise("nf4", 1.0, tokens, decisions)
    assert report.kl_nats.mean == pytest.approx((1 + 3 + 5) / 12) and report.kl_nats.records == 2
    assert report.top1_agreement.mean == pytest.approx(11 / 12)
    first, second = report.by_position
    assert (first["first"], first["last"], first["tokens"]) == (0, 7, 2 + 8)
    assert first["kl_nats"] == pytest.approx((4 + sum(i / 9 for i in range(8))) / 10)
    assert (second["first"], second["last"], second["tokens"]) == (8, 31, 2)
    assert report.reference_jsd_bits == pytest.approx(1.3 / 3) and report.jsd_bits == pytest.approx(1.2 / 3)
    assert report.absolute_jsd_change_bits == pytest.approx(0.7 / 3)
    assert report.reference_intervention_share == pytest.approx(2 / 3)
    assert report.intervention_share == pytest.approx(2 / 3)
    assert report.changed_decisions.mean == pytest.approx(2 / 3), "one more and one fewer: the shares hide it"


def test_quantised_teachers_are_compared_on_the_same_tokens(made, capsys):
    assert run(["fidelity", str(made), "--prompts", "3"]) == 0
    text = capsys.readouterr().out
    result = json.loads((made / "fidelity.json").read_text(encoding="utf-8"))
    nf4, fp4, int8 = result["precisions"]
    assert [p["precision"] for p in result["precisions"]] == ["nf4", "fp4", "int8"] and not result["failed"]
    for one in (nf4, fp4, int8):
        assert one["kl_nats"]["mean"] > 1e-6 and 0 < one["top1_agreement"]["mean"] <= 1
        assert one["absolute_jsd_change_bits"] > 0 and one["weights_gib"] > 0
        assert sum(p["tokens"] for p in one["by_position"]) == result["teacher_tokens"]
        assert one["reference_jsd_bits"] == nf4["reference_jsd_bits"], "one reference for all"
    # NF4 fits bell-shaped weights better than FP4 (QLoRA, table 2), and 8 bits hold more than 4.
    assert fp4["kl_nats"]["mean"] > nf4["kl_nats"]["mean"] > int8["kl_nats"]["mean"]
    assert "nf4" in text and "changed writers" in text and result["origin"] is None


def test_weights_are_counted_by_one_rule_for_every_precision(made):
    """What a card holds: quantised weights with all that bitsandbytes keeps beside them, the rest in 2 bytes.

    A CPU without native bf16 holds embeddings in 4 bytes, which made quantised teachers look larger beside bf16.
    """
    from qswitch.models.pair import load_pair_tokenizer
    from qswitch.models.runtime import make_runtime

    config = RunDir.open(made).config
    result = fidelity(config, run_dir=RunDir.open(made), work_dir=made, precisions=["nf4", "int8"], num_prompts=1)
    found = {one["precision"]: one["weights_gib"] for one in (result["reference"], *result["precisions"])}
    pair, runtime = load_pair_tokenizer(config), make_runtime(config.train)
    assert runtime.compute_dtype == torch.float32

    def held(module) -> int:
        size = 0
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                size += 2 * parameter.numel()
                continue
            tensors, state = [parameter], getattr(parameter, "quant_state", None)
            if state is not None:
                tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
            else:
                tensors.append(module.state.SCB if parameter.SCB is None else parameter.SCB)
            size += sum(t.numel() * t.element_size() for t in tensors)
        return size

    for precision, gib in found.items():
        model = module._teacher(config, runtime, pair, precision)
        assert gib * 2**30 == pytest.approx(sum(held(m) for m in model.hf.modules()), rel=0.01), precision
    assert f"counted {result['weights_counted']}" in render(result)


def test_the_page_counts_the_demos_teacher_in_the_same_way():
    """Its table was measured by an earlier version, which counted in two ways; the bytes are recomputed."""
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^\| (bf16|NF4|FP4|int8) \| ([\d.]+) \|", page, re.M))
    # SmolLM2-135M: 30 layers of width 576, 9 heads over 3, MLP 1536, 49,152 tokens, tied head.
    attention = 2 * 576 * 576 + 2 * 576 * 192
    linear, other = 30 * (attention + 3 * 576 * 1536), 49_152 * 576 + 61 * 576
    scales = linear / 64
    tables = 30 * 7 * (16 + 256 + 1) * 4
    nf4 = linear / 2 + scales + scales / 256 * 4 + tables + 2 * other
    int8 = linear + 30 * 4 * (576 + 192 + 192 + 576 + 1536 + 1536 + 576) + 2 * other
    expected = {"bf16": 2 * (linear + other), "NF4": nf4, "FP4": nf4, "int8": int8}
    assert shown == {name: f"{size / 2**30:.3f}" for name, size in expected.items()}


def test_an_unquantised_teacher_differs_in_nothing(made, monkeypatch):
    run_dir = RunDir.open(made)
    real = module._teacher
    monkeypatch.setattr(
        module, "_teacher", lambda config, runtime, pair, precision: real(config, runtime, pair, "bf16")
    )
    result = fidelity(run_dir.config, run_dir=run_dir, work_dir=made, precisions=["nf4"], num_prompts=3)
    (same,) = result["precisions"]
    assert same["kl_nats"]["mean"] == 0 and same["top1_agreement"]["mean"] == 1
    assert same["changed_decisions"]["mean"] == 0 and same["jsd_bits"] == same["reference_jsd_bits"]


def test_kl_and_interventions_are_those_of_whole_logits(made):
    """One response at a time from whole logits in fp64: the direction of KL, who is right of top-1, who intervenes."""
    from qswitch.evaluate.subjects import find_subject
    from qswitch.models.pair import load_pair_tokenizer
    from qswitch.models.runtime import make_runtime

    config = RunDir.open(made).config
    pair, runtime = load_pair_tokenizer(config), make_runtime(config.train)
    written: list = []
    real = module._read

    def remember(model, rollouts, *rest):
        written.append(rollouts)
        return real(model, rollouts, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_read", remember)
        run_dir = RunDir.open(made)
        (found,) = fidelity(config, run_dir=run_dir, work_dir=made, precisions=["fp4"], num_prompts=3)["precisions"]
    mixed, own = written[0], written[1]
    bf16, fp4 = (module._teacher(config, runtime, pair, precision) for precision in ("bf16", "fp4"))
    student = find_subject(str(made)).load().model

    def log_probs(model, rollout):
        whole = torch.tensor([rollout.prompt_ids + rollout.response_ids])
        with torch.no_grad():
            logits = model.hf(input_ids=whole).logits[0, len(rollout.prompt_ids) - 1 : -1]
        return logits[:, : pair.vocab_size].double().log_softmax(-1)

    kl, same = [], []
    for rollout in own:
        p, q = log_probs(bf16, rollout), log_probs(fp4, rollout)
        kl += (p.exp() * (p - q)).sum(-1).tolist()
        same += (p.argmax(-1) == q.argmax(-1)).tolist()
    assert found["kl_nats"]["mean"] == pytest.approx(sum(kl) / len(kl), rel=1e-3)
    reverse = sum(((q := log_probs(fp4, r)).exp() * (q - log_probs(bf16, r))).sum().item() for r in own) / len(kl)
    assert abs(reverse / found["kl_nats"]["mean"] - 1) > 5e-3, "the other direction would be seen"
    assert found["top1_agreement"]["mean"] == pytest.approx(sum(same) / len(same))

    threshold = module._switch_policy(config, config.rollout.max_new_tokens, None).threshold
    above, teacher_wrote, total = 0, 0, 0
    for rollout in mixed:
        p, q = log_probs(bf16, rollout), log_probs(student, rollout)
        m = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0, dtype=torch.float64))
        jsd = ((p.exp() * (p - m)).sum(-1) + (q.exp() * (q - m)).sum(-1)) / 2 / torch.log(torch.tensor(2.0)).double()
        above += int((jsd > threshold(torch.arange(len(jsd)))).sum())
        teacher_wrote += sum(rollout.writers)
        total += len(jsd)
    assert found["reference_intervention_share"] == pytest.approx(above / total, abs=1.5 / total)
    assert found["reference_intervention_share"] == pytest.approx(teacher_wrote / total, abs=1.5 / total), (
        "the engine's"
    )


def test_another_cut_of_the_student_is_another_student(tmp_path):
    from qswitch.layers import build_config

    run_dir = make_run(tmp_path, rollout__max_new_tokens=8)
    values = run_dir.config.model_dump(exclude_unset=True)
    work = tmp_path / "work"
    layers = []
    for keep in (2, 1):
        values["student"]["shrink_to_layers"] = keep
        values["student"]["model"] = values["teacher"]["model"]
        config = build_config(values)
        pair, runtime = module.load_pair_tokenizer(config), module.make_runtime(config.train)
        layers.append(module._student(config, runtime, pair, None, work)[0].hf.config.num_hidden_layers)
    assert layers == [2, 1]


def test_a_precision_that_does_not_run_is_named_and_left_out(made, monkeypatch):
    run_dir = RunDir.open(made)
    real = module._teacher

    def refuse(config, runtime, pair, precision):
        if precision == "int8":
            raise ModelError("no int8 here")
        return real(config, runtime, pair, precision)

    monkeypatch.setattr(module, "_teacher", refuse)
    result = fidelity(run_dir.config, run_dir=run_dir, work_dir=made, precisions=["int8", "nf4"], num_prompts=2)
    assert result["failed"] == {"int8": "no int8 here"} and len(result["precisions"]) == 1
    assert "int8 does not run here: no int8 here" in render(result)


def test_a_run_that_goes_on_meanwhile_is_measured_with_its_newest_weights(tmp_path, monkeypatch):
    """Its checkpoints are replaced in the minutes in which a large teacher is read."""
    run_dir = make_run(tmp_path, rollout__max_new_tokens=8)
    older, newer = (run_dir.checkpoints_path / f"step-{step:06d}" for step in (1, 2))
    older.mkdir(parents=True)
    shutil.move(run_dir.adapter_path, older / "adapter")
    write_manifest(older)
    load = module._teacher

    def slow(*arguments):
        if older.exists():
            older.rename(newer)
        return load(*arguments)

    monkeypatch.setattr(module, "_teacher", slow)
    result = fidelity(run_dir.config, run_dir=run_dir, work_dir=tmp_path, precisions=["nf4"], num_prompts=1)
    assert result["student_weights"]["step"] == 2
    shutil.rmtree(newer)
    monkeypatch.setattr(module, "_teacher", lambda *_: pytest.fail("the teacher was read"))
    with pytest.raises(RunDirError, match="holds no adapter yet"):
        fidelity(run_dir.config, run_dir=run_dir, work_dir=tmp_path, precisions=["nf4"], num_prompts=1)


@pytest.mark.parametrize(
    ("seed", "answered", "is_said"),
    [(42, None, False), (7, None, True), (7, "its own", False), (42, "others", True), (7, "others", True)],
)
def test_prompts_that_a_run_did_not_hold_out_are_not_called_so(tmp_path, seed, answered, is_said):
    """An earlier version drew them by the seed of the run; RUN/held_out.json, where it is, has the first of them."""
    run_dir = make_run(tmp_path, rollout__max_new_tokens=4)
    run_dir = RunDir(run_dir.path, run_dir.config.model_copy(update={"seed": seed}))
    config = run_dir.config
    encoder, training, held_out = load_prompts(config, module.load_pair_tokenizer(config))
    if answered is not None:
        texts = [p.text for p in (held_out if answered == "its own" else list(training))][:3]
        answers = [{"prompt": _without_template(text, encoder, None), "before": None, "after": None, "reference": None}
                   for text in texts]  # fmt: skip
        run_dir.write_json("held_out.json", {"answers": answers})
    text = render(fidelity(config, run_dir=run_dir, work_dir=tmp_path, precisions=[], num_prompts=3))
    assert ("3 held-out prompts" in text) != is_said and ("may have been trained on some of these" in text) == is_said
    given = config.data.model_copy(update={"validation": config.data.train})
    with_file = RunDir(run_dir.path, config.model_copy(update={"data": given}))
    assert doubt_of_held_out(with_file, held_out, encoder) is None, "a file of its own was never trained on"


def test_a_teacher_that_host_memory_does_not_hold_is_refused_before_it_is_read(made, monkeypatch):
    from qswitch.models.pair import load_pair_tokenizer
    from qswitch.models.runtime import make_runtime

    run_dir = RunDir.open(made)
    runtime = make_runtime(run_dir.config.train)
    assert runtime.compute_dtype == torch.float32
    pair = load_pair_tokenizer(run_dir.config)
    teacher = module._teacher(run_dir.config, runtime, pair, "bf16")
    student, _ = module._student(run_dir.config, runtime, pair, None, made)
    held = sum(  # without what is added to the student
        4 * p.numel() for model in (teacher, student) for n, p in model.hf.named_parameters() if "lora_" not in n
    )
    monkeypatch.setattr(module, "_teacher", lambda *_: pytest.fail("the teacher was read"))
    monkeypatch.setattr(module, "detect_budget_bytes", lambda _: (held - 1, "free memory"))
    with pytest.raises(PlanError, match=r"the yardstick, takes .* 4 bytes a weight, and .* are free \(free memory\)"):
        fidelity(run_dir.config, run_dir=run_dir, work_dir=made, precisions=["nf4"], num_prompts=2, device="cpu")
    monkeypatch.setattr(module, "detect_budget_bytes", lambda _: (held, "free memory"))
    with pytest.raises(pytest.fail.Exception, match="the teacher was read"):
        fidelity(run_dir.config, run_dir=run_dir, work_dir=made, precisions=["nf4"], num_prompts=2, device="cpu")


def test_host_memory_that_runs_out_is_no_gpu_that_is_full(made, monkeypatch):
    """It would be told to use --device cpu, where it is."""

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(module, "_teacher", fail)
    run_dir = RunDir.open(made)
    with pytest.raises(MemoryError):
        fidelity(run_dir.config, run_dir=run_dir, work_dir=made, precisions=["nf4"], num_prompts=2, device="cpu")


def test_weights_from_a_gguf_file_are_said_to_be_dequantised(made, monkeypatch):
    from types import SimpleNamespace

    def noted(references, name):
        config = RunDir.open(made).config
        config = config.model_copy(update={"teacher": config.teacher.model_copy(update={"model": references})})
        monkeypatch.setattr(module, "resolve_reference", lambda *_: SimpleNamespace(name=name))
        return origin_note(config)

    note = noted(["package:x/Small.Q4_1.gguf", "org/Small"], "Small.Q4_1")
    assert note and "Small.Q4_1.gguf (4-bit)" in note and "second quantisation" in note
    assert noted(["package:x/Small.Q4_1.gguf", "org/Small"], "org/Small") is None
    plain = noted("models/Small-F16.gguf", "Small-F16")
    assert plain and "read from Small-F16.gguf" in plain


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fidelity"], "--preset NAME or --config FILE"),
        (["fidelity", "RUN", "--preset", "smollm2-demo"], "leave --preset"),
        (["fidelity", "RUN", "--precision", "int3"], "nf4, fp4, int8"),
    ],
)
def test_mistakes_end_with_2(made, arguments, message, capsys):
    assert run([a if a != "RUN" else str(made) for a in arguments]) == 2
    assert message in capsys.readouterr().err
