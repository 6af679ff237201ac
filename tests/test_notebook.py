"""The notebook: what is committed, the whole of it run on demo data, and the one-file version for
Kaggle run alone.
"""

import json
import re
import shutil

import nbformat
import pandas as pd
import pytest
from conftest import ROOT
from refresh_notebook import execute

import helpers as h

COMMITTED = nbformat.read(ROOT / h.NOTEBOOK, as_version=4)

# Every key of a kernel-metadata.json.
METADATA = {"id", "title", "code_file", "language", "kernel_type", "is_private"}
METADATA |= {"enable_gpu", "enable_internet"}
METADATA |= {"dataset_sources", "competition_sources", "kernel_sources", "model_sources"}


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    """The outputs of all cells, one after the other."""
    found = []
    for cell in code_cells(notebook):
        found += cell.outputs
    return found


def assert_ran_well(notebook):
    """No cell ended in an error, none wrote to stderr, and no illustration is missing."""
    for output in outputs(notebook):
        assert output.output_type != "error", output
        assert output.get("name") != "stderr", output
        assert "Not shown" not in output.get("text", ""), output


def test_the_committed_notebook_is_small_and_clean():
    nbformat.validate(COMMITTED)
    assert (ROOT / h.NOTEBOOK).stat().st_size < 2_000_000
    assert_ran_well(COMMITTED)
    for cell in code_cells(COMMITTED):
        lines = [line for line in cell.source.splitlines() if line.strip()]
        mark = cell.metadata.get("exercise")
        assert len(lines) <= (13 if mark == "training_loop" else 8), cell.source
        assert cell.execution_count is None
        assert cell.metadata.keys() <= {"exercise", "tags"}
    assert COMMITTED.metadata.keys() == {"kernelspec", "language_info"}


def test_the_committed_outputs_are_of_the_demo_set_and_hold_no_path_of_a_machine():
    text = json.dumps(outputs(COMMITTED))
    assert "DEMO: drawn shapes" in text
    assert not re.search(r"/(tmp|home|root|kaggle|work)/", text)


def sections(notebook):
    """{number: cells} of the sections that a heading of the form `## 3 ` begins."""
    found = {}
    current = []  # what stands before the first heading belongs to no section
    for cell in notebook.cells:
        heading = re.match(r"## (\d+) ", cell.source)
        if cell.cell_type == "markdown" and heading:
            current = found.setdefault(int(heading[1]), [])
        current.append(cell)
    return found


def test_every_section_ends_in_something_to_look_at():
    found = sections(COMMITTED)
    assert list(found) == list(range(12))
    for number in range(1, 11):
        kinds = set()
        for output in outputs(nbformat.v4.new_notebook(cells=found[number])):
            kinds |= output.get("data", {}).keys()
        assert kinds & {"image/png", "text/html"}, f"section {number} shows no picture or table"


def section_that_shows(source):
    """The number of the only section in which a code cell begins so."""
    numbers = []
    for number, cells in sections(COMMITTED).items():
        if any(cell.cell_type == "code" and cell.source.startswith(source) for cell in cells):
            numbers.append(number)
    assert len(numbers) == 1, (source, numbers)
    return numbers[0]


def test_code_is_shown_where_it_can_be_understood():
    assert section_that_shows("optimizer = torch.optim.Adam(") == 2  # the loop by hand
    assert section_that_shows("h.show_source(h.DistillLoss.forward)") == 4
    assert section_that_shows("h.show_source(h.feature_hooks)") == 6
    assert section_that_shows("h.show_source(h.sample_affine)") == 7
    source = "\n".join(cell.source for cell in code_cells(COMMITTED))
    assert "h.train_one_epoch" not in source


def test_every_section_has_a_recap_and_something_to_do():
    for number, cells in sections(COMMITTED).items():
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        if 1 <= number <= 10:
            assert "**Recap.**" in text, number
            assert "**Exercise.**" in text or "**To think about.**" in text, number
        # Every answer is folded, and every fold is closed.
        assert text.count("<details>") == text.count("</details>")
    exercises = [cell.source for cell in COMMITTED.cells if "**Exercise.**" in cell.source]
    assert len(exercises) >= 8
    for exercise in exercises:
        assert "<summary>A solution</summary>\n\n```python\n" in exercise


def test_the_contents_link_to_every_section():
    links = re.findall(r"\]\(#([^)]*)\)", COMMITTED.cells[0].source)
    headings = []
    for cell in COMMITTED.cells:
        headings += re.findall(r"^## (.*)$", cell.source, re.MULTILINE)
    assert links == [heading.replace(" ", "-") for heading in headings]


