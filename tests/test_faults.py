"""What a run survives and what it says: kills, damaged files, a second run, the end of a session,
the stop button.
"""

import dataclasses
import io
import os
import random
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import ROOT
from shared import same, settings, without_seconds
from test_training import SMALL, prepared

import helpers as h

WORKER = [sys.executable, ROOT / "helpers.py", "run"]
DISK_FULL = OSError(28, "No space left on device")


def train(food, folder, stage="simple", fresh=False, **settings):
    """(history without seconds, checksum) of a fit into a folder."""
    loss_fn, _, train_loader, valid = prepared(food, stage, **settings)
    run_folder = None
    if folder:
        run_folder = h.RunFolder(folder, loss_fn, fresh=fresh)
    history = h.fit(loss_fn, train_loader, valid, run_folder)
    timeless = [{**row, "seconds": 0} for row in history]
    return timeless, h.state_checksum(loss_fn.student)


def simple_stage(data, out=None, **changes):
    """The Run of a small simple stage."""
    return h.run_stage(h.get_config("simple", **(SMALL | changes)), data, out=out)


def failing(error):
    """A function that raises this, whatever it is called with."""

    def fail(*args):
        raise error

    return fail


# --- kills ----------------------------------------------------------------------------------------


def test_killed_processes_leave_what_an_uninterrupted_one_leaves(food, teacher_file, tmp_path):
    """Three SIGKILLs at random moments of a run, then to the end: every byte is the same."""
    small_run = settings(**(SMALL | {"n_epochs": 6}))
    command = [*WORKER, "--data", food, "--stages", "boss", *small_run, "--out"]
    whole = tmp_path / "whole"
    cut = tmp_path / "cut"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    to_the_end = {"env": environment, "check": True, "capture_output": True}
    silent = {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    start = time.monotonic()
    subprocess.run([*command, whole], **to_the_end)
    seconds = time.monotonic() - start
    rng = random.Random(3)
    for _ in range(3):
        process = subprocess.Popen([*command, cut], **silent)
        time.sleep(rng.uniform(0.4, 0.9) * seconds)
        process.kill()
        process.wait()
    subprocess.run([*command, cut], **to_the_end)
    for name in ("boss.csv", "submission.csv", "boss/student_best.ckpt", "boss/config.json"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes(), name
    # last.ckpt holds the seconds of each epoch, which differ.
    assert same(without_seconds(whole / "boss"), without_seconds(cut / "boss"))


# --- damaged and missing files --------------------------------------------------------------------


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    "harm",
    [cut_short, os.remove, lambda p: p.write_bytes(b""), lambda p: torch.save({"other": 1}, p)],
)
def test_a_damaged_last_falls_back_to_the_save_before(food, tmp_path, harm, capsys):
    wanted = train(food, tmp_path / "whole")
    train(food, tmp_path / "cut", n_epochs=3)
    harm(tmp_path / "cut/last.ckpt")
    capsys.readouterr()
    assert train(food, tmp_path / "cut") == wanted
    out = capsys.readouterr().out
    assert "goes on after epoch 2" in out
    # A file that is not there is no damage to warn of.
    if harm is not os.remove:
        assert "WARNING" in out
        assert "last.ckpt" in out
        assert "previous.ckpt" in out
    assert same(without_seconds(tmp_path / "whole"), without_seconds(tmp_path / "cut"))


def test_two_damaged_saves_are_said_and_fresh_starts_again(food, tmp_path, capsys):
    wanted = train(food, tmp_path / "run", n_epochs=2)
    for name in ("last.ckpt", "previous.ckpt"):
        cut_short(tmp_path / "run" / name)
    with pytest.raises(h.UserError, match=r"last.ckpt is not loaded: it is damaged.*--fresh"):
        train(food, tmp_path / "run", n_epochs=2)
    assert "WARNING" not in capsys.readouterr().out
    assert not (tmp_path / "run/damaged.ckpt").exists()
    assert train(food, tmp_path / "run", n_epochs=2, fresh=True) == wanted


def test_a_fallback_never_replaces_the_good_save_by_the_damaged_one(food, tmp_path, monkeypatch):
    """Killed right after the fallback's first write, the run still goes on."""
    wanted = train(food, tmp_path / "whole")
    train(food, tmp_path / "cut", n_epochs=3)
    cut_short(tmp_path / "cut/last.ckpt")
    with monkeypatch.context() as patch:
        patch.setattr(h, "train_epochs", failing(RuntimeError("killed")))
        with pytest.raises(RuntimeError, match="killed"):
            train(food, tmp_path / "cut")
    # Were the damaged file the predecessor by now, nothing would be left to go on from.
    cut_short(tmp_path / "cut/last.ckpt")
    assert train(food, tmp_path / "cut") == wanted


@pytest.mark.parametrize("name", ["student_best.ckpt", "config.json", "log.csv"])
@pytest.mark.parametrize("harm", [cut_short, lambda p: p.unlink()])
def test_what_was_lost_beside_last_is_written_again(food, tmp_path, name, harm):
    train(food, tmp_path / "run", n_epochs=1)
    before = (tmp_path / "run" / name).read_bytes()
    harm(tmp_path / "run" / name)
    train(food, tmp_path / "run", n_epochs=1)
    assert (tmp_path / "run" / name).read_bytes() == before


@pytest.mark.parametrize(
    "harm",
    [
        lambda s: s | {"facts": 3},
        lambda s: s | {"facts": "{}"},
        lambda s: [1],
        lambda s: s | {"history": [1]},
        lambda s: {"facts": s["facts"]},
    ],
)
def test_a_checkpoint_with_other_contents_is_one_sentence(food, tmp_path, harm):
    train(food, tmp_path / "run", n_epochs=1)
    saved = torch.load(tmp_path / "run/last.ckpt", weights_only=True)
    for name in ("last.ckpt", "previous.ckpt"):
        torch.save(harm(saved), tmp_path / "run" / name)
    with pytest.raises(h.UserError, match="is no run of this program; --fresh"):
        train(food, tmp_path / "run", n_epochs=1)


def test_a_checkpoint_with_a_part_missing_is_one_sentence(food, tmp_path):
    train(food, tmp_path / "run", n_epochs=1)
    saved = torch.load(tmp_path / "run/last.ckpt", weights_only=True)
    del saved["optimizer"]
    torch.save(saved, tmp_path / "run/last.ckpt")
    with pytest.raises(h.UserError, match="another student or program.*optimizer"):
        train(food, tmp_path / "run", n_epochs=1)


def test_another_student_of_the_same_settings_is_refused(food, tmp_path, monkeypatch):
    """A learner edits the builder between two runs: weights may fit, but it is another net."""
    train(food, tmp_path / "run", n_epochs=1)
    original = h.NETS["sample"]

    def edited(cfg):
        net = original(cfg)
        net.relu1 = torch.nn.SiLU()
        return net

    monkeypatch.setitem(h.NETS, "sample", edited)
    with pytest.raises(h.UserError, match="other settings: the layers of the student"):
        train(food, tmp_path / "run", n_epochs=1)


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (OSError(5, "Input/output error"), "Input/output error"),
        (MemoryError(), "the memory is full"),
    ],
)
def test_a_picture_that_cannot_be_read_now_stops_and_is_not_remembered_as_broken(
    food, monkeypatch, error, why
):
    original = h.Image.open

    def flaky(path, **options):
        if str(path).endswith("3_1.jpg"):
            raise error
        return original(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(h.Image, "open", flaky)
        with pytest.raises(h.UserError, match=f"3_1.jpg cannot be decoded.*{why}"):
            h.load_data(h.find_data(food), "training", "whole", 72)
    assert len(h.load_data(h.find_data(food), "training", "whole", 72)) == 22


def test_a_picture_that_asks_for_an_impossible_place_in_its_file_is_a_damaged_one(
    food, monkeypatch, capsys
):
    original = h.Image.open

    def seeks(path, **options):
        if str(path).endswith("3_1.jpg"):
            raise OSError(22, "Invalid argument")
        return original(path, **options)

    monkeypatch.setattr(h.Image, "open", seeks)
    assert len(h.load_data(h.find_data(food), "training", "whole", 72)) == 21
    assert "left out" in capsys.readouterr().out


def test_damaged_pictures_are_said_at_every_use_and_a_cache_of_zeros_is_made_again(food, capsys):
    (food / "training/3_1.jpg").write_bytes(b"no picture")
    (food / "evaluation/0001.jpg").write_bytes(b"no picture")
    data = h.find_data(food)
    # A damaged training image is left out; an evaluation image keeps its row.
    cases = (("training", "3_1.jpg", 22, 21), ("evaluation", "0001.jpg", 5, 5))
    for split, damaged, n, kept in cases:
        made = h.load_data(data, split, "whole", 76)
        images = made.images.clone()
        assert damaged in capsys.readouterr().out
        # The second use takes the cache, and says it again.
        assert len(h.load_data(data, split, "whole", 76)) == kept
        out = capsys.readouterr().out
        assert f"WARNING: 1 of {n} {split} images are damaged ({damaged})" in out
        size = made.cache.stat().st_size
        del made  # its images lie in the cache's file
        path = next(h.cache_root().glob(f"{split}-whole-76-*"))
        path.unlink()
        path.write_bytes(bytes(size))
        assert torch.equal(h.load_data(data, split, "whole", 76).images, images)


def test_what_killed_writers_left_is_cleared_after_a_day(tmp_path):
    old = tmp_path / ".a.txt.1.tmp"
    new = tmp_path / ".a.txt.2.tmp"
    other = tmp_path / ".b.txt.1.tmp"
    for path in (old, new, other):
        path.write_text("half")
    more_than_a_day_ago = time.time() - 90_000
    for path in (old, other):
        os.utime(path, (more_than_a_day_ago, more_than_a_day_ago))
    h.write_text(tmp_path / "a.txt", "whole")
    # Only what was left of the file that is written now is cleared.
    assert sorted(os.listdir(tmp_path)) == [".a.txt.2.tmp", ".b.txt.1.tmp", "a.txt"]


def test_a_save_that_fails_leaves_last_and_its_predecessor_alone(tmp_path, monkeypatch):
    for value in (1, 2):
        h.save_checkpoint(value, tmp_path / "last.ckpt", "previous.ckpt")
    with monkeypatch.context() as patch:
        patch.setattr(h.os, "fsync", failing(DISK_FULL))
        with pytest.raises(h.UserError, match="No space left"):
            h.save_checkpoint(3, tmp_path / "last.ckpt", "previous.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True) == 2
    assert torch.load(tmp_path / "previous.ckpt", weights_only=True) == 1


def test_a_run_survives_that_its_folder_vanishes(food, tmp_path, monkeypatch):
    """Between two epochs somebody removes the folder: it is made again, and all four files are
    there at the end.
    """
    wanted = train(food, tmp_path / "whole")
    original = h.evaluate
    calls = []

    def evaluate(*args):
        calls.append(1)
        if len(calls) == 3:
            for path in (tmp_path / "run").iterdir():
                path.unlink()
        return original(*args)

    monkeypatch.setattr(h, "evaluate", evaluate)
    assert train(food, tmp_path / "run") == wanted
    files = set(os.listdir(tmp_path / "run"))
    assert {"config.json", "last.ckpt", "log.csv", "student_best.ckpt"} <= files


def test_a_full_disk_is_one_sentence_and_what_was_saved_stays(food, tmp_path, monkeypatch):
    train(food, tmp_path / "run", n_epochs=1)
    before = (tmp_path / "run/last.ckpt").read_bytes()
    monkeypatch.setattr(h.os, "fsync", failing(DISK_FULL))
    with pytest.raises(h.UserError, match="No space left on device.*what was saved is intact"):
        train(food, tmp_path / "run", n_epochs=2)
    assert (tmp_path / "run/last.ckpt").read_bytes() == before
    assert not [name for name in os.listdir(tmp_path / "run") if name.endswith(".tmp")]


# --- two runs on one folder -----------------------------------------------------------------------


def test_a_second_run_on_a_folder_is_refused_and_a_killed_one_holds_nothing(food, tmp_path):
    code = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import helpers as h
with h.locked({str(tmp_path / "run")!r}):
    print("held", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(h.UserError, match="another run is working in .*run"):
        train(food, tmp_path / "run")
    with pytest.raises(h.UserError, match="another run"):
        h.run(h.find_data(food), ["simple"], out=tmp_path / "run", **SMALL)
    process.kill()
    process.wait()
    history, _ = train(food, tmp_path / "run")
    assert len(history) == 4


# --- time -----------------------------------------------------------------------------------------


def test_a_run_ends_before_its_time_is_up_and_goes_on_later(food, tmp_path, monkeypatch, capsys):
    wanted = train(food, tmp_path / "whole")
    clock = iter(range(0, 100_000, 60))  # a minute passes at each look
    with monkeypatch.context() as patch:
        patch.setattr(h, "SESSION_START", 0)
        patch.setattr(h.time, "time", lambda: next(clock))
        history, _ = train(food, tmp_path / "cut", time_limit_h=0.05)  # 180 s, 18 of them kept free
    assert len(history) == 3
    assert "ends after epoch 3 of 4" in capsys.readouterr().out
    assert train(food, tmp_path / "cut") == wanted


def test_a_stage_for_which_no_time_is_left_still_ends_in_a_csv(food, tmp_path, monkeypatch):
    monkeypatch.setattr(h, "SESSION_START", time.time() - 3600)
    (run,) = h.run(h.find_data(food), ["simple"], out=tmp_path, **SMALL, time_limit_h=0.5)
    assert len(run.history) == 0
    assert h.validate_submission(run.csv, 5) == 5
    assert run.student()
    # The table and the curves of no epochs are made as well.
    assert h.stage_table([run]).loc["simple (unfinished: 0 of 4 epochs)", "epochs"] == 0
    assert h.plot_history([run])


def test_the_limit_is_kaggles_own_there_and_none_elsewhere(monkeypatch, tmp_path):
    cfg = h.Config()
    cpu = torch.device("cpu")
    monkeypatch.setattr(h, "SESSION_START", time.time() - 11.6 * 3600)
    assert not h.time_is_up(cfg, [], cpu)
    (tmp_path / "working").mkdir()
    monkeypatch.setenv("HW13_KAGGLE", str(tmp_path))
    assert h.time_is_up(cfg, [], cpu)
    # A limit that is set counts instead.
    longer = dataclasses.replace(cfg, time_limit_h=20.0)
    assert not h.time_is_up(longer, [], cpu)
    # Before the limit it depends on how long an epoch takes.
    monkeypatch.setattr(h, "SESSION_START", time.time() - 9 * 3600)
    assert not h.time_is_up(cfg, [{"seconds": 60}], cpu)
    assert h.time_is_up(cfg, [{"seconds": 5000}], cpu)


def test_on_kaggle_the_session_began_with_the_machine_and_elsewhere_with_the_import(monkeypatch):
    monkeypatch.delenv("HW13_SESSION_START", raising=False)
    assert abs(h.session_start() - time.time()) < 1
    monkeypatch.setattr(h, "on_kaggle", lambda: True)
    if not Path("/proc/uptime").exists():
        pytest.skip("the system does not tell when its processes began")
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    age = time.time() - h.session_start()
    assert 0 < age <= uptime + 1
    # A name with blanks and parentheses does not move the fields.
    texts = {"/proc/uptime": "5000.0 1.0", "/proc/1/stat": "1 (a b) c) S " + "0 " * 18 + "100000 0"}
    monkeypatch.setattr(h.Path, "read_text", lambda path: texts[str(path)])
    monkeypatch.setattr(h.os, "sysconf", lambda name: 100)
    assert abs(time.time() - h.session_start() - 4000) < 1
    texts["/proc/1/stat"] = "nonsense"
    assert abs(h.session_start() - time.time()) < 1


@pytest.mark.parametrize(
    "error", [NotImplementedError("no flock"), OSError(38, "not implemented"), OSError(95, "no")]
)
def test_a_file_system_without_locks_is_said_and_the_run_goes_on(
    error, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(h.filelock.FileLock, "acquire", failing(error))
    with h.locked(tmp_path / "run"):
        (tmp_path / "run/file").write_text("x")
    assert "cannot be locked" in capsys.readouterr().out
    monkeypatch.setattr(h.filelock.FileLock, "acquire", failing(OSError(30, "read-only")))
    with pytest.raises(h.UserError, match="cannot be written"), h.locked(tmp_path / "run"):
        pass


def test_an_edited_module_is_noticed_in_a_running_kernel(food, tmp_path, monkeypatch, capsys):
    data = h.find_data(food)
    cfg = h.get_config("simple", **SMALL)
    h.prepare_stage(cfg, data, out=tmp_path)
    assert "restart the kernel" not in capsys.readouterr().out
    monkeypatch.setattr(h, "SOURCE_WHEN_IMPORTED", b"as it was")
    h.prepare_stage(cfg, data, out=tmp_path)
    assert "restart the kernel" in capsys.readouterr().out


def test_the_folders_of_all_stages_are_looked_at_before_the_first_trains(food, tmp_path):
    """As after another LENGTH: n_epochs may grow for Simple, not under Strong's cosine."""
    data = h.find_data(food)
    simple_stage(data, tmp_path)
    teacher = h.freeze(h.build_student(h.TEACHER_CONFIG))
    small = SMALL | {"n_epochs": 1, "image_size": 40}
    strong = h.get_config("strong", **small)
    h.run_stage(strong, data, teacher, out=tmp_path)

    longer = {"n_epochs": 9}
    simple = h.get_config("simple", **(SMALL | longer))
    h.check_folders([simple, strong], data, tmp_path)
    configs = [simple, dataclasses.replace(strong, **longer)]
    with pytest.raises(h.UserError, match=r"strong \(n_epochs 1, now 9\)") as error:
        h.check_folders(configs, data, tmp_path)
    assert "simple" not in str(error.value)
    h.check_folders(configs, data, tmp_path / "elsewhere")


# --- messages -------------------------------------------------------------------------------------


def test_a_message_shows_no_invisible_characters_and_no_endless_words():
    text = str(h.UserError("x\x1b[31m\u202ey\x00 " + "k" * 5000 + "\nend"))
    assert "\\x1b[31m\\u202ey\\x00" in text
    assert len(text) < 260
    assert text.endswith("k\nend")
    for character in text:
        assert character.isprintable() or character == "\n"
    assert h.readable("Gemüse/Obst 25 °C: 麺") == "Gemüse/Obst 25 °C: 麺"


def test_what_a_terminal_cannot_show_ends_no_run(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    h.say("m\u00fcsli \udcff")
    assert stream.buffer.getvalue() == b"m\\xfcsli \\udcff\n"


def test_a_message_quotes_little_of_a_long_value_and_no_invisible_character(tmp_path):
    long = "a \u202e\x1b " * 2000
    calls = [
        lambda: h.get_config(long),
        lambda: h.get_config("simple", long),
        lambda: h.build_student(h.get_config("simple", student=long)),
        lambda: h.get_config("simple", amp=long),
        lambda: h.parse_setting(f"x={long}"),
        lambda: h.load_student(tmp_path / h.BEST),
    ]
    (tmp_path / h.BEST).write_bytes(b"x")
    facts = {"config": {long: 1}}
    h.write_text(tmp_path / "config.json", h.json.dumps(facts))
    for call in calls:
        with pytest.raises(h.UserError) as error:
            call()
        text = str(error.value)
        assert text.count("a \\u202e") < 20, text[:300]
        assert text.isprintable()
    names = [f"{'b ' * 2000}{i}\n" for i in range(9)]
    assert len(h.some_of(names)) < 4 * 170
    assert h.some_of(names).isprintable()


# --- other systems --------------------------------------------------------------------------------


def test_no_file_is_renamed_while_it_is_mapped(food, tmp_path, monkeypatch):
    """Windows refuses that. Here the mappings of the process are looked at."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("the system does not tell what is mapped")
    monkeypatch.setenv("HW13_CACHE", str(tmp_path / "cache"))
    original = os.replace
    renamed = []

    def replace(source, target):
        for path in (source, target):
            assert str(path) not in maps.read_text(), path
        renamed.append(Path(target).suffix)
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    teacher = h.freeze(h.build_student(h.TEACHER_CONFIG))
    cfg = h.get_config("beyond", **(SMALL | {"n_epochs": 1, "image_size": 40}))
    h.run_stage(cfg, h.find_data(food), teacher, out=tmp_path / "out")
    assert ".images" in renamed
    assert ".ckpt" in renamed


def test_a_run_needs_nothing_that_only_posix_has(food, tmp_path, monkeypatch):
    monkeypatch.setenv("HW13_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(h, "on_kaggle", lambda: True)
    monkeypatch.delenv("HW13_SESSION_START", raising=False)
    data = h.find_data(food)
    for name in ("posix_fallocate", "sysconf"):
        monkeypatch.delattr(os, name, raising=False)
    assert abs(h.session_start() - time.time()) < 1
    run = simple_stage(data, tmp_path / "out", n_epochs=1)
    assert h.validate_submission(run.csv, 5) == 5


def test_the_notebook_says_where_helpers_must_be_and_nothing_else_is_blamed_on_that(tmp_path):
    notebook = h.json.loads((ROOT / h.NOTEBOOK).read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"]]
    setup = next(cell for cell in cells if "import helpers as h" in cell)
    imports = setup.partition("LENGTH = h.chosen_length")[0]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    for folder, code, words in (
        (tmp_path, imports, "start this notebook in the folder of helpers.py"),
        (ROOT, "import sys; sys.modules['filelock'] = None\n" + imports, "filelock"),
    ):
        command = [sys.executable, "-c", code]
        result = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        last = result.stderr.splitlines()[-1]
        assert last.startswith("ModuleNotFoundError"), last
        assert words in last


# --- the stop button ------------------------------------------------------------------------------


def interrupted_at(monkeypatch, nth_view):
    """In a notebook whose stop button is pressed while the nth batch of views is made."""
    original = h.BatchLoader.views_of
    calls = []

    def interrupted(loader, rows, draw=None):
        calls.append(1)
        if len(calls) == nth_view:
            raise KeyboardInterrupt
        return original(loader, rows, draw)

    def no_bar(total, desc, initial=0):
        return h.tqdm(total=total, disable=True)

    monkeypatch.setattr(h.BatchLoader, "views_of", interrupted)
    monkeypatch.setattr(h, "in_notebook", lambda: True)
    monkeypatch.setattr(h, "progress_bar", no_bar)


def test_the_stop_button_ends_the_queue_too_and_the_cell_goes_on_exactly(
    food, tmp_path, monkeypatch, capsys
):
    _, wanted = train(food, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted_at(patch, 10)
        simple_stage(h.find_data(food), tmp_path / "cut")
    said = capsys.readouterr().out
    assert "simple: stopped after 2 of 4 epochs" in said
    assert "run this cell again, and" in said
    again = simple_stage(h.find_data(food), tmp_path / "cut")
    assert h.state_checksum(again.student()) == wanted


def test_an_interrupted_fit_leaves_its_best_weights_in_the_student(food, tmp_path, monkeypatch):
    loss_fn, _, train_loader, valid = prepared(food, "simple")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted_at(patch, 10)
        h.fit(loss_fn, train_loader, valid, h.RunFolder(tmp_path / "run", loss_fn))
    best = h.load_file(tmp_path / "run/student_best.ckpt")
    assert same(h.copy_of_weights(loss_fn.student), best)


def test_an_unfinished_stage_is_called_so_in_every_table_and_figure(food, tmp_path):
    """Here the session's time ended it."""
    run = simple_stage(h.find_data(food), tmp_path / "short", time_limit_h=1e-9)
    whole = simple_stage(h.find_data(food), tmp_path / "whole")
    assert not run.finished
    words = f"simple (unfinished: {len(run.history)} of 4 epochs)"
    assert run.label == words
    assert list(h.stage_table([run, whole]).index) == [words, "simple"]
    figure = h.plot_history([run, whole])
    labels = [line.get_label() for line in figure.axes[1].lines]
    assert words in labels
    assert "simple" in labels


def test_who_stops_a_fresh_run_is_told_not_to_start_it_afresh_again(
    food, tmp_path, monkeypatch, capsys
):
    data = h.find_data(food)
    cfg = h.get_config("simple", **SMALL)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted_at(patch, 10)
        h.run_stage(cfg, data, out=tmp_path, fresh=True)
    assert "run this cell again without fresh=True, and it goes on" in capsys.readouterr().out
    h.run_stage(cfg, data, out=tmp_path)
    assert "goes on after epoch 2" in capsys.readouterr().out


def test_predict_and_evaluate_say_that_a_students_run_is_not_finished(
    food, tmp_path, monkeypatch, capsys
):
    data = h.find_data(food)
    checkpoint = tmp_path / "simple" / h.BEST
    said = []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted_at(patch, 10)
        simple_stage(data, tmp_path)
    for _ in range(2):  # stopped, then finished
        capsys.readouterr()
        arguments = ["--data", str(food), "--checkpoint", str(checkpoint)]
        assert h.main(["evaluate", *arguments]) == 0
        assert h.main(["predict", *arguments, "--out", str(tmp_path / "p.csv")]) == 0
        said.append(capsys.readouterr().out.count("not finished (2 of 4 epochs)"))
        simple_stage(data, tmp_path)
    assert said == [2, 0]


def test_the_best_of_unfinished_runs_is_called_unfinished(food, tmp_path, monkeypatch, capsys):
    data = h.find_data(food)
    with monkeypatch.context() as patch:
        patch.setattr(h, "time_is_up", lambda cfg, history, device: len(history) == 2)
        run = simple_stage(data, tmp_path)
    capsys.readouterr()
    assert h.best_run([run]) is run
    assert "the best so far is simple (unfinished: 2 of 4 epochs)" in capsys.readouterr().out
    assert "unfinished: 2 of 4 epochs" in h.plot_loss_terms(run).alt_text


def test_without_a_notebook_an_interrupt_stays_one(food, tmp_path, monkeypatch):
    monkeypatch.setattr(h, "train_one_epoch", failing(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(food, tmp_path / "run")


# --- a second session on Kaggle -------------------------------------------------------------------


@pytest.fixture
def kaggle(tmp_path, food, monkeypatch):
    """A simulated /kaggle with the data attached."""
    root = tmp_path / "kaggle"
    (root / "working").mkdir(parents=True)
    (root / "input").mkdir()
    food.rename(root / "input/ml2023spring-hw13")
    monkeypatch.setenv("HW13_KAGGLE", str(root))
    return root


def end_session(kaggle, folder):
    """Move what the session has written, and begin another one with nothing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    (kaggle / "working").rename(folder)
    (kaggle / "working").mkdir()


def test_an_earlier_sessions_output_is_gone_on_from(kaggle, tmp_path, capsys):
    data = h.find_data()
    wanted = simple_stage(data, tmp_path / "whole")
    simple_stage(data, n_epochs=2)
    earlier = kaggle / "input/datasets/somebody/first-session"
    end_session(kaggle, earlier)
    # Kaggle's inputs can only be read.
    attached = [*sorted(earlier.rglob("*")), earlier]
    for path in attached:
        mode = 0o555 if path.is_dir() else 0o444
        path.chmod(mode)
    capsys.readouterr()
    run = simple_stage(data)
    out = capsys.readouterr().out
    assert f"goes on after epoch 2 from {earlier / 'simple'}" in out
    assert run.folder == kaggle / "working/simple"
    assert len(run.history) == 4
    assert h.state_checksum(run.student()) == h.state_checksum(wanted.student())
    for path in attached:
        path.chmod(0o755)


def test_a_run_begun_without_the_input_does_not_hide_it(kaggle, capsys):
    data = h.find_data()
    simple_stage(data, n_epochs=3)
    end_session(kaggle, kaggle / "elsewhere")
    simple_stage(data, n_epochs=1)
    # Now the input is attached.
    (kaggle / "elsewhere").rename(kaggle / "input/first")
    capsys.readouterr()
    simple_stage(data)
    assert "goes on after epoch 3 from" in capsys.readouterr().out


def test_a_finished_input_is_this_folders_own_from_then_on(kaggle, capsys):
    data = h.find_data()
    wanted = h.state_checksum(simple_stage(data).student())
    end_session(kaggle, kaggle / "elsewhere")
    simple_stage(data, n_epochs=1)
    (kaggle / "elsewhere").rename(kaggle / "input/first")
    simple_stage(data)
    # The input is detached again.
    (kaggle / "input/first").rename(kaggle / "elsewhere")
    capsys.readouterr()
    run = simple_stage(data)
    assert "finished before, loaded" in capsys.readouterr().out
    assert h.state_checksum(run.student()) == wanted


def test_an_input_that_a_kill_left_with_the_save_before_is_gone_on_from(kaggle, capsys):
    data = h.find_data()
    simple_stage(data, n_epochs=2)
    first = kaggle / "input/first"
    end_session(kaggle, first)
    (first / "simple/last.ckpt").rename(first / "simple/previous.ckpt")
    capsys.readouterr()
    run = simple_stage(data)
    assert "goes on after epoch 2 from" in capsys.readouterr().out
    assert len(run.history) == 4


def test_the_demo_set_is_not_taught_by_a_teacher_that_lies_near(kaggle, tmp_path):
    near = tmp_path / "resnet18_teacher.ckpt"
    demo = dataclasses.replace(h.find_data(), origin="demo set", teacher_path=near)
    assert h.teacher_file(demo, out=tmp_path) is None
    assert h.teacher_file(demo, tmp_path / "named.ckpt") == tmp_path / "named.ckpt"


def test_evaluation_images_are_no_part_of_what_a_run_remembers(food, tmp_path, capsys):
    """Not by the words for the data either, which tell whether one is missing."""
    data = h.find_data(food)
    simple_stage(data, tmp_path)
    said_otherwise = dataclasses.replace(data, origin="own photographs, all of them")
    capsys.readouterr()
    simple_stage(said_otherwise, tmp_path)
    assert "finished before, loaded" in capsys.readouterr().out


def test_an_earlier_session_with_other_settings_is_ignored_and_said(kaggle, capsys):
    data = h.find_data()
    simple_stage(data, lr=0.5)
    end_session(kaggle, kaggle / "input/first")
    run = simple_stage(data)
    out = capsys.readouterr().out
    assert "ignored: " in out
    assert "lr 0.5 (now 0.001)" in out
    assert "fresh" not in out  # there is nothing to start again
    assert len(run.history) == 4


def test_a_teacher_of_an_earlier_session_is_taken(kaggle):
    data = h.find_data()
    cfg = h.replace(h.TEACHER_CONFIG, n_epochs=1, image_size=64, batch_size=8, amp="off")
    h.train_teacher(data, cfg=cfg)
    end_session(kaggle, kaggle / "input/first")
    found = kaggle / "input/first/teacher/student_best.ckpt"
    assert h.find_teacher(data).source.startswith(str(found))


def test_an_earlier_session_on_one_gpu_is_gone_on_from_on_one(kaggle, monkeypatch, capsys):
    data = h.find_data()
    simple_stage(data, n_epochs=2)
    end_session(kaggle, kaggle / "input/first")
    monkeypatch.setattr(h, "gpus_of_notebook", lambda device: 2)
    monkeypatch.setattr(h, "train_in_processes", None)  # it is not asked
    capsys.readouterr()
    run = simple_stage(data)
    out = capsys.readouterr().out
    assert "1 of 2 GPUs at work, for the run began on so many" in out
    assert "goes on after epoch 2 from" in out
    assert len(run.history) == 4


def test_an_earlier_session_with_other_images_is_ignored_and_said(kaggle, capsys):
    simple_stage(h.find_data())
    end_session(kaggle, kaggle / "input/first")
    picture = kaggle / "input/ml2023spring-hw13/training/4_1.jpg"
    picture.write_bytes(picture.with_name("4_0.jpg").read_bytes())
    simple_stage(h.find_data())
    out = capsys.readouterr().out
    assert "ignored: " in out
    assert "the training images (they have changed)" in out


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
    ],
)
def test_out_of_memory_names_the_settings_that_would_fit(food, monkeypatch, error):
    monkeypatch.setattr(h, "train_one_epoch", failing(error))
    sentence = "simple: out of memory with batch_size=8, image_size=64: set batch_size=4"
    with pytest.raises(h.UserError, match=sentence):
        train(food, None)
    # Any other error stays what it is.
    monkeypatch.setattr(h, "train_one_epoch", failing(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        train(food, None)


def test_memory_is_given_back_though_the_error_is_kept(food):
    """As a notebook keeps it. torch's forward pass has closures, which clearing frames misses."""
    kept = []

    class Greedy(torch.nn.Module):
        def forward(self, images):
            activations = images * 1.0
            kept.append(weakref.ref(activations))

            def closure():
                return activations.sum()

            closure()
            raise MemoryError

    student = torch.nn.Sequential(Greedy(), torch.nn.Linear(1, 1))
    cfg = h.Config(image_size=64, batch_size=8)
    train, valid = h.build_loaders(cfg, h.find_data(food), torch.device("cpu"))
    with pytest.raises(h.UserError, match="out of memory") as caught:
        h.fit(h.DistillLoss(cfg, student), train, valid)
    assert caught.value is not None
    assert kept[0]() is None


def test_the_unused_cache_of_torch_is_free_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3, 16))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 11)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 4)
    assert h.free_memory(torch.device("cuda")) == 10


@pytest.mark.parametrize(("free", "moves"), [(201, True), (199, False)])
def test_images_are_on_the_gpu_for_the_block_where_they_fit(food, monkeypatch, free, moves):
    class Images:
        nbytes = 100
        is_cuda = False

        def to(self, device):
            return f"on {device.type}"

    loader = h.build_loaders(h.Config(image_size=64), h.find_data(food), torch.device("cpu"))[0]
    on_the_host = Images()
    loader.device = torch.device("cuda")
    loader.images = on_the_host
    loader.split = h.replace(loader.split, images=on_the_host)
    monkeypatch.setattr(h, "free_memory", lambda device: free)
    with h.images_on_gpu(loader, None):
        assert (loader.images == "on cuda") is moves
    assert loader.images is on_the_host


# --- the final fit --------------------------------------------------------------------------------


def test_the_final_fit_repeats_a_stage_on_all_labelled_images(food, tmp_path, capsys):
    data = h.find_data(food)
    (run,) = h.run(data, ["simple"], out=tmp_path, **SMALL)
    before = (tmp_path / "submission.csv").read_bytes()
    path = h.final_fit(run, data, out=tmp_path)
    out = capsys.readouterr().out
    best = int(run.history["valid_acc"].argmax()) + 1
    assert f"for {best} epochs on 33 images; it has no validation score" in out
    assert "simple_final" in out
    assert h.validate_submission(path, 5) == 5
    assert (tmp_path / "submission.csv").read_bytes() == before
    log = pd.read_csv(tmp_path / "simple_final/log.csv")
    assert len(log) == best
    assert log["valid_acc"].isna().all()
    # Without a validation score the last student is the best one.
    state = torch.load(tmp_path / "simple_final/last.ckpt", weights_only=True)
    for name, value in state["best"].items():
        assert torch.equal(value, state["loss_fn"][f"student.{name}"]), name
    h.final_fit(run, data, out=tmp_path, submit_it=True)
    assert (tmp_path / "submission.csv").read_bytes() == path.read_bytes()
    checkpoint = tmp_path / "simple_final/student_best.ckpt"
    code = h.main(["evaluate", "--data", str(food), "--checkpoint", str(checkpoint)])
    assert code == 2
    assert "it has no validation accuracy" in capsys.readouterr().err


def test_a_final_fit_replaces_no_run_that_is_none(food, tmp_path):
    data = h.find_data(food)
    named_like_it = simple_stage(data, tmp_path, exp_name="simple_final")
    run = simple_stage(data, tmp_path)
    before = h.state_checksum(named_like_it.student())
    with pytest.raises(
        h.UserError, match="simple_final holds a run that is no final fit of simple"
    ):
        h.final_fit(run, data, out=tmp_path)
    assert (
        h.state_checksum(simple_stage(data, tmp_path, exp_name="simple_final").student()) == before
    )


def test_names_that_would_meet_other_files_are_refused(food, tmp_path):
    with pytest.raises(h.UserError, match="exp_name='submission': allowed is any other name"):
        h.Config(exp_name="submission")
    data = h.find_data(food)
    with pytest.raises(h.UserError, match="at most 64"):  # with _final behind it
        h.run(data, ["simple"], out=tmp_path, final="csv", **(SMALL | {"exp_name": "a" * 60}))
    assert not list(tmp_path.glob("a*"))


def test_the_final_fit_follows_a_stage_that_went_on_and_submits_nothing_unfinished(
    food, tmp_path, monkeypatch, capsys
):
    data = h.find_data(food)
    (run,) = h.run(data, ["simple"], out=tmp_path, final="csv", **SMALL)
    # The stage's best epoch is now its last.
    history = run.history.assign(valid_acc=[0.0, 0.1, 0.2, 0.3])
    moved = dataclasses.replace(run, history=history)
    assert h.final_fit(moved, data, out=tmp_path) == tmp_path / "simple_final.csv"
    assert "for 4 epochs" in capsys.readouterr().out
    (tmp_path / "simple_final.csv").unlink()
    before = (tmp_path / "submission.csv").read_bytes()
    monkeypatch.setattr(h, "time_is_up", lambda *a: True)
    assert h.final_fit(moved, data, out=tmp_path, fresh=True, submit_it=True) is None
    never_trained = dataclasses.replace(run, history=run.history[:0])
    assert h.final_fit(never_trained, data, out=tmp_path) is None
    out = capsys.readouterr().out
    assert "not finished, so no CSV is written" in out
    assert "no final fit" in out
    assert (tmp_path / "submission.csv").read_bytes() == before
    assert not (tmp_path / "simple_final.csv").exists()


def test_stages_after_an_unfinished_one_wait_and_a_half_trained_teacher_does_not_teach(
    food, tmp_path, monkeypatch, capsys
):
    data = h.find_data(food)
    monkeypatch.setattr(h, "time_is_up", lambda cfg, history, device: len(history) == 2)
    simple = h.STAGES["simple"]
    second = dataclasses.replace(simple, exp_name="second")
    monkeypatch.setattr(h, "STAGES", {"simple": simple, "second": second})
    runs = h.run(data, ["simple", "second"], out=tmp_path, **SMALL)
    assert [run.name for run in runs] == ["simple"]
    assert "left for the next time" in capsys.readouterr().out
    small_teacher = dataclasses.replace(h.TEACHER_CONFIG, **SMALL)
    with pytest.raises(h.UserError, match="half-trained one must not teach"):
        h.train_teacher(data, tmp_path, small_teacher)


# --- values ---------------------------------------------------------------------------------------

COMMANDS = ["run", "evaluate", "predict", "validate", "export-"]
STAGE_WORDS = ["--demo-", "--out", "--stages", "simple", "boss,boss", "--teacher"]
SETTINGS = ["--set", "lr=1", "lr=", "=", "lr=nan", "widths=1,2", "depths=(1,)", "student=resnet50"]
ROWS = ["--fresh", "--rows", "3", "-1", "x", "", "\x00"]
LENGTHS = ["--length", "full", "long", "--final", "csv", "--tta"]
VALUES = ["crop_scale=0.5,0.2", "n_epochs=1e9", "time_limit_h=-1", "é"]


def test_random_arguments_give_one_sentence_and_no_run(food, tmp_path, monkeypatch, capsys):
    """600 command lines of random words: exit code 2 and one line each, unless what is asked for is
    usable.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(h, "run", lambda *a, **k: [])
    monkeypatch.setattr(h, "stage_table", lambda runs: h.pd.DataFrame())
    rng = random.Random(1)
    words = [*COMMANDS, "--data", str(food), *STAGE_WORDS, *SETTINGS, *ROWS, *LENGTHS]
    words += ["--checkpoint", str(food), *VALUES]
    refused = 0
    for _ in range(600):
        command = rng.choice(COMMANDS)
        more = [rng.choice(words) for _ in range(rng.randint(0, 6))]
        arguments = [command, *more]
        code = h.main(arguments)
        captured = capsys.readouterr()
        assert code in (0, 2), arguments
        if code == 2:
            refused += 1
            assert captured.err.startswith("helpers.py: "), arguments
            assert captured.err.count("\n") == 1, arguments
    assert refused > 500
