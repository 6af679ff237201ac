"""Own code in the training, what a run remembers of it, and stages that are prepared once."""

import importlib
import json
import sys
import textwrap
from collections import namedtuple
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from shared import settings
from torch import nn

import helpers as h

CALLS = []


def my_loss(student_logits, labels, teacher_logits, alpha, temperature):
    CALLS.append((alpha, temperature))
    return h.loss_fn_kd(student_logits, labels, teacher_logits, alpha, temperature)


def labels_only(student_logits, labels, teacher_logits, alpha, temperature):
    return F.cross_entropy(student_logits, labels)


class MyNet(nn.Module):
    """A learner's own student."""

    def __init__(self, activation=torch.relu):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2)
        self.fc = nn.Linear(8, 11)
        self.activation = activation

    def forward(self, x):
        return self.fc(self.activation(self.conv(x)).mean((2, 3)))


@pytest.fixture
def medium(food, teacher_file, tmp_path, tiny):
    """Run Medium into one folder, with own code if any is given."""
    data = h.find_data(food)
    teacher = h.load_teacher(teacher_file)

    def run_medium(stage="medium", **own):
        return h.run_stage(h.get_config(stage, **tiny), data, teacher, tmp_path, **own)

    return run_medium


# --- the door -------------------------------------------------------------------------------------


def test_an_own_loss_gets_alpha_and_temperature_and_its_whole_value_trains(medium):
    standard = medium()
    CALLS.clear()
    own = medium(fresh=True, loss_fn_kd=my_loss)
    assert set(CALLS) == {(0.5, 20.0)}
    assert h.state_checksum(own.net) == h.state_checksum(standard.net)
    other = medium(fresh=True, loss_fn_kd=labels_only)
    # Nothing is added beside it: what is minimised is the labels' term alone.
    assert other.history["train_loss"].tolist() == pytest.approx(other.history["ce"].tolist())
    assert h.state_checksum(other.net) != h.state_checksum(standard.net)


def test_an_own_loss_gets_bosss_moving_alpha(medium):
    CALLS.clear()
    medium("boss", loss_fn_kd=my_loss)
    assert {alpha for alpha, _ in CALLS} == {1 - 0.5**2, 0.0}


def test_an_own_alignment_trains(medium):
    def no_alignment(student_maps, teacher_maps, weights, adapters):
        return student_maps["layer1"].sum() * 0.0

    run = medium("boss", alignment=no_alignment)
    assert run.history["align"].tolist() == [0.0, 0.0]


def test_an_own_student_trains_and_the_one_handed_in_stays_as_it_was(medium):
    torch.manual_seed(3)
    net = MyNet()
    before = h.state_checksum(net)
    run = medium(student=net)
    assert h.state_checksum(net) == before != h.state_checksum(run.student())
    assert isinstance(run.student(), MyNet) and run.n_params == 8 * 27 + 8 + 88 + 11
    assert h.validate_submission(run.csv, 5) == 5
    again = medium(student=net)
    assert h.state_checksum(again.student()) == h.state_checksum(run.student())


def test_a_function_that_builds_a_student_draws_from_the_seed(medium):
    first = medium(student=MyNet)
    again = medium(student=MyNet, fresh=True)
    assert h.state_checksum(first.net) == h.state_checksum(again.net)


def test_the_command_line_does_not_take_an_own_student_for_the_configs(
    medium, food, tmp_path, capsys
):
    run = medium(student=MyNet)
    checkpoint = str(run.folder / "student_best.ckpt")
    out = str(tmp_path / "x.csv")
    arguments = ["predict", "--data", str(food), "--checkpoint", checkpoint, "--out", out]
    assert h.main(arguments) == 2
    assert "a student of your own" in capsys.readouterr().err

    def sample_net_with_another_activation():
        net = h.build_student(h.Config())
        net.relu1 = nn.SiLU()
        return net

    medium(student=sample_net_with_another_activation, fresh=True)
    assert h.main(arguments) == 2
    assert "a student of your own" in capsys.readouterr().err


