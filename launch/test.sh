#!/usr/bin/env bash
# Everything that CI checks, stopping at the first failure: bash launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
if [ -n "${CI:-}" ] && [ "$(id -u)" = 0 ] && ! command -v chromedriver >/dev/null && command -v apt-get >/dev/null; then
    # The tests of the page need a browser; a person's machine is left as it is, and they are skipped there.
    apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null ||
        echo "launch/test.sh: no chromium could be installed; the tests that need it are skipped" >&2
fi
export OMP_NUM_THREADS=1

ruff format --check .
ruff check .
mypy ndtrain
lint-imports
pytest -q "$@"
