"""The notebook, cell by cell in a kernel of its own, as a reader runs it."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parent.parent / "examples" / "quickstart.ipynb"


WHOLE_TRAINING, SHORT_TRAINING = "max_steps=30", "max_steps=5"


@pytest.fixture(scope="module", params=["short", pytest.param("whole", marks=pytest.mark.slow)])
def executed(request):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (training,) = [cell for cell in notebook.cells if WHOLE_TRAINING in cell.source]
    if request.param == "short":
        training.source = training.source.replace(WHOLE_TRAINING, SHORT_TRAINING)
    return NotebookClient(notebook, timeout=300, kernel_name="python3").execute()


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs_of(notebook, text):
    """Outputs of the one cell that holds a text: what was printed, and how many pictures were shown."""
    (cell,) = [cell for cell in notebook.cells if cell.cell_type == "code" and text in cell.source]
    printed = "".join(
        output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout"
    )
    pictures = sum("image/png" in output.get("data", {}) for output in cell.outputs)
    return printed, pictures


def test_every_step_shows_its_picture(executed):
    for step in (
        "draw_routing(",
        "training_curves.png",
        "draw_overlay(found.image, found.anomaly_map, found.regions, trained",
    ):
        assert outputs_of(executed, step)[1] == 1, step


def test_prediction_marks_the_defect(executed):
    printed, pictures = outputs_of(executed, "load_pretrained()")
    assert pictures == 1
    assert "anomalous" in printed
    printed, _ = outputs_of(executed, "on the defect")
    on, elsewhere = (float(part.split()[-1]) for part in printed.splitlines()[-1].replace("defect", "").split(","))
    assert on > 2 * elsewhere


def test_notebook_is_kept_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(
        not cell.outputs and cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code"
    )
