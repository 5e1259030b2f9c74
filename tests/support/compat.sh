#!/usr/bin/env bash
# Opens an export of ours in an environment with transformers 4.57 and no hf_plm. `make compat` runs it.
set -euo pipefail
python=$1
venv=.venv-compat
test -x $venv/bin/python || "$python" -m venv $venv
$venv/bin/python -m pip install --quiet --disable-pip-version-check \
    "$(grep '^torch==' constraints.txt)" 'transformers==4.57.*' 'safetensors' 'numpy'
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" - "$folder/hub" <<'PY'
import sys
from hf_plm import build_model, esm_config
from hf_plm.models.hub import save_hub_folder
save_hub_folder(build_model(esm_config("8m"), seed=0), sys.argv[1], "# test\n")
PY
"$python" -I tests/support/open_stock.py "$folder/hub" > "$folder/new.json"
$venv/bin/python -I tests/support/open_stock.py "$folder/hub" > "$folder/old.json"
"$python" - "$folder" <<'PY'
import json, pathlib, sys
new, old = (json.loads((pathlib.Path(sys.argv[1]) / f"{name}.json").read_text()) for name in ("new", "old"))
for key in ("missing", "unexpected", "mismatched"):
    assert not new[key] and not old[key], (key, new[key], old[key])
for key in ("ids", "padded_ids", "model_class"):
    assert new[key] == old[key], key
difference = max(abs(a - b) for a, b in zip(new["logits_masked"], old["logits_masked"], strict=True))
assert difference < 1e-4, difference
print("transformers", old["transformers"], "opens what", new["transformers"], "wrote; logits differ by", difference)
PY
