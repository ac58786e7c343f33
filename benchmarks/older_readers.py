"""Does an older transformers read a written folder to the same logits, with and without the keys added for it?

    pip install --no-deps --target OLDER transformers==4.57.6 tokenizers==0.22.2 'huggingface_hub<1'
    python -m benchmarks.older_readers --packages OLDER --output benchmarks/results/older_readers.json

A tiny random model of every family of the tests, with positions that are not the default ones, is written here and read
by a second Python in which the packages of OLDER come first. "without" is the folder as transformers 5 writes it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.provenance import publish
from qswitch.models.older_readers import add_older_keys
from tests.families import CHANGES
from tests.tiny import ARCHITECTURES, tiny_config, tiny_model, tiny_tokenizer

FAMILIES = (*ARCHITECTURES, "llama3", "qwen3", "gemma3", "phi3", "phi", "cohere", "granite", *CHANGES)
SAME = 1e-4
"""Largest difference of logits that two versions' arithmetic makes; without the keys it is 0.01 and more."""
IDS = [5, 9, 33, 21, 7, 8, 40, 41, 12, 3, 9, 17, 25, 26, 6, 60, 31, 22, 14, 5, 7, 9] * 3
READER = """
import json, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch, transformers
transformers.logging.set_verbosity_error()
folder, found = Path(sys.argv[2]), {"transformers": transformers.__version__}
ids = torch.load(folder / "ids.pt")
for model in sorted(p for p in folder.iterdir() if p.is_dir()):
    one = found[model.name] = {}
    try:
        hf = transformers.AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
        with torch.no_grad():
            logits = hf(input_ids=ids, use_cache=False).logits
        one["difference"] = float((logits - torch.load(model / "logits.pt")).abs().max())
    except Exception as error:
        one["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        one["tokenizer"] = set(tokenizer("a", return_tensors="pt")) == {"input_ids", "attention_mask"}
    except Exception as error:
        one["tokenizer"] = False
(folder / "found.json").write_text(json.dumps(found))
"""


def write_family(arch: str, folder: Path) -> None:
    """FOLDER/ARCH.with and FOLDER/ARCH.without: one model whose rotary base is 3.7 times the family's own."""
    config = tiny_config(arch)
    rope = getattr(config, "rope_parameters", None)
    changes: dict[str, Any] = {}
    if isinstance(rope, dict):
        for one in [value for value in rope.values() if isinstance(value, dict)] or [rope]:
            one["rope_theta"] = 3.7 * one.get("rope_theta", 10_000.0)
        changes["rope_parameters"] = rope
    model = tiny_model(arch, **changes)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([IDS]), use_cache=False).logits
    plain = folder / f"{arch}.without"
    model.save_pretrained(plain)
    tiny_tokenizer().save_pretrained(plain)
    torch.save(logits, plain / "logits.pt")
    shutil.copytree(plain, folder / f"{arch}.with")
    add_older_keys(folder / f"{arch}.with")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder of the older packages")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        torch.save(torch.tensor([IDS]), folder / "ids.pt")
        left_out = {}
        for arch in FAMILIES:
            try:
                write_family(arch, folder)
            except (KeyError, ValueError) as error:
                left_out[arch] = str(error)
        subprocess.run([sys.executable, "-c", READER, str(arguments.packages.resolve()), work], check=True)
        found = json.loads((folder / "found.json").read_text(encoding="utf-8"))
    version = found.pop("transformers")
    known = [arch for arch in FAMILIES if "does not recognize" not in found.get(f"{arch}.with", {}).get("error", "")]
    known = [arch for arch in known if arch not in left_out]

    def same(kind: str) -> list[str]:
        return [arch for arch in known if found[f"{arch}.{kind}"].get("difference", 1) <= SAME]

    result = {
        "transformers": version,
        "families_known_to_it": len(known),
        "same_logits": {kind: len(same(kind)) for kind in ("with", "without")},
        "not_the_same_with_keys": {a: found[f"{a}.with"] for a in known if a not in same("with")},
        "tokenizers_read": {k: sum(found[f"{a}.{k}"]["tokenizer"] for a in known) for k in ("with", "without")},
        "left_out": left_out,
        "folders": found,
    }
    publish(result, arguments.output)


if __name__ == "__main__":
    main()
