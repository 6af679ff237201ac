"""Run the notebook on the demo set, clean it, and write it and the one-file notebooks made from it.

    python tests/refresh_notebook.py

Outputs are kept, since people look before they run; execution counts and volatile metadata are not.
The run is made in an empty folder with nothing but the notebook and helpers.py, so that it shows
what a newcomer sees.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import helpers as h  # noqa: E402


def execute(notebook, folder, **environment):
    """Run a notebook file in its folder with nbconvert, as the README does; (executed notebook,
    seconds).
    """
    convert = [sys.executable, "-m", "jupyter", "nbconvert", "--to", "notebook", "--execute"]
    start = time.perf_counter()
    subprocess.run(
        [*convert, "--output", "run", notebook],
        cwd=folder,
        env=os.environ | environment,
        check=True,
        capture_output=True,
    )
    seconds = time.perf_counter() - start
    executed = nbformat.read(Path(folder) / "run.ipynb", as_version=4)
    return executed, seconds


def clean(notebook):
    """Drop what changes from run to run without meaning: counts, timestamps, transient ids.

    The marks that drive the exercises edition stay, and the one by which papermill sets LENGTH.
    """
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:03d}"
        kept = {"exercise", "tags"} & cell.metadata.keys()
        cell.metadata = {key: cell.metadata[key] for key in sorted(kept)}
        if cell.cell_type != "code":
            continue
        cell.execution_count = None
        for output in cell.outputs:
            output.pop("execution_count", None)
            # The format wants the key here, if only as null.
            if output.output_type == "execute_result":
                output["execution_count"] = None
    nbformat.validate(notebook)
    return notebook


def main():
    # No data, no Kaggle, a cache of its own: the demo set is drawn, and no run is shortened.
    environment = {"HW13_CACHE": "cache", "HW13_DATA": "", "HW13_FAST": ""}
    environment["HW13_KAGGLE"] = "/nowhere"
    # No picture or table may be missing from what is committed.
    environment["HW13_STRICT"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        for name in (h.NOTEBOOK, "helpers.py"):
            shutil.copy(ROOT / name, folder)
        notebook, seconds = execute(h.NOTEBOOK, folder, **environment)
    path = ROOT / h.NOTEBOOK
    nbformat.write(clean(notebook), path)
    megabytes = path.stat().st_size / 1e6
    print(f"{h.NOTEBOOK}: {seconds:.0f} s, {megabytes:.2f} MB")
    print(h.export_notebook())
    print(h.export_exercises())


if __name__ == "__main__":
    main()
