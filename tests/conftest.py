"""One thread per test process, before torch is imported: models of the tests are so small that threads cost more than
they give, and `make test` runs one process per core.

What has been imported is frozen, as Python calls it: a run collects its garbage some twenty times, and each time looked
at the million objects of torch and transformers, which took more than half of the time of all tests.
"""

import gc
import os
import sys
from collections.abc import Iterator

import pytest

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

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


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Transformers imports each model's module when it is first asked for, so once is not enough."""
    if len(sys.modules) >= _frozen_modules + MODULES_BETWEEN_FREEZES:
        freeze_what_is_imported()
