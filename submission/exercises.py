"""Checks of a learner's answers, and the stages that train with them (exercises edition alone).

A check asks an answer one question after the other: it prints what is right, and what to mend.
"""

import contextlib
import functools
import inspect
import itertools
import math
import os
import traceback
from collections import namedtuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

import helpers as h

# --- asking ---------------------------------------------------------------------------------------


def in_parts(reference=None):
    """Make a check of a generator function of an answer: it prints a verdict and returns a bool.

    The function yields (what is asked, what the answer gives, advice). A right answer gives what
    the reference gives; without a reference it gives True. What is asked of several cases begins
    alike, up to a colon: the first slip in it is told.
    """

    def decorate(questions):
        @functools.wraps(questions)
        def check(answer):
            wanted = {}
            slips = {}  # what is asked -> the slip in it, or nothing
            try:
                if reference:
                    check_order(answer, reference)
                    wanted = {what: value for what, value, _ in questions(reference)}
                for what, given, advice in questions(answer):
                    topic = what.partition(":")[0]
                    slip = slip_in(what, given, wanted.get(what, True), advice)
                    slips[topic] = slips.get(topic) or slip
            except Exception as error:  # whatever a learner's code raises is theirs to read
                slips["it runs"] = words_for(error)
            is_right = not any(slips.values())
            print("Right." if is_right else "Not yet.")
            for topic, slip in slips.items():
                print("  to mend:" if slip else "  right:", slip or topic)
            return is_right

        return check

    return decorate


def check_order(answer, reference):
    """UserError where a function has the right arguments in another order."""
    given, wanted = (list(inspect.signature(f).parameters) for f in (answer, reference))
    if given != wanted and set(given) == set(wanted):
        raise h.UserError(f"the order of its arguments is {', '.join(wanted)}")


def slip_in(what, given, wanted, advice):
    """The slip in one part of an answer, in words, or nothing."""
    if given == wanted:
        return ""
    if wanted is True:
        return f"{what}: not so. {advice}"
    return f"{what}: {given}, where {wanted} is wanted. {advice}"


POWER = "A power is written temperature ** 2 in Python; ^ is another operator."
# What the text of an error holds -> what to do about it.
ADVICE = {
    "for ^": POWER,
    "bitwise_xor": POWER,
    "must match the size": "Two tensors of different sizes meet: print the .shape of both.",
    "mat1 and mat2": "nn.Linear wants one number per channel: pool the maps to 1 x 1 and flatten "
    "them (h.GlobalAvgPool() does both), and compare in_features with the channels.",
    "channels, but got": "Compare the layer's in_channels with the out_channels before it.",
    "running_mean should": "A batch norm wants the number of channels of the layer before it.",
    "too many values to unpack": "A batch holds more than two things: write "
    "for images, labels, *_ in train_loader.",
    "positional argument": "Compare its arguments with those of the empty cell.",
    "is not defined": "Run the cell that defines it, or look at the spelling.",
    "Dimension out of range": "The classes are the last dimension: dim=-1.",
    "inplace": "optimizer.step() comes after backward(); write x = x / y and not x /= y.",
    "does not require grad": "Leave out .detach(), .item() and torch.no_grad().",
    "must be divisible by groups": "groups=in_channels belongs to the depthwise convolution.",
    "KeyError: 'layer": "The layers to align are the keys of weights.",
    "string to float": "Return h.LossWeights(kd=..., alpha=..., align=...).",
    "Boolean value of Tensor": "A loss that is a class is made first: nn.CrossEntropyLoss()(x, y).",
    "list is not a Module": "nn.Sequential takes layers one after the other: put * before a list.",
    "[ModuleDict]": "One layer's adapter is adapters[layer].",
    "before Module.__init__": "super().__init__() comes first.",
    "attribute 'cpu'": "It should return a module, as nn.Sequential(...) is one.",
    "attribute 'get'": "A dict of settings is wanted.",
    "NoneType": "Is a return statement missing?",
}
NOT_LEARNERS = (__file__, h.__file__, os.path.dirname(os.__file__), os.path.dirname(torch.__file__))


def words_for(error):
    """What an exception says, the learner's own line, and what to do."""
    if isinstance(error, h.UserError):
        return str(error)
    text = f"it raises {type(error).__name__}: {str(error)[:200]}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(NOT_LEARNERS)]
    if own:
        text += f" (line {own[-1].lineno} of its cell: {own[-1].line})"
    # As the empty place of an exercise raises it; torch's own has a text.
    if isinstance(error, NotImplementedError) and not error.args:
        return f"{own[-1].name} is still to be written"
    advice = [words for sign, words in ADVICE.items() if sign in text]
    return " ".join([f"{text}.", *advice])


