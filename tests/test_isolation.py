"""What tests/conftest.py promises: no test reads this user's caches, and none looks up another machine unseen."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

FOLDERS = """
import os
from huggingface_hub import constants
from qswitch.hub import hub_cache
print(constants.HF_HUB_CACHE, hub_cache(), os.environ["QSWITCH_CACHE"], constants.HF_HUB_OFFLINE)
"""


def test_tests_and_their_children_keep_nothing_in_the_home_folder():
    from huggingface_hub import constants

    from qswitch.hub import hub_cache
    from qswitch.models.gguf_cache import cache_folder

    home = Path(os.environ["HF_HOME"])
    ours = [constants.HF_HUB_CACHE, str(hub_cache()), str(cache_folder()), str(constants.HF_HUB_OFFLINE)]
    assert ours == [str(home / "hub"), str(home / "hub"), str(home.parent / "qswitch"), "True"]
    assert Path.home() / ".cache" not in home.parents
    child = subprocess.run([sys.executable, "-c", FOLDERS], capture_output=True, text=True, check=True, timeout=120)
    assert child.stdout.split() == ours


def test_another_machine_is_not_looked_up_and_this_one_is(looked_up: list[str]):
    with pytest.raises(OSError, match=r"such as hub\.example"):
        socket.create_connection(("hub.example", 443), timeout=1)
    assert looked_up == ["hub.example"]
    looked_up.clear()  # else this test fails
    assert socket.getaddrinfo("localhost", 80) and socket.getaddrinfo("127.0.0.1", 80)
    assert looked_up == []
