"""Checks of a learner's answers, and the stages that train with them (exercises edition alone).

A check asks an answer one question after the other: it prints what is right, and what to mend.
"""

import contextlib
import os
import traceback
from collections import namedtuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import helpers as h

# --- asking ---------------------------------------------------------------------------------------


def check(ask, answer):
    """Tell a learner what is right in an answer and what to mend; True where all is right.

    ask: a generator function of the answer. It yields (what is asked, what the answer gives, what
    is wanted, advice). Questions that begin alike, up to a colon, are one: its first slip is told.
    """
    slips = {}  # what is asked -> the slip in it, or nothing
    try:
        for what, given, wanted, advice in ask(answer):
            topic = what.partition(":")[0]
            slips[topic] = slips.get(topic) or slip_in(what, given, wanted, advice)
    except Exception as error:  # whatever a learner's code raises is theirs to read
        slips["it runs"] = words_for(error)
    is_right = not any(slips.values())
    print("Right." if is_right else "Not yet.")
    for topic, slip in slips.items():
        print("  to mend:" if slip else "  right:", slip or topic)
    return is_right


def slip_in(what, given, wanted, advice):
    """The slip in what an answer gives, in words, or nothing."""
    if alike(given, wanted):
        return ""
    shown = "not so" if torch.is_tensor(wanted) else f"{given!s:.200}, where {wanted} is wanted"
    return f"{what}: {shown}. {advice}"


def alike(x, y):
    """Whether two values are equal; numbers in a tensor may differ by rounding."""
    if not torch.is_tensor(y):
        return x == y
    if getattr(x, "shape", None) != y.shape:
        return False
    return bool((x - y).abs().max() <= 1e-3 * y.abs().max() + 1e-7)


# What the text of an error holds -> what to do about it.
ADVICE = {
    # Without a text, as the empty place of an exercise raises it.
    "NotImplementedError:  (": "This function is still to be written.",
    "mat1 and mat2": "nn.Linear wants one number per channel: pool the maps to 1 x 1 and flatten "
    "them (h.GlobalAvgPool() does both), and compare in_features with the channels.",
    "channels, but got": "Compare the layer's in_channels with the out_channels before it.",
    "running_mean should": "A batch norm wants the number of channels of the layer before it.",
    "too many values to unpack": "A batch holds more than two things: write "
    "for images, labels, *_ in train_loader. A dict's keys and values come from .items().",
    "positional argument": "Compare its arguments, and their order, with those of the empty cell. "
    "A class becomes a net by the () after its name.",
    "is not defined": "Run the cell that defines it, or look at the spelling.",
    "inplace": "optimizer.step() comes after backward(); write x = x / y and not x /= y.",
    "does not require grad": "Leave out .detach(), .item() and torch.no_grad(); freeze nothing.",
    "must be divisible by groups": "groups=in_channels belongs to the depthwise convolution.",
    "KeyError: 'layer": "The layers to align are the keys of weights.",
    "string to float": "Return h.LossWeights(kd=..., alpha=..., align=...).",
    "Boolean value of Tensor": "A loss that is a class is made first: nn.CrossEntropyLoss()(x, y).",
    "list is not a Module": "nn.Sequential takes layers one after the other: put * before a list.",
    "[ModuleDict]": "One layer's adapter is adapters[layer].",
    "before Module.__init__": "super().__init__() comes first.",
    "attribute 'to'": "It should return a module, as nn.Sequential(...) is one.",
    "attribute 'get'": "A dict of settings is wanted.",
    "NoneType": "Is a return statement missing?",
}


def words_for(error):
    """What an exception says, the learner's own line, and what to do."""
    if isinstance(error, h.UserError):
        return str(error)
    text = f"it raises {type(error).__name__}: {error!s:.200}"
    frames = traceback.extract_tb(error.__traceback__)
    # A cell of a notebook is no file.
    own = [frame for frame in frames if not os.path.exists(frame.filename)]
    for frame in own[-1:]:
        text += f" (in {frame.name}, line {frame.lineno} of its cell: {frame.line})"
    advice = [words for sign, words in ADVICE.items() if sign in text] or [
        "Print what this line works with; of a tensor print its .shape (sums over classes want "
        "keepdim=True). Are the arguments those of the empty cell, in its order? Does () stand "
        "after each class, and is what you return a tensor where one is wanted, without numpy or "
        "math, .item() or a comma at its end? A power is written temperature ** 2."
    ]
    return " ".join([f"{text}.", *advice])


