"""The notebook in docs/ runs from top to bottom."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "docs" / "pretrain.ipynb"


@pytest.mark.slow
def test_the_notebook_runs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = [str(cell.get("outputs", "")) for cell in notebook.cells]
    assert any("Finished: 60 steps" in output for output in outputs)
    assert any("image/png" in output for output in outputs)
