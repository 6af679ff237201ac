"""The checks of a learner's answers: right cells pass, whatever their style, and slips are told.

A slip is an edit of a right cell: (words that are told, {old text: new text}).
"""

import exercises
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import helpers as h

# --- cells as learners write them -----------------------------------------------------------------

SOFT_LABELS = """
def my_soft_labels(logits, temperature):
    return F.softmax(logits / temperature, dim=-1)
"""
BY_EXP = """
def my_soft_labels(logits, temperature):
    scaled = logits / temperature
    powers = (scaled - scaled.max(-1, keepdim=True).values).exp()
    return powers / powers.sum(-1, keepdim=True)
"""

LOSS = """
def my_loss_fn_kd(student_logits, labels, teacher_logits, alpha=0.5, temperature=20.0):
    log_p = F.log_softmax(student_logits / temperature, dim=1)
    q = F.softmax(teacher_logits / temperature, dim=1)
    soft = F.kl_div(log_p, q, reduction="batchmean")
    hard = F.cross_entropy(student_logits, labels)
    return alpha * temperature**2 * soft + (1 - alpha) * hard
"""
LOSS_BY_HAND = """
def my_loss_fn_kd(s, y, t, a, T):
    p = (t / T).softmax(1)
    soft = (p * (p.log() - (s / T).log_softmax(1))).sum(1).mean()
    return a * T * T * soft + (1 - a) * F.nll_loss(s.log_softmax(1), y)
"""
LOSS_BY_CROSS_ENTROPY = """
def my_loss_fn_kd(student_logits, labels, teacher_logits, alpha, temperature):
    soft = F.cross_entropy(student_logits / temperature, F.softmax(teacher_logits / temperature, 1))
    return alpha * temperature**2 * soft + (1 - alpha) * F.cross_entropy(student_logits, labels)
"""
LOSS_OF_LAYERS = """
class Loss(nn.Module):
    def forward(self, student_logits, labels, teacher_logits, alpha=0.5, temperature=20.0):
        log_p = nn.LogSoftmax(dim=1)(student_logits / temperature)
        q = nn.Softmax(dim=1)(teacher_logits / temperature)
        soft = nn.KLDivLoss(reduction="sum")(log_p, q) / len(labels)
        hard = nn.CrossEntropyLoss()(student_logits, labels)
        return soft * (alpha * temperature * temperature) + hard * (1.0 - alpha)

my_loss_fn_kd = Loss()
"""

LOOP = """
def my_training_loop(student, train_loader, cfg):
    optimizer = torch.optim.Adam(student.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
    for epoch in range(cfg.n_epochs):
        train_loader.set_epoch(epoch)
        student.train()
        for images, labels, *_ in train_loader:
            logits = student(images)
            loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), cfg.grad_norm_max)
            optimizer.step()
"""
LOOP_IN_BFLOAT16 = """
def my_training_loop(student, train_loader, cfg):
    weights = [p for p in student.parameters()]
    opt = torch.optim.Adam([{"params": weights}], cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    criterion = nn.CrossEntropyLoss()
    student.train()
    for epoch in range(0, cfg.n_epochs):
        train_loader.set_epoch(epoch)
        right = 0
        for batch in train_loader:
            for p in weights:
                p.grad = None
            with torch.autocast(batch.images.device.type, torch.bfloat16):
                logits = student(batch.images)
                loss = criterion(logits, batch.labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, max_norm=cfg.grad_norm_max)
            opt.step()
            right += (logits.argmax(1) == batch.labels).sum().item()
        student.eval()
        with torch.no_grad():
            student(batch.images)
        student.train()
        print(epoch, loss.item(), right / len(train_loader.dataset), len(train_loader))
"""