def attempt(function, *arguments):
    """What a function gives, or None where torch refuses the shapes."""
    with contextlib.suppress(RuntimeError, IndexError):
        return function(*arguments)
    return None


def gradient(value, leaf):
    """The gradient of the loss that an answer returned; UserError where there is none."""
    if getattr(value, "shape", None) != () or not value.requires_grad:
        raise h.UserError(
            f"it returns {value!r:.60}, where one number with a gradient is wanted. Is there a "
            "return? Take the mean over the batch; leave out .item(), .detach(), torch.no_grad()"
        )
    return torch.autograd.grad(value, leaf, materialize_grads=True)[0]


def made_up(*shape):
    """Normal numbers, on the device that trains: an answer may fail on one device alone."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(h.pick_device())


LABELS = torch.tensor([3, 1, 4, 0, 5, 9], device=h.pick_device())

# --- soft labels and the loss of distillation -----------------------------------------------------


def ask_soft_labels(answer):
    """Questions on soft_labels(logits, temperature)."""
    logits = 3 * made_up(6, h.NUM_CLASSES)
    given = logits.clone()
    seen = answer(given, 2.0)
    yield (
        "each picture's probabilities add up to 1",
        seen.sum(-1),
        torch.ones_like(logits[:, 0]),
        "The classes are the last dimension, dim=-1; dim=0 runs over the batch. Take softmax, not "
        "its logarithm, log_softmax. Nothing follows the softmax.",
    )
    yield (
        "softmax of logits / temperature",
        seen,
        h.soft_labels(logits, 2.0),
        "The logits are divided by the temperature, not multiplied and not rounded (//), and "
        "the softmax comes after that. The order of its arguments is logits, temperature.",
    )
    yield (
        "one picture, (11,)",
        attempt(answer, logits[0], 2.0),
        seen[0],
        "The classes are the last dimension: dim=-1.",
    )
    yield (
        "logits so large that exp overflows",
        answer(logits + 900, 2.0),
        seen,
        "F.softmax copes with them, a bare exp does not.",
    )
    yield (
        "logits left as they are",
        given,
        logits,
        "Write logits / temperature, not logits /= temperature.",
    )


def kd_gradient(loss, alpha, temperature, logits):
    """The gradient (66,) of a loss for the student's logits, which is what trains.

    logits: (2, 6, 11), the student's and the teacher's.
    """
    student = logits[0].clone().requires_grad_()
    # Times one, for a leaf forbids to be written to; what a net answers does not.
    value = loss(student * 1, LABELS, logits[1], alpha, temperature)
    return gradient(value, student).flatten().cpu()


# (alpha, temperature) -> what to do where the loss is no sum of the two losses.
KD_CASES = {
    (0.0, 4.0): "Multiply the soft loss by alpha, so that nothing of it is left here; one that is "
    "not finite spoils even this. F.cross_entropy(student_logits, labels) remains: it wants the "
    "plain logits, without softmax, temperature or label_smoothing. Write no /=, which changes "
    "them. Are alpha and temperature swapped? Their order is that of the empty cell.",
    (1.0, 4.0): "Multiply the labels' loss by 1 - alpha, so that nothing of it is left here. "
    "F.kl_div(log_p, q) remains, log_p of the student first and q of the teacher second. Are "
    "log_p and q swapped, is the softmax not over dim=1, is it no softmax, or is it not "
    "divided by the argument temperature, once? The question on two equal nets, below, tells more.",
    (0.3, 3.0): "Mend the others first. Then use both arguments, no numbers of your own.",
}


def ask_loss_fn_kd(answer):
    """Questions on loss_fn_kd(student_logits, labels, teacher_logits, alpha, temperature).

    Gradients decide, for they are what trains: a loss with another value and the same gradient is
    right. They should be a sum of the two losses' gradients, each with its weight.
    """
    logits = 3 * made_up(2, 6, h.NUM_CLASSES)
    for (alpha, temperature), advice in KD_CASES.items():
        seen = kd_gradient(answer, alpha, temperature, logits)
        # (66, 2): what they should be made of, labels' loss and soft loss.
        losses = torch.stack(
            [kd_gradient(h.loss_fn_kd, end, temperature, logits) for end in (0.0, 1.0)], -1
        )
        weights = torch.linalg.lstsq(losses, seen[:, None].nan_to_num()).solution.flatten()
        fitted = losses @ weights
        case = f"alpha = {alpha:g}, temperature = {temperature:g}"
        yield f"a sum of labels' loss and soft loss at {case}", seen, fitted, advice
        if alike(seen, fitted):  # else the weights mean nothing
            yield (
                f"how many times labels' loss and soft loss count: at {case}",
                [round(weight, 3) + 0.0 for weight in weights.tolist()],
                [1 - alpha, alpha],
                "The loss is alpha * temperature ** 2 * soft + (1 - alpha) * hard. A factor too "
                "many tells the slip. 1/16, 0.06: temperature ** 2 is missing. 1/4: it is "
                "temperature, not its square. 16: temperature ** 2 belongs to the soft loss alone. "
                "1/11, 0.09: a mean over the 11 classes too; 6: a sum over the 6 pictures; 6/11, "
                "0.55: over the classes in place of the pictures. Write reduction='batchmean', by "
                "its name. 0: no gradient comes from it: .item(), .detach(), or not the student's "
                "logits. -1: the sign is wrong. Two slips multiply.",
            )
    yield (
        "no gradient at alpha = 1 where both nets have equal logits",
        seen + kd_gradient(answer, 1.0, 4.0, logits[[1, 1]]),
        seen,
        "Nothing of the labels' loss is left there, and equal logits make equal soft labels. Are "
        "both nets' logits divided by temperature? In F.kl_div(log_p, q) log_p is log_softmax of "
        "the student's, q is softmax of the teacher's, not its logarithm. If it calls "
        "my_soft_labels, that has to be right first.",
    )
    yield (
        "logits so large that exp overflows",
        kd_gradient(answer, alpha, temperature, logits + 900),
        seen,
        "F.softmax and F.log_softmax cope with them, a bare exp does not.",
    )
    yield (
        "the teacher's logits left as they are",
        logits,
        3 * made_up(2, 6, h.NUM_CLASSES),
        "Write teacher_logits / temperature, not teacher_logits /= temperature.",
    )


# --- the training loop ----------------------------------------------------------------------------

# What is watched at each step -> what to do.
WATCHED = {
    "(epoch given to set_epoch, steps before it)": "Begin each of range(cfg.n_epochs) with "
    "train_loader.set_epoch(epoch); call optimizer.step() for each batch; return after the loops.",
    "the student that is handed in is in training mode": "Call student.train() in each epoch, and "
    "train this student, no new one.",
    "the size of the gradient at step(), where 1.0 is that of one clipped batch": "For each batch: "
    "F.cross_entropy(logits, labels) of the plain logits, with its reduction at the mean; "
    "optimizer.zero_grad(); loss.backward(); nn.utils.clip_grad_norm_ with cfg.grad_norm_max; then "
    "optimizer.step(), each with its (). Where only the first number is right, zero_grad() is "
    "missing; 0.0: no backward() of this student's loss came before.",
    "the optimizer": "Make a torch.optim.Adam.",
    "the optimizer's lr": "Hand it cfg.lr.",
    "the optimizer's weight_decay": "Hand it cfg.weight_decay.",
    "how many parameters it moves": "Hand it student.parameters(): all of these and no others.",
    "it remembers the steps before": "Make one optimizer, before the loops: Adam remembers its "
    "gradients. Without gradients it has nothing to remember.",
}


class Batches(list):
    """A loader of made-up batches."""

    dataset = range(12)
    epoch = "none"

    def set_epoch(self, epoch):
        self.epoch = epoch


def watch(loop, n_epochs, grad_norm_max):
    """What a loop's optimizer meets on a small net: a list per row of WATCHED, without repeats."""
    cfg = h.Config(
        lr=0.03, weight_decay=0.1, grad_norm_max=grad_norm_max, n_epochs=n_epochs, amp="off"
    )
    student = h.build_student(cfg).to(LABELS.device).eval()  # train() is the loop's to call
    loader = Batches(h.Batch(images, LABELS) for images in made_up(2, 6, 3, 24, 24))
    norms = [1.0]  # of each batch's gradient, as it should be
    steps = []

    def forward(net, images, logits):
        if logits.requires_grad:
            loss = F.cross_entropy(logits.float(), LABELS)
            gradients = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
            norm = torch.stack([g.norm() for g in gradients]).norm().item()
            norms.append(min(norm, grad_norm_max))

    def step(optimizer, *arguments):
        group = optimizer.param_groups[0]
        norm = nn.utils.clip_grad_norm_(student.parameters(), 1e9).item()
        facts = (
            (loader.epoch, len(steps)),
            student.training,
            round(norm / norms[-1], 1),
            type(optimizer).__name__,
            group["lr"],
            group["weight_decay"],
            len(group["params"]),
            bool(optimizer.state) == bool(steps),
        )
        steps.append(facts)

    student.register_forward_hook(forward)
    with register_optimizer_step_pre_hook(step):
        loop(student, loader, cfg)
    if not steps:
        raise h.UserError("it learns from no batch: call optimizer.step() for each of train_loader")
    return [list(dict.fromkeys(facts)) for facts in zip(*steps, strict=True)]


