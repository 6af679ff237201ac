"""What tests and benches share: the plain student, --set arguments, the comparison of two runs."""

import json

import torch

import helpers as h

# The plain student of the course's blocks, whose layers are as wide as the teacher's.
DWPW = {
    key: getattr(h.Config(student="dwpw"), key)
    for key in ("student", "stem_width", "widths", "depths", "strides")
}


def settings(**values):
    """The --set arguments of a command line."""
    arguments = []
    for key, value in values.items():
        arguments += ["--set", f"{key}={value}"]
    return arguments


def without_seconds(folder):
    """What last.ckpt of a run's folder holds, but for the times."""
    saved = torch.load(folder / "last.ckpt", weights_only=True)
    saved["history"] = [{**row, "seconds": 0} for row in saved["history"]]
    return saved


def begun_by_two(path, epochs=None):
    """Make a last.ckpt say that two processes began its run; its facts.

    epochs: so many of its history are left; None: all.
    """
    saved = torch.load(path, weights_only=True)
    facts = json.loads(saved["facts"]) | {"processes": 2}
    changed = {"facts": json.dumps(facts), "history": saved["history"][:epochs]}
    torch.save(saved | changed, path)
    return facts


def same(a, b):
    """Whether two nested checkpoints are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)