BLOCK = """
def my_dwpw_conv(in_channels, out_channels, kernel_size=3, stride=2, padding=1):
    return nn.Sequential(
        nn.Conv2d(in_channels, in_channels, kernel_size, stride, padding, groups=in_channels),
        nn.BatchNorm2d(in_channels),
        nn.LeakyReLU(0.01),
        nn.Conv2d(in_channels, out_channels, 1),
        nn.BatchNorm2d(out_channels),
        nn.LeakyReLU(0.01),
    )
"""
BLOCK_AS_CLASS = """
class my_dwpw_conv(nn.Module):
    def __init__(self, in_channels, out_channels, kernel_size=3, stride=2, padding=1):
        super().__init__()
        self.last_norm = nn.BatchNorm2d(out_channels)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1)
        self.norm = nn.BatchNorm2d(in_channels)
        window = dict(kernel_size=kernel_size, stride=stride, padding=padding)
        self.depthwise = nn.Conv2d(in_channels, in_channels, groups=in_channels, **window)

    def forward(self, x):
        x = F.leaky_relu(self.norm(self.depthwise(x)))
        x = self.last_norm(self.pointwise(x))
        return torch.where(x > 0, x, 0.01 * x)
"""
BLOCK_OF_PARAMETERS = """
class my_dwpw_conv(nn.Module):
    def __init__(self, i, o, kernel_size=3, stride=2, padding=1):
        super().__init__()
        self.window = (stride, padding, 1, i)
        self.w1 = nn.Parameter(torch.randn(i, 1, kernel_size, kernel_size))
        self.b1 = nn.Parameter(torch.zeros(i))
        self.w2 = nn.Parameter(torch.randn(o, i))
        self.b2 = nn.Parameter(torch.zeros(o, 1, 1))
        self.norm1 = nn.BatchNorm2d(i)
        self.norm2 = nn.BatchNorm2d(o)

    def forward(self, x):
        x = F.conv2d(x, self.w1, self.b1, *self.window)
        x = F.leaky_relu(self.norm1(x), 0.01)
        x = torch.einsum("oc,bchw->bohw", self.w2, x) + self.b2
        return F.leaky_relu(self.norm2(x), 0.01, inplace=True)
"""
EINSUM = 'torch.einsum("oc,bchw->bohw", self.w2, x)'
LAZY_BLOCK = """
def my_dwpw_conv(in_channels, out_channels, kernel_size=3, stride=2, padding=1):
    layers = [nn.LazyConv2d(in_channels, kernel_size, stride, padding, groups=in_channels)]
    layers += [nn.LazyBatchNorm2d(), nn.LeakyReLU(inplace=True)]
    layers += [nn.LazyConv2d(out_channels, 1), nn.LazyBatchNorm2d(), nn.LeakyReLU(inplace=True)]
    return nn.Sequential(*layers)
"""

WEIGHTS = """
def my_loss_weights(cfg, progress):
    if cfg.loss_schedule == "handover":
        return h.LossWeights(kd=10 * progress**2, alpha=1 - progress**2, align=1.0)
    return h.LossWeights(1.0, cfg.alpha, 1.0)
"""

ALIGNMENT = """
def my_alignment(student_maps, teacher_maps, weights, adapters):
    total = 0
    for layer, weight in weights.items():
        ours = adapters[layer](student_maps[layer])
        theirs = teacher_maps[layer]
        side = min(ours.shape[-1], theirs.shape[-1])
        ours = F.adaptive_avg_pool2d(ours, side)
        theirs = F.adaptive_avg_pool2d(theirs, side)
        total = total + weight * F.smooth_l1_loss(ours, theirs)
    return total
"""
ALIGNMENT_PUT_BACK = """
def my_alignment(student_maps, teacher_maps, weights, adapters):
    for n in weights:
        sizes = [maps[n].shape[-1] for maps in (student_maps, teacher_maps)]
        for maps, size in zip((student_maps, teacher_maps), sizes):
            if size > min(sizes):
                maps[n] = F.interpolate(maps[n], (min(sizes), min(sizes)), mode="area")
        if student_maps[n].shape[1] != teacher_maps[n].shape[1]:
            student_maps[n] = adapters[n](student_maps[n])
    criterion = nn.SmoothL1Loss()
    return sum(w * criterion(student_maps[n], teacher_maps[n].detach()) for n, w in weights.items())
"""

STUDENT = """
class my_student(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.blocks = nn.ModuleList([h.dwpw_conv(3, width)])
        self.pool = h.GlobalAvgPool()
        self.fc = nn.Linear(width, 11)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.fc(self.pool(x))
"""
CONVOLUTIONAL_STUDENT = """
def my_student():
    head = [nn.LazyConv2d(11, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(h.dwpw_conv(3, 16), *head)
"""

VIEWS = """
my_views = {
    "crop_scale": (0.7, 1.0),
    "hflip": 0.5,
    "vflip": 0.5,
    "rotation": 180,
    "affine": 30.0,
}
"""