def test_an_own_schedule_trains_and_is_remembered(medium):
    def labels_from_the_start(cfg, progress):
        return h.LossWeights(kd=1.0, alpha=0.0, align=1.0)

    run = medium(loss_weights=labels_from_the_start)
    assert run.history["train_loss"].tolist() == pytest.approx(run.history["ce"].tolist())
    with pytest.raises(h.UserError, match="the code of loss_weights .it has changed."):
        medium()
    with pytest.raises(h.UserError, match="simple learns from labels alone: .* no loss_weights"):
        medium("simple", loss_weights=labels_from_the_start)


def test_own_code_that_nothing_would_use_is_refused(medium):
    with pytest.raises(
        h.UserError, match="simple learns from labels alone: it takes no loss_fn_kd"
    ):
        medium("simple", loss_fn_kd=my_loss)
    with pytest.raises(h.UserError, match="medium aligns no layers"):
        medium(alignment=h.alignment)


def test_an_own_student_above_the_limit_is_refused(medium):
    with pytest.raises(h.UserError, match="homework allows 60,000"):
        medium(student=nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 11)))


# --- what a run remembers -------------------------------------------------------------------------


def test_another_loss_on_a_finished_folder_is_said(medium, capsys):
    medium(loss_fn_kd=my_loss)
    capsys.readouterr()
    medium(loss_fn_kd=my_loss)
    assert "finished before, loaded" in capsys.readouterr().out
    changed = "other settings: the code of loss_fn_kd .it has changed."
    for own in ({}, {"loss_fn_kd": labels_only}):
        with pytest.raises(h.UserError, match=changed):
            medium(**own)


def test_an_own_student_that_changed_is_said(medium):
    medium(student=MyNet)

    class MyNet2(MyNet):
        def forward(self, x):
            return super().forward(2 * x)

    with pytest.raises(h.UserError, match="layers of the student.*code of the student"):
        medium(student=MyNet2)


def code_of(tmp_path, source, name="my_loss"):
    """code_fingerprint of a function in a module with this source."""
    path = tmp_path / "learners_module.py"
    path.write_text(textwrap.dedent(source))
    sys.modules.pop("learners_module", None)
    importlib.invalidate_caches()
    spec = importlib.util.spec_from_file_location("learners_module", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["learners_module"] = module
    spec.loader.exec_module(module)
    h.inspect.linecache.clearcache()
    return h.code_fingerprint(getattr(module, name))


LEARNERS = '''
    """My module."""
    import numpy
    weight = 2.0
    shares = numpy.array([0.1, 0.2])
    mean = 0.5
    times = 3
    def scaled(x):
        class Scale:
            factor = times
        return weight * x.mean() * shares * Scale.factor
    def my_loss(a, b):
        "What it does."
        return scaled(a) + b
'''


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("scaled(a) + b", "scaled(a) + b  # a comment", True),
        ("What it does.", "Said better.", True),
        ("scaled(a) + b", "(scaled(a)\n            + b)", True),
        ("scaled(a) + b", "scaled(a) - b", False),
        ("weight * x.mean()", "weight + x.mean()", False),  # in a function that it calls
        ("weight = 2.0", "weight = 3.0", False),
        ("My module", "Your module", True),
        ("[0.1, 0.2]", "[0.1, 0.3]", False),  # in an array
        ("times = 3", "times = 4", False),  # in the body of a class
        ("mean = 0.5", "mean = 0.6", True),  # a.mean() is another one
    ],
)
def test_the_fingerprint_is_that_of_what_the_code_does(tmp_path, old, new, same):
    before = code_of(tmp_path, LEARNERS)
    after = code_of(tmp_path, LEARNERS.replace(old, new))
    assert (before == after) == same


NETS = """
class Base:
    def forward(self, x):
        return x
class Net(Base):
    @staticmethod
    def scale(x):
        return 2 * x
    def other(self, x):
        return self.scale(x)
"""


@pytest.mark.parametrize(("old", "new"), [("return x\n", "return -x\n"), ("2 * x", "3 * x")])
def test_base_classes_and_static_methods_count(tmp_path, old, new):
    before = code_of(tmp_path, NETS, "Net")
    assert code_of(tmp_path, NETS.replace(old, new), "Net") != before


