"""The benches at their smallest, and what RESULTS.md says against the stored rows."""

import base64
import io
import re
import sys

import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import HERE, ROOT, ids
from PIL import Image

import helpers as h

sys.path.insert(0, str(HERE / "bench"))

import diagrams  # noqa: E402
import peers  # noqa: E402
import recipes  # noqa: E402

STORED = ROOT / "tests/bench/results"
TEXT = (HERE / "bench/RESULTS.md").read_text(encoding="utf-8")
N_EVALUATION = 1_493
SMALL = ["--batch", "4", "--photographs", "8", "--epochs", "2", "--workers", "0"]


# --- RESULTS.md -----------------------------------------------------------------------------------


def read_table(heading):
    """The first table below a heading as a DataFrame of texts; a second "six views" gets a 2."""
    below = TEXT.split(f"## {heading}\n")[1]
    lines = re.search(r"(?m)(^\|.*\n)+", below).group().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    names = []
    for name in rows[0]:
        names.append(f"{name}2" if name in names else name)
    return pd.DataFrame(rows[2:], columns=names)


def numbers(cell):
    """The numbers of a cell; a standard error behind a ± is none of them."""
    plain = re.sub(r"± [\d.]+", "", cell)
    return [float(text.replace(",", "")) for text in re.findall(r"\d[\d,]*\.?\d*(?!\w)", plain)]


def recipe_of(cell):
    """The recipe that a table's first cell names in backticks."""
    found = re.search(r"`(\w+)`", cell)
    return found.group(1) if found else ""


STORED_ROWS = pd.read_csv(STORED / "recipes.csv")


def budget_of(heading, cell, row):
    """The columns of recipes.csv that pick a table's row, but for its recipe."""
    if heading == "Half of the training images":
        size = 144 if "144 px" in cell else 112
        return {"epochs": int(row["epochs"]), "size": size, "scored": "half"}
    if heading == "All training images":
        is_best = "handover" not in cell
        views = 10 if is_best and "50 stored" not in cell else 50
        scored = "best" if is_best else "once"
        return {"epochs": int(row["epochs"]), "views": views, "scored": scored, "size": 112}
    is_net = heading == "Nets, 10 epochs" or "teacher at 112 px" in row["what is new"]
    return {"epochs": 10, "teacher_size": 112 if is_net else 176}


HEADINGS = (
    "All training images",
    "Half of the training images",
    "Nets, 10 epochs",
    "Recipes, 10 epochs",
)
# A table's column -> that of recipes.csv.
COLUMNS = {
    "parameters": "parameters",
    "validation": "accuracy",
    "held out": "accuracy",
    "accuracy": "accuracy",
    "six views": "six_views",
    "agreement with the teacher": "agreement",
}


@pytest.mark.parametrize("heading", HEADINGS)
def test_the_rows_of_a_table_have_the_stored_scores(heading):
    for _, row in read_table(heading).iterrows():
        cell = row.iloc[0]
        stored = STORED_ROWS[STORED_ROWS["recipe"] == recipe_of(cell)]
        if stored.empty:
            assert "the teacher on" in cell
            continue
        for column, value in budget_of(heading, cell, row).items():
            stored = stored[stored[column] == value]
        stored = stored.sort_values("seed")
        for column, name in COLUMNS.items():
            said = numbers(row.get(column, "").partition(", last epoch")[0])
            for value, wanted in zip(said, stored[name], strict=False):
                assert abs(value - wanted) <= 0.000501, cell
            assert len(said) <= len(stored)


def test_every_stored_recipe_is_named_and_every_row_says_where_its_code_is():
    for name in STORED_ROWS["recipe"].unique():
        assert f"`{name}`" in TEXT, name
    for heading in ("All training images", "Half of the training images"):
        table = read_table(heading)
        for _, row in table[table["code"] != ""].iterrows():
            is_here = recipe_of(row["recipe"]) in recipes.RECIPES
            assert row["code"] == ("here" if is_here else "008e167"), row["recipe"]


def test_evaluation_scores_carry_their_standard_errors():
    table = read_table("All training images")
    pairs = []
    for cell in [*table["evaluation"], *table["six views2"]]:
        pairs += re.findall(r"(0\.\d+) ± (0\.\d+)", cell)
    for accuracy, error in pairs:
        wanted = h.standard_error(float(accuracy), N_EVALUATION)
        assert abs(float(error) - wanted) <= 0.0006


def test_peers_and_demo_set_have_the_stored_values():
    peers_rows = pd.read_csv(STORED / "peers-cpu.csv")
    medians = peers_rows.groupby(["side", "size"])["images_per_second"].median()
    for _, row in read_table("Against what people would use instead").iterrows():
        side = re.match(r"\w+", row["side"]).group()
        for size in (224, 128):
            assert abs(numbers(row[f"{size} px: images/s"])[0] - medians[side, size]) < 0.06
    demo = pd.read_csv(STORED / "demo.csv").pivot(index="seed", columns="net", values="accuracy")
    for _, row in read_table("The demo set").iterrows():
        for net, accuracy in demo.loc[int(row["seed"])].items():
            assert numbers(row[net])[0] == pytest.approx(accuracy, abs=0.000501)