def attempt(function, *arguments):
    """What a function gives, or None where torch refuses the shapes."""
    with contextlib.suppress(RuntimeError, IndexError):
        return function(*arguments)
    return None


def alike(x, y, tolerance=2e-3):
    """Whether two tensors are equal but for rounding; None is like nothing."""
    if x is None or x.shape != y.shape:
        return False
    return bool((x - y).abs().max() <= tolerance * y.abs().max() + 1e-7)


def gradient(value, leaf):
    """The gradient of the loss that an answer returned; UserError where there is none."""
    if getattr(value, "shape", None) != () or not value.requires_grad:
        raise h.UserError(
            f"it returns {value!r:.60}, where one number with a gradient is wanted. Is there a "
            "return? Take the mean over the batch; leave out .item(), .detach(), torch.no_grad()"
        )
    return torch.autograd.grad(value, leaf, retain_graph=True, materialize_grads=True)[0]


def made_up(*shape, seed=0):
    """Normal numbers, on the device that trains: an answer may fail on one device alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(h.pick_device())


# --- soft labels ----------------------------------------------------------------------------------

# The temperature to this power is what logits are multiplied by.
POWERS = {
    -1: "",
    0: "The {} logits are not divided by the temperature. ",
    1: "The {} logits are multiplied by the temperature: divide by it. ",
}
SOFTMAXES = {F.softmax: "", F.log_softmax: "That is the logarithm: softmax, not log_softmax. "}
DIMENSIONS = {1: "", 0: "The softmax runs over the batch: the classes are the last dimension. "}
OTHER_SOFTMAX = (
    "These are other numbers. Divide the logits first; nothing follows the softmax, with which the "
    "probabilities of a picture add up to 1."
)
LAST = "The classes are the last dimension: dim=-1."
LARGE = "F.softmax and F.log_softmax cope with them, a bare exp does not."
PLACE = "Write logits / temperature, not logits /= temperature."


def named_soft_labels(seen, logits):
    """The slips that lead to soft labels like these at T = 2, in words."""
    for power, softmax, dim in itertools.product(POWERS, SOFTMAXES, DIMENSIONS):
        if alike(seen, softmax(logits * 2.0**power, dim)):
            slips = POWERS[power].format("net's")
            return slips + SOFTMAXES[softmax] + DIMENSIONS[dim]
    return OTHER_SOFTMAX


@in_parts(h.soft_labels)
def check_soft_labels(answer):
    """Tell a learner whether their soft_labels(logits, temperature) is right: True or False."""
    logits = 3 * made_up(6, h.NUM_CLASSES)
    given = logits.clone()
    seen = answer(given, 2.0)
    slips = named_soft_labels(seen, logits)
    yield "softmax of logits / temperature", not slips, slips
    alone = attempt(answer, logits[0], 2.0)
    yield "one picture, (11,)", alike(alone, seen[0]), LAST
    shape = (2, 3, h.NUM_CLASSES)
    two = attempt(answer, logits.reshape(shape), 2.0)
    yield f"two batches, {shape}", alike(two, seen.reshape(shape)), LAST
    yield "logits so large that exp overflows", is_finite(answer(logits + 900, 2.0)), LARGE
    yield "logits left as they are", given.equal(logits), PLACE


def is_finite(x):
    """Whether all numbers of a tensor are finite."""
    return x.isfinite().all().item()


# --- the loss of distillation ---------------------------------------------------------------------

LABELS = torch.tensor([3, 1, 4, 0, 5, 9], device=h.pick_device())


def kd_pull(loss, alpha, temperature, shift=0.0):
    """The gradient (66,) of a loss for the student's logits, which is what trains."""
    student, teacher = 3 * made_up(2, 6, h.NUM_CLASSES) + shift
    student.requires_grad_()
    # Times one, for a leaf forbids to be written to; what a net answers does not.
    value = loss(student * 1, LABELS, teacher, alpha, temperature)
    return gradient(value, student).flatten().cpu()


def kd_pulls(loss):
    """(66, 2): the gradients of a loss at T = 4, at alpha = 0 and 1."""
    return torch.stack([kd_pull(loss, alpha, 4.0) for alpha in (0.0, 1.0)], -1)


