# Sourced by the launch scripts: makes .venv beside this directory, installs ndtrain into it, puts it on PATH.
# NDTRAIN_PYTHON names the interpreter (3.11 or later) that makes the venv.

ndtrain_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export HOME="${HOME:-/tmp}"

ndtrain_find_python() {
    local candidate
    for candidate in ${NDTRAIN_PYTHON:-} python3.13 python3.12 python3.11 python3; do
        if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "launch/setup.sh: found no Python 3.11 or later with venv; set NDTRAIN_PYTHON to one" >&2
    return 1
}

ndtrain_setup() {
    local venv="$ndtrain_root/.venv" stamp python wanted
    if [ ! -x "$venv/bin/python" ]; then
        python="$(ndtrain_find_python)" || return 1
        echo "== making $venv" >&2
        "$python" -m venv "$venv" || return 1
    fi
    stamp="$venv/.ndtrain-installed"
    # Includes the checkout's path, since an editable install points at it.
    wanted="$(cat "$ndtrain_root/pyproject.toml" <(echo "$ndtrain_root") | cksum)"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "== installing ndtrain and its dependencies (takes minutes the first time)" >&2
        if ! command -v nvidia-smi >/dev/null 2>&1; then
            # Without an NVIDIA GPU pin this version, because with the newest pip downloads gigabytes of CUDA.
            if ! "$venv/bin/python" -c 'import torch, sys; sys.exit(torch.__version__.split("+")[0] != "2.13.0")' \
                2>/dev/null; then
                "$venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.13.0 || return 1
            fi
        fi
        (cd "$ndtrain_root" && "$venv/bin/pip" install -q --no-compile --disable-pip-version-check -e '.[dev]') || return 1
        # pip compiles on one core only; ignore errors, since some packages contain files that do not compile
        "$venv/bin/python" -m compileall -qq -j 0 "$venv/lib" || true
        echo "$wanted" >"$stamp"
    fi
    export PATH="$venv/bin:$PATH" VIRTUAL_ENV="$venv"
}

ndtrain_setup || return 1