POINTWISE = {
    "by conv2d": "F.conv2d(x, self.w2[:, :, None, None])",
    "by a product": "(x.movedim(1, -1) @ self.w2.T).movedim(-1, 1)",
    "with a bias": "F.linear(x.movedim(1, -1), self.w2, self.b2.flatten()).movedim(-1, 1)",
    "by linear": "F.linear(x.permute(0, 2, 3, 1), self.w2).permute(0, 3, 1, 2)",
}
# Of each exercise: the cell that is edited below, and others that are right.
RIGHT = {
    "soft_labels": [SOFT_LABELS, BY_EXP],
    "loss_fn_kd": [LOSS, LOSS_BY_HAND, LOSS_BY_CROSS_ENTROPY, LOSS_OF_LAYERS],
    "training_loop": [LOOP, LOOP_IN_BFLOAT16],
    "dwpw_conv": [BLOCK, BLOCK_AS_CLASS, LAZY_BLOCK, BLOCK_OF_PARAMETERS]
    + [BLOCK_OF_PARAMETERS.replace(EINSUM, other) for other in POINTWISE.values()],
    "loss_weights": [WEIGHTS, WEIGHTS.replace("10 * progress", "torch.tensor(10) * progress")],
    "alignment": [ALIGNMENT, ALIGNMENT_PUT_BACK],
    "student": [
        STUDENT,
        CONVOLUTIONAL_STUDENT,
        STUDENT + "\nmy_student = my_student()",
        STUDENT.replace("nn.Linear(width, 11)", "nn.LazyLinear(11)"),
        "my_student = h.plain_student",
    ],
    "views": [VIEWS, VIEWS.replace("(0.7, 1.0)", "[0.7, 1]")],
}

# --- slips ----------------------------------------------------------------------------------------

SOFT_LABEL_SLIPS = [
    ({"logits / t": "logits * t"}, "by the temperature, not multiplied"),
    ({"logits / temperature": "logits"}, "are divided by the temperature"),
    ({"dim=-1": "dim=0"}, "over the batch", "one picture, (11,)", "dim=-1"),
    ({"dim=-1": "dim=1"}, "right: softmax of", "one picture, (11,)", "dim=-1"),
    ({"F.softmax": "F.log_softmax"}, "not its logarithm"),
    ({"logits / temperature, dim=-1)": "logits, -1) / temperature"}, "Nothing follows the softmax"),
    ({"F.softmax(logits / temperature, dim=-1)": "logits / temperature"}, "add up to 1"),
    ({"    return": "    logits /= temperature\n    return"}, "not logits /= temperature"),
    ({"return ": ""}, "return statement"),
    ({"logits, temperature": "temperature, logits"}, "its arguments is logits, temperature"),
    ({", temperature)": ")"}, "takes 1 positional argument", "Compare its arguments"),
    ({"F.softmax": "F.sofmax"}, "no attribute 'sofmax'", "line 3 of its cell"),
    ({"F.softmax": "softmax"}, "'softmax' is not defined", "spelling"),
    ({"return F.softmax(logits / temperature, dim=-1)": "..."}, "return statement"),
    (
        {"F.softmax(logits / t": "F.log_softmax(logits * t", "-1": "0"},
        "not multiplied",
        "not its logarithm",
        "over the batch",
    ),
]

