"""One thread per test process, before torch is imported: models of the tests are so small that threads cost more than
they give, and `make test` runs one process per core."""

import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