def loop_of_fit(student, train_loader, cfg):
    """The epochs of `fit`, and nothing besides."""
    state = h.TrainState(h.DistillLoss(cfg, student))
    for epoch in range(cfg.n_epochs):
        h.train_one_epoch(state, state.loss_fn, train_loader, epoch)


def ask_training_loop(answer):
    """Questions on training_loop(student, train_loader, cfg).

    It is watched while it trains a small net for two and for three epochs of two batches.
    """
    for case in ((2, 0.02), (3, 1000)):
        seen, wanted = (watch(loop, *case) for loop in (answer, loop_of_fit))
        for (what, advice), given, right in zip(WATCHED.items(), seen, wanted, strict=True):
            yield f"{what}: with (n_epochs, grad_norm_max) = {case}", given, right, advice


# --- the depthwise-separable block ----------------------------------------------------------------


def sizes_and_output(make_block, settings):
    """(sizes of its parameters, output (4, C, H, W)) of a block whose parameters are all 0.5.

    So it does not matter in which order and shape a block holds its parameters.
    """
    images = made_up(4, 8, 24, 24)
    block = make_block(*settings).to(images.device)
    block(images)  # a lazy layer gets its parameters
    for parameter in block.parameters():
        nn.init.constant_(parameter, 0.5)
    return sorted(parameter.numel() for parameter in block.parameters()), block(images)


