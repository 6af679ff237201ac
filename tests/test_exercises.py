"""The exercises edition: untouched and solved, each run whole, and what stands in its cells."""

import ast
import contextlib
import io
import re
import shutil
import subprocess
import sys

import nbformat
import numpy as np
import pytest
from conftest import ROOT
from shared import begun_by_two
from torch import nn

import helpers as h

# Of every exercise: the cell to write has a place of its own.
WRITTEN = {*h.EXERCISES, "views"}


@pytest.fixture(scope="module")
def edition(tmp_path_factory):
    """The exercises edition of the committed notebook."""
    folder = tmp_path_factory.mktemp("edition")
    (folder / "submission").mkdir()
    shutil.copy(ROOT / h.NOTEBOOK, folder)
    return nbformat.read(h.export_exercises(folder), as_version=4)


def folded_code(cell):
    """The Python code in a folded solution."""
    return re.search(r"```python\n(.*?)```", cell.source, re.DOTALL)[1]


def solved(notebook):
    """The cells of the edition with every solution in its place and a guess before each stage."""
    sources = []
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type != "code" or cell.source.startswith("%%writefile"):
            continue
        source = cell.source
        if "exercise" in cell.metadata:
            source = folded_code(notebook.cells[number + 2])  # behind the check
        if source == "# Your code.":
            source = folded_code(notebook.cells[number + 1])
        sources.append(source.replace(", None)  # TODO", ", 0.5)  # TODO"))
    return sources


def untouched(notebook):
    """The code cells of the edition as they are."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return [source for source in sources if not source.startswith("%%writefile")]


def run_cells(sources):
    """Execute cells one after the other, as a notebook does: (its variables, what was printed)."""
    shown = []
    variables = {"display": lambda *things: shown.extend(things), "__name__": "__main__"}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for source in sources:
            tree = ast.parse(source)
            last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, "<cell>", "exec"), variables)
            if last:
                code = compile(ast.Expression(last.value), "<cell>", "eval")
                shown.append(eval(code, variables))
    return variables, printed.getvalue(), shown


@pytest.fixture(scope="module")
def runs(edition, tmp_path_factory):
    """{"untouched": ..., "solved": ...}: both editions run in one folder, the untouched first."""
    folder = tmp_path_factory.mktemp("notebook")
    base = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HW13_CACHE", str(folder / "cache"))
        patch.setenv("HW13_KAGGLE", str(base / "no_kaggle"))
        patch.delenv("HW13_DATA", raising=False)
        patch.chdir(folder)
        yield {
            "untouched": run_cells(untouched(edition)),
            "solved": run_cells(solved(edition)),
        }


def test_an_untouched_edition_runs_whole_with_the_references(runs):
    variables, printed, _ = runs["untouched"]
    assert list(variables["runs"]) == list(h.STAGES)
    # Each function, and the views.
    assert printed.count("Not yet: it is still to be written.") == len(h.EXERCISES) + 1
    assert printed.count("Until it is right the reference stands in below.") == len(h.EXERCISES)
    assert "Until they are right the reference's views stand in" in printed
    assert printed.count("no guess yet") == len(h.STAGES)
    n_epochs = variables["simple_cfg"].n_epochs
    assert f"simple: no guess yet. It trains for {n_epochs} epochs" in printed
    assert variables["mine"].own == {}
    boss = variables["runs"]["boss"]
    assert boss.facts["alignment"] == h.code_fingerprint(h.alignment)
    assert variables["strong_cfg"].rotation == h.STAGES["strong"].rotation


def test_a_solved_edition_trains_with_the_answers(runs):
    variables, printed, shown = runs["solved"]
    assert "Not yet" not in printed
    assert variables["mine"].own.keys() == h.EXERCISES.keys()
    stages = variables["runs"]
    assert list(stages) == list(h.STAGES)
    for stage, facts in {
        "medium": ("loss_fn_kd",),
        "strong": ("loss_fn_kd",),
        "boss": ("loss_fn_kd", "alignment", "loss_weights"),
    }.items():
        for fact in facts:
            own = h.code_fingerprint(variables[f"my_{fact}"])
            assert stages[stage].facts[fact] == own, (stage, fact)
    for stage in ("strong", "boss", "beyond"):
        assert stages[stage].n_params == 58_235
    assert "medium trains with your loss_fn_kd." in printed
    assert "boss trains with your student, loss_fn_kd, loss_weights, alignment." in printed
    assert printed.count("you guessed 0.5000, it reached") == 4
    tables = [thing for thing in shown if isinstance(thing, h.pd.DataFrame)]
    assert any("guess" in table and (table["guess"] == 0.5).all() for table in tables)


def test_a_stage_whose_code_is_the_same_is_loaded(runs, capsys):
    variables, *_ = runs["solved"]
    arguments = [variables[name] for name in ("medium_cfg", "data", "teacher")]
    run = variables["mine"].run_stage(*arguments)
    assert "medium: finished before, loaded" in capsys.readouterr().out
    assert h.state_checksum(run.net) == h.state_checksum(variables["runs"]["medium"].net)


def test_the_solutions_are_the_references(runs):
    """The solved Medium is the untouched one: the folded code does what the module's does."""
    nets = [variables["runs"]["medium"].net for variables, *_ in runs.values()]
    assert h.state_checksum(nets[0]) == h.state_checksum(nets[1])
    # It was trained a second time, since its code is another.
    assert "medium: started again" in runs["solved"][1]


