"""What must hold of the reports that `open_stock.py` prints, of each alone and between them.

    python tests/support/compare.py DIRECTORY

The directory holds `VERSION.ours.json` and `VERSION.published.json` for each version of transformers. Two layouts under
one version must agree in all, messages included; two versions in all but those. Numbers may differ by 1e-4.
"""

import json
import sys
from pathlib import Path
from typing import Any

TOLERANCE = 1e-4
OF_THE_VERSION = ("python", "torch", "transformers", "messages")


def difference(expected: Any, found: Any, where: str = "report") -> float:
    """The largest difference between two numbers at the same place; `AssertionError` if anything else differs."""
    if isinstance(expected, float) and isinstance(found, float):
        return abs(expected - found)
    if isinstance(expected, dict) and isinstance(found, dict):
        assert expected.keys() == found.keys(), f"{where}: {sorted(expected.keys() ^ found.keys())} on one side only"
        return max((difference(expected[key], found[key], f"{where}.{key}") for key in expected), default=0.0)
    if isinstance(expected, list) and isinstance(found, list):
        assert len(expected) == len(found), f"{where}: {expected} and {found}"
        pairs = enumerate(zip(expected, found, strict=True))
        return max((difference(*pair, f"{where}[{index}]") for index, pair in pairs), default=0.0)
    assert expected == found, f"{where}: {expected!r} and {found!r}"
    return 0.0


def check_alone(report: dict[str, Any]) -> None:
    """`AssertionError` unless nothing but new heads was made up, contacts are probabilities, and each step learned."""
    assert report["model_class"] == "EsmForMaskedLM"
    faults = [*report["missing"], *report["unexpected"], *report["mismatched"]]
    assert not faults, faults
    silent = ("AutoModelForMaskedLM", "AutoTokenizer", "predict_contacts")
    said = [line for step in silent for line in report["messages"][step]]
    said += [line for line in report["messages"]["fill-mask"] if not line.startswith("Device set to use")]
    assert not said, said
    assert report["base"]["missing"] == ["pooler.dense.bias", "pooler.dense.weight"]
    for name, step in report["steps"].items():
        faults = [key for key in step["missing"] if not key.startswith("classifier.")]
        faults += [key for key in step["unexpected"] if not key.startswith("lm_head.")]
        faults += step["mismatched"]
        assert not faults, (name, faults)
        assert step["losses"][1] < step["losses"][0] - 1e-4, (name, step["losses"])
    contacts = report["contacts"]
    length = len(report["sequences"][0])
    assert [len(row) for row in contacts] == [length] * length
    assert all(0 <= probability <= 1 for row in contacts for probability in row)
    transposed = [list(column) for column in zip(*contacts, strict=True)]
    assert difference(contacts, transposed, "contacts") < 1e-6, "contacts are not symmetric"


def between_versions(report: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in report.items() if key not in OF_THE_VERSION}


def compare(directory: Path) -> None:
    """Prints a line for each version; raises `AssertionError` at the first fault."""
    reports = {path.name: json.loads(path.read_text()) for path in sorted(directory.glob("*.ours.json"))}
    assert reports, f"no report in {directory}"
    first, *_ = reports.values()
    for name, ours in reports.items():
        published = json.loads((directory / name.replace(".ours.", ".published.")).read_text())
        check_alone(ours)
        layouts = difference(published, ours)
        versions = difference(between_versions(first), between_versions(ours))
        assert max(layouts, versions) < TOLERANCE, (name, layouts, versions)
        answer = ours["fill_mask"][0][0]
        losses = {step: [round(loss, 4) for loss in ours["steps"][step]["losses"]] for step in ours["steps"]}
        print(
            f"transformers {ours['transformers']}, torch {ours['torch']}: off by {layouts:.1e} from the published "
            f"layout, by {versions:.1e} from {first['transformers']}\n"
            f"  fill-mask {answer['token_str']!r} {answer['score']:.4f} in {answer['sequence']!r}; one step: {losses}"
        )


if __name__ == "__main__":
    compare(Path(sys.argv[1]))
