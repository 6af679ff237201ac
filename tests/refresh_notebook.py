"""Run the notebook on the demo set, clean it and store it with its outputs.

    python tests/refresh_notebook.py

People look before they run, so outputs are kept; what changes from run to run is not. The run is
made in an empty folder with nothing but the notebook and helpers.py, as a newcomer has it.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat

SOURCE = Path(__file__).resolve().parent.parent  # the folder of the notebook and helpers.py
NOTEBOOK = "hw13_distill.ipynb"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
MARKS = {"exercise", "above", "tags"}  # what drives the editions and papermill


def execute(notebook, folder, **environment):
    """Run a notebook file in its folder with nbconvert: (executed notebook, seconds)."""
    command = [sys.executable, "-m", "jupyter", "nbconvert", "--to", "notebook", "--execute"]
    start = time.perf_counter()
    done = subprocess.run(
        [*command, "--output", "run", notebook],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    seconds = time.perf_counter() - start
    return nbformat.read(Path(folder) / "run.ipynb", as_version=4), seconds


def clean(notebook):
    """Drop counts, times and paths; ids are the cells' places."""
    notebook.metadata = METADATA
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:03d}"
        kept = sorted(MARKS & cell.metadata.keys())
        cell.metadata = {key: cell.metadata[key] for key in kept}
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = clean_outputs(cell.outputs)
    nbformat.validate(notebook)
    return notebook


def clean_outputs(outputs):
    """Outputs without counts, with neighbouring pieces of printed text joined."""
    kept = []
    for output in outputs:
        if output.output_type == "execute_result":
            output.execution_count = None
        if output.output_type != "stream":
            plain = output.get("data", {}).get("text/plain", "")
            if plain.startswith("decode "):  # a progress bar
                continue
            if plain:
                output.data["text/plain"] = clean_text(plain)
            kept.append(output)
        elif kept and kept[-1].get("name") == output.name:
            kept[-1].text += output.text
        else:
            kept.append(output)
    for output in kept:
        if output.output_type == "stream":
            output.text = clean_text(output.text)
    return [output for output in kept if output.get("text", "...").strip()]


def clean_text(text):
    """Text without what changes from run to run."""
    text = re.sub(r"<00:00, ", ", ", text)  # a bar's: nothing is left to wait for
    return re.sub(r"/tmp/[^\s,:;]+", "this folder", text)


def main():
    # No data, no Kaggle, a cache of its own: the demo set is drawn, and no run is shortened.
    environment = {"HW13_CACHE": "cache", "HW13_DATA": "", "HW13_FAST": ""}
    environment["HW13_KAGGLE"] = "/nowhere"
    environment["HW13_STRICT"] = "1"  # no picture or table may be missing from what is stored
    with tempfile.TemporaryDirectory() as folder:
        for name in (NOTEBOOK, "helpers.py"):
            shutil.copy(SOURCE / name, folder)
        notebook, seconds = execute(NOTEBOOK, folder, **environment)
    nbformat.write(clean(notebook), SOURCE / NOTEBOOK)
    print(f"{NOTEBOOK}: {seconds:.0f} s. Now run: python submission/export.py")


if __name__ == "__main__":
    main()