def test_what_section_8_says_of_training_halves_are_the_rows_of_the_ring():
    stored = pd.read_csv(ROOT / "tests/bench/results/recipes.csv")
    rows = stored.query("scored == 'half' and size == 112")
    recipes = ("boss", "beyond", "beyond_early", "handover_bare", "handover_early")
    text = "\n".join(cell.source for cell in sections(COMMITTED)[8])
    table = re.findall(r"^\| .*0\.\d{3}.*\|$", text, re.MULTILINE)
    assert len(table) == len(recipes)
    for recipe, line in zip(recipes, table, strict=True):
        mine = rows[rows["recipe"] == recipe].sort_values(["epochs", "seed"])
        said = [float(number) for number in re.findall(r"0\.\d{3}", line)]
        assert said == list(mine["accuracy"].round(3)), recipe


def test_papermill_finds_the_length():
    tags = {}
    for cell in COMMITTED.cells:
        if "tags" in cell.metadata:
            tags[cell.source.partition(" =")[0]] = cell.metadata.tags
    assert tags == {"LENGTH": ["parameters"]}


def test_shown_code_is_never_a_copy():
    source = "\n".join(cell.source for cell in code_cells(COMMITTED))
    assert "show_source(h.loss_fn_kd)" in source
    assert "def " not in source
    assert source.count("import helpers") == 1


def test_the_notebook_runs_in_a_bare_folder(tmp_path):
    for name in (h.NOTEBOOK, "helpers.py"):
        shutil.copy(ROOT / name, tmp_path)
    environment = {"HW13_FAST": "1", "HW13_CACHE": str(tmp_path / "cache")}
    notebook, _ = execute(h.NOTEBOOK, tmp_path, **environment)
    assert_ran_well(notebook)
    results = tmp_path / "submission"
    assert h.validate_submission(results / "submission_demo.csv", 44) == 44
    assert not (results / "submission.csv").exists()
    folders = {path.name for path in (results / "demo").iterdir() if path.is_dir()}
    assert folders == {"teacher", *h.STAGES}


def test_the_committed_kaggle_notebook_is_the_current_one(tmp_path):
    (tmp_path / "submission").mkdir()
    shutil.copy(ROOT / h.NOTEBOOK, tmp_path)
    path = h.export_notebook(tmp_path)
    committed = (ROOT / h.KAGGLE_NOTEBOOK).read_text()
    assert path.read_text() == committed, "run python helpers.py export"
    nbformat.validate(nbformat.read(path, as_version=4))
    with pytest.raises(FileNotFoundError, match="hw13_distill.ipynb"):
        h.export_notebook(tmp_path / "submission")


def test_the_kaggle_notebook_runs_alone_on_a_mounted_input(food, teacher_file, tmp_path):
    """As on Kaggle: one file in the working folder, data and teacher under input, nothing else."""
    kaggle = tmp_path / "kaggle"
    working = kaggle / "working"
    working.mkdir(parents=True)
    shutil.copytree(food, kaggle / "input/competitions/ml2023spring-hw13/Food-11")
    shutil.copy(ROOT / h.KAGGLE_NOTEBOOK, working / "notebook.ipynb")
    environment = {"HW13_FAST": "1", "HW13_CACHE": str(tmp_path / "cache")}
    notebook, _ = execute("notebook.ipynb", working, HW13_KAGGLE=str(kaggle), **environment)
    assert_ran_well(notebook)
    names = {path.name for path in working.iterdir()}
    assert {"helpers.py", "submission.csv"} <= names
    assert {f"{stage}.csv" for stage in h.STAGES} <= names
    assert h.validate_submission(working / "submission.csv", 5) == 5


def test_the_metadata_for_kaggle_names_the_notebook_and_the_competition():
    """Keys as documented for `kaggle kernels push`; the slug of the id is the title in lower case
    with dashes.
    """
    path = (ROOT / h.KAGGLE_NOTEBOOK).with_name("kernel-metadata.json")
    meta = json.loads(path.read_text())
    assert meta.keys() == METADATA
    assert path.with_name(meta["code_file"]).samefile(ROOT / h.KAGGLE_NOTEBOOK)
    assert meta["competition_sources"] == [h.COMPETITION]
    slug = "-".join(meta["title"].lower().split())
    assert meta["id"].split("/")[1] == slug
    assert meta["enable_gpu"] == "true"
    assert meta["enable_internet"] == "false"
    assert meta["kernel_type"] == "notebook"
