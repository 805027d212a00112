#!/usr/bin/env bash
# Everything that CI checks, stopping at the first failure: bash launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
export OMP_NUM_THREADS=1

ruff format --check .
ruff check .
mypy ndtrain
lint-imports
pytest -q "$@"
