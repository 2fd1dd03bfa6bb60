#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Source this: makes .venv with the pinned requirements and the project itself, and activates it.
# A second call with the same requirements.txt costs well under a second. PYTHON=... picks the interpreter.

fastdllm_setup_env() {
    local root python stamp wanted
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    python=${PYTHON:-python3}
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "setup_env: the pinned requirements need Python 3.11 or later; set PYTHON=/path/to/python3.11" >&2
        return 1
    fi
    stamp=$root/.venv/requirements.stamp
    # The pins, the project's metadata and the interpreter decide what is installed; anything else is code.
    wanted=$({ cat "$root/requirements.txt" "$root/pyproject.toml" && "$python" --version && echo "$root"; } | sha256sum | cut -d " " -f 1)
    if [[ ! -f $stamp || $(<"$stamp") != "$wanted" ]]; then
        echo "setup_env: installing into .venv (several minutes the first time)" >&2
        if [[ ! -x $root/.venv/bin/python ]] && ! "$python" -m venv "$root/.venv"; then
            echo "setup_env: no venv module; on Debian and Ubuntu: apt-get install python3-venv" >&2
            return 1
        fi
        local pip=("$root/.venv/bin/python" -m pip --quiet --disable-pip-version-check)
        # torch goes first and alone: once it is there, no other package's open range can bring a second build.
        "${pip[@]}" install "$(head -n 1 "$root/requirements.txt")" || return 1
        "${pip[@]}" install --requirement "$root/requirements.txt" || return 1
        "${pip[@]}" install --no-deps --no-build-isolation --editable "$root" || return 1
        echo "$wanted" >"$stamp"
    fi
    source "$root/.venv/bin/activate"
}

fastdllm_setup_env || { unset -f fastdllm_setup_env; return 1 2>/dev/null || exit 1; }
unset -f fastdllm_setup_env
