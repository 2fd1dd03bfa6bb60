#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Build the wheel, install it into an empty environment, and decode and evaluate with it in an empty folder.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
pip=("$work/venv/bin/python" -m pip --quiet --disable-pip-version-check)
# From a copy of what git tracks: setuptools leaves a build folder in the tree it builds.
mkdir "$work/tree" "$work/empty"
git -C "$root" ls-files -z | (cd "$root" && xargs -0 cp --parents -t "$work/tree")
"${pip[@]}" wheel --no-deps --wheel-dir "$work" "$work/tree"
mapfile -t torch < <(grep "^torch==" "$root/requirements.txt") # several lines for several interpreters; their markers choose
"${pip[@]}" install "${torch[@]}"
"${pip[@]}" install --constraint "$root/requirements.txt" "$(ls "$work"/fastdllm-*.whl)[eval,ui]"
cd "$work/empty"
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
"$work/venv/bin/fastdllm" --help
"$work/venv/bin/python" -c "
import fastdllm
model = fastdllm.load('tiny-llada', device='cpu')
question = 'A student has 23 pencils. His sister has 7 fewer pencils than he has. How many pencils do they have together?'
out = fastdllm.generate(model, [{'role': 'user', 'content': question}], preset='balanced')
assert out.texts[0].endswith('#### 39'), out.texts[0]
print(fastdllm.__version__, out.texts[0])"
"$work/venv/bin/fastdllm" eval --model fastdllm --model_args pretrained=tiny-llada --tasks gsm_symbolic --limit 2