# What a learner may give to F.cross_entropy, and to F.kl_div; the right one comes first. p is the
# student's distribution, q the teacher's.
HARD_FORMS = {
    "logits": "",
    "logits / T": "F.cross_entropy gets logits / temperature: it wants the plain ones.",
    "p at T = 1": "F.cross_entropy gets probabilities: it wants the plain logits.",
    "p": "F.cross_entropy gets softened probabilities: it wants the plain logits.",
}
SOFT_FORMS = {
    ("log p", "q"): "",
    ("log q", "p"): "Student and teacher are swapped: F.kl_div wants the student's logarithms "
    "first, the teacher's probabilities second. ",
    ("p", "q"): "F.kl_div wants log_softmax of the student, not softmax. ",
    ("log p", "log q"): "F.kl_div wants the teacher's probabilities, not their logarithm. ",
    ("q", "p"): "F.kl_div has the teacher first and no logarithm: the student's log_softmax comes "
    "first, the teacher's softmax second. ",
}
# A term's size beside what it should be, at T = 4 with six pictures and eleven classes.
RATIOS = {
    1.0: "",
    -1.0: "The sign is wrong. ",
    1 / 16: "Multiply it by temperature ** 2. ",
    1 / 4: "Multiply it by temperature ** 2, not by temperature. ",
    16.0: "temperature ** 2 belongs to the soft loss alone. ",
    1 / 11: "It is a mean over the classes too: sum over them, then take the mean over the batch "
    "(in F.kl_div reduction='batchmean'). ",
    6.0: "It is summed over the batch: take the mean (in F.kl_div reduction='batchmean'). ",
}
ALPHA = "The soft loss is multiplied by alpha, the labels' loss by 1 - alpha. "
# The terms of the loss: what they weigh at T = 4 at most, and what else may be wrong with that.
TERMS = {
    "labels' loss": (1, ALPHA),
    "soft loss": (16, ALPHA),
    "label_smoothing": (1, "Leave out label_smoothing. "),
}


@functools.cache
def kd_terms(hard, soft, dim, ours, theirs):
    """(66, 3): the gradients of the three terms at T = 4, as a learner may make them."""
    student, teacher = 3 * made_up(2, 6, h.NUM_CLASSES)
    student.requires_grad_()
    log_p = F.log_softmax(student * 4.0**ours, dim)
    log_q = F.log_softmax(teacher * 4.0**theirs, dim)
    made = {"log p": log_p, "log q": log_q, "p": log_p.exp(), "q": log_q.exp()}
    made |= {"logits": student, "logits / T": student / 4, "p at T = 1": student.softmax(1)}
    first, second = soft
    terms = (
        F.cross_entropy(made[hard], LABELS),
        F.kl_div(made[first], made[second], reduction="batchmean"),
        -F.log_softmax(student, 1).mean(),  # what label_smoothing adds
    )
    pulls = [gradient(term, student).flatten().cpu() for term in terms]
    return torch.stack(pulls, -1).nan_to_num()


def named_kd(seen):
    """(slips of the labels' loss, of the soft loss, weights (3, 2) of the TERMS), or None.

    seen: what `kd_pulls` gives of a loss, if these terms make it up.
    """
    for forms in itertools.product(HARD_FORMS, SOFT_FORMS, DIMENSIONS, POWERS, POWERS):
        terms = kd_terms(*forms)
        weights = torch.linalg.lstsq(terms, seen).solution
        # Each alpha by itself, for the larger one would hide the other.
        if all(map(alike, (terms @ weights).mT, seen.mT)):
            hard, soft, dim, ours, theirs = forms
            slips = SOFT_FORMS[soft] + DIMENSIONS[dim]
            slips += POWERS[ours].format("student's")
            slips += POWERS[theirs].format("teacher's")
            return HARD_FORMS[hard], slips, weights
    return None


def advice_on(ratio):
    """Why a term is so many times as large as it should be; nothing where that is not known."""
    for one, other in itertools.combinations_with_replacement(RATIOS, 2):
        if math.isclose(one * other, ratio, rel_tol=0.01):
            return RATIOS[one] + RATIOS[other]
    return ""


@in_parts(h.loss_fn_kd)
def check_loss_fn_kd(answer):
    """Tell a learner whether their loss_fn_kd is right: True or False.

    answer(student_logits, labels, teacher_logits, alpha, temperature) -> scalar. Gradients decide,
    for they are what trains: a loss with another value and the same gradient is right.
    """
    seen = kd_pulls(answer)
    wanted = kd_pulls(h.loss_fn_kd)
    yield "a gradient of finite numbers", is_finite(seen), FINITE
    named = named_kd(seen.nan_to_num())
    if named is None:
        for alpha, (words, advice) in enumerate(ALONE.items()):
            is_right = alike(seen[:, alpha], wanted[:, alpha])
            yield f"with alpha = {alpha} {words} alone", is_right, advice
    else:
        hard, soft, weights = named
        yield "the cross-entropy of plain logits", not hard, hard
        yield "the KL of both nets' soft labels", not soft, soft
        for (term, (most, words)), row in zip(TERMS.items(), weights.tolist(), strict=True):
            for alpha, weight in enumerate(row):
                what = f"the weight of the {term}: with alpha = {alpha}, temperature = 4"
                yield what, round(weight, 2) + 0.0, advice_on(weight / most) + words
    if alike(seen, wanted):
        other = kd_pull(h.loss_fn_kd, 0.3, 2.0)
        is_same = alike(kd_pull(answer, 0.3, 2.0), other)
        yield "any alpha and temperature", is_same, "Use both arguments, no numbers of your own."
    yield "logits so large that exp overflows", is_finite(kd_pull(answer, 0.5, 2.0, 900.0)), LARGE
    student, teacher = logits = made_up(2, 6, h.NUM_CLASSES)
    answer(student, LABELS, teacher, 0.5, 2.0)
    yield "logits left as they are", logits.equal(made_up(2, 6, h.NUM_CLASSES)), PLACE