def test_a_student_without_the_layers_to_align_is_one_sentence(medium):
    with pytest.raises(h.UserError, match="the student has no layer1, layer2, layer3"):
        medium("boss", student=MyNet)


def test_code_without_a_source_has_a_fingerprint_too():
    names = {}
    exec(
        "def f(x): return x + 1\ndef g(x): return x + 2\ndef k(x): return [i + 1 for i in x]", names
    )
    prints = {h.code_fingerprint(names[name]) for name in "fgk"}
    assert len(prints) == 3
    assert h.code_fingerprint(names["f"]) in prints
    half = h.functools.partial(names["f"], 1)
    assert h.code_fingerprint(half) != h.code_fingerprint(names["f"])


def test_what_a_run_remembers_does_not_hang_on_the_version_of_torch_or_python(monkeypatch):
    """A module's repr and the bytecode of what Python makes for a namedtuple do."""

    def facts():
        stages = {}
        for name, cfg in h.STAGES.items():
            student = h.build_student(cfg)
            teacher = h.build_student(h.TEACHER_CONFIG)
            stages[name] = h.run_facts(h.DistillLoss(cfg, student, teacher))
        return stages

    before = facts()
    monkeypatch.setattr(nn.BatchNorm2d, "extra_repr", lambda self: "in other words")
    monkeypatch.setattr(h, "bytecode", None)  # nothing asks for it
    assert facts() == before


def test_fingerprints_are_the_same_under_every_torch_and_python(tmp_path):
    """Worked out once, under torch 2.14 and Python 3.11; 2.10 and 3.12 gave the same."""
    source = """
        def my_loss(a, b=None, *, names=()):
            "What it does."
            if b is None:
                raise ValueError(f"b is {b!r:>5} in {'my'} loss")
            return a
    """
    assert code_of(tmp_path, source) == "219470226121b1590dac"
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.LeakyReLU(0.01))
    assert h.layers_fingerprint(net) == "0e0a10e7553985230019"


def test_the_layers_fingerprint_is_that_of_what_they_compute():
    nets = [
        nn.Conv2d(3, 8, 3),
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(3, 8, 3, stride=2),
        nn.Conv2d(3, 8, 3, bias=False),
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(8),
        nn.BatchNorm2d(8, eps=1e-3),
        nn.LeakyReLU(0.01),
        nn.LeakyReLU(0.1),
    ]
    prints = [h.layers_fingerprint(nn.Sequential(net)) for net in nets]
    assert len(set(prints)) == len(nets)
    again = nn.Sequential(nn.Conv2d(3, 8, 3)).eval()  # other weights, another mode
    assert h.layers_fingerprint(again) == prints[0]


class Weighed:
    """A loss that is an object."""

    def __init__(self, weight):
        self.weight = weight

    def __call__(self, student_logits, labels, teacher_logits, alpha, temperature):
        return self.weight * F.cross_entropy(student_logits, labels)


def test_what_an_object_holds_and_what_is_bound_count():
    assert h.code_fingerprint(Weighed(0.1)) == h.code_fingerprint(Weighed(0.1))
    assert h.code_fingerprint(Weighed(0.1)) != h.code_fingerprint(Weighed(0.9))
    bound = [h.functools.partial(my_loss, alpha=inner) for inner in (labels_only, h.alignment)]
    assert h.code_fingerprint(bound[0]) != h.code_fingerprint(bound[1])
    # By its code, not by its address: another function of the same code.
    again = type(labels_only)(labels_only.__code__, globals(), "labels_only")
    same = h.functools.partial(my_loss, alpha=again)
    assert h.code_fingerprint(bound[0]) == h.code_fingerprint(same)


NOTEBOOK_CELL = """
class MyBlock(nn.Module):
    slope = 0.1

    def forward(self, x, power=1.0):
        return F.leaky_relu(x, self.slope) ** power  # as usual

weights = torch.tensor([1.0, 2.0])

def my_loss(student_logits, labels):
    return F.cross_entropy(student_logits, labels, weights)
"""


