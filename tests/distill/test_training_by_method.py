"""Training by method on two-layer models: which tokens, which loss, and without a teacher where none is needed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qswitch.data.template import Prompt
from qswitch.distill.sequence import TrainingSequence, ground_truth_sequence
from qswitch.divergence import divergence
from qswitch.rollout.policy import STUDENT, TEACHER
from qswitch.run import distill
from qswitch.run_dir import RunDir
from tests.distill.test_trainer import folders, make_trainer, settings

__all__ = ["folders"]


def with_method(folders, method: str, **changes):
    from qswitch.layers import build_config

    values = settings(folders).model_dump(mode="json", exclude_unset=True)
    values["method"] = method
    values["rollout"].pop("policy", None)
    values["loss"] = {}
    values["data"].pop("ground_truth_mix", None)
    for dotted, value in changes.items():
        section, _, key = dotted.partition("__")
        values.setdefault(section, {})[key] = value
    return build_config(values)


def cross_entropy(trainer, sequences) -> float:
    """Mean -log q of the loss tokens, one sequence at a time, from plain logits."""
    total = tokens = 0
    with torch.no_grad():
        trainer.student.eval()
        for s in sequences:
            ids = torch.tensor([s.prompt_ids + s.response_ids])
            log_q = trainer.student.hf(ids).logits[0].double().log_softmax(-1)
            for step in s.loss_steps:
                position = len(s.prompt_ids) + step
                total -= log_q[position - 1, ids[0, position]].item()
                tokens += 1
    return total / tokens


@pytest.mark.parametrize("method", ["sft", "seqkd"])
def test_cross_entropy_is_that_of_the_written_tokens(folders, tmp_path, method):
    config = with_method(folders, method, train__compute_dtype="fp64")
    trainer = make_trainer(config, tmp_path / "run")
    items = trainer.supply.loader.next(6)
    if method == "sft":
        sequences = trainer.supply.read_ground_truth(items)
        assert {tuple(s.response_ids) for s in sequences} == {tuple(p.response_ids) for p, _ in items}
    else:
        rollouts, stats = trainer.supply.roll_out(items)
        assert stats.student_passes == 0 and all(r.teacher_hidden is None for r in rollouts)
        sequences = trainer.supply.cache_teacher(rollouts)
    assert all(s.loss_steps == list(range(len(s.response_ids))) for s in sequences)
    loss = trainer.learner.accumulate(sequences)
    assert loss == pytest.approx(cross_entropy(trainer, sequences), rel=1e-9)


def test_sft_loads_no_teacher_and_lowers_the_loss_on_held_out_responses(folders, tmp_path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr("qswitch.distill.session.load_teacher", refuse)
    config = with_method(folders, "sft", train__max_steps=20, train__eval_steps=20, train__learning_rate=2e-2)
    summary = distill(config, tmp_path / "run")
    run_dir = RunDir.open(tmp_path / "run")
    assert summary.kl_before_nats is None and summary.rollout_tokens == 0
    assert summary.response_loss_after_nats < 0.9 * summary.response_loss_before_nats
    assert {m["batch"] for m in run_dir.read_metrics() if "batch" in m} == {"ground_truth"}
    assert json.loads((run_dir.path / "plan.json").read_text())["parts"]["teacher_weights"] == 0
    assert "method `sft`" in (run_dir.adapter_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("method", "batches"),
    [
        ("kd", {"ground_truth"}),
        ("imitkd", {"rollout"}),
        ("gkd", {"ground_truth", "rollout"}),
        ("skd", {"rollout"}),
        ("adaswitch", {"rollout"}),
    ],
)
def test_a_method_has_its_mix_of_batches(folders, tmp_path, method, batches):
    config = with_method(folders, method, train__max_steps=8, train__eval_steps=8, train__save_steps=8)
    distill(config, tmp_path / "run")
    run_dir = RunDir.open(tmp_path / "run")
    steps = [m for m in run_dir.read_metrics() if "batch" in m]
    assert {m["batch"] for m in steps} == batches
    assert all(m["loss"] > 0 and m["loss_tokens"] > 0 for m in steps)


def test_tokens_of_each_writer_have_the_divergence_that_is_set_for_them(folders, tmp_path):
    options = {"train__compute_dtype": "fp64", "loss__scope": "all", "rollout__decay_rate": 0.5}
    by_writer = {"loss__divergence_teacher_tokens": "forward_kl", "loss__divergence_student_tokens": "jsd"}
    trainer = make_trainer(with_method(folders, "switch", **options, **by_writer), tmp_path / "run")
    sequences = trainer.supply.cache_teacher(trainer.supply.roll_out(trainer.supply.loader.next(6))[0])
    assert {writer for s in sequences for writer in s.loss_writers} == {STUDENT, TEACHER}
    restored = [TrainingSequence(**s.state_dict()) for s in sequences]
    loss = trainer.learner.accumulate(restored)
    total, tokens = 0.0, 0
    with torch.no_grad():
        trainer.student.eval()
        for s in sequences:
            ids = torch.tensor([s.prompt_ids + s.response_ids])
            p, q = (m.hf(ids).logits[0].double() for m in (trainer.supply._teacher, trainer.student))
            for step, writer in zip(s.loss_steps, s.loss_writers, strict=True):
                at = len(s.prompt_ids) + step - 1
                name = "forward_kl" if writer == TEACHER else "jsd"
                total += float(divergence(name, p[at], q[at], beta=0.5))
                tokens += 1
    assert loss == pytest.approx(total / tokens, rel=1e-9)


def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """KL(a || b) of log-probabilities [..., V], differentiable, term by term."""
    return (a.exp() * (a - b)).sum(dim=-1)


def trl_jsd(log_p: torch.Tensor, log_q: torch.Tensor, beta: float) -> torch.Tensor:
    """TRL's generalized_jsd_loss: beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta p + (1 - beta) q."""
    mixture = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    return beta * kl(log_p, mixture) + (1 - beta) * kl(log_q, mixture)