FINITE = (
    "Is it divided by a temperature of 0 (swapped with alpha?), or is a logarithm of a negative "
    "number in it? F.kl_div wants the student's logarithms first, the teacher's probabilities "
    "second."
)
# What is left of the loss at alpha = 0 and at alpha = 1.
ALONE = {
    "F.cross_entropy(student_logits, labels)": "Hand it plain logits, and nothing else.",
    "temperature ** 2 times the KL": "Its arguments are log_softmax of the student's logits and "
    "soft labels of the teacher's, both divided by the argument temperature.",
}

# --- the training loop ----------------------------------------------------------------------------

# What is watched, in words, and what to do.
WATCHED = {
    "epoch": (
        "the epoch given to set_epoch, batch by batch",
        "Begin each of range(cfg.n_epochs) with train_loader.set_epoch(epoch); return after the "
        "loops.",
    ),
    "event": (
        "what happens for two batches",
        "For each batch: forward pass, optimizer.zero_grad(), loss.backward(), clip, "
        "optimizer.step().",
    ),
    "training": ("the student is in training mode", "Call student.train() in each epoch."),
    "loss": (
        "the loss's gradient is that of F.cross_entropy(logits, labels)",
        "Hand it the plain logits, and leave its reduction at the mean.",
    ),
    "clean": (
        "no gradients are left from the batch before",
        "Call optimizer.zero_grad() for each batch.",
    ),
    "norm": (
        "the norm of the gradient that step() sees, where cfg.grad_norm_max is 0.02",
        "First zero_grad(), then backward(), then nn.utils.clip_grad_norm_, then step().",
    ),
    "optimizer": ("the optimizer", "Make a torch.optim.Adam."),
    "lr": ("the optimizer's lr", "Hand it cfg.lr."),
    "decay": ("the optimizer's weight_decay", "Hand it cfg.weight_decay."),
    "moves": ("it moves student.parameters()", "All of these and no others."),
    "first": ("it is the first optimizer", "Make one, before the loops: it remembers."),
}


class Batches(list):
    """A loader of made-up batches."""

    dataset = range(12)
    epoch = "none"

    def set_epoch(self, epoch):
        self.epoch = epoch


def watch(loop, n_epochs):
    """{key of WATCHED: a list of what was seen} while a loop trains a small net."""
    cfg = h.Config(lr=0.03, weight_decay=0.1, grad_norm_max=0.02, n_epochs=n_epochs, amp="off")
    student = h.build_student(cfg).to(LABELS.device).eval()
    loader = Batches(h.Batch(made_up(6, 3, 40, 40, seed=seed), LABELS) for seed in (0, 1))
    seen = {what: [] for what in WATCHED}
    optimizers = []

    def note(**facts):
        for what, fact in facts.items():
            seen[what].append(fact)

    def forward(net, images, logits):
        if logits.requires_grad:
            note(event="forward", epoch=loader.epoch, training=net.training)
            leaf = logits.detach().float().requires_grad_()
            wanted = gradient(F.cross_entropy(leaf, LABELS), leaf)
            logits.register_hook(functools.partial(backward, wanted))

    def backward(wanted, pull):
        # Nothing has reached the weights yet: gradients that are there are old ones.
        old = student.fc.weight.grad
        is_clean = old is None or not old.any().item()
        is_entropy = alike(pull.float(), wanted, 0.03)  # as bfloat16 rounds
        note(event="backward", loss=is_entropy, clean=is_clean)

    def step(optimizer, *arguments):
        optimizers.append(optimizer)
        settings = optimizer.param_groups[0]
        norm = nn.utils.clip_grad_norm_(student.parameters(), math.inf).item()
        note(event="step", norm=round(norm, 3))
        note(optimizer=type(optimizer).__name__)
        note(lr=settings["lr"], decay=settings["weight_decay"], first=optimizer is optimizers[0])
        note(moves=set(settings["params"]) == set(student.parameters()))

    student.register_forward_hook(forward)
    with register_optimizer_step_pre_hook(step):
        loop(student, loader, cfg)
    return seen