def test_sentences_are_short():
    prose = [line for line in TEXT.splitlines() if line and line[0] not in "|#!"]
    for line in prose:
        for sentence in re.split(r"(?<=[.!?:;])\s+", line):
            assert len(re.findall(r"[A-Za-z][\w'-]*", sentence)) <= 30, sentence


# --- diagrams -------------------------------------------------------------------------------------


def test_each_diagram_is_attached_to_the_notebook_as_it_is_drawn_today(tmp_path):
    diagrams.main(tmp_path)
    shown = {}
    for cell in nbformat.read(ROOT / "hw13_distill.ipynb", as_version=4).cells:
        for alt, name in re.findall(r"!\[(.*?)\]\(attachment:(.*?)\)", cell.source):
            shown[name] = alt
            stored = base64.b64decode(cell.attachments[name]["image/png"])
            pictures = [Image.open(file) for file in (io.BytesIO(stored), tmp_path / name)]
            drawn = [np.asarray(picture.convert("RGB"), dtype=float) for picture in pictures]
            assert abs(drawn[0] - drawn[1]).mean() < 5, name
    assert shown == diagrams.ALT


def test_the_numbers_of_the_diagrams_are_those_of_the_program():
    block = h.InvertedResidual(32, 32)
    counts = [f"{sum(p.numel() for p in part.parameters()):,}" for part in block.children()]
    assert [text.split("\n")[-1] for *_, text in diagrams.RESIDUAL_TEXTS[:3]] == counts
    table = read_table("All training images")
    cells = " ".join([*table["evaluation"], *table["six views2"]])
    said = {float(text) for text in re.findall(r"0\.\d{3}", cells)}
    assert {accuracy for _, accuracy in diagrams.PHOTOGRAPHS} <= said
    for name in h.STAGES:
        assert str(h.STAGES[name].n_epochs) in diagrams.ALT["stages.png"]


# --- recipes --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(a_teacher):
    return h.load_teacher(a_teacher)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_net_answers_and_all_but_the_published_one_are_legal(name, teacher):
    recipe = recipes.RECIPES[name]
    net = recipe.net(recipe.cfg, teacher)
    limit = 99_891 if name == "published_boss" else h.PARAM_LIMIT
    assert 40_000 < h.check_budget(net, limit) <= limit


def test_choosing_never_sees_the_validation_images_and_its_halves_stay_the_same(food):
    halves = recipes.choosing_data(h.find_data(food))
    held_out = halves.ids["validation"]
    assert sorted(halves.ids["training"] + held_out) == h.find_data(food).ids["training"]
    assert all(path.parent.name == "training" for path in halves.files["validation"])
    # An image's half is that of its id alone, for good.
    assert "10_1" in held_out
    assert {"0_0", "0_1"} <= set(halves.ids["training"])


def test_the_ring_trains_stores_and_predicts(food, teacher_file, tmp_path, capsys):
    out = tmp_path / "out"
    budget = ["--data", str(food), "--out", str(out), "--work", str(out), "--csvs", str(out)]
    budget += ["--epochs", "1", "--size", "40", "--teacher-size", "48", "--threads", "2"]
    recipes.main(budget)
    recipes.main(budget)
    (out / "recipes.csv").unlink()
    recipes.main(budget)
    said = capsys.readouterr().out
    assert said.count("is stored already") == said.count("finished before") == 1
    row = pd.read_csv(out / "recipes.csv").iloc[0]
    assert row["parameters"] == 52_795
    assert 0 <= row["six_views"] <= 1
    for name in ("handover_bare_1_half", "handover_bare_1_half_six"):
        assert h.validate_submission(out / f"{name}.csv", ids(5)) == 5


def test_a_recipe_of_the_last_stage_is_that_stage_at_the_calls_budget():
    args = type("Args", (), {"size": 112, "epochs": 300, "views": 50, "scored": "both"})
    args.amp = "off"
    cfg = recipes.recipe_config("handover_bare", args, 2)
    same = {"image_size": 112, "n_epochs": 300, "patience": 300, "seed": 2, "amp": "off"}
    wanted = h.replace(h.BEYOND, exp_name="handover_bare", train_on="both", **same)
    assert cfg == wanted
    assert recipes.recipe_config("boss", args, 1).teacher_views == 0


# --- peers ----------------------------------------------------------------------------------------


@pytest.fixture
def prepared(food, teacher_file):
    """The Setup of a side's process."""
    return peers.prepare(peers.parse(["--data", str(food), "--size", "40", *SMALL]))


@pytest.mark.parametrize("name", peers.SIDES)
def test_a_side_has_the_loss_of_the_course_and_trains(prepared, name):
    if name in ("timm", "torchdistill"):
        pytest.importorskip(name)
    batch = peers.noise(prepared)
    wanted = peers.wanted_loss(prepared, *batch)
    side = peers.SIDES[name](prepared)
    peers.check_loss(side, wanted, *batch)
    assert peers.train(prepared, side)["images_per_second"] > 0