@pytest.mark.parametrize(
    ("name", "old", "new", "same"),
    [
        ("MyBlock", "slope = 0.1", "slope = 0.9", False),
        ("MyBlock", "power=1.0", "power=3.0", False),
        ("MyBlock", "as usual", "said otherwise", True),
        ("my_loss", "2.0]", "3.0]", False),
    ],
)
def test_the_code_of_a_notebooks_cell_is_told_apart(name, old, new, same):
    def of(source):
        """As a kernel runs a cell: its lines are known, a class's file is not."""
        file = f"<cell {hash(source)}>"
        lines = source.splitlines(keepends=True)
        h.inspect.linecache.cache[file] = (len(source), None, lines, file)
        cell = {"__name__": "__nowhere__", "nn": nn, "F": F, "torch": torch}
        exec(compile(source, file, "exec"), cell)
        return h.code_fingerprint(cell[name])

    assert (of(NOTEBOOK_CELL) == of(NOTEBOOK_CELL.replace(old, new))) == same


def test_a_function_that_gives_one_net_each_time_shares_it_with_no_stage():
    net = MyNet()
    first = h.own_student(h.Config(), lambda: net)
    assert first is not net
    assert first is not h.own_student(h.Config(), lambda: net)


def test_a_student_with_layers_in_a_plain_list_is_one_sentence(medium):
    class InAList(MyNet):
        def __init__(self):
            super().__init__()
            self.more = [nn.Conv2d(3, 3, 1)]

        def forward(self, x):
            return super().forward(self.more[0](x))

    with pytest.raises(h.UserError, match="neither trained nor saved"):
        medium(student=InAList)


def test_namedtuples_differ_by_their_fields():
    pair = namedtuple("pair", "kd alpha")
    same = namedtuple("pair", "kd alpha")
    assert h.code_fingerprint(pair) == h.code_fingerprint(same)
    assert h.code_fingerprint(pair) != h.code_fingerprint(namedtuple("pair", "alpha kd"))


# --- prepared once --------------------------------------------------------------------------------


def test_a_stage_is_prepared_once_and_the_same_objects_are_trained(
    food, teacher_file, tmp_path, tiny, monkeypatch
):
    counts = {}

    def counted(name):
        original = getattr(h, name)

        def call(*args, **kwargs):
            counts[name] = counts.get(name, 0) + 1
            return original(*args, **kwargs)

        monkeypatch.setattr(h, name, call)

    for name in ("build_adapters", "own_student", "RunFolder", "DistillLoss"):
        counted(name)
    data = h.find_data(food)
    cfg = h.get_config("boss", **tiny)
    stage = h.prepare_stage(cfg, data, h.load_teacher(teacher_file), tmp_path)
    assert not (tmp_path / "boss").exists()
    run = stage.train()
    assert run.net is stage.student is stage.loss_fn.student
    assert counts == {"build_adapters": 1, "own_student": 1, "RunFolder": 1, "DistillLoss": 1}


def test_preparing_changes_nothing_in_a_folder(medium, food, teacher_file, tmp_path, tiny):
    run = medium()
    last = run.folder / "last.ckpt"
    last.write_bytes(b"damaged")
    before = {p.name: p.read_bytes() for p in run.folder.iterdir()}
    h.prepare_stage(run.cfg, h.find_data(food), h.load_teacher(teacher_file), tmp_path)
    assert {p.name: p.read_bytes() for p in run.folder.iterdir()} == before
    medium()
    assert (run.folder / "damaged.ckpt").read_bytes() == b"damaged"


def test_facts_are_plain_values_that_a_file_gives_back(medium):
    run = medium()
    stored = json.loads((run.folder / "config.json").read_text())
    assert stored == run.facts
    assert stored["config"]["exp_name"] == "medium" and stored["processes"] == 1


class Drops(MyNet):
    """A student that draws random numbers while it learns."""

    def forward(self, x):
        return super().forward(F.dropout(x, 0.3, self.training))


def test_a_student_with_dropout_learns_the_same_again_and_after_a_stop(food, tmp_path, tiny):
    data = h.find_data(food)

    def losses(folder, *lengths):
        for n_epochs in lengths:
            cfg = h.get_config("simple", **(tiny | {"n_epochs": n_epochs}))
            run = h.run_stage(cfg, data, out=tmp_path / folder, student=Drops)
            torch.rand(7)  # whatever else is drawn
        return list(run.history["train_loss"])

    whole = losses("whole", 3)
    assert losses("again", 3) == whole
    assert losses("stopped", 1, 3) == whole