def ask_dwpw_conv(answer):
    """Questions on dwpw_conv(in_channels, out_channels, kernel_size=3, stride=2, padding=1).

    Its parameters and what it computes decide, so that it may be written in any style.
    """
    for settings in ((8, 12), (8, 12, 5, 1, 2), (8, 12, 3, 2, 0), (8, 8, 3, 1, 1)):
        sizes, output = sizes_and_output(answer, settings)
        right_sizes, wanted = sizes_and_output(h.dwpw_conv, settings)
        case = f"dwpw_conv{settings}"
        yield (
            f"how many numbers its parameters hold: {case}",
            sizes,
            right_sizes,
            "groups=in_channels makes the first convolution depthwise: kernel_size ** 2 numbers "
            "per channel. The pointwise one is 1 x 1 without groups. Both have a bias, and a batch "
            "norm with weight and bias follows each.",
        )
        yield (
            f"the shape of its output: {case}",
            tuple(output.shape),
            tuple(wanted.shape),
            "kernel_size, stride and padding belong to the depthwise convolution, the first.",
        )
        yield (
            f"what it computes where all parameters are 0.5: {case}",
            output,
            wanted,
            "Mend the others first. nn.LeakyReLU(0.01) follows each batch norm, which follows each "
            "convolution, and nothing else: no ReLU, no dropout, no pooling, no shortcut. The "
            "stride is the first convolution's.",
        )


