"""The notebook: what is committed, the whole of it run on demo data, and the one-file version for
Kaggle run alone.
"""

import json
import re
import shutil

import nbformat
import pytest
from conftest import ROOT
from refresh_notebook import execute

import helpers as h

COMMITTED = nbformat.read(ROOT / h.NOTEBOOK, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def assert_ran_well(notebook):
    for cell in code_cells(notebook):
        for output in cell.outputs:
            assert output.output_type != "error" and output.get("name") != "stderr", output


def test_the_committed_notebook_is_small_and_clean():
    nbformat.validate(COMMITTED)
    assert (ROOT / h.NOTEBOOK).stat().st_size < 2_000_000
    assert_ran_well(COMMITTED)
    for cell in code_cells(COMMITTED):
        lines = [line for line in cell.source.splitlines() if line.strip()]
        assert len(lines) <= 8, cell.source
        assert cell.execution_count is None and cell.metadata == {}
    assert COMMITTED.metadata.keys() == {"kernelspec", "language_info"}


def test_the_committed_outputs_are_of_the_demo_set_and_hold_no_path_of_a_machine():
    text = json.dumps([cell.outputs for cell in code_cells(COMMITTED)])
    assert "DEMO: drawn shapes" in text and not re.search(r"/(tmp|home|root|kaggle|work)/", text)


def test_every_section_ends_in_something_to_look_at():
    sections, current = {}, None
    for cell in COMMITTED.cells:
        heading = re.match(r"## (\d+) ", cell.source) if cell.cell_type == "markdown" else None
        current = heading[1] if heading else current
        sections.setdefault(current, []).append(cell)
    assert [int(k) for k in sections if k] == list(range(12))
    for number in range(1, 11):
        kinds = {
            kind
            for cell in code_cells(nbformat.v4.new_notebook(cells=sections[str(number)]))
            for output in cell.outputs
            for kind in output.get("data", {})
        }
        assert kinds & {"image/png", "text/html"}, f"section {number} shows no picture or table"


def test_shown_code_is_never_a_copy():
    source = "\n".join(cell.source for cell in code_cells(COMMITTED))
    assert (
        "show_source(h.loss_fn_kd)" in source
        and "def " not in source
        and source.count("import helpers") == 1
    )


def test_the_notebook_runs_in_a_bare_folder(tmp_path):
    for name in (h.NOTEBOOK, "helpers.py"):
        shutil.copy(ROOT / name, tmp_path)
    notebook, _ = execute(h.NOTEBOOK, tmp_path, HW13_FAST="1", HW13_CACHE=str(tmp_path / "cache"))
    assert_ran_well(notebook)
    assert h.validate_submission(tmp_path / "submission/submission_demo.csv", 44) == 44
    assert not (tmp_path / "submission/submission.csv").exists()
    assert {p.name for p in (tmp_path / "submission/demo").iterdir() if p.is_dir()} == {
        "teacher",
        *h.STAGES,
    }


def test_the_committed_kaggle_notebook_is_the_current_one(tmp_path):
    (tmp_path / "submission").mkdir()
    shutil.copy(ROOT / h.NOTEBOOK, tmp_path)
    path = h.export_notebook(tmp_path)
    assert path.read_text() == (ROOT / h.KAGGLE_NOTEBOOK).read_text(), (
        "run python helpers.py export"
    )
    nbformat.validate(nbformat.read(path, as_version=4))
    with pytest.raises(FileNotFoundError, match="hw13_distill.ipynb"):
        h.export_notebook(tmp_path / "submission")


def test_the_kaggle_notebook_runs_alone_on_a_mounted_input(food, teacher_file, tmp_path):
    """As on Kaggle: one file in the working folder, data and teacher under input, nothing else."""
    kaggle = tmp_path / "kaggle"
    (kaggle / "working").mkdir(parents=True)
    shutil.copytree(food, kaggle / "input/competitions/ml2023spring-hw13/Food-11")
    shutil.copy(ROOT / h.KAGGLE_NOTEBOOK, kaggle / "working/notebook.ipynb")
    notebook, _ = execute(
        "notebook.ipynb",
        kaggle / "working",
        HW13_FAST="1",
        HW13_KAGGLE=str(kaggle),
        HW13_CACHE=str(tmp_path / "cache"),
    )
    assert_ran_well(notebook)
    names = {p.name for p in (kaggle / "working").iterdir()}
    assert {"helpers.py", "submission.csv", *(f"{stage}.csv" for stage in h.STAGES)} <= names
    assert h.validate_submission(kaggle / "working/submission.csv", 5) == 5


def test_the_metadata_for_kaggle_names_the_notebook_and_the_competition():
    """Keys as documented for `kaggle kernels push`; the slug of the id is the title in lower case
    with dashes.
    """
    path = (ROOT / h.KAGGLE_NOTEBOOK).with_name("kernel-metadata.json")
    meta = json.loads(path.read_text())
    assert meta.keys() == {
        "id",
        "title",
        "code_file",
        "language",
        "kernel_type",
        "is_private",
        "enable_gpu",
        "enable_internet",
        "dataset_sources",
        "competition_sources",
        "kernel_sources",
        "model_sources",
    }
    assert path.with_name(meta["code_file"]).samefile(ROOT / h.KAGGLE_NOTEBOOK)
    assert meta["competition_sources"] == [h.COMPETITION] and meta["id"].split("/")[1] == "-".join(
        meta["title"].lower().split()
    )
    assert (meta["enable_gpu"], meta["enable_internet"], meta["kernel_type"]) == (
        "true",
        "false",
        "notebook",
    )