def loop_of_fit(student, train_loader, cfg):
    """The epochs of `fit`, and nothing besides."""
    state = h.TrainState(h.DistillLoss(cfg, student))
    for epoch in range(cfg.n_epochs):
        h.train_one_epoch(state, state.loss_fn, train_loader, epoch)


@in_parts(loop_of_fit)
def check_training_loop(answer):
    """Tell a learner whether their training_loop(student, train_loader, cfg) is right.

    It is watched while it trains a small net for two and for three epochs of two batches.
    """
    for n_epochs in (2, 3):
        seen = watch(answer, n_epochs)
        if "forward" not in seen["event"]:
            raise h.UserError("the student that is handed in learns from no batch of train_loader")
        for what, (words, advice) in WATCHED.items():
            facts = list(dict.fromkeys(seen[what]))
            if what in ("epoch", "event"):
                facts = seen[what][:6]
            if facts:
                yield f"{words}: with n_epochs = {n_epochs}", facts, advice


# --- the depthwise-separable block ----------------------------------------------------------------

# given, made: the sums of the numbers above and below zero in its input and output.
Layer = namedtuple("Layer", "words given made")
# The operations of torch that count; a product of matrices is a 1 x 1 convolution.
OPERATIONS = {
    "convolution": "convolution",
    "mm": "convolution (1, 1), stride 1, groups 1",
    "bmm": "convolution (1, 1), stride 1, groups 1",
    "addmm": "convolution (1, 1), stride 1, groups 1",
    "native_batch_norm": "batch norm",
    "_native_batch_norm_legit": "batch norm",
    "_batch_norm_with_update": "batch norm",
}


def sums(maps):
    """The sums of the numbers above and below zero."""
    return [(sign * maps).relu().sum() for sign in (1, -1)]


class Trace(TorchDispatchMode):
    """The Layers that run inside the block, whatever they are written with."""

    def __init__(self):
        super().__init__()
        self.layers = []

    def __torch_dispatch__(self, operation, types, arguments=(), settings=None):
        words = OPERATIONS.get(operation.overloadpacket.__name__)
        if words:
            # The maps are larger than the weights. An activation may overwrite them later.
            given = sums(max(arguments[:2], key=torch.numel))
        made = operation(*arguments, **(settings or {}))
        if words == "convolution":
            _, weight, _, stride, *_, groups = arguments
            words += f" {tuple(weight.shape[2:])}, stride {stride[0]}, groups {groups}"
        if words:
            output = made[0] if words == "batch norm" else made
            self.layers.append(Layer(words, given, sums(output)))
        return made


@in_parts(h.dwpw_conv)
def check_dwpw_conv(answer):
    """Tell a learner whether their dwpw_conv is the course's block: True or False.

    It is judged by the layers that run, so that it may be written in any style.
    """
    images = made_up(4, 8, 24, 24).cpu()
    for settings in ((8, 12), (8, 12, 5, 1, 2), (8, 12, 3, 2, 0), (8, 8, 3, 1, 1)):
        block = answer(*settings)
        block.cpu()(images)  # a lazy layer gets its parameters
        with torch.no_grad(), Trace() as trace:
            output = block(images)
        case = f"dwpw_conv{settings}"
        words = [layer.words for layer in trace.layers]
        yield f"its layers: {case}", words, LAYERS
        shape = tuple(output.shape[1:])
        yield f"its output's shape: {case}", shape, WINDOW
        count = sum(parameter.numel() for parameter in block.parameters())
        yield f"its number of parameters: {case}", count, BIASES
        layers = [*trace.layers, Layer("the output", sums(output), None)]
        for before, after in itertools.pairwise(layers):
            if before.words == "batch norm" or after.words == "the output":
                # What an activation makes of the numbers above and below zero.
                above, below = (x / y for x, y in zip(after.given, before.made, strict=True))
                sizes = f"{above:.3f} and {below:.3f}"
                place = f"between {before.words} and {after.words} of {case}"
                is_leaky = sizes == "1.000 and 0.010"
                yield f"LeakyReLU(0.01) alone: {place}", is_leaky, LEAKY.format(sizes)


LAYERS = (
    "groups=in_channels makes a convolution depthwise. The pointwise one is 1 x 1 and has stride 1 "
    "and no groups. A batch norm follows each."
)
WINDOW = "kernel_size, stride and padding belong to the depthwise convolution, the first."
BIASES = "Both convolutions have a bias, both batch norms weight and bias."
LEAKY = (
    "It multiplies numbers above and below zero by {}. nn.LeakyReLU(0.01) has 1 and 0.01, no "
    "activation 1 and 1, a ReLU 1 and 0; other than 1 is a shortcut or a dropout too many."
)

# --- alignment and its schedule -------------------------------------------------------------------