# --- alignment and its schedule -------------------------------------------------------------------

ONE_LAYER = {"layer1": 1.0}
NO_ADAPTER = nn.Identity()
DOWN = "Average it down to the size of the smaller (F.adaptive_avg_pool2d)."


def aligned(answer, ours, theirs, weights=ONE_LAYER, adapter=NO_ADAPTER):
    """What an alignment gives.

    ours: the student's map in both layers. theirs: the teacher's layer1; its layer3 is twice that.
    """
    student_maps = {"layer1": ours, "layer3": ours}
    teacher_maps = {"layer1": theirs, "layer3": 2 * theirs}
    adapters = nn.ModuleDict(dict.fromkeys(weights, adapter))
    return answer(student_maps, teacher_maps, weights, adapters)


def ask_alignment(answer):
    """Questions on alignment(student_maps, teacher_maps, weights, adapters).

    It is asked about one layer first; what follows is compared with what it answers there.
    """
    ours, theirs = made_up(2, 2, 4, 8, 8)
    ours.requires_grad_()
    one = aligned(answer, ours, theirs)
    yield (
        "one layer with maps of one size",
        gradient(one, ours),
        gradient(aligned(h.alignment, ours, theirs), ours),
        "F.smooth_l1_loss(ours, theirs), its mean over the map, times 1, is added. Nothing is "
        "detached; maps of one size are not pooled (the sizes are shape[2] and shape[3]).",
    )
    yield (
        "a layer with weight 3 counts three times",
        aligned(answer, ours, theirs, {"layer1": 3.0}),
        3 * one,
        "Multiply by the weight, and divide by nothing.",
    )
    other = aligned(answer, ours, theirs, {"layer3": 1.0})
    both = aligned(answer, ours, theirs, {"layer1": 1.0, "layer3": 1.0})
    yield (
        "two layers add up",
        both,
        one + other,
        "Start at 0, add in the loop, return after it, divided by nothing. Take each map by its "
        "layer's name: the dicts may have another order.",
    )
    pool = nn.AdaptiveAvgPool2d(2)
    small = aligned(answer, pool(ours), pool(theirs))
    yield "a larger map of the teacher", attempt(aligned, answer, pool(ours), theirs), small, DOWN
    yield "a larger map of the student", attempt(aligned, answer, ours, pool(theirs)), small, DOWN
    adapter = nn.Conv2d(4, 6, 1).to(ours.device)
    wide = made_up(2, 6, 8, 8)
    yield (
        "adapters",
        attempt(aligned, answer, ours, wide, ONE_LAYER, adapter),
        aligned(answer, adapter(ours), wide),
        "adapters[layer] takes the student's map, not the teacher's. The order of its arguments is "
        "student_maps, teacher_maps, weights, adapters.",
    )


def ask_loss_weights(answer):
    """Questions on loss_weights(cfg, progress)."""
    constant = h.replace(h.BOSS, loss_schedule="constant", alpha=0.3)
    for cfg, advice in (
        (
            h.BOSS,
            "In a handover kd is 10 * progress ** 2, alpha 1 - progress ** 2 and align 1; progress "
            "is from 0 to 1. Are these the numbers of the other case?",
        ),
        (constant, "Without a handover kd is 1, alpha is cfg.alpha and align is 1."),
    ):
        given, wanted = (
            [round(float(weight), 4) for weight in rule(cfg, 0.2)]
            for rule in (answer, h.loss_weights)
        )
        yield f"(kd, alpha, align), {cfg.loss_schedule}, progress 0.2", given, wanted, advice


# --- the student and its views --------------------------------------------------------------------