KL = "F.kl_div(log_p, q, "
OTHER_HARD = "to mend: a sum of labels' loss and soft loss at alpha = 0, temperature = 4: not so"
OTHER_SOFT = "to mend: a sum of labels' loss and soft loss at alpha = 1, temperature = 4: not so"
EQUAL = "to mend: no gradient at alpha = 1 where both nets have equal logits"
LOSS_SLIPS = [
    ({KL: "F.kl_div(q.log(), log_p.exp(), "}, "log_p and q swapped", "right: no"),
    ({KL: "F.kl_div(q, log_p, "}, EQUAL),
    ({KL: "F.kl_div(log_p, q.log(), "}, EQUAL),
    ({"F.log_softmax": "F.softmax"}, EQUAL),
    ({"batchmean": "mean"}, "[0.0, 0.091], where [0.0, 1.0] is wanted"),
    ({"batchmean": "sum"}, "[0.0, 6.0], where [0.0, 1.0] is wanted"),
    ({"temperature**2 * ": ""}, "1/16, 0.06: temperature ** 2 is missing"),
    ({"temperature**2": "temperature"}, "[0.0, 0.25], where [0.0, 1.0] is wanted"),
    ({"student_logits / temperature": "student_logits"}, EQUAL),
    ({"teacher_logits / temperature": "teacher_logits"}, EQUAL),
    ({"teacher_logits / t": "teacher_logits * t"}, EQUAL),
    ({"dim=1": "dim=0"}, "is the softmax not over dim=1", "right: no gradient"),
    ({"entropy(student_logits": "entropy(student_logits / temperature"}, OTHER_HARD),
    ({"entropy(student_logits": "entropy(student_logits.softmax(1)"}, OTHER_HARD),
    ({"labels)\n": "labels, label_smoothing=0.1)\n"}, "or label_smoothing"),
    ({"labels)\n": "labels, label_smoothing=0.03)\n"}, "or label_smoothing"),
    (
        {"alpha *": "(1 - alpha) *", "(1 - alpha) * hard": "alpha * hard"},
        "count: at alpha = 0, temperature = 4: [0.0, 1.0], where [1.0, 0.0]",
    ),
    ({"alpha * temp": "temp"}, "at alpha = 0, temperature = 4: [1.0, 1.0], where [1.0, 0.0]"),
    ({"(1 - alpha) * ": ""}, "count: at alpha = 1, temperature = 4: [1.0, 1.0], where [0.0, 1.0]"),
    ({"(1 - alpha) * hard": "alpha * hard"}, "at alpha = 0, temperature = 4: [0.0, 0.0], where"),
    ({"+ (1": "- (1"}, "[-1.0, 0.0], where [1.0, 0.0]"),
    ({"alpha *": "0.5 *"}, "count: at alpha = 0, temperature = 4: [1.0, 0.5]"),
    ({"    log_p": "    temperature = 6\n    log_p"}, "divided by the argument temperature"),
    ({KL + 'reduction="batchmean"': "F.mse_loss(log_p, q"}, EQUAL),
    ({"alpha=0.5, temperature=20.0": "temperature, alpha"}, "alpha and temperature swapped?"),
    ({"alpha=0.5, temperature=20.0": "T, a", "alpha": "a", "temperature": "T"}, "swapped?"),
    ({"temperature**2": "temperature^2"}, "A power is written temperature ** 2"),
    ({"alpha * temperature**2 * soft": "alpha * soft * temperature ^ 2"}, "A power is written"),
    ({"return alpha": "alpha"}, "Is there a return?"),
    ({"* hard": "* hard.item()", "soft +": "soft.item() +"}, "leave out .item()"),
    ({"    log_p": "    student_logits = student_logits.detach()\n    log_p"}, ".detach()"),
    ({"labels)\n": "labels, reduction='none')\n"}, "Take the mean"),
    ({"    log_p": "    student_logits /= 1.5\n    log_p"}, "Write no /=, which changes them"),
    ({"temperature**2": "2**temperature"}, "count: at alpha = 0.3, temperature = 3: [0.7, 0.267]"),
    ({"    q = ": "    teacher_logits /= 1.5\n    q = "}, "not teacher_logits /= temperature"),
    ({"q = F.softmax(": "q = torch.exp(", ", dim=1)\n    soft": ")\n    soft"}, "is it no softmax"),
    ({"return": "raise NotImplementedError\n    return"}, "(in my_loss_fn_kd, line 7 of its cell"),
    ({"labels)\n": "label)\n"}, "NameError: name 'label' is not defined", "line 6 of its cell"),
    (
        {
            "batchmean": "mean",
            "temperature**2 * ": "",
            "labels)\n": "labels, label_smoothing=0.2)\n",
        },
        "[0.0, 0.006], where",
        "or label_smoothing",
    ),
    (
        {KL: "F.kl_div(q.log(), log_p.exp(), ", "**2": "", "(1 - alpha) * ": ""},
        "log_p and q swapped",
    ),
    (
        {
            "F.log_softmax": "F.softmax",
            "teacher_logits / temperature": "teacher_logits",
            "alpha *": "",
        },
        EQUAL,
        OTHER_HARD,
    ),
    (
        {"batchmean": "sum", "student_logits / temperature": "student_logits", "y(s": "y(5 * s"},
        OTHER_HARD,
        OTHER_SOFT,
    ),
]

