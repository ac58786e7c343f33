"""Whether this machine can distil: versions, GPU, memory, 4-bit arithmetic, the hub. Cold until `examine` runs."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from qswitch.errors import ConfigError
from qswitch.hub import forbidden_by, has_token
from qswitch.units import GIB

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "gguf")
HUB_TIMEOUT_S = 3.0


def examine() -> dict[str, Any]:
    """Findings by name; a finding that went wrong holds the reason as text."""
    import torch

    from qswitch.models.runtime import native_dtype, unusable_gpu
    from qswitch.plan.machine import detect_budget_bytes

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    free_gib: float | None = None
    try:
        budget, source = detect_budget_bytes()
        free_gib = round(budget / GIB, 1)
    except ConfigError as error:
        source = str(error)
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": {name: _version(name) for name in PACKAGES},
        "gpu": unusable_gpu(),
        "device": torch.cuda.get_device_name(0) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "compute_dtype": str(native_dtype(device)).removeprefix("torch."),
        "free_gib": free_gib,
        "free_source": source,
        "bitsandbytes": _try_nf4(device),
        "hub": _try_hub(),
    }


def render(findings: dict[str, Any]) -> str:
    """Findings as aligned lines."""
    versions = ", ".join(f"{name} {number or 'missing'}" for name, number in findings["versions"].items())
    dtype, free = findings["compute_dtype"], findings["free_gib"]
    bf16 = {"bfloat16": "yes", "float16": "no: models compute in fp16, with loss scaling"}.get(
        dtype, "no: models compute in fp32"
    )
    lines = {
        "python": f"{findings['python']} on {findings['system']}",
        "packages": versions,
        "device": findings["device"] + (f"; {findings['gpu']}" if findings["gpu"] else ""),
        "native bf16": bf16,
        "free memory": findings["free_source"] if free is None else f"{free} GiB ({findings['free_source']})",
        "4-bit (NF4)": findings["bitsandbytes"],
        "hub": findings["hub"],
    }
    return "\n".join(f"{name:<12} {text}" for name, text in lines.items())


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _try_nf4(device: Any) -> str:
    """Quantise and run one small layer for real; importing bitsandbytes proves little."""
    import torch

    try:
        import bitsandbytes as bnb

        torch.manual_seed(0)
        plain = torch.nn.Linear(64, 64, bias=False)
        layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
        layer.load_state_dict(plain.state_dict())
        layer = layer.to(device)
        inputs = torch.randn(4, 64)
        with torch.no_grad():
            error = (layer(inputs.to(device)).cpu() - plain(inputs)).norm() / plain(inputs).norm()
    except Exception as failure:  # whatever the driver or the library raises is the finding
        return f"does not work: {type(failure).__name__}: {failure}"
    return f"works (relative error of a random layer {error:.1%})"


def _try_hub() -> str:
    import os

    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if (variable := forbidden_by()) is not None:
        return f"switched off by {variable}"
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(f"{endpoint}/api/models?limit=1", timeout=HUB_TIMEOUT_S):
            pass
    except ValueError:  # urllib takes no address without a scheme
        return f"HF_ENDPOINT={endpoint} is no address. Write it with its scheme, as https://..."
    except (OSError, urllib.error.URLError) as failure:
        return f"{endpoint} not reachable ({failure}); local folders and package: references still work"
    token = "with a token" if has_token() else "no token (only gated models need one: HF_TOKEN, or hf auth login)"
    return f"{endpoint} reachable; {token}"