# What a learner may leave at the end of a net, as torch calls the step.
ENDS = {
    "SoftmaxBackward0": "softmax",
    "LogSoftmaxBackward0": "log_softmax",
    "SigmoidBackward0": "sigmoid",
    "ReluBackward0": "ReLU",
    "LeakyReluBackward0": "leaky ReLU",
    "TanhBackward0": "tanh",
}


def ask_student(answer):
    """Questions on a learner's own student: can it be trained and submitted?

    answer: a net, or a class or function without arguments that builds one.
    """
    net = h.own_student(h.STRONG, answer).to(LABELS.device)
    images = made_up(2, 3, 64, 64)
    with h.evaluation_mode(net):
        shapes = [tuple(net(made_up(2, 3, n, n)).shape) for n in (64, 100, 224)]
        together = net(images)
        alone = net(images[:1])
    yield (
        "eleven logits for two pictures of any size",
        shapes,
        [(2, h.NUM_CLASSES)] * 3,
        "Is nn.Flatten() missing, or is the last layer's width not 11?",
    )
    yield (
        "an answer that depends on the picture alone",
        alone,
        together[:1],
        "In evaluation mode nothing is random, and nothing depends on the other pictures. Does a "
        ".squeeze() take the first dimension away where there is one picture?",
    )
    logits = net.train()(images)
    logits.square().sum().backward()
    idle = [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None]
    yield "parameters without a gradient", idle[:3], [], "Left out of forward, or detached?"
    end = ENDS.get(logits.grad_fn.name(), "nothing")
    yield "what follows the last layer", end, "nothing", "Leave that to the loss."
    ratio = h.count_macs(net, 224) / h.count_macs(h.build_student(h.STRONG), 224)
    price = (
        f"{h.check_budget(net):,} parameters; {ratio:.2g} times the multiply-adds of Strong's net, "
        "and an epoch takes about so many times as long"
    )
    yield price, True, True, ""


# A setting -> the transform of torchvision that it stands for.
VIEWS = {
    "crop_scale": "RandomResizedCrop(224, scale=(0.7, 1.0))",
    "hflip": "RandomHorizontalFlip(0.5)",
    "vflip": "RandomVerticalFlip(0.5)",
    "rotation": "RandomRotation(180)",
    "affine": "RandomAffine(30)",
}


def ask_views(answer):
    """Questions on a dict of settings: does it make the training views of Strong and Boss?"""
    for name, transform in VIEWS.items():
        given = answer.get(name, "missing")
        if isinstance(given, list):
            given = tuple(given)
        yield (
            f"{name} for {transform}",
            given,
            getattr(h.BOSS, name),
            "Write what stands in the brackets, as a number and not in quotes: for crop_scale two "
            "numbers (low, high), else one.",
        )
    yield "other settings", sorted(answer.keys() - VIEWS.keys()), [], "These make no view."


# --- answers --------------------------------------------------------------------------------------

# reference: what stands in until the answer is right. hint, second: the second is folded.
Exercise = namedtuple("Exercise", "reference ask hint second")