class Louder(nn.Module):
    """A teacher of somebody's own."""

    def __init__(self, net, factor):
        super().__init__()
        self.net = net
        self.factor = factor

    def forward(self, x):
        return self.factor * self.net(x)


def test_a_teachers_own_code_and_settings_count(food, teacher_file, tmp_path, tiny):
    data = h.find_data(food)
    net = h.load_teacher(teacher_file)
    cfg = h.get_config("medium", **(tiny | {"teacher_views": 2}))
    losses = []
    for factor in (1.0, 30.0):
        run = h.run_stage(cfg, data, h.freeze(Louder(net, factor)), tmp_path / str(factor))
        losses.append(run.history["kl"].iloc[0])
    assert losses[0] != losses[1]
    # Where its file lies is no setting.
    moved = h.load_teacher(teacher_file.rename(tmp_path / "moved.ckpt"))
    assert h.code_and_settings(moved) == h.code_and_settings(net)
    with pytest.raises(h.UserError, match="the code or settings of the teacher .it has changed"):
        h.run_stage(cfg, data, h.freeze(Louder(net, 2.0)), tmp_path / "1.0")


def labels_last(cfg, progress):
    return h.LossWeights(1.0, 1 - progress, 1.0)


def test_n_epochs_does_not_grow_under_an_own_schedule(medium, food, teacher_file, tmp_path, tiny):
    medium(loss_weights=labels_last)
    cfg = h.get_config("medium", **(tiny | {"n_epochs": 5}))
    teacher = h.load_teacher(teacher_file)
    with pytest.raises(h.UserError, match="n_epochs 2 .now 5."):
        h.run_stage(cfg, h.find_data(food), teacher, tmp_path, loss_weights=labels_last)


def test_a_final_fit_wants_the_same_code(medium, food, teacher_file, tmp_path):
    run = medium(loss_fn_kd=my_loss)
    data = h.find_data(food)
    teacher = h.load_teacher(teacher_file)
    with pytest.raises(
        h.UserError, match="code of loss_fn_kd is not that of medium: hand in the same"
    ):
        h.final_fit(run, data, teacher, tmp_path)
    assert h.final_fit(run, data, teacher, tmp_path, loss_fn_kd=my_loss)


# --- weights are looked at, and no placeholder looks like a result --------------------------------


def test_a_teacher_whose_answers_are_not_finite_is_named_as_the_cause(
    food, teacher_file, tmp_path, tiny
):
    teacher = h.load_teacher(teacher_file)
    with torch.no_grad():
        teacher.fc.bias[3] = float("nan")
    cfg = h.get_config("medium", **tiny)
    with pytest.raises(h.UserError, match="the teacher's answers in epoch 1 are not finite at the"):
        h.run_stage(cfg, h.find_data(food), teacher, tmp_path)


class Knows(nn.Module):
    """A teacher that looks images up: right but for every `wrong_every`-th, classes shifted by
    `shift`.
    """

    def __init__(self, split, shift=0, wrong_every=0):
        super().__init__()
        self.at = nn.Parameter(torch.zeros(1))
        self.images = h.normalize(split.images)
        self.classes = (split.labels + shift) % h.NUM_CLASSES
        if wrong_every:
            self.classes[::wrong_every] = (self.classes[::wrong_every] + 1) % h.NUM_CLASSES

    def forward(self, x):
        rows = [(self.images - image).abs().sum((1, 2, 3)).argmin() for image in x]
        return F.one_hot(self.classes[torch.stack(rows)], h.NUM_CLASSES).float()