LOOP_SLIPS = [
    ({"range(cfg.n_epochs)": "range(2)"}, "(1, 3)], where [(0, 0), (0, 1), "),
    ({"optimizer.step()": "optimizer.step()\n            return"}, "return after the loops"),
    ({"        train_loader.set_epoch(epoch)\n": ""}, "[('none', 0), ('none', 1), "),
    ({"set_epoch(epoch)": "set_epoch(epoch + 1)"}, "[(1, 0), (1, 1), (2, 2), (2, 3)], where"),
    ({"        student.train()\n": ""}, "Call student.train()"),
    ({"student.train()": "student.eval()"}, "Call student.train()"),
    ({"student(images)": "student(images).softmax(1)"}, "of the plain logits"),
    ({"labels)\n": "labels, reduction='sum')\n"}, "[6.0], where [1.0] is wanted"),
    ({"Adam(": "AdamW("}, "['AdamW'], where ['Adam'] is wanted"),
    ({"Adam(": "SGD("}, "'SGD'"),
    ({"lr=cfg.lr, ": ""}, "Hand it cfg.lr"),
    ({", weight_decay=cfg.weight_decay": ""}, "Hand it cfg.weight_decay"),
    ({"            optimizer.zero_grad()\n": ""}, "zero_grad() is missing"),
    ({"            nn.utils.clip": "            # "}, "nn.utils.clip_grad_norm_"),
    ({"clip_grad_norm_": "clip_grad_value_"}, "nn.utils.clip_grad_norm_"),
    ({"cfg.grad_norm_max)": "1.0)"}, "nn.utils.clip_grad_norm_"),
    ({"            optimizer.step()": "        optimizer.step()"}, "[(0, 0), (1, 1)], where"),
    ({"            optimizer.step()": ""}, "learns from no batch: call optimizer.step()"),
    ({"            loss.backward()\n": ""}, "[0.0], where [1.0] is wanted"),
    ({"loss.backward()": "loss.backward()\n            optimizer.zero_grad()"}, "[0.0], where"),
    (
        {"            loss = ": "            optimizer.step()\n            loss = "},
        "step() comes after backward()",
    ),
    (
        {"        student.train()": "        optimizer = torch.optim.Adam(student.parameters())"},
        "before the loops: Adam remembers",
    ),
    ({"student.parameters(), lr": "student[3].parameters(), lr"}, "all of these and no others"),
    ({"    optimizer =": "    student = nn.Sequential(*student)\n    optimizer ="}, "handed in"),
    ({"labels, *_": "labels"}, "for images, labels, *_ in train_loader"),
    ({"    optimizer = ": "    return\n    optimizer = "}, "learns from no batch"),
    ({"cfg.lr": "config.lr"}, "'config' is not defined"),
    (
        {
            "        student.train()\n": "",
            "lr=cfg.lr": "lr=0.1",
            "            nn.utils.clip": "            # ",
        },
        "Call student.train()",
        "Hand it cfg.lr",
        "nn.utils.clip_grad_norm_",
    ),
    (
        {
            "set_epoch(epoch)": "set_epoch(0)",
            "Adam(": "SGD(",
            "            optimizer.zero_grad()\n": "",
        },
        "[(0, 0), (0, 1), (0, 2), (0, 3)], where",
        "torch.optim.Adam",
        "zero_grad() is missing",
    ),
]

DEPTHWISE = "groups=in_channels"
SLOPE = "nn.LeakyReLU(0.01),\n        nn.Conv2d(in_channels, out"
SHORTCUT = """
class Shortcut(nn.Sequential):
    def forward(self, x):
        made = super().forward(x)
        return x + made if x.shape == made.shape else made

"""
COMPUTES = "to mend: what it computes where all parameters are 0.5: dwpw_conv(8, 12): not so."
BLOCK_SLIPS = [
    ({", " + DEPTHWISE: ""}, "96, 576], where [8, 8, 8, 12, 12, 12, 72, 96]"),
    ({"out_channels, 1)": "out_channels, 1, groups=4)"}, "12, 24, 72], where"),
    ({"stride, padding, groups": "2, padding, groups"}, "(8, 12, 5, 1, 2): (4, 12, 12, 12)"),
    ({"stride, padding, groups": "1, padding, groups"}, "(4, 12, 24, 24), where (4, 12, 12, 12)"),
    ({"out_channels, 1)": "out_channels, 1, stride)"}, "(4, 12, 6, 6), where (4, 12, 12, 12)"),
    ({"stride, padding, groups": "stride, 1, groups"}, "the shape of its output: dwpw_conv(8, 12,"),
    ({"stride, padding, groups": "stride, groups"}, "stride and padding belong to the depthwise"),
    ({"kernel_size, stride, padding, g": "3, stride, padding, g"}, "72, 96], where [8, 8, 8, 12"),
    ({"out_channels, 1)": "out_channels, 3, 1, 1)"}, "12, 72, 864], where"),
    ({DEPTHWISE: DEPTHWISE + ", bias=False"}, "[8, 8, 12, 12, 12, 72, 96], where"),
    ({"        nn.BatchNorm2d(in_channels),\n": ""}, "norm with weight and bias follows each"),
    ({SLOPE: "nn.Conv2d(in_channels, out"}, COMPUTES),
    ({"LeakyReLU(0.01)": "ReLU()"}, COMPUTES),
    ({"0.01": "0.1"}, COMPUTES),
    ({"LeakyReLU(0.01)": "GELU()"}, COMPUTES),
    ({"(0.01),\n    )": "(0.01),\n        nn.Dropout(),\n    )"}, COMPUTES),
    (
        {"def my_dwpw": SHORTCUT + "def my_dwpw", "return nn.Sequential": "return Shortcut"},
        "dwpw_conv(8, 8, 3, 1, 1): not so. Mend the others first. nn.LeakyReLU(0.01) follows",
    ),
    (
        {"return nn.Sequential(": "return (", "in_channels, in_c": "in_channels, in_c"},
        "It should return a module",
    ),
    ({"return": "block ="}, "It should return a module"),
    ({"BatchNorm2d(in": "BatchNorm2d(out"}, "A batch norm wants the number of channels"),
    ({"in_channels, in_channels, k": "in_channels, out_channels, k"}, "groups=in_channels belongs"),
    ({"Conv2d(in_channels, out_channels, 1": "Conv2d(3, out_channels, 1"}, "in_channels with the"),
    (
        {", " + DEPTHWISE: ", bias=False", "LeakyReLU(0.01)": "ReLU()", "1),\n": "1, stride),\n"},
        "[8, 8, 12, 12, 12, 96, 576], where",
        "no ReLU",
        "stride and padding belong",
    ),
]

