#!/usr/bin/env bash
# What a stranger does with a Hub folder, in three versions of transformers without hf_plm: the same answers in all, and
# the same as from a folder with the layout of facebook/esm2_*. `make compat` runs it.
set -euo pipefail
python=$1
versions=(4.57 5.17 5.23)
for version in "${versions[@]}"; do
    venv=.venv-compat/$version
    test -x "$venv/bin/python" || "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        "$(grep '^torch==' constraints.txt)" "transformers==$version.*" numpy safetensors
done
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" - "$folder/ours" <<'PY'
import sys
import torch
from hf_plm import build_model, esm_config
from hf_plm.models.hub import save_hub_folder
model = build_model(esm_config("8m"), seed=0)
generator = torch.Generator().manual_seed(0)
for parameter in model.parameters():  # a new model's answers are all alike
    parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
save_hub_folder(model, sys.argv[1], "# test\n")
PY
"$python" tests/support/published.py "$folder/ours" "$folder/published"
mkdir "$folder/reports"
for version in "${versions[@]}"; do
    for layout in ours published; do
        .venv-compat/$version/bin/python -I tests/support/open_stock.py "$folder/$layout" \
            > "$folder/reports/$version.$layout.json" 2> "$folder/errors" || { cat "$folder/errors" >&2; exit 1; }
    done
done
"$python" tests/support/compare.py "$folder/reports"