def align_pull(answer, ours, theirs, weights=None, adapter=None, before=None):
    """The gradient of an alignment for the student's maps, zero where torch refuses the sizes.

    ours: the student's map in all layers, after `before`. theirs: the teacher's layer1; its layer3
    is twice that.
    """
    leaf = ours.clone().requires_grad_()
    maps = before(leaf) if before else leaf
    student_maps = {"layer1": maps, "layer2": maps, "layer3": maps}
    teacher_maps = {"layer1": theirs, "layer2": theirs, "layer3": 2 * theirs}
    weights = weights or {"layer1": 1.0}
    adapters = nn.ModuleDict(dict.fromkeys(weights, adapter or nn.Identity()))
    with contextlib.suppress(RuntimeError):
        return gradient(answer(student_maps, teacher_maps, weights, adapters), leaf)
    return 0 * ours


SMOOTH = "F.smooth_l1_loss(ours, theirs), its mean over the map, times 1. Nothing is detached."
ADD = "Start at 0, add in the loop, return after it."
DOWN = "Average it down to the size of the smaller (F.adaptive_avg_pool2d)."
ADAPTERS = "adapters[layer] takes the student's map, not the teacher's."


@in_parts(h.alignment)
def check_alignment(answer):
    """Tell a learner whether their alignment is right: True or False.

    answer(student_maps, teacher_maps, weights, adapters) -> scalar. It is asked about one layer
    first; what follows is compared with what it answers there.
    """
    pull = functools.partial(align_pull, answer)
    ours, theirs = made_up(2, 2, 4, 8, 8)
    one = pull(ours, theirs)
    yield (
        "one layer with maps of one size",
        alike(one, align_pull(h.alignment, ours, theirs)),
        SMOOTH,
    )
    weighed = pull(ours, theirs, {"layer1": 3.0})
    yield (
        "a layer with weight 3 counts three times",
        alike(weighed, 3 * one),
        "Multiply by the weight.",
    )
    other = pull(ours, theirs, {"layer3": 1.0})
    both = pull(ours, theirs, {"layer1": 1.0, "layer3": 1.0})
    yield "two layers add up", alike(both, one + other), ADD
    pool = nn.AdaptiveAvgPool2d(2)
    small, small_theirs = pool(ours), pool(theirs)
    is_pooled = alike(pull(small, theirs), pull(small, small_theirs))
    yield "a larger map of the teacher", is_pooled, DOWN
    is_pooled = alike(pull(ours, small_theirs), pull(ours, small_theirs, before=pool))
    yield "a larger map of the student", is_pooled, DOWN
    adapter = nn.Conv2d(4, 6, 1).to(ours.device)
    wide = made_up(2, 6, 8, 8)
    wanted = pull(ours, wide, before=adapter)
    is_adapted = alike(pull(ours, wide, None, adapter), wanted)
    yield "adapters", is_adapted, ADAPTERS


FORMULAS = {
    "handover": "In a handover kd is 10 * progress ** 2, alpha is 1 - progress ** 2, align is 1.",
    "constant": "Without a handover kd is 1, alpha is cfg.alpha, align is 1.",
}


@in_parts(h.loss_weights)
def check_loss_weights(answer):
    """Tell a learner whether their loss_weights(cfg, progress) is right: True or False."""
    constant = h.replace(h.BOSS, loss_schedule="constant", alpha=0.3)
    for cfg, progress in itertools.product((h.BOSS, constant), (0.2, 0.6)):
        weights = [round(float(weight), 4) for weight in answer(cfg, progress)]
        schedule = cfg.loss_schedule
        yield f"{schedule}: (kd, alpha, align) at progress {progress}", weights, FORMULAS[schedule]


# --- the student and its views --------------------------------------------------------------------

# What a learner may leave at the end of a net, as torch calls the step.
ENDS = ("Softmax", "LogSoftmax", "Sigmoid", "Relu", "LeakyRelu", "Tanh", "Hardtanh")
NO_OTHERS = "In evaluation mode nothing is random, and nothing depends on the other pictures."
FLAT = "The shapes are {}: is nn.Flatten() missing, or the last layer's width not 11?"


