"""The notebook and its two one-file editions: what is stored, and both editions run whole."""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import export
import nbformat
import pytest
from conftest import HERE, ROOT, draw_food, ids
from exercises import EXERCISES
from refresh_notebook import MARKS, NOTEBOOK, SOURCE, execute

import helpers as h

KAGGLE = "hw13_distill_kaggle.ipynb"
LEARNERS = "hw13_distill_exercises.ipynb"
WORD = r"[A-Za-z][\w'-]*"
STORED = nbformat.read(SOURCE / NOTEBOOK, as_version=4)


def text_of(cells, kind):
    """All cells of a kind, "markdown" or "code", as one text."""
    return "\n".join(cell.source for cell in cells if cell.cell_type == kind)


def outputs(notebook):
    found = []
    for cell in notebook.cells:
        found += cell.get("outputs", [])
    return found


def sections(cells):
    """[cells] of each section that a heading of the form `## 3 ` begins."""
    found = [[]]
    for cell in cells:
        if re.match(r"## \d+ ", cell.source):
            found.append([])
        found[-1].append(cell)
    return found[1:]


def prose(cells, folded):
    """The text of the markdown cells without pictures and code, and without folded parts."""
    text = text_of(cells, "markdown")
    if not folded:
        text = re.sub(r"<details>.*?</details>", "", text, flags=re.DOTALL)
    return re.sub(r"!\[.*?\]\(.*?\)|```.*?```", "", text, flags=re.DOTALL)


def n_words(text):
    return len(re.findall(WORD, text))


# --- what is stored -------------------------------------------------------------------------------


def test_the_stored_notebook_is_small_and_clean():
    nbformat.validate(STORED)
    assert (SOURCE / NOTEBOOK).stat().st_size < 3_000_000
    for cell in STORED.cells:
        assert cell.metadata.keys() <= MARKS
        if cell.cell_type == "code":
            lines = cell.source.replace("\n\n", "\n").splitlines()
            assert len(lines) <= 8, cell.source
            assert max(map(len, lines)) <= 100, cell.source
            assert cell.execution_count is None


def assert_ran_well(notebook):
    """No cell ended in an error, none warned, and no picture is missing."""
    for output in outputs(notebook):
        assert output.output_type != "error", output
        assert output.get("name") != "stderr", output
        assert "Not shown" not in output.get("text", ""), output


def test_the_stored_outputs_hold_no_path_of_a_machine():
    assert_ran_well(STORED)
    text = json.dumps(outputs(STORED))
    assert not re.search(r"/(tmp|home|root|kaggle|work)/|cache/|\\r", text)


def test_the_prose_is_short():
    """At most 3,600 words, 22 per line of code, 30 per sentence (folded ones too), and 120 in
    section 8, which is further reading.
    """
    words = n_words(prose(STORED.cells, folded=False))
    lines = re.findall(r"^.*\S", text_of(STORED.cells, "code"), re.MULTILINE)
    assert words <= 3_600
    assert words / len(lines) <= 22
    for line in prose(STORED.cells, folded=True).splitlines():
        if not line.startswith(("|", "#", ">", "**Contents")):
            for sentence in re.split(r"(?<=[.!?:;])\s+", line):
                assert n_words(sentence) <= 30, sentence
    further = prose(sections(STORED.cells)[8], folded=False)
    assert n_words(re.sub(r"^[|#].*$", "", further, flags=re.MULTILINE)) <= 120


def test_every_name_of_the_module_exists():
    text = text_of(STORED.cells, "code") + text_of(STORED.cells, "markdown")
    names = set(re.findall(r"\bh\.([A-Za-z_]\w*)", text))
    assert len(names) > 50
    assert names <= set(dir(h)), names - set(dir(h))


def test_a_stored_listing_is_what_the_module_shows_today():
    shows = re.compile(r"h\.show_source\(h\.([\w.]+)\)")
    for cell in STORED.cells:
        if shows.fullmatch(cell.source) and cell.outputs:
            listing = eval(cell.source, {"h": h})
            assert cell.outputs[0].data["text/html"] == listing.data, cell.source


def test_the_photographs_are_those_of_the_results():
    """A row of section 8 has recipe and epochs, parameters, accuracy and its standard error."""
    results = (HERE / "bench" / "RESULTS.md").read_text(encoding="utf-8").splitlines()
    row = r"^\| (.*) \| ([\d,]+) \| (0\.\d+) \| (0\.\d+) \|$"
    rows = re.findall(row, text_of(sections(STORED.cells)[8], "markdown"), re.MULTILINE)
    assert len(rows) > 4
    for recipe, parameters, accuracy, error in rows:
        wanted = [f"| {parameters} |", f"{accuracy} ± {error}"]
        wanted += re.findall(r"(\d+) epochs", recipe)
        assert any(all(part in line for part in wanted) for line in results), recipe


def test_every_section_has_something_to_look_at_a_recap_and_something_to_do():
    found = sections(STORED.cells)
    assert len(found) == 12
    for cells in found[1:11]:
        text = text_of(cells, "markdown")
        assert re.search(r"h\.(plot_\w+|\w+_table)\(", text_of(cells, "code")), text
        assert "**Recap.**" in text, text
        assert "**Exercise.**" in text or "**To think about.**" in text, text
        assert text.count("<details>") == text.count("</details>")


def test_the_contents_link_to_every_section():
    links = re.findall(r"\]\(#([^)]*)\)", STORED.cells[0].source)
    headings = re.findall(r"^## (.*)$", text_of(STORED.cells, "markdown"), re.MULTILINE)
    assert links == [heading.replace(" ", "-") for heading in headings]


