"""One thread per test process, before torch is imported: models of the tests are so small that threads cost more than
they give, and `make test` runs one process per core.

What has been imported is frozen, as Python calls it: a run collects its garbage some twenty times, and each time looked
at the million objects of torch and transformers, which took more than half of the time of all tests.

No test depends on what its machine and user keep: the folders of qswitch and Hugging Face are those of one session of
tests, shared by its processes and their children, and HF_ variables from outside are taken away. Nor on a network: a
test whose process looks up another machine fails, whatever it makes of the answer; its children are not watched.
"""

import gc
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_session_folder: Path | None = None
if "PYTEST_XDIST_WORKER" not in os.environ:  # a worker has the environment of the process that starts it
    assert "huggingface_hub" not in sys.modules, "it has read HF_HOME already"
    _session_folder = Path(tempfile.mkdtemp(prefix="qswitch-tests-"))
    for name in [name for name in os.environ if name.startswith("HF_")]:
        del os.environ[name]
    os.environ |= {
        "HF_HOME": str(_session_folder / "huggingface"),
        "HF_HUB_OFFLINE": "1",  # for children too; a test with a hub of its own switches it off (tests/hub.py)
        "QSWITCH_CACHE": str(_session_folder / "qswitch"),
    }


def pytest_unconfigure() -> None:
    if _session_folder is not None:
        shutil.rmtree(_session_folder, ignore_errors=True)


_asked_for: list[str] = []
_look_up = socket.getaddrinfo


def _look_up_only_this_machine(host: Any, *args: Any, **kwargs: Any) -> Any:
    name = host.decode() if isinstance(host, bytes) else host
    if name in (None, "", "localhost", "::1", socket.gethostname()) or name.startswith("127."):
        return _look_up(host, *args, **kwargs)
    _asked_for.append(name)
    raise socket.gaierror(socket.EAI_NONAME, f"tests look up no other machine, such as {name}")


socket.getaddrinfo = _look_up_only_this_machine


@pytest.fixture(autouse=True)
def looked_up() -> Iterator[list[str]]:
    """Hosts that the test has looked up: none, also where a thread did, or a library took the failure for an answer."""
    yield _asked_for
    hosts = sorted(set(_asked_for))
    _asked_for.clear()
    assert not hosts, f"this test asked for {', '.join(hosts)}; with a network it might do something else"


SLOWEST_FIRST = (
    "rollout/test_engines.py", "compare/test_compare.py", "distill/test_processes.py", "models/test_families.py",
    "rollout/test_hybrids.py", "distill/test_pretended_device.py", "test_docs.py", "distill/test_recovery.py",
    "distill/test_residency_runs.py", "distill/test_trainer.py", "distill/test_training_by_method.py",
    "distill/test_checkpoint.py", "distill/test_not_finite.py", "distill/test_stored_teacher.py",
    "distill/test_supply.py", "evaluate/test_evaluate.py", "test_bad_inputs.py", "test_rules.py",
)  # fmt: skip
"""Files of more than ten seconds, so that none of them is left to one worker at the end (`--no-loadscope-reorder`)."""
MODULES_BETWEEN_FREEZES = 20
_frozen_modules = 0


def freeze_what_is_imported() -> None:
    """Take what is alive now out of every later garbage collection."""
    global _frozen_modules
    gc.collect()
    gc.freeze()
    _frozen_modules = len(sys.modules)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    gc.disable()  # imports make much that stays, and next to nothing to collect
    try:
        return (yield)
    finally:
        freeze_what_is_imported()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file of `SLOWEST_FIRST` comes before all others; the rest stays as it was collected."""
    tests = Path(__file__).parent
    order = {tests / name: place for place, name in enumerate(SLOWEST_FIRST)}
    assert all(path.is_file() for path in order), "SLOWEST_FIRST names a file that is no more"
    items.sort(key=lambda item: order.get(item.path, len(order)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Transformers imports each model's module when it is first asked for, so once is not enough."""
    if len(sys.modules) >= _frozen_modules + MODULES_BETWEEN_FREEZES:
        freeze_what_is_imported()
