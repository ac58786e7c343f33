"""What does the chunked loss save against the dense one, and what does it cost in time?

    python -m benchmarks.chunked_loss                                   # bytes at full size, time at a small one
    python -m benchmarks.chunked_loss --timed-positions 2048 --timed-vocab 128256 --timed-width 2048

Both sides run the same divergence over the same frozen heads, forward and backward to the student's hidden states;
dense holds the logits of all positions, chunked those of `--chunk-tokens`. Live tensor bytes are counted by a dispatch
mode on the meta device, so the full size needs neither the memory nor the time; kernels' internal workspaces are not
seen. Weights and inputs are made outside and not counted; the teacher's logits are counted in one of two figures.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.live_bytes import LiveBytes
from benchmarks.provenance import publish
from qswitch.distill.logit_cache import Targets
from qswitch.distill.loss import chunked_divergence
from qswitch.divergence import DIVERGENCES, divergence

Loss = Callable[[Tensor], Tensor]


class Case:
    """Frozen heads, teacher and student hidden states of one size, and the loss in both forms."""

    def __init__(self, args: argparse.Namespace, positions: int, vocab: int, width: int, device: torch.device) -> None:
        dtype = getattr(torch, args.dtype)
        self.args, self.positions = args, positions
        torch.manual_seed(0)
        self.head = nn.Linear(width, vocab, bias=False, device=device, dtype=dtype).requires_grad_(False)
        self.teacher_head = nn.Linear(width, vocab, bias=False, device=device, dtype=dtype).requires_grad_(False)
        self.hidden = (2.0 * torch.randn(positions, width, device=device, dtype=dtype)).requires_grad_()
        self.teacher_hidden = 2.0 * torch.randn(positions, width, device=device, dtype=dtype)
        self.score: Callable[[Tensor], Tensor] = self.teacher_head

    def dense(self, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_logits = self.score(self.teacher_hidden)
        return divergence(self.args.divergence, teacher_logits, self.head(hidden)).sum() / self.positions

    def chunked(self, hidden: Tensor) -> Tensor:
        return chunked_divergence(
            hidden,
            self.head,
            Targets.from_hidden(self.teacher_hidden, self.score),
            name=self.args.divergence,
            alpha=0.1,
            beta=0.5,
            temperature=1.0,
            normalizer=float(self.positions),
            chunk_tokens=self.args.chunk_tokens,
        )


def live_bytes(case: Case, loss: Loss, *, with_targets: bool) -> dict[str, int]:
    """Peak live bytes of one forward and backward pass, and the largest single tensor."""
    case.hidden.grad = None
    with LiveBytes() as mode:

        def score(hidden: Tensor) -> Tensor:
            if with_targets:
                return case.teacher_head(hidden)
            with mode.paused():
                return case.teacher_head(hidden)

        case.score = score
        loss(case.hidden).backward()
    case.score = case.teacher_head
    case.hidden.grad = None
    return {"peak_bytes": mode.peak_bytes, "largest_tensor_bytes": mode.largest_bytes}


def seconds(case: Case, loss: Loss) -> tuple[float, Tensor, Tensor]:
    case.hidden.grad = None
    if case.hidden.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    value = loss(case.hidden)
    value.backward()
    if case.hidden.device.type == "cuda":
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - start
    assert case.hidden.grad is not None
    return elapsed, value.detach(), case.hidden.grad


def measure_bytes(args: argparse.Namespace) -> dict[str, Any]:
    case = Case(args, args.positions, args.vocab, args.width, torch.device("meta"))
    result: dict[str, Any] = {"positions": args.positions, "vocab": args.vocab, "width": args.width}
    for with_targets, name in ((False, "targets_apart"), (True, "targets_counted")):
        dense = live_bytes(case, case.dense, with_targets=with_targets)
        chunked = live_bytes(case, case.chunked, with_targets=with_targets)
        share = chunked["peak_bytes"] / dense["peak_bytes"]
        result[name] = {"dense": dense, "chunked": chunked, "chunked_share_of_dense": round(share, 4)}
    head_bytes = case.head.weight.numel() * case.head.weight.element_size()
    largest = result["targets_counted"]["chunked"]["largest_tensor_bytes"]
    result["frozen_head_gradient_buffer"] = largest >= head_bytes
    return result


def measure_time(args: argparse.Namespace) -> dict[str, Any]:
    case = Case(args, args.timed_positions, args.timed_vocab, args.timed_width, torch.device(args.device))
    times: dict[str, list[float]] = {"dense": [], "chunked": []}
    gradients, values = {}, {}
    # Taken in turns, so that a change of the machine's load meets both.
    for repeat in range(args.repeats + args.warmup):
        for name, loss in (("dense", case.dense), ("chunked", case.chunked)):
            elapsed, values[name], gradients[name] = seconds(case, loss)
            if repeat >= args.warmup:
                times[name].append(elapsed)
    scale = gradients["dense"].abs().max()
    return {
        "positions": args.timed_positions,
        "vocab": args.timed_vocab,
        "width": args.timed_width,
        "seconds": {name: [round(t, 4) for t in all_times] for name, all_times in times.items()},
        "chunked_over_dense": round(min(times["chunked"]) / min(times["dense"]), 4),
        "value_relative_difference": float((values["chunked"] - values["dense"]).abs() / values["dense"].abs()),
        "gradient_relative_difference": float((gradients["chunked"] - gradients["dense"]).abs().max() / scale),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    for name, default in (("positions", 2048), ("vocab", 128256), ("width", 2048)):
        parser.add_argument(f"--{name}", type=int, default=default, help="size of the count of bytes")
    for name, default in (("positions", 512), ("vocab", 16032), ("width", 512)):
        parser.add_argument(f"--timed-{name}", type=int, default=default, help="size of the measurement of time")
    parser.add_argument("--chunk-tokens", type=int, default=128)
    parser.add_argument("--divergence", choices=DIVERGENCES, default="skew_reverse_kl")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float64"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--output", type=Path, help="also write the JSON there")
    args = parser.parse_args()
    result = {
        "benchmark": "chunked_loss",
        "divergence": args.divergence,
        "chunk_tokens": args.chunk_tokens,
        "dtype": args.dtype,
        "bytes": measure_bytes(args),
        "time": measure_time(args),
    }
    publish(result, args.output, args.device)


if __name__ == "__main__":
    main()