WEIGHT_SLIPS = [
    ({"10 * ": ""}, "[0.04, 0.96, 1.0], where [0.4, 0.96", "right: (kd, alpha, align), constant"),
    ({"progress**2": "progress"}, "[2.0, 0.8, 1.0], where [0.4, 0.96, 1.0] is wanted"),
    ({"1 - progress**2": "progress**2"}, "1 - progress ** 2"),
    ({"1 - progress**2": "cfg.alpha"}, "[0.4, 0.5, 1.0]"),
    ({"align=1.0": "align=1 - progress"}, "align 1"),
    ({"== ": "!= "}, "Without a handover kd is 1", "In a handover kd is"),
    ({"cfg.alpha": "0.5"}, "alpha is cfg.alpha", "right: (kd, alpha, align), handover"),
    ({"progress**2": "progress^2"}, "A power is written"),
    ({"h.LossWeights(1.0, cfg.alpha, 1.0)": "{'kd': 1}"}, "Return h.LossWeights"),
    ({"    return h.LossWeights(1.0": "    h.LossWeights(1.0"}, "Is a return statement missing?"),
    ({"10 *": "5 *", "1 - progress**2": "progress", "align=1.0": "align=0"}, "[0.2, 0.2, 0.0]"),
]

POOL = "F.adaptive_avg_pool2d("
ALIGNMENT_SLIPS = [
    ({"F.smooth_l1_loss": "F.mse_loss"}, "F.smooth_l1_loss", "right: a layer with weight 3"),
    ({"theirs)\n    return": "theirs, reduction='sum')\n    return"}, "its mean over the map"),
    ({"weight * ": ""}, "Multiply by the weight", "right: one layer"),
    ({"    return": "        return"}, "add in the loop, return after it"),
    ({"total = total + ": "total = "}, "two layers add up"),
    ({"return total": "return total / len(weights)"}, "two layers add up", "right: adapters"),
    ({"adapters[layer](student_maps[layer])": "student_maps[layer]"}, "adapters[layer] takes"),
    ({POOL: "(lambda x, side: x)("}, "a larger map of the teacher", "a larger map of the student"),
    ({POOL: "F.adaptive_max_pool2d("}, "Average it down", "right: adapters"),
    ({POOL: "F.interpolate("}, "Average it down"),
    ({"        theirs = " + POOL: "        # "}, "a larger map of the teacher", "right: a larger"),
    ({"student_maps[layer])": "student_maps[layer].detach())"}, "leave out .item(), .detach()"),
    ({"in weights.items()": "in dict.fromkeys(student_maps, 1).items()"}, "the keys of weights"),
    ({"student_maps, teacher_maps, w": "teacher_maps, student_maps, w"}, "order of its arguments"),
    (
        {"F.smooth_l1_loss": "F.mse_loss", "weight * ": "", POOL: "F.interpolate("},
        "F.smooth_l1_loss",
        "Multiply by the weight",
        "Average it down",
    ),
]