@pytest.mark.parametrize(
    ("shift", "wrong_every", "accuracy", "is_loud"),
    [(0, 0, 1.0, False), (0, 2, 5 / 11, False), (3, 0, 0.0, True), (0, 1, 0.0, True)],
)
def test_a_teacher_is_introduced_and_loudly_near_chance(
    food, capsys, shift, wrong_every, accuracy, is_loud
):
    split = h.load_data(h.find_data(food), "validation", "eval", 64)
    teacher = Knows(split, shift, wrong_every)
    teacher.source = "there.ckpt"
    assert h.introduce_teacher(teacher, split) == pytest.approx(accuracy)
    said = capsys.readouterr().out
    assert f"teacher: there.ckpt; accuracy {accuracy:.4f} +- " in said
    assert "on 11 of 11 validation images" in said
    assert ("NO BETTER THAN CHANCE" in said) == is_loud


def test_only_some_images_are_asked_and_of_all_classes(food, capsys):
    split = h.load_data(h.find_data(food), "training", "eval", 64)
    asked = []

    class Counts(Knows):
        def forward(self, x):
            asked.append(len(x))
            return super().forward(x)

    assert h.introduce_teacher(Counts(split), split, n_images=11) == 1
    assert sum(asked) == 11
    assert "the one handed in; accuracy 1.0000 +- 0.0000 on 11 of 22" in capsys.readouterr().out


def test_always_the_most_frequent_class_is_chance(food, capsys):
    split = h.load_data(h.find_data(food), "validation", "eval", 64)
    labels = torch.zeros(11, dtype=torch.int64)
    labels[:5] = torch.arange(1, 6)
    split = replace(split, labels=labels)

    class Always(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.eye(11)[0])

        def forward(self, x):
            return self.bias.expand(len(x), 11)

    assert h.introduce_teacher(Always(), split) == pytest.approx(6 / 11)
    assert "NO BETTER THAN CHANCE (0.5455)" in capsys.readouterr().out


def test_the_command_line_says_once_which_teacher_teaches(
    food, teacher_file, tmp_path, tiny, capsys
):
    other = tmp_path / "other.ckpt"
    teacher_file.rename(other)
    (food / h.TEACHER_FILE).write_bytes(b"not this one")
    stages = ["--stages", "simple,medium,strong", "--out", str(tmp_path / "out")]
    arguments = ["run", "--data", str(food), *stages, "--teacher", str(other), *settings(**tiny)]
    assert h.main(arguments) == 0
    said = capsys.readouterr().out
    assert said.count(f"teacher: {other}; accuracy ") == 1
    assert f"Teacher: {food}" not in said
    # Before the first stage trains.
    assert said.index("teacher: ") < said.index("simple: ")
    assert h.main([*arguments[:4], "simple", *arguments[5:]]) == 0
    assert "teacher: " not in capsys.readouterr().out


def test_a_teacher_whose_answers_overflow_is_refused_before_training(
    food, teacher_file, tmp_path, tiny
):
    state = torch.load(teacher_file, weights_only=True)
    state["fc.weight"] = torch.full_like(state["fc.weight"], 3e38)
    torch.save(state, teacher_file)
    with pytest.raises(h.UserError, match="cannot teach: its answers to validation images are not"):
        h.run(h.find_data(food), ["medium"], out=tmp_path, **tiny)


@pytest.mark.parametrize("tta", [False, True])
def test_a_student_whose_answers_overflow_writes_no_csv(medium, food, tmp_path, tta, capsys):
    run = medium("simple")
    checkpoint = run.folder / "student_best.ckpt"
    state = torch.load(checkpoint, weights_only=True)
    name = next(key for key in reversed(state) if key.endswith("weight"))
    torch.save(state | {name: torch.full_like(state[name], 3e38)}, checkpoint)
    arguments = ["--data", str(food), "--checkpoint", str(checkpoint)]
    flags = ["--tta"] if tta else []
    assert h.main(["predict", *arguments, "--out", str(tmp_path / "x.csv"), *flags]) == 2
    assert "answers to 5 evaluation images (0000, 0001, " in capsys.readouterr().err
    assert not (tmp_path / "x.csv").exists()
    assert h.main(["evaluate", *arguments]) == 2
    assert "cannot be scored" in capsys.readouterr().err


def killed(*arguments):
    raise RuntimeError("killed")


class Answering(nn.Module):
    """A net of one layer with another kind of answer."""

    def __init__(self, n_classes=11, wrap=lambda logits: logits):
        super().__init__()
        self.fc = nn.Linear(3, n_classes)
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(self.fc(x.mean((2, 3))))


