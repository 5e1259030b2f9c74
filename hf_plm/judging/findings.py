"""What was found out about a model, as JSON: written whole or not, told apart by kind, gathered by the report.

Every file begins with the same fields: `kind` (evaluation, score, scan, dms, contacts, probe, comparison), `format`,
`hf_plm`, `made` (UTC) and `models` (for each its name, family, revision and precision).
"""

import hashlib
import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from hf_plm.config import UserError
from hf_plm.files import write_whole
from hf_plm.version import __version__

FORMAT = 1
FOLDER = "findings"
"""In a run's folder: where what is found out about its model is kept."""


def write_findings(path: Path, kind: str, models: list[dict[str, str]], plain: dict[str, Any]) -> None:
    """Raises `UserError` where the file cannot be written. NaN becomes null, NumPy's numbers become JSON's."""
    head = {
        "kind": kind,
        "format": FORMAT,
        "hf_plm": __version__,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "models": models,
    }
    text = json.dumps(_as_json({**head, **plain}), indent=1, allow_nan=False)
    write_whole(path, text.encode() + b"\n")


def read_findings(path: Path) -> dict[str, Any]:
    """Raises `UserError` for a file that is none of ours, or of a later format."""
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError:
        raise UserError(
            f"{path} is not JSON, as the findings of hf-plm evaluate, score, contacts and probe are."
        ) from None
    if not isinstance(plain, dict) or not {"kind", "format", "models"} <= plain.keys():
        raise UserError(f"{path} holds no findings: hf-plm evaluate, score, contacts and probe write such files.")
    if not isinstance(plain["format"], int) or plain["format"] > FORMAT:
        raise UserError(f"{path} was written by hf_plm {plain.get('hf_plm')}, which is newer than this one; update it.")
    return plain


def home(model: str, kind: str, name: str) -> Path | None:
    """Where a run keeps findings on its own model: RUN/findings/KIND-NAME.json; none where `model` is no run."""
    run = Path(model)
    if not (run / "hub" / "config.json").is_file():
        return None
    safe = "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in name)
    if len(safe) > 100:  # the names of many files together; a file system takes 255 bytes
        safe = f"{safe[:80]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return run / FOLDER / f"{kind}-{safe}.json"


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _as_json(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(one) for one in value]
    if isinstance(value, np.ndarray):
        return _as_json(value.tolist())
    if isinstance(value, np.bool_ | bool):
        return bool(value)
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, np.floating | float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    return value