@in_parts()
def check_student(answer):
    """Tell a learner whether their own student can be trained and submitted: True or False.

    answer: a net, or a class or function without arguments that builds one.
    """
    net = h.own_student(h.STRONG, answer).cpu()
    images = made_up(2, 3, 64, 64).cpu()
    with h.evaluation_mode(net):
        shapes = [tuple(net(made_up(2, 3, n, n).cpu()).shape) for n in (64, 100, 224)]
        logits = net(images)
        is_alone = alike(net(images[:1]), logits[:1])
    right = [(2, h.NUM_CLASSES)] * 3
    yield "eleven logits for two pictures of any size", shapes == right, FLAT.format(shapes)
    yield "an answer that depends on the picture alone", is_alone, NO_OTHERS
    logits = net.train()(images)
    logits.square().sum().backward()
    idle = [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None]
    words = f"None reaches {h.some_of(idle)}: left out of forward, or detached?"
    yield "a gradient for every parameter", not idle, words
    end = logits.grad_fn.name().removesuffix("Backward0")
    yield "plain logits", end not in ENDS, f"Its last step is {end}: leave that to the loss."
    macs = h.count_macs(net, 224)
    ratio = macs / h.count_macs(h.build_student(h.STRONG), 224)
    cost = f"{macs:,} multiply-adds at 224 pixels, {ratio:.2g} times those of Strong's net"
    count = h.check_budget(net)
    yield f"{count:,} parameters; {cost}; an epoch takes about so many times as long", True, ""


NUMBERS = "for crop_scale two numbers (low, high), else one number"
# A setting -> the transform of torchvision that it stands for.
VIEWS = {
    "crop_scale": "RandomResizedCrop(224, scale=(0.7, 1.0))",
    "hflip": "RandomHorizontalFlip(0.5)",
    "vflip": "RandomVerticalFlip(0.5)",
    "rotation": "RandomRotation(180)",
    "affine": "RandomAffine(30)",
}


@in_parts()
def check_views(answer):
    """Tell a learner whether a dict of settings makes the training views of Strong and Boss."""
    for name, transform in VIEWS.items():
        given = answer.get(name, "missing")
        if isinstance(given, list):
            given = tuple(given)
        advice = f"It is {given!r:.60}: write what stands in the brackets, {NUMBERS}."
        yield f"{name} for {transform}", given == getattr(h.BOSS, name), advice
    unknown = sorted(answer.keys() - VIEWS.keys())
    yield "no other settings", not unknown, f"{h.some_of(unknown)}: these make no view."


# --- answers --------------------------------------------------------------------------------------

# reference: what stands in until the answer is right. hint, second: the second is folded.
Exercise = namedtuple("Exercise", "reference check hint second")

EXERCISES = {
    "training_loop": Exercise(
        loop_of_fit,
        check_training_loop,
        "two loops: over the epochs, counted from 0, and over the batches. Which calls belong into "
        "which? (The check trains a tiny net twice, so what your loop prints is seen twice.)",
        "before the loops the optimizer; for each epoch `train_loader.set_epoch(epoch)` and "
        "`student.train()`; for each batch `images, labels, *_` the cross-entropy, "
        "`optimizer.zero_grad()`, `loss.backward()`, `nn.utils.clip_grad_norm_` and "
        "`optimizer.step()`.",
    ),
    "soft_labels": Exercise(
        h.soft_labels,
        check_soft_labels,
        "what is divided by what, and over which dimension do the probabilities add up to one?",
        "`F.softmax(..., dim=-1)` of the logits divided by the temperature: it copes with large "
        "logits, a bare `exp` does not.",
    ),
    "loss_fn_kd": Exercise(
        h.loss_fn_kd,
        check_loss_fn_kd,
        "two losses and two weights: which of the two knows a temperature?",
        "`F.kl_div(log_p_student, p_teacher, reduction='batchmean')` wants the student's "
        "logarithms (`F.log_softmax`) and the teacher's probabilities (`soft_labels`); "
        "`F.cross_entropy` wants the plain logits. A power is written `temperature**2`.",
    ),
    "dwpw_conv": Exercise(
        h.dwpw_conv,
        check_dwpw_conv,
        "six layers in an `nn.Sequential`: convolution, batch norm, activation, and the same "
        "again. Which of the two convolutions sees space, and which mixes channels?",
        "`groups=in_channels` makes a convolution depthwise; kernel size, stride and padding are "
        "its own, the pointwise one is 1 x 1. Both have a bias; the activation is "
        "`nn.LeakyReLU(0.01)`. `h.check_budget(my_dwpw_conv(64, 128))` counts the parameters.",
    ),
    "student": Exercise(
        None,
        check_student,
        "a stem that halves the picture once or twice, some of your blocks, `h.GlobalAvgPool()` "
        "and one `nn.Linear`. Any net within 60,000 parameters will do.",
        "a function or a class without arguments builds it. Boss trains yours where it has a "
        "`layer1`, `layer2` and `layer3`; `mine.use_reference('student')` puts the reference back.",
    ),
    "loss_weights": Exercise(
        h.loss_weights,
        check_loss_weights,
        "`cfg.loss_schedule` says which of the two cases of the docstring it is.",
        "the formula is `loss_fn_kd` with another alpha, times 10 p²; return "
        "`h.LossWeights(kd=..., alpha=..., align=...)`.",
    ),
    "alignment": Exercise(
        h.alignment,
        check_alignment,
        "go through the layers of `weights`; what has to be equal before two maps can be compared?",
        "average the larger of the two maps down with `F.adaptive_avg_pool2d`, send the student's "
        "through its adapter, and add the weight times `F.smooth_l1_loss`.",
    ),
}