def test_papermill_finds_the_length():
    tagged = [cell.source for cell in STORED.cells if "tags" in cell.metadata]
    assert tagged == ['LENGTH = "full"  # or "lesson", or "quick"']


# --- the one-file editions ------------------------------------------------------------------------


@pytest.fixture
def editions(tmp_path):
    """{file name: notebook} of the editions as they would be written today."""
    export.export(SOURCE, tmp_path)
    return {path.name: nbformat.read(path, as_version=4) for path in tmp_path.glob("*.ipynb")}


def test_the_stored_editions_are_the_current_ones(editions):
    for name, notebook in editions.items():
        nbformat.validate(notebook)
        stored = nbformat.read(ROOT / "submission" / name, as_version=4)
        assert stored == notebook, "run python submission/export.py"


@pytest.mark.parametrize("name", [KAGGLE, LEARNERS])
def test_an_edition_brings_its_modules_and_names_no_other_file(name, editions):
    cells = editions[name].cells
    modules = [cell for cell in cells if cell.source.startswith("%%writefile")]
    assert len(modules) == 1 + (name == LEARNERS)
    size = len(modules[0].source.encode())
    assert size <= 165_000
    for module in modules:
        assert module.metadata["jupyter"]["source_hidden"]
        assert "once" in cells[cells.index(module) - 1].source
    text = text_of(cells, "markdown")
    assert not re.search(r"RESULTS\.md|tests/|README|hw13_distill\.ipynb|submission/hw13", text)


def test_what_a_learner_writes_has_a_check_hints_and_a_solution(editions):
    cells = editions[LEARNERS].cells
    written = []
    for number, cell in enumerate(cells):
        head = re.match(r"def my_(\w+)\(.*NotImplementedError  # TODO", cell.source, re.DOTALL)
        if head:
            written.append(head[1])
            assert f"my_{head[1]})" in cells[number + 1].source
            below = cells[number + 2].source
            assert below.startswith("**Hint:**")
            assert below.count("<details>") == 2
            assert f"def my_{head[1]}(" in below
            assert f"h.show_source(h.{head[1]})" not in text_of(cells, "code")
    assert set(written) == set(EXERCISES)


# --- both run whole -------------------------------------------------------------------------------

SMALLER = """\
small = {"image_size": 40, "batch_size": 8}
h.DEMO_SETTINGS.update(small)
h.DEMO_TEACHER_SETTINGS["image_size"] = 40
h.STAGES.update({name: h.replace(cfg, **small) for name, cfg in h.STAGES.items()})"""


def solution_in(cell):
    return cell.source.split("```python\n")[1].partition("```")[0]


def run_smaller(notebook, folder, kaggle):
    """Run a notebook at 40 pixels, on one thread, in a folder where nothing else is."""
    for cell in notebook.cells:
        if cell.source.endswith("import helpers as h"):
            cell.source += "\n" + SMALLER
    nbformat.write(notebook, folder / "notebook.ipynb")
    environment = {"HW13_FAST": "1", "HW13_STRICT": "1", "HW13_KAGGLE": str(kaggle)}
    done, _ = execute("notebook.ipynb", folder, OMP_NUM_THREADS="1", **environment)
    assert_ran_well(done)
    return done


def solve(notebook):
    """Put every solution in its place, and a guess before each stage."""
    for number, cell in enumerate(notebook.cells):
        if "NotImplementedError  # TODO" in cell.source[-60:]:
            cell.source = solution_in(notebook.cells[number + 2])
        if cell.source.startswith("my_views"):
            take = cell.source.splitlines(keepends=True)[-3:]
            cell.source = solution_in(notebook.cells[number + 2]) + "".join(take)
        cell.source = cell.source.replace(", None)  # TODO", ", 0.5)  # TODO")
    return notebook


def test_both_editions_run_alone(editions, a_teacher, tmp_path):
    """At the same time: the Kaggle edition as on Kaggle, with data and teacher in a read-only
    input, and the exercises edition, solved, on the demo set.
    """
    folders = (tmp_path / "working", tmp_path / "learner")
    for folder in folders:
        folder.mkdir()
    root = draw_food(tmp_path / "input" / "competitions" / h.COMPETITION / "Food-11")
    shutil.copy(a_teacher, root)
    for path in [*root.rglob("*"), root]:
        path.chmod(0o555)
    notebooks = (editions[KAGGLE], solve(editions[LEARNERS]))
    with ThreadPoolExecutor() as pool:
        _, learners = pool.map(run_smaller, notebooks, folders, (tmp_path, "/nowhere"))
    for path in [root, *root.rglob("*")]:
        path.chmod(0o755)  # so that pytest can remove them

    working, learner = folders
    names = {path.name for path in working.iterdir()}
    assert {"helpers.py", "submission.csv", *h.STAGES} <= names
    assert {f"{stage}.csv" for stage in h.STAGES} <= names
    assert h.validate_submission(working / "submission.csv", ids(5)) == 5

    # Every answer is right, and trains.
    printed = "".join(output.get("text", "") for output in outputs(learners))
    assert "Not yet" not in printed
    assert printed.count("guess 0.5, reached") == len(h.STAGES)
    assert "own code: student, loss_fn_kd, loss_weights, alignment" in printed
    assert (learner / "submission" / "submission_demo.csv").is_file()
    # Of each progress bar the last state alone is on the page.
    shown = json.dumps(outputs(learners))
    assert shown.count("boss: ") == shown.count("boss: 100%") == 1