@pytest.mark.parametrize(
    ("net", "wanted"),
    [
        (lambda: Answering(10), r"answers of the shape \(2, 10\), where 11 logits each"),
        (lambda: Answering(13), r"answers of the shape \(2, 13\)"),
        (lambda: Answering(wrap=lambda logits: (logits, None)), "the student returns a tuple"),
    ],
)
def test_a_student_with_other_answers_is_refused_before_any_work(medium, tmp_path, net, wanted):
    with pytest.raises(h.UserError, match=wanted):
        medium("simple", student=net)
    assert not (tmp_path / "simple").exists()


def test_what_is_no_teacher_and_what_is_no_data_is_one_sentence(food, teacher_file, tmp_path, tiny):
    data = h.find_data(food)
    cfg = h.get_config("medium", **tiny)
    with pytest.raises(h.UserError, match="the teacher is a .*: hand in what load_teacher gives"):
        h.run_stage(cfg, data, teacher_file, tmp_path)
    with pytest.raises(h.UserError, match=r"the teacher gives .* shape \(2, 1000\)"):
        h.run_stage(cfg, data, h.freeze(Answering(1000)), tmp_path)
    with pytest.raises(h.UserError, match="data is a str: hand in what find_data gives"):
        h.run_stage(cfg, str(food), None, tmp_path)
    with pytest.raises(h.UserError, match="data is a str: hand in what find_data gives"):
        h.run(str(food), "simple, medium", out=tmp_path)
    with pytest.raises(h.UserError, match="student is a str: hand in a net, or a function"):
        h.run_stage(cfg, h.find_data(food), None, tmp_path, student="dwpw")
    with pytest.raises(h.UserError, match="unknown stage 'mediun'"):
        h.run(h.find_data(food), "simple, mediun", out=tmp_path)


def test_loaders_of_another_config_are_refused(food, tmp_path, tiny):
    data = h.find_data(food)
    cfg = h.get_config("simple", **tiny)
    # What is trained for another number of epochs sees the same views.
    loaders = h.build_loaders(h.replace(cfg, n_epochs=1), data, "cpu")
    loss_fn = h.DistillLoss(cfg, h.build_student(cfg))
    assert len(h.fit(loss_fn, *loaders)) == 2
    other = h.replace(cfg, batch_size=4, hflip=0.0)
    with pytest.raises(h.UserError, match="different are batch_size, hflip: hand this config to"):
        h.fit(h.DistillLoss(other, h.build_student(other)), *loaders)
    # Of labels alone no view is shown again, whatever teacher_views says.
    replaying = h.get_config("medium", **(tiny | {"teacher_views": 2}))
    same_views = {key: getattr(cfg, key) for key in h.VIEW_SETTINGS}
    replaying = h.replace(replaying, **same_views)
    labels_alone = h.replace(replaying, loss_fn_type="CE")
    with pytest.raises(h.UserError, match="different are teacher_views or whether there is a t"):
        h.refuse_other_views(h.build_loaders(labels_alone, data, "cpu")[0], replaying)


def test_a_frozen_student_is_told_before_anything_is_decoded(food, tmp_path, tiny):
    cfg = h.get_config("simple", **tiny)
    frozen = h.freeze(h.build_student(cfg))
    with pytest.raises(h.UserError, match=r"is frozen, .* call student.requires_grad_.True."):
        h.run_stage(cfg, h.find_data(food), None, tmp_path, student=frozen)
    assert not (tmp_path / "simple").exists()


def test_a_loss_that_writes_to_what_it_gets_leaves_the_stored_answers(teacher_file):
    def in_place(student_logits, labels, teacher_logits, alpha, temperature):
        teacher_logits /= temperature
        return h.loss_fn_kd(student_logits, labels, teacher_logits, alpha, 1.0)

    cfg = h.get_config("medium", image_size=64)
    net = h.build_student(cfg).eval()
    images = torch.randn(4, 3, 64, 64)
    labels = torch.arange(4)
    teacher = h.load_teacher(teacher_file)
    outs = [
        h.DistillLoss(cfg, net, teacher, own)(images, labels) for own in (h.loss_fn_kd, in_place)
    ]
    assert torch.equal(outs[0].teacher_logits, outs[1].teacher_logits)
    assert torch.equal(outs[0].terms["kl"], outs[1].terms["kl"])


