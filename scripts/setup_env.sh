#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Source this: makes .venv with the project and the pinned versions of requirements.txt, and activates it.
#   source scripts/setup_env.sh [EXTRAS]     EXTRAS of pyproject.toml, by commas; default: dev, which is all of them
# A second call with the same files costs well under a second. PYTHON=... picks the interpreter (3.10 or later).
# CONSTRAINTS=... names another file of pins than requirements.txt; its torch== lines are installed first.
# uv installs, faster than pip; where it is not found, pip brings it. What uv cannot install, pip does. uv takes the
# build of torch that fits the machine, from PyTorch's own index.

# What pip is told by its variables holds for uv too. Away from pyproject.toml: what it says to uv (that torch needs no CUDA
# libraries) is for scripts/lock.sh.
fastdllm_install() {
    if [[ -n $uv ]]; then
        env ${PIP_INDEX_URL:+UV_DEFAULT_INDEX="$PIP_INDEX_URL"} ${PIP_FIND_LINKS:+UV_FIND_LINKS="$PIP_FIND_LINKS"} \
            ${PIP_CERT:+SSL_CERT_FILE="$PIP_CERT"} \
            "$uv" pip install --quiet --directory / --python "$root/.venv/bin/python" "$@" && return
        echo "setup_env: uv could not install $*; going on with pip" >&2
    fi
    "${pip[@]}" "$@"
}

fastdllm_setup_env() {
    local root python extras pins stamp wanted torch pip uv
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    python=${PYTHON:-python3} extras=${1:-dev} pins=${CONSTRAINTS:-$root/requirements.txt}
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "setup_env: Python 3.10 or later is needed; set PYTHON=/path/to/python3" >&2
        return 1
    fi
    if [[ ! -f $pins ]]; then
        echo "setup_env: CONSTRAINTS=$pins is not a file" >&2
        return 1
    fi
    # The pins, the project's metadata and the interpreter decide what is installed; anything else is code.
    wanted=$({ cat "$pins" "$root/pyproject.toml" && "$python" --version && echo "$root"; } | sha256sum | cut -d " " -f 1)
    stamp=$root/.venv/$wanted
    if [[ ! -f $stamp.dev && ! -f $stamp.$extras ]]; then
        echo "setup_env: installing into .venv (a few minutes the first time)" >&2
        if [[ ! -x $root/.venv/bin/python ]] && ! "$python" -m venv "$root/.venv"; then
            echo "setup_env: no venv module; on Debian and Ubuntu: apt-get install python3-venv" >&2
            return 1
        fi
        # Not compiled here: most of what is installed is never imported, and the rest is compiled at its first import.
        pip=("$root/.venv/bin/python" -m pip --quiet --disable-pip-version-check install --no-compile)
        uv=$(command -v uv || true)
        mapfile -t torch < <(grep "^torch==" "$pins") # several lines for several interpreters; their markers choose
        # torch goes first: once it is there, no other package's open range can bring a second build of it.
        UV_TORCH_BACKEND=${UV_TORCH_BACKEND:-auto} fastdllm_install "${torch[@]}" || return 1
        [[ -n $uv ]] || ! "${pip[@]}" --constraint "$pins" uv || uv=$root/.venv/bin/uv
        fastdllm_install --constraint "$pins" --editable "$root[$extras]" || return 1
        touch "$stamp.$extras"
    fi
    source "$root/.venv/bin/activate"
}

fastdllm_setup_env "$@" || { unset -f fastdllm_setup_env fastdllm_install; return 1 2>/dev/null || exit 1; }
unset -f fastdllm_setup_env fastdllm_install
