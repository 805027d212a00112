#!/usr/bin/env bash
# Everything that CI checks: bash launch/test.sh [pytest arguments]
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
lint-imports
# The types are checked beside the tests, whose ranks wait for one another much of the time; what is said of them comes
# last, and only where something is wrong.
types="$(mktemp)"
mypy ndtrain >"$types" 2>&1 &
checking=$!
trap 'kill "$checking" 2>/dev/null || true; rm -f "$types"' EXIT
result=0
pytest -q "$@" || result=$?
if ! wait "$checking"; then
    cat "$types"
    result=1
fi
exit "$result"
