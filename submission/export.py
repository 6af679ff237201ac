"""Write the two one-file notebooks beside this file: python submission/export.py

hw13_distill_kaggle.ipynb is the notebook with helpers.py in a folded cell. In
hw13_distill_exercises.ipynb the taught functions are the learner's to write; exercises.py, which
checks them, is in a second folded cell.

Marks in the metadata of the notebook's cells say what the exercises edition makes of a cell:
"exercise": NAME, the learner writes it; "exercise": "omit", it is left out; "above": TEXT, it
begins with this text.
"""

import inspect
import itertools
import sys
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # the folder of helpers.py, which exercises.py imports

from exercises import EXERCISES  # noqa: E402

from helpers import plain_student  # noqa: E402

FOLDED = {"jupyter": {"source_hidden": True}, "_kg_hide-input": True}

ABOVE_MODULE = """\
**Run the folded cell below once.** It writes `{}`, a module that this notebook imports, to a file.
To fold it again, choose *View*, *Collapse Selected Code* in JupyterLab, or *Hide input* in the
cell's menu on Kaggle."""

INTRODUCTION = """\
**This is the exercises edition.** It is the same walk, but you write the taught functions.

1. **Predict.** Before a stage trains, guess its validation accuracy in place of `None`.
2. **Write.** Put your code in place of `raise NotImplementedError`.
3. **Check.** The next cell asks your answer one question after the other. Hints and a solution are
   below it.
4. **Compare.** Stages train with your right answers, and say which. In place of a missing or
   wrong one the reference trains. `mine.summary()` at the end shows all.

After a change run the cells from there on again. A stage whose code answers otherwise starts anew,
and its earlier run is put aside."""

# What the exercises edition says in place of the notebook's own words.
SAYS = {
    'LENGTH = "full"  # or "lesson", or "quick"': 'LENGTH = "quick"  # or "lesson", or "full"',
    "h.run_stage(": "mine.run_stage(",
    "h.plot_soft_labels(": "mine.plot_soft_labels(",
}
# What solutions use of helpers.py that the learner has not written.
USED = ("GlobalAvgPool", "LossWeights", "NUM_CLASSES", "OrderedDict", "pooled_to")

TODO = "\n    raise NotImplementedError  # TODO: your code"

BELOW = """\
**Hint:** {}

<details><summary>A second hint</summary>

{}

</details>

<details><summary>A solution</summary>

```python
{}```

</details>"""

# The section by hand as one function.
TRAINING_LOOP = '''\
def training_loop(student, train_loader, cfg):
    """Train a student on its labels for cfg.n_epochs, in place.

    Adam with cfg.lr and cfg.weight_decay. Gradients are clipped to the norm cfg.grad_norm_max, so
    that one odd batch cannot throw the weights far away. train_loader.set_epoch(epoch) chooses the
    order and the flips of an epoch, counted from 0.
    """
    optimizer = torch.optim.Adam(student.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
    for epoch in range(cfg.n_epochs):
        train_loader.set_epoch(epoch)
        student.train()
        for images, labels, *_ in train_loader:
            loss = F.cross_entropy(student(images), labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), cfg.grad_norm_max)
            optimizer.step()
        print(f"epoch {epoch + 1}: the last batch's loss is {loss.item():.4f}")
'''
# Solutions that are no reference of exercises.py.
SOURCES = {"training_loop": TRAINING_LOOP, "student": inspect.getsource(plain_student)}


def export(root=HERE.parent, out=HERE):
    """Write both notebooks into `out`. root: the folder of hw13_distill.ipynb and helpers.py."""
    modules = folded_module(root / "helpers.py")
    write(edition(root, {}), modules, out / "hw13_distill_kaggle.ipynb")

    notebook = edition(root, SAYS)
    notebook.cells = list(itertools.chain(*map(learners_cells, notebook.cells)))
    notebook.cells.append(new_code_cell("mine.summary()"))
    modules = [new_markdown_cell(INTRODUCTION), *modules, *folded_module(HERE / "exercises.py")]
    write(notebook, modules, out / "hw13_distill_exercises.ipynb")


def edition(root, words):
    """The notebook without outputs, with other words for some of its own."""
    notebook = nbformat.read(root / "hw13_distill.ipynb", as_version=4)
    for cell in notebook.cells:
        for old, new in words.items():
            cell.source = cell.source.replace(old, new)
        if cell.cell_type == "code":
            cell.outputs = []
    return notebook


def folded_module(path):
    """A line that says what the next cell is, and that cell, which writes a module to a file."""
    code = f"%%writefile {path.name}\n{path.read_text(encoding='utf-8')}"
    return [
        new_markdown_cell(ABOVE_MODULE.format(path.name)),
        new_code_cell(code, metadata=FOLDED),
    ]


def write(notebook, above, path):
    """Write a notebook with some more cells below its title."""
    notebook.cells[1:1] = above
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:03d}"  # a random one would change with every export
    nbformat.write(notebook, path)


def learners_cells(cell):
    """The cells that the exercises edition has in place of one cell."""
    name = cell.metadata.get("exercise")
    if name == "omit":
        return []
    if name:
        return function_to_write(name)
    question, fold, answer = cell.source.partition("<details>")
    if fold:
        place = new_code_cell("# Your answer.")
        return [new_markdown_cell(question), place, new_markdown_cell(fold + answer)]
    cell.source = cell.metadata.get("above", "") + cell.source
    return [cell]


def function_to_write(name):
    """A place to write a function, its check, and below them hints and a solution."""
    exercise = EXERCISES[name]
    source = SOURCES.get(name) or inspect.getsource(exercise.reference)
    # A learner's function has the reference's arguments and docstring.
    signature, docstring, body = source.partition("(")[2].split('"""', 2)
    head = f'def my_{name}({signature}"""{docstring}"""'
    for used in USED:
        body = body.replace(used, f"h.{used}")
    return [
        new_code_cell(head + TODO),
        new_code_cell(f'{name} = mine.take("{name}", my_{name})'),
        new_markdown_cell(BELOW.format(exercise.hint, exercise.second, head + body)),
    ]


if __name__ == "__main__":
    export()