END = "return self.fc(self.pool(x))"
STUDENT_SLIPS = [
    ({END: END + ".softmax(1)"}, "softmax, where nothing is wanted"),
    ({END: "return F.log_softmax(self.fc(self.pool(x)), 1)"}, "log_softmax, where nothing"),
    ({END: END + ".relu()"}, "ReLU, where nothing"),
    ({END: "return torch.sigmoid(self.fc(self.pool(x))).flatten(1)"}, "sigmoid, where nothing"),
    ({"width, 11": "width, 10"}, "is the last layer's width not 11"),
    ({"self.pool(x)": "x"}, "h.GlobalAvgPool() does both"),
    ({"h.GlobalAvgPool()": "nn.AdaptiveAvgPool2d(1)"}, "flatten"),
    ({END: END + "[..., None]"}, "Is nn.Flatten() missing"),
    ({"nn.ModuleList([h.dwpw_conv(3, width)])": "[h.dwpw_conv(3, width)]"}, "not in a plain list"),
    ({"    def forward": "    @torch.no_grad()\n    def forward"}, "and torch.no_grad()"),
    ({"self.pool(x)": "self.pool(x).detach()"}, "Left out of forward, or detached", "blocks.0.0"),
    (
        {"self.fc =": "self.unused = nn.Linear(3, 3)\n        self.fc ="},
        "['unused.weight', 'unused.bias'], where",
    ),
    ({"self.pool(x)": "F.dropout(self.pool(x))"}, "nothing is random"),
    ({"self.pool(x)": "self.pool(x) - self.pool(x).mean(0)"}, "depends on the other pictures"),
    ({"width=16": "width=4000"}, "the homework allows 60,000"),
    ({"width=16": "width"}, "Compare its arguments"),
    ({"(3, width)": "(1, width)"}, "Compare the layer's in_channels"),
    ({"class my_student(": "def my_student():\n    pass\n\nclass Other("}, "return statement"),
]

VIEW_SLIPS = [
    (
        {'    "vflip": 0.5,\n': ""},
        "vflip for RandomVerticalFlip(0.5): missing, where",
    ),
    ({"180": "(-180, 180)"}, "rotation for RandomRotation(180): (-180, 180)"),
    ({"30.0": "nn.Identity()"}, "Identity(), where 30.0 is wanted"),
    ({"(0.7, 1.0)": "0.7"}, "crop_scale", "two numbers (low, high)"),
    (
        {"30.0": "30.0, 'shear': 3", '"vflip": 0.5': '"vflip": 0'},
        "['shear'], where [] is wanted. These make no view",
        "vflip",
    ),
    ({"my_views = {": "my_views = [", ": ": ", ", "}": "]"}, "A dict of settings is wanted"),
]

SLIPS = {
    "soft_labels": SOFT_LABEL_SLIPS,
    "loss_fn_kd": LOSS_SLIPS,
    "training_loop": LOOP_SLIPS,
    "dwpw_conv": BLOCK_SLIPS,
    "loss_weights": WEIGHT_SLIPS,
    "alignment": ALIGNMENT_SLIPS,
    "student": STUDENT_SLIPS,
    "views": VIEW_SLIPS,
}

# --- the checks -----------------------------------------------------------------------------------


def answer_of(name, cell):
    """What a learner's cell defines for an exercise."""
    variables = {"h": h, "torch": torch, "F": F, "nn": nn}
    exec(compile(cell, "<cell>", "exec"), variables)
    return variables[f"my_{name}"]


def asked(name, cell, capsys):
    """(verdict, what was printed) of the check of a cell."""
    verdict = exercises.check(getattr(exercises, f"ask_{name}"), answer_of(name, cell))
    return verdict, capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "cell"), [(name, cell) for name, cells in RIGHT.items() for cell in cells]
)
def test_a_right_answer_is_right_in_any_style(name, cell, capsys):
    verdict, text = asked(name, cell, capsys)
    assert verdict, text
    assert "Right.\n" in text
    assert "to mend" not in text


@pytest.mark.parametrize(
    ("name", "slip"), [(name, slip) for name, slips in SLIPS.items() for slip in slips]
)
def test_a_slip_is_told(name, slip, capsys):
    edits, *words = slip
    cell = RIGHT[name][0]
    for old, new in edits.items():
        assert old in cell
        cell = cell.replace(old, new)
    verdict, text = asked(name, cell, capsys)
    assert not verdict
    assert text.startswith("Not yet.\n")
    for word in words:
        assert word in text, text


def test_a_student_is_told_its_price_and_left_as_it_is(capsys):
    net = answer_of("student", STUDENT)()
    before = h.state_checksum(net)
    exercises.check(exercises.ask_student, net)
    assert h.state_checksum(net) == before
    assert "times the multiply-adds of Strong's net" in capsys.readouterr().out


