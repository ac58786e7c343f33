"""What a configuration must not inherit: settings that describe a model or an adapter which another has replaced.

Cold, and knows only nested plain values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ROLES = ("teacher", "student")


def forget_replaced(below: Mapping[str, Any], above: Mapping[str, Any], *, shapes: bool = True) -> dict[str, Any]:
    """`below` without what `above` makes meaningless.

    A shape block describes the model it stands beside, so it goes when `above` names another model and no shape of its
    own. Adapter settings go when `above` takes the adapter away and says nothing of them.

    Args:
        shapes: whether shapes go; the shipped twins are the same model under another name, and keep theirs.
    """
    kept = dict(below)
    for role in ROLES:
        old, new = below.get(role), above.get(role)
        if not isinstance(old, Mapping) or not isinstance(new, Mapping):
            continue
        gone = set()
        if shapes and "shape" not in new and "model" in new and new["model"] != old.get("model"):
            gone.add("shape")
        if role == "student" and new.get("adapter") == "none" and "lora" not in new:
            gone.add("lora")
        if gone:
            kept[role] = {key: value for key, value in old.items() if key not in gone}
    return kept
