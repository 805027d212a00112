#!/usr/bin/env bash
# Run everything that CI checks: bash launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
if [ -n "${CI:-}" ] && [ "$(id -u)" = 0 ] && ! command -v chromedriver >/dev/null && command -v apt-get >/dev/null; then
    # The tests of the page need a browser. Outside CI none is installed, and without one they are skipped.
    apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null ||
        echo "launch/test.sh: could not install chromium; the tests that need it are skipped" >&2
fi
export OMP_NUM_THREADS=1

ruff format --check .
ruff check .
lint-imports
# mypy runs beside the tests, whose ranks often wait for one another; its output comes last, and only if it fails.
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