# What a stage takes of a learner.
OWN = ("student", "loss_fn_kd", "loss_weights", "alignment")


class Answers:
    """A learner's answers and guesses: what is right is what the stages train with.

    In the place of anything else the reference stands, and that is said. The runs have a folder of
    their own, "exercises".
    """

    def __init__(self, out=None):
        self.out = h.out_folder(out) / "exercises"
        self.own = {}  # name of an exercise -> the right answer
        self.guesses = {}  # name of a stage -> guessed validation accuracy
        self.runs = {}  # name of a stage -> (the names of the answers that it trained with, Run)

    def take(self, name, answer):
        """Check the answer to an exercise: it is returned where it is right, else the reference."""
        # An earlier right answer goes too, or stages would train with code that is no longer there.
        self.own.pop(name, None)
        if EXERCISES[name].check(answer):
            self.own[name] = answer
            print("Yours is used below.")
            return answer
        called = getattr(getattr(answer, "__code__", None), "co_names", ())
        for other in EXERCISES.keys() - self.own.keys():
            if f"my_{other}" in called:
                print(f"It calls my_{other}, which is not right yet: mend that first.")
        print("Until it is right the reference stands in below.")
        return EXERCISES[name].reference

    def use_reference(self, name):
        """Put an exercise's reference back in the place of the learner's answer."""
        self.own.pop(name, None)
        print(f"{name}: the reference stands in below.")

    def with_views(self, cfg, settings):
        """The config with a learner's settings of the training views, if these are right."""
        if check_views(settings):
            return h.replace(cfg, **settings)
        print("Until they are right the reference's views stand in below.")
        return cfg

    def guess(self, cfg, accuracy):
        """Keep a guess of a stage's validation accuracy, from 0 to 1; None is no guess."""
        self.guesses.pop(cfg.exp_name, None)
        words = "is no guess yet: write a number from 0 to 1, for 80 % 0.8"
        if accuracy is not None and 0 <= accuracy <= 1:
            self.guesses[cfg.exp_name] = accuracy
            words = "is your guess"
        print(f"{cfg.exp_name}, {cfg.n_epochs} epochs: {accuracy} {words}.")

    def run_stage(self, cfg, data, teacher=None, device=None, views=6, **own):
        """`h.run_stage` with the right answers. own: code for this stage; None is the reference."""
        for name in own.keys() - set(OWN):
            raise h.UserError(
                f"run_stage takes no {name}. A setting belongs into the config: "
                f"cfg = h.get_config(..., {name}=..., exp_name='a name of its own')"
            )
        own = self.own_for(cfg) | own
        own = {name: code for name, code in own.items() if code is not None}
        names = ", ".join(own) or "nothing"
        print(f"{cfg.exp_name} trains with your own {names}.")
        net = (cfg.widths, cfg.depths)
        if "student" in own and net != (h.STRONG.widths, h.STRONG.depths):
            print(
                "widths and depths are settings of the reference net. Your own net trains here and "
                "knows nothing of them; student=None trains the reference."
            )
        run = h.run_stage(cfg, data, teacher, self.out, device, views, **own)
        self.runs[run.name] = (names, run)
        return run

    def own_for(self, cfg):
        """The right answers that a stage has a use for, as `h.run_stage` takes them."""
        uses = {
            "student": cfg.student != "sample",  # Simple and Medium keep the course's net
            "loss_fn_kd": cfg.needs_teacher,
            "loss_weights": cfg.loss_schedule == "handover",
            "alignment": cfg.aligned_layers,
        }
        own = {name: self.own[name] for name in OWN if uses[name] and name in self.own}
        if "student" in own:
            layers = dict(h.own_student(cfg, own["student"]).named_children())
            if not cfg.aligned_layers.keys() <= layers.keys():
                print("Your student has no layer1, layer2, layer3: the reference trains here.")
                del own["student"]
        return own

    def plot_soft_labels(self, *arguments):
        """`h.plot_soft_labels`, drawn with the learner's soft_labels if they are right."""
        return h.plot_soft_labels(*arguments, self.own.get("soft_labels", h.soft_labels))

    def summary(self):
        """Print which answers are right, what trained with them, and the guesses beside results."""
        for name in EXERCISES:
            print(f"{name:<14}", "right" if name in self.own else "not right yet")
        for name, (own, run) in self.runs.items():
            guess = self.guesses.get(name, "none")
            print(f"{name:<14} guess {guess}, reached {run.valid_acc:.4f} with your own {own}")
