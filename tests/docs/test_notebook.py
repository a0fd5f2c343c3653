"""The notebook runs from its first cell to its last one."""

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "own_federation.ipynb"


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    folder = tmp_path_factory.mktemp("notebook")
    resources = {"metadata": {"path": str(folder)}}
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources=resources
    )
    client.execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"], folder


def shown(cell, kind):
    """What a cell shows in one format, as one text."""
    data = [output.get("data", {}) for output in cell.outputs]
    return "".join(piece[kind] for piece in data if kind in piece)


def test_the_notebook_is_kept_without_outputs():
    import json

    notebook = json.loads(NOTEBOOK.read_text())
    assert all(not cell.get("outputs") for cell in notebook["cells"])


def test_the_notebook_trains_plots_and_exports(cells):
    (*_, training, plot, frame, export), folder = cells
    assert "<progress value=30 max=30>" in shown(training, "text/html")
    assert "fedgradnorm, 30 rounds" in shown(training, "text/html")
    assert shown(plot, "image/png")
    assert "hospital" in shown(frame, "text/html")
    assert "torch.Size([3, 2]) False" in export.outputs[0]["text"]
    assert (folder / "runs/notebook/models/hospital.pt2").is_file()