def test_a_run_without_an_epoch_gives_way_to_other_settings(food, tmp_path, tiny, monkeypatch):
    data = h.find_data(food)
    cfg = h.get_config("simple", **tiny)
    with monkeypatch.context() as patch:
        patch.setattr(h, "train_one_epoch", killed)
        with pytest.raises(RuntimeError, match="killed"):
            h.run_stage(cfg, data, out=tmp_path)
    assert (tmp_path / "simple/last.ckpt").is_file()
    other = h.replace(cfg, seed=5, batch_size=4)
    h.check_folders([other], data, tmp_path)
    run = h.run_stage(other, data, out=tmp_path)
    wanted = h.run_stage(other, data, out=tmp_path / "alone")
    assert h.state_checksum(run.student()) == h.state_checksum(wanted.student())
    # With an epoch it has something to lose.
    with pytest.raises(h.UserError, match="holds a run with other settings"):
        h.run_stage(cfg, data, out=tmp_path)


def test_a_single_stage_may_be_named_without_a_list(food, tmp_path, tiny):
    runs = h.run(h.find_data(food), "simple", out=tmp_path, **tiny)
    assert [run.name for run in runs] == ["simple"]


def test_a_trained_teacher_is_found_again(food, tmp_path, tiny):
    data = h.find_data(food)
    cfg = h.replace(h.TEACHER_CONFIG, n_epochs=1, image_size=64, batch_size=8, amp="off")
    assert h.find_teacher(data, out=tmp_path) is None
    path = h.train_teacher(data, tmp_path, cfg)
    teacher = h.find_teacher(data, out=tmp_path)
    assert teacher.source.startswith(str(path))
    # One that was trained on other images is not taken, nor one that is not finished.
    ids = data.ids | {"training": [f"x{name}" for name in data.ids["training"]]}
    assert h.teacher_file(h.replace(data, ids=ids), out=tmp_path) is None
    log = torch.load(path.with_name("last.ckpt"), weights_only=True)
    torch.save(log | {"history": []}, path.with_name("last.ckpt"))
    assert h.teacher_file(data, out=tmp_path) is None


def test_before_the_first_epoch_ends_there_is_no_student_to_predict_with(
    food, teacher_file, tmp_path, tiny, monkeypatch, capsys
):
    cfg = h.get_config("medium", **tiny)
    with monkeypatch.context() as patch:
        patch.setattr(h, "train_one_epoch", killed)
        with pytest.raises(RuntimeError, match="killed"):
            h.run_stage(cfg, h.find_data(food), h.load_teacher(teacher_file), tmp_path)
    checkpoint = str(tmp_path / "medium/student_best.ckpt")
    out = str(tmp_path / "x.csv")
    arguments = ["predict", "--data", str(food), "--checkpoint", checkpoint, "--out", out]
    assert h.main(arguments) == 2
    assert "there is no file" in capsys.readouterr().err
    assert not (tmp_path / "x.csv").exists()


def test_starting_again_takes_the_old_student_away(medium):
    run = medium()
    stage_folder = run.folder
    loss_fn = h.DistillLoss(h.get_config("simple"), h.build_student(h.get_config("simple")))
    h.RunFolder(stage_folder, loss_fn).clear()
    assert not (stage_folder / "student_best.ckpt").exists()


def test_a_stage_that_is_loaded_says_its_epochs_and_accuracy(medium, capsys):
    run = medium()
    best = max(run.history["valid_acc"])
    capsys.readouterr()
    medium()
    wanted = f"(2 epochs, best validation accuracy {best:.4f})"
    assert wanted in capsys.readouterr().out


def test_a_notebook_is_told_its_own_words(medium, monkeypatch):
    medium()
    monkeypatch.setattr(h, "in_notebook", lambda: True)
    with pytest.raises(h.UserError, match=r"fresh=True \(or another exp_name\) starts it again"):
        medium(loss_fn_kd=my_loss)