# --- Answers --------------------------------------------------------------------------------------


@pytest.fixture
def mine(tmp_path):
    return exercises.Answers(tmp_path)


def test_each_exercise_has_two_hints_and_a_reference_that_is_right():
    assert exercises.EXERCISES.keys() == RIGHT.keys() - {"views"}
    for exercise in exercises.EXERCISES.values():
        assert len(exercise.hint) > 20
        assert len(exercise.second) > 40
        assert exercises.check(exercise.ask, exercise.reference or h.plain_student)


def test_a_wrong_answer_is_not_used_and_the_next_right_one_is(mine, capsys):
    right = answer_of("soft_labels", SOFT_LABELS)
    assert mine.take("soft_labels", lambda logits, temperature: logits) is h.soft_labels
    assert "soft_labels: the reference stands in below." in capsys.readouterr().out
    assert mine.take("soft_labels", right) is right
    assert mine.own == {"soft_labels": right}
    mine.take("soft_labels", None)
    assert mine.own == {}
    mine.take("soft_labels", right)
    mine.use_reference("soft_labels")
    assert mine.own == {}


CALLS = """
def my_soft_labels(logits, temperature):
    return logits.softmax(-1)

""" + LOSS.replace(
    "F.softmax(teacher_logits / temperature, dim=1)", "my_soft_labels(teacher_logits, temperature)"
)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return", "If it calls my_soft_labels, that has to be right first"),
        ("raise NotImplementedError #", "in my_soft_labels, line 3 of its cell"),
    ],
)
def test_a_loss_that_calls_wrong_soft_labels_is_told_so(body, words, capsys):
    assert words in asked("loss_fn_kd", CALLS.replace("return", body, 1), capsys)[1]


def test_a_stage_gets_the_answers_that_it_has_a_use_for(mine, capsys):
    mine.own = {name: exercise.reference for name, exercise in exercises.EXERCISES.items()}
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
    mine.own["student"] = answer_of("student", STUDENT)
    assert "student" in mine.own_for(h.STRONG)
    assert "student" not in mine.own_for(h.BOSS)
    assert "Your student has no layer1, layer2, layer3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("accuracy", "words", "kept"),
    [
        (None, "medium, 700 epochs: None is no guess yet: write a number from 0 to 1", {}),
        (80, "80 is no guess yet: write a number from 0 to 1, for 80 % 0.8", {}),
        (0.5, "medium, 700 epochs: 0.5 is your guess", {"medium": 0.5}),
    ],
)
def test_guesses(mine, accuracy, words, kept, capsys):
    mine.guess(h.MEDIUM, accuracy)
    assert words in capsys.readouterr().out
    assert mine.guesses == kept


def test_wrong_views_leave_the_config_as_it_is(mine):
    strong = h.get_config("strong", rotation=0.0)
    assert mine.with_views(strong, {}) is strong
    assert mine.with_views(strong, answer_of("views", VIEWS)).rotation == 180


def test_a_setting_for_run_stage_is_told_where_it_belongs(mine):
    with pytest.raises(h.UserError, match="loss_schedule=..., exp_name='a name of its own'"):
        mine.run_stage(h.STRONG, None, loss_schedule="handover")


def test_stages_train_with_the_answers_and_the_summary_says_so(
    mine, food, teacher_file, tiny, capsys
):
    data = h.find_data(food)
    teacher = h.load_teacher(teacher_file)
    mine.take("loss_fn_kd", answer_of("loss_fn_kd", LOSS_BY_CROSS_ENTROPY))
    mine.take("student", answer_of("student", STUDENT))
    cfg = h.get_config("strong", depths=(1, 1, 1), **tiny)
    mine.guess(cfg, 0.1)
    run = mine.run_stage(cfg, data, teacher)
    said = capsys.readouterr().out
    assert "strong trains; your own code in it: student, loss_fn_kd\n" in said
    assert "knows nothing of widths and depths" in said
    assert run.n_params == 319
    assert run.folder == mine.out / "strong"
    reference = mine.run_stage(h.replace(cfg, exp_name="deep"), data, teacher, student=None)
    assert reference.n_params != run.n_params
    capsys.readouterr()
    mine.summary()
    said = capsys.readouterr().out
    assert "loss_fn_kd     right" in said
    assert "soft_labels    not right yet" in said
    assert "strong         guess 0.1, reached 0." in said
    assert "; your own code: student, loss_fn_kd\n" in said
