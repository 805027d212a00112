"""ndtrain: train any Hugging Face causal LM with N-D parallelism."""

import sys

__version__ = "0.1.0"

# Before anything is imported that an older Python lacks or that was never installed for it.
if sys.version_info < (3, 11):  # noqa: UP036
    found = ".".join(map(str, sys.version_info[:3]))
    print(f"ndtrain: error: needs Python 3.11 or later; this is {found} ({sys.executable})", file=sys.stderr)
    raise SystemExit(2)
