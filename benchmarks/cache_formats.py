"""What does each cache format lose against the teacher's exact logits, and how many bytes does a token take?

    python -m benchmarks.cache_formats --teacher DIR --student DIR --output benchmarks/results/cache_formats.json

Two cases. `pair`: a real teacher and student over the repository's demo prompts, every position. `vocab_128k`: made-up
logits in the shape of Llama 3 (128,256 ids, Zipf-like bias, a few nats of entropy), for the bytes and to see how the
error moves with the vocabulary. Both store what a run stores: the teacher's final hidden state in bf16, or its largest
log-probabilities. KL(exact || stored) needs stored logits, so for topk, which keeps events, and for hidden beside it,
the error of the loss itself is given: divergence from the student with stored outputs minus that with exact ones.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.provenance import publish
from qswitch.distill.cache_format import FORMATS, LogitTargets
from qswitch.distill.logit_cache import LogitCache
from qswitch.distill.sequence import TrainingSequence
from qswitch.divergence import divergence, topk_divergence

PROMPTS = Path(__file__).resolve().parents[1] / "qswitch" / "data" / "demo_prompts.jsonl"
DIVERGENCES = ("forward_kl", "skew_reverse_kl")


@torch.no_grad()
def compare(hidden: Tensor, head: Any, student_logits: Tensor, topk: int) -> dict[str, Any]:
    """Every format over the teacher's hidden states [N, D] and the student's logits [N, V]."""
    exact = head(hidden).double()
    log_p = exact.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    wanted = {name: divergence(name, exact, student_logits.double(), alpha=0.1) for name in DIVERGENCES}
    result: dict[str, Any] = {
        "positions": len(hidden),
        "vocab": exact.shape[-1],
        "teacher_entropy_nats": round(float(entropy.mean()), 4),
        "divergence_nats": {name: round(float(v.mean()), 5) for name, v in wanted.items()},
        "formats": {},
    }
    sequences = [TrainingSequence(0, 0, [0], [0] * len(hidden), list(range(len(hidden))))]
    for format in FORMATS:
        cache = LogitCache(
            format, head=head, vocab_size=exact.shape[-1], device=hidden.device, dtype=torch.bfloat16,
            device_budget_bytes=1 << 40, host_budget_bytes=0, disk_path=None, topk=topk,
        )  # fmt: skip
        # In a run that computes in bf16 hidden states are bf16 already; here they are fp32 and lose it in the cache.
        cache.put(sequences, hidden)
        targets = cache.get(sequences).chunk(0, len(hidden), hidden.device) if format != "hidden" else LogitTargets(
            head(hidden.bfloat16().to(hidden.dtype))
        )  # fmt: skip
        found: dict[str, Any] = {"bytes_per_token": cache.stats()["device_bytes"] // len(hidden)}
        if isinstance(targets, LogitTargets):
            kl = (log_p.exp() * (log_p - targets.logits.double().log_softmax(-1))).sum(-1)
            found["kl_nats"] = {"mean": float(kl.mean()), "max": float(kl.max())}
        errors = {}
        for name in DIVERGENCES:
            if isinstance(targets, LogitTargets):
                got = divergence(name, targets.logits.double(), student_logits.double(), alpha=0.1)
            else:
                got = topk_divergence(
                    name, targets.log_probs.double(), targets.ids, student_logits.double(),
                    teacher_tail_log_prob=targets.tail_log_prob.double(), alpha=0.1,
                )  # fmt: skip
            difference = got - wanted[name]
            errors[name] = {
                "mean_nats": float(difference.mean()),
                "mean_share": float(difference.mean() / wanted[name].mean()),
                "max_abs_nats": float(difference.abs().max()),
            }
        found["loss_error"] = errors
        result["formats"][format] = found
    return result


@torch.no_grad()
def pair_case(teacher_path: str, student_path: str, num_prompts: int, topk: int) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(teacher_path)
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32).eval() for p in (teacher_path, student_path)
    )
    lines = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()[:num_prompts]]
    hidden, student_logits = [], []
    for line in lines:
        messages = [{"role": "user", "content": "\n".join(filter(None, (line["instruction"], line["input"])))}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
        torch.manual_seed(0)
        ids = teacher.generate(ids, max_new_tokens=24, do_sample=True, top_k=0, pad_token_id=tokenizer.eos_token_id)
        hidden.append(teacher.base_model(ids).last_hidden_state[0])
        student_logits.append(student(ids).logits[0])
    return compare(torch.cat(hidden), teacher.get_output_embeddings(), torch.cat(student_logits), topk)


@torch.no_grad()
def synthetic_case(topk: int, positions: int = 48, vocab: int = 128256, width: int = 2048) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    ranks = torch.arange(1, vocab + 1, dtype=torch.float32)
    bias = -1.0 * ranks.log()[torch.randperm(vocab, generator=generator)]
    weight = torch.randn(vocab, width, generator=generator) / width**0.5
    hidden = 3.0 * torch.randn(positions, width, generator=generator)

    def head(states: Tensor) -> Tensor:
        return states @ weight.T + bias

    student_logits = head(hidden + 1.0 * torch.randn(positions, width, generator=generator))
    return compare(hidden, head, student_logits, topk)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--teacher", help="folder of a real teacher; without it only the made-up case runs")
    parser.add_argument("--student", help="folder of a student with the same tokenizer")
    parser.add_argument("--label", default="", help="what the pair is, for the result")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--topk", type=int, default=64)
    parser.add_argument("--output", type=Path, help="also write the JSON there")
    args = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "cache_formats", "topk": args.topk, "pair_label": args.label}
    if args.teacher and args.student:
        result["pair"] = pair_case(args.teacher, args.student, args.prompts, args.topk)
    result["vocab_128k"] = synthetic_case(args.topk)
    publish(result, args.output)


if __name__ == "__main__":
    main()