# --- what stands in the cells ---------------------------------------------------------------------


def test_each_exercise_is_written_once_and_has_a_check_and_a_solution(edition):
    places = {}
    for number, cell in enumerate(edition.cells):
        if "exercise" in cell.metadata:
            places[cell.metadata["exercise"]] = number
    assert places.keys() == WRITTEN
    for name, number in places.items():
        todo, check, solution = edition.cells[number : number + 3]
        assert "TODO" in todo.source
        assert f"my_{name}" in todo.source
        assert f"my_{name})" in check.source
        assert f"my_{name}" in folded_code(solution)
    shown = [cell.source for cell in edition.cells if cell.source.startswith("h.show_source(")]
    for name in h.EXERCISES:
        assert f"h.show_source(h.{name})" not in shown
    assert "h.show_source(h.plain_student)" not in shown


def test_a_place_to_write_has_the_signature_and_the_docstring(edition):
    for cell in edition.cells:
        name = cell.metadata.get("exercise")
        if name in (None, "views"):
            continue
        function = ast.parse(cell.source).body[0]
        assert function.name == f"my_{name}"
        assert ast.get_docstring(function)
        assert isinstance(function.body[-1], ast.Raise)
        assert len(function.body) == 2


def test_every_stage_is_guessed_before_it_runs(edition):
    guessed = []
    for cell in edition.cells:
        guess = re.match(r"mine\.guess\((\w+), None\)", cell.source)
        if guess:
            guessed.append(guess[1])
        trained = re.search(r"(?:mine\.run_stage|h\.prepare_stage)\((\w+),", cell.source)
        if trained and cell.cell_type == "code" and not cell.source.startswith("%%"):
            assert guessed[-1] == trained[1]
    assert guessed == ["simple_cfg", "medium_cfg", "strong_cfg", "boss_cfg", "beyond_cfg"]


def test_every_question_has_an_empty_place_before_its_folded_answer(edition):
    for number, cell in enumerate(edition.cells):
        if "<details>" not in cell.source or cell.cell_type != "markdown":
            continue
        before = edition.cells[number - 1]
        if "A solution" in cell.source and before.cell_type == "code":
            continue
        assert before.source.startswith("**Your answer:**")


def test_the_edition_is_one_valid_file_without_outputs(edition):
    nbformat.validate(edition)
    assert sum(cell.source.startswith("%%writefile") for cell in edition.cells) == 1
    assert len({cell.id for cell in edition.cells}) == len(edition.cells)
    for cell in edition.cells:
        assert not cell.get("outputs")
    calls = [cell.source for cell in edition.cells if cell.source[:2] != "%%"]
    for call in h.EXERCISES_CALLS.values():
        assert any(call in source for source in calls)


def test_the_committed_exercises_edition_is_the_current_one(edition):
    committed = nbformat.read(ROOT / h.EXERCISES_NOTEBOOK, as_version=4)
    assert committed == edition, "run python helpers.py export"


def test_export_writes_both_one_file_notebooks(tmp_path):
    for name in (h.NOTEBOOK, "helpers.py"):
        shutil.copy(ROOT / name, tmp_path)
    subprocess.run([sys.executable, "helpers.py", "export"], cwd=tmp_path, check=True)
    for name in (h.KAGGLE_NOTEBOOK, h.EXERCISES_NOTEBOOK):
        nbformat.validate(nbformat.read(tmp_path / name, as_version=4))


# --- Answers --------------------------------------------------------------------------------------


def test_a_wrong_answer_is_not_used_and_the_next_right_one_is(tmp_path, capsys):
    mine = h.Answers(tmp_path)
    assert mine.take("soft_labels", lambda z, t: (z * t).softmax(-1)) is h.soft_labels
    assert "Not yet: the logits are multiplied" in capsys.readouterr().out

    def right(logits, temperature):
        return (logits / temperature).softmax(-1)

    assert mine.take("soft_labels", right) is right
    assert mine.own == {"soft_labels": right}
    mine.take("soft_labels", lambda z, t: z)
    assert mine.own == {}


