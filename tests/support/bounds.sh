#!/usr/bin/env bash
# Runs the tests on the oldest versions that pyproject.toml allows. `make bounds` runs it; torch's oldest version comes
# from the package index with its CUDA packages (several GB) unless a CPU wheel is at hand.
set -euo pipefail
python=${1:-python3}
venv=.venv-bounds
test -x $venv/bin/python || "$python" -m venv $venv
oldest=$("$python" - <<'PY'
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
lines = [line.split(";")[0].strip() for line in project["dependencies"] if "deepspeed" not in line]
print("\n".join(line.replace(">=", "==") + (".*" if line.count(".") < 2 else "") for line in lines))
PY
)
$venv/bin/python -m pip install --quiet --disable-pip-version-check $oldest \
    pytest hypothesis fair-esm zstandard nbclient ipykernel hatchling editables
$venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
$venv/bin/python -m pip list 2>/dev/null | grep -iE '^(torch|transformers|accelerate|datasets|tokenizers|numpy|pyarrow) '
OMP_NUM_THREADS=1 $venv/bin/python -m pytest -m "not slow and not gpu"
