"""Is a narrower MLP in every layer a better cut than fewer layers, at the same number of parameters?

    python -m benchmarks.mlp_width MODEL --data FILE.jsonl --output results/mlp_width-NAME.json

Of every MLP the hidden units go whose activation, times the norm of their column of the down projection, has the
smallest mean square on this project's calibration examples; `refitted` solves the down projection of those that stay
anew by least squares on the same examples. KL(whole || cut) is measured as in benchmarks/shrink.py, whose results say
what the same number of parameters costs in layers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.provenance import publish
from benchmarks.shrink import response_row
from qswitch.models.decoder_layers import LayerStack, computing_in_fp32, find_layers
from qswitch.models.layer_choice import calibration, scored_rows
from qswitch.models.load import read_model, read_tokenizer
from qswitch.models.references import resolve_reference
from qswitch.models.runtime import Runtime

RIDGE_SHARE = 0.1
"""Of the mean square of an activation, added to the diagonal of the least squares."""


def activations(hf: Any, rows: list[tuple[int, ...]]) -> list[Tensor]:
    """What each layer's down projection reads, [tokens, width]."""
    _, layers = find_layers(hf)
    found: list[list[Tensor]] = [[] for _ in layers]
    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args, i=i: found[i].append(args[0].flatten(0, 1)))
        for i, layer in enumerate(layers)
    ]
    for ids in rows:
        hf.base_model(input_ids=torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return [torch.cat(one) for one in found]


def narrowed(weight: Tensor, read: Tensor, keep: int, *, refit: bool) -> Tensor:
    """The down projection [D, width] with zeros for the units that go."""
    mean_square = read.square().mean(dim=0)
    kept = (mean_square * weight.square().sum(dim=0)).topk(keep).indices.sort().values
    new = torch.zeros_like(weight)
    new[:, kept] = weight[:, kept]
    if refit:
        gram = read[:, kept].T @ read
        ridge = RIDGE_SHARE * gram[:, kept].diagonal().mean() * torch.eye(keep)
        # Towards the old columns: what the units that went had contributed is spread over those that stay.
        gone = weight.clone()
        gone[:, kept] = 0
        new[:, kept] += torch.linalg.solve(gram[:, kept] + ridge, gram @ gone.T).T
    return new


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True, help="held-out records, jsonl")
    parser.add_argument("--records", type=int, default=8)
    parser.add_argument("--share", type=float, action="append", help="share of the units that go, repeatable")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    resolved = resolve_reference(args.model, None)
    tokenizer = read_tokenizer(resolved)
    hf = read_model(resolved, Runtime(device=torch.device("cpu"), compute_dtype=torch.float32), "fp32")
    _, layers = find_layers(hf)
    records = [json.loads(line) for line in args.data.read_text(encoding="utf-8").splitlines()[: args.records]]
    held_out = [row for record in records if (row := response_row(tokenizer, record)) is not None]
    per_layer = sum(p.numel() for p in layers[0].parameters())
    results = []
    with computing_in_fp32(hf):
        read = activations(hf, [row.ids for row in scored_rows(tokenizer, calibration("choose"))])
        stack = LayerStack(hf, held_out, max_positions=sum(len(row.ids) for row in held_out))
        for share in args.share or [0.1, 0.25, 0.5]:
            for refit in (False, True):
                whole = [layer.mlp.down_proj.weight.data for layer in layers]
                width = whole[0].shape[1]
                keep = round(width * (1 - share))
                for layer, activation in zip(layers, read, strict=True):
                    weight = layer.mlp.down_proj.weight
                    weight.data = narrowed(weight.data, activation, keep, refit=refit)
                kl = stack.kl_nats(stack.through(range(len(stack)), stack.states[0])[len(stack)])
                for layer, weight in zip(layers, whole, strict=True):
                    layer.mlp.down_proj.weight.data = weight
                gone = (width - keep) * 3 * whole[0].shape[0] * len(layers)
                results.append(
                    {
                        "units_gone": share,
                        "refitted": refit,
                        "kl_nats": round(kl, 4),
                        "parameters_gone": gone,
                        "as_many_as_layers": round(gone / per_layer, 2),
                    }
                )
                print(results[-1], flush=True)
    publish(
        {
            "model": resolved.name,
            "data": args.data.name,
            "held_out_tokens": stack.num_positions,
            "calibration_tokens": int(read[0].shape[0]),
            "results": results,
        },
        args.output,
    )


if __name__ == "__main__":
    main()