EXERCISES = {
    "training_loop": Exercise(
        loop_of_fit,
        ask_training_loop,
        "two loops: over the epochs, counted from 0, and over the batches. Which calls belong into "
        "which? (The check trains a tiny net twice, so what your loop prints is seen twice.)",
        "before the loops the optimizer; for each epoch `train_loader.set_epoch(epoch)` and "
        "`student.train()`; for each batch `images, labels, *_` the cross-entropy, "
        "`optimizer.zero_grad()`, `loss.backward()`, `nn.utils.clip_grad_norm_` and "
        "`optimizer.step()`.",
    ),
    "soft_labels": Exercise(
        h.soft_labels,
        ask_soft_labels,
        "what is divided by what, and over which dimension do the probabilities add up to one?",
        "`F.softmax(..., dim=-1)` of the logits divided by the temperature: it copes with large "
        "logits, a bare `exp` does not.",
    ),
    "loss_fn_kd": Exercise(
        h.loss_fn_kd,
        ask_loss_fn_kd,
        "two losses and two weights: which of the two knows a temperature?",
        "`F.kl_div(log_p_student, p_teacher, reduction='batchmean')` wants the student's "
        "logarithms (`F.log_softmax`) and the teacher's probabilities (`soft_labels`); "
        "`F.cross_entropy` wants the plain logits. A power is written `temperature**2`.",
    ),
    "dwpw_conv": Exercise(
        h.dwpw_conv,
        ask_dwpw_conv,
        "six layers in an `nn.Sequential`: convolution, batch norm, activation, and the same "
        "again. Which of the two convolutions sees space, and which mixes channels?",
        "`groups=in_channels` makes a convolution depthwise; kernel size, stride and padding are "
        "its own, the pointwise one is 1 x 1. Both have a bias; the activation is "
        "`nn.LeakyReLU(0.01)`. `h.check_budget(my_dwpw_conv(64, 128))` counts the parameters.",
    ),
    "student": Exercise(
        None,
        ask_student,
        "a stem that halves the picture once or twice, some of your blocks, `h.GlobalAvgPool()` "
        "and one `nn.Linear`. Any net within 60,000 parameters will do.",
        "a function or a class without arguments builds it. Boss trains yours where it has a "
        "`layer1`, `layer2` and `layer3`; `mine.use_reference('student')` puts the reference back.",
    ),
    "loss_weights": Exercise(
        h.loss_weights,
        ask_loss_weights,
        "`cfg.loss_schedule` says which of the two cases of the docstring it is.",
        "the formula is `loss_fn_kd` with another alpha, times 10 p²; return "
        "`h.LossWeights(kd=..., alpha=..., align=...)`.",
    ),
    "alignment": Exercise(
        h.alignment,
        ask_alignment,
        "go through the layers of `weights`; what has to be equal before two maps can be compared?",
        "average the larger of the two maps down with `F.adaptive_avg_pool2d`, send the student's "
        "through its adapter, and add the weight times `F.smooth_l1_loss`.",
    ),
}


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
        if check(EXERCISES[name].ask, answer):
            self.own[name] = answer
            print("Yours is used below.")
            return answer
        return self.use_reference(name)

    def use_reference(self, name):
        """Put an exercise's reference back in the place of the learner's answer, and return it."""
        # An earlier right answer goes, or stages would train with code that is no longer there.
        self.own.pop(name, None)
        print(f"{name}: the reference stands in below.")
        return EXERCISES[name].reference

    def with_views(self, cfg, settings):
        """The config with a learner's settings of the training views, if these are right."""
        if check(ask_views, settings):
            return h.replace(cfg, **settings)
        print("Until they are right the reference's views stand in below.")
        return cfg

    def guess(self, cfg, accuracy):
        """Keep a guess of a stage's validation accuracy, from 0 to 1; None is no guess."""
        words = "is no guess yet: write a number from 0 to 1, for 80 % 0.8"
        if accuracy is not None and 0 <= accuracy <= 1:
            self.guesses[cfg.exp_name] = accuracy
            words = "is your guess"
        print(f"{cfg.exp_name}, {cfg.n_epochs} epochs: {accuracy} {words}.")

    def run_stage(self, cfg, data, teacher=None, device=None, views=6, **own):
        """`h.run_stage` with the right answers. own: code for this stage; None is the reference."""
        for name in own.keys() - EXERCISES.keys():
            raise h.UserError(
                f"run_stage takes no {name}. A setting belongs into the config: "
                f"cfg = h.get_config(..., {name}=..., exp_name='a name of its own')"
            )
        own = self.own_for(cfg) | own
        own = {name: code for name, code in own.items() if code is not None}
        names = ", ".join(own) or "none"
        print(f"{cfg.exp_name} trains; your own code in it: {names}")
        if "student" in own:
            print(
                "Your own net knows nothing of widths and depths, which are settings of the "
                "reference net; student=None trains the reference."
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
        own = {name: self.own[name] for name in uses if uses[name] and name in self.own}
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
            print(f"{name:<14} guess {guess}, reached {run.valid_acc:.4f}; your own code: {own}")