def distillm_js(log_p: torch.Tensor, log_q: torch.Tensor, weight: float) -> torch.Tensor:
    """DistiLLM's js_distance: the weight is that of KL(student || mixture), and of the student in the mixture."""
    mixture = ((1 - weight) * log_p.exp() + weight * log_q.exp()).log()
    return weight * kl(log_q, mixture) + (1 - weight) * kl(log_p, mixture)


def skew_reverse(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return kl(log_q, (0.9 * log_p.exp() + 0.1 * log_q.exp()).log())


def plain_step(trainer, sequences, loss_of) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of a step from whole logits by autograd; `loss_of(log p, log q, writer)` of one token."""
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for s in sequences:
        ids = torch.tensor([s.prompt_ids + s.response_ids])
        with torch.no_grad():
            log_p = trainer.supply._teacher.hf(ids).logits[0].double().log_softmax(-1)
        log_q = trainer.student.hf(ids).logits[0].double().log_softmax(-1)
        for step, writer in zip(s.loss_steps, s.loss_writers, strict=True):
            at = len(s.prompt_ids) + step - 1
            total = total + loss_of(log_p[at], log_q[at], writer)
            tokens += 1
    loss = total / tokens
    return loss.item(), list(torch.autograd.grad(loss, trainer.learner.trainable))


@pytest.mark.parametrize("published", ["trl", "distillm", "by writer", "interventions"])
def test_a_step_has_the_loss_and_the_gradients_of_the_published_formula(folders, tmp_path, published):
    """The chunked and cached loss of a whole step against whole logits: token mean, micro-batches, and all."""
    shared = {"train__compute_dtype": "fp64", "loss__chunk_tokens": 5, "rollout__decay_rate": 0.5}
    by_writer = {"loss__divergence_teacher_tokens": "forward_kl", "loss__divergence_student_tokens": "jsd"}
    method, changes, loss_of = {
        "trl": ("gkd", {}, lambda p, q, _: trl_jsd(p, q, beta=0.1)),
        "distillm": ("gkd", {}, lambda p, q, _: distillm_js(p, q, weight=0.9)),
        "by writer": (
            "switch", {"loss__scope": "all", "loss__beta": 0.3, **by_writer},
            lambda p, q, writer: kl(p, q) if writer == TEACHER else trl_jsd(p, q, beta=0.3),
        ),
        "interventions": ("switch", {"loss__divergence_teacher_tokens": "forward_kl"}, lambda p, q, _: kl(p, q)),
    }[published]  # fmt: skip
    shared = {k: v for k, v in shared.items() if method == "switch" or not k.startswith("rollout")}
    trainer = make_trainer(with_method(folders, method, **shared, **changes), tmp_path / "run")
    with torch.no_grad():  # an adapter that starts at zero would have no gradient in half of its weights
        for parameter in trainer.learner.trainable:
            parameter += 0.02 * torch.randn(parameter.shape, dtype=parameter.dtype)
    rollouts, _ = trainer.supply.roll_out(trainer.supply.loader.next(6))
    sequences = [s for s in trainer.supply.cache_teacher(rollouts) if s.loss_steps]
    loss = trainer.learner.accumulate(sequences)
    found = [p.grad.clone() for p in trainer.learner.trainable]
    expected, gradients = plain_step(trainer, sequences, loss_of)
    assert loss == pytest.approx(expected, rel=1e-9) and loss > 1e-3
    assert max(g.abs().max() for g in gradients) > 1e-4
    for ours, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-10)


def test_the_logged_loss_has_the_language_model_loss_in_it_and_apart(folders, tmp_path):
    from qswitch.data.loader import PassageLoader, load_corpus_tokens

    config = with_method(
        folders, "switch", data__lm_corpus=str(folders[2].parent / "corpus.txt"), loss__lm_passage_tokens=16,
        loss__lm_coefficient=0.25, train__compute_dtype="fp64", train__max_steps=1, train__eval_steps=1,
        train__save_steps=1, rollout__decay_rate=0.5,
    )  # fmt: skip
    distill(config, tmp_path / "run")
    line = RunDir.open(tmp_path / "run").read_metrics()[0]
    trainer = make_trainer(config, tmp_path / "again")  # the same first step, by hand and without the corpus
    sequences = trainer.supply.cache_teacher(trainer.supply.roll_out(trainer.supply.loader.next(4))[0])
    own = trainer.learner.accumulate([s for s in sequences if s.loss_steps])
    tokens = load_corpus_tokens(config.data.lm_corpus, trainer.pair.tokenizer, split="train")
    blocks = PassageLoader(tokens, 16, config.seed).next(4)
    with torch.no_grad():
        log_q = trainer.student.hf(torch.stack(list(blocks))).logits.double().log_softmax(-1)[:, :-1]
        expected = -log_q.gather(-1, torch.stack(list(blocks))[:, 1:, None]).mean().item()
    assert line["lm_loss"] == pytest.approx(expected, rel=1e-9)
    assert line["loss"] == pytest.approx(own + 0.25 * expected, rel=1e-9) and own > 1e-3


def test_every_assistant_turn_of_a_conversation_is_learnt_and_no_user_turn():
    # ids: user 1 2 | assistant 3 4 | user 5 6 7 | assistant (response) 8 9
    prompt = Prompt(0, [1, 2, 3, 4, 5, 6, 7], [8, 9], "text", earlier_turns=((2, 4),))
    sequence = ground_truth_sequence(prompt, 0)
    assert sequence is not None
    assert (sequence.prompt_ids, sequence.response_ids) == ([1, 2], [3, 4, 5, 6, 7, 8, 9])
    assert [sequence.response_ids[step] for step in sequence.loss_steps] == [3, 4, 8, 9]


def test_conversations_train_with_a_divergence_too(folders: tuple[Path, Path, Path], tmp_path):
    data = tmp_path / "turns.jsonl"
    turns = [
        {"messages": [
            {"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"it is {i}"},
            {"role": "user", "content": "again"}, {"role": "assistant", "content": f"still {i}"},
        ]}
        for i in range(12)
    ]  # fmt: skip
    data.write_text("".join(json.dumps(t) + "\n" for t in turns))
    trainer = make_trainer(with_method(folders, "kd", data__train=str(data), data__num_validation=2), tmp_path / "run")
    report = trainer.train_step()
    first = trainer.supply.loader.next(1)[0][0]
    assert first.earlier_turns and report.loss > 0
    assert report.loss_tokens > 4 * len("still 1")