def test_a_stage_gets_the_answers_that_it_has_a_use_for(tmp_path, capsys):
    mine = h.Answers(tmp_path)
    mine.own = {name: exercise.reference for name, exercise in h.EXERCISES.items()}
    mine.own["student"] = h.plain_student
    wanted = {
        "simple": set(),
        "medium": {"loss_fn_kd"},
        "strong": {"student", "loss_fn_kd"},
        "boss": {"student", "loss_fn_kd", "loss_weights", "alignment"},
        "beyond": {"student", "loss_fn_kd", "loss_weights"},
    }
    for stage, names in wanted.items():
        assert mine.own_for(h.STAGES[stage]).keys() == names
    # A student without the layers that Boss aligns leaves Boss to the reference.
    mine.own["student"] = lambda: h.build_student(h.STAGES["simple"])
    assert "student" in mine.own_for(h.STAGES["strong"])
    assert "student" not in mine.own_for(h.STAGES["boss"])
    said = capsys.readouterr().out
    assert (
        "your student has no layer1, layer2, layer3 to align, so the reference trains here" in said
    )
    mine.use_reference("student")
    assert "student" not in mine.own_for(h.STAGES["strong"])
    mine.use_reference("studnet")
    assert "'studnet' is no exercise: training_loop, soft_labels" in capsys.readouterr().out
    with pytest.raises(
        h.UserError, match="'soft_label' is no exercise: training_loop, soft_labels"
    ):
        mine.take("soft_label", h.soft_labels)


class LayersInLists(nn.Module):
    """Its layers have the wanted names, but forward loops over what is in them."""

    def __init__(self):
        super().__init__()
        widths = {"layer1": (3, 8), "layer2": (8, 16), "layer3": (16, 32)}
        for name, (width, wider) in widths.items():
            setattr(self, name, nn.ModuleList([nn.Conv2d(width, wider, 3, 2, 1), nn.ReLU()]))
        self.fc = nn.Linear(32, 11)

    def forward(self, x):
        for part in (*self.layer1, *self.layer2, *self.layer3):
            x = part(x)
        return self.fc(x.mean((2, 3)))


def test_layers_that_are_not_called_as_a_whole_cannot_be_aligned(tmp_path, capsys):
    assert h.check_student(LayersInLists)
    mine = h.Answers(tmp_path)
    mine.own["student"] = LayersInLists
    assert "student" in mine.own_for(h.STAGES["strong"])
    assert "student" not in mine.own_for(h.STAGES["boss"])
    boss = h.STAGES["boss"]
    teacher = h.build_student(h.TEACHER_CONFIG)
    with pytest.raises(h.UserError, match="the student has no layer1, layer2, layer3; name"):
        h.DistillLoss(boss, LayersInLists(), teacher)


def test_other_settings_do_not_throw_a_finished_run_away(
    food, teacher_file, tmp_path, tiny, capsys
):
    def my_loss(student_logits, labels, teacher_logits, alpha, temperature):
        return h.loss_fn_kd(student_logits, labels, teacher_logits, alpha, temperature)

    data = h.find_data(food)
    teacher = h.load_teacher(teacher_file)
    mine = h.Answers(tmp_path)
    cfg = h.get_config("medium", **tiny)
    mine.run_stage(cfg, data, teacher)
    shorter = h.replace(cfg, n_epochs=1)
    with pytest.raises(h.UserError, match="n_epochs 2, now 1"):
        mine.check_folders([shorter], data)
    with pytest.raises(h.UserError, match=r"n_epochs 2 \(now 1\)"):
        mine.run_stage(shorter, data, teacher)
    # Other code and other settings at once are refused too.
    mine.own["loss_fn_kd"] = my_loss
    with pytest.raises(h.UserError, match="the code of loss_fn_kd"):
        mine.run_stage(shorter, data, teacher)
    # Other code alone starts anew, also what two processes began: with own code one trains.
    begun_by_two(tmp_path / "exercises/medium/last.ckpt", epochs=1)
    capsys.readouterr()
    mine.run_stage(cfg, data, teacher)
    assert "medium: started again, for the code of loss_fn_kd" in capsys.readouterr().out


def test_a_worse_stage_of_the_exercises_leaves_a_better_submission(food, tmp_path, tiny, capsys):
    data = h.find_data(food)
    cfg = h.get_config("simple", **tiny)
    best = h.run_stage(cfg, data, out=tmp_path)
    result = h.read_result(best.folder)
    text = h.json.dumps(result._replace(valid_acc=1.0)._asdict())
    (best.folder / h.RESULT).write_text(text)
    mine = h.Answers(tmp_path)
    worse = mine.run_stage(h.replace(cfg, seed=2), data)
    assert worse.folder != best.folder
    h.write_best([worse], data, tmp_path)
    assert "of an earlier call, has the best" in capsys.readouterr().out
    assert (tmp_path / "submission.csv").read_text() == best.csv.read_text()


def test_guesses(tmp_path, capsys):
    mine = h.Answers(tmp_path)
    cfg = h.STAGES["medium"]
    for nonsense in (None, "much", 70, -0.1, True):
        mine.guess(cfg, nonsense)
        assert mine.guesses == {}
    said = capsys.readouterr().out
    assert "70 is no accuracy from 0 to 1" in said
    assert "It trains for 700 epochs" in said
    mine.guess(cfg, 1)
    assert mine.guesses == {"medium": 1.0}
    assert "medium: after 700 epochs, you guess, 1.000." in capsys.readouterr().out
    mine.guess(cfg, np.float32(0.5))
    assert mine.guesses == {"medium": 0.5}
    mine.guess(cfg, None)
    assert mine.guesses == {}
