"""Where the time of a Boss epoch goes, and how far it is from the hardware's limit.

    HW13_PHOTOS=DIR python tests/bench/speed.py [--size 224] [--batch 128] [--steps 4] [--repeats 3]
        [--out FOLDER]

Runs the same Boss training steps with the course's blocks in two ways: "ours", through
BatchLoader, and "device", on tensors that lie on the device and are augmented already. Then it
measures the parts of a step alone, and what its arithmetic would cost at the rate of a large matrix
product. Prints a table and stores it as speed-cpu.csv or speed-cuda.csv. Peers are compared
in peers.py.
"""

import itertools

import common
import torch
from common import seconds

import helpers as h


def on_device(loader, n, dtype):
    """`n` batches as the networks want them, made before the clock starts."""
    batches = []
    for batch in itertools.islice(loader, n):
        images = h.to_device(batch.images, batch.images.device, dtype or torch.float32)
        batches.append(batch._replace(images=images))
    return batches


def measure_epochs(args, device, state, loader):
    """{figure: seconds per image, or a ratio} of steps through the loader and on ready batches."""

    def per_image(batches):
        def epoch():
            h.train_one_epoch(state, state.loss_fn, batches, 300)

        return seconds(epoch, device, args.repeats) / (args.steps * args.batch)

    alone = per_image(on_device(loader, args.steps, state.loss_fn.dtype))
    ours = per_image(common.Steps(loader, args.steps))
    return {
        "seconds an image: device": alone,
        "seconds an image: ours": ours,
        "ratio: share of arithmetic": ours / alone,
    }


def measure_parts(args, device, state, loader):
    """{part: seconds per image} of one training step's pieces, each measured alone."""
    loss_fn = state.loss_fn
    loss_fn.train().set_progress(0.5)
    batch = on_device(loader, 1, loss_fn.dtype)[0]
    draw = loader.draw_epoch()

    def views():
        images = loader.views_of(batch.rows, draw)
        h.to_device(images, device, loss_fn.dtype or torch.float32)

    def forward_of(net):
        with torch.autocast(device.type, loss_fn.dtype, enabled=loss_fn.dtype is not None):
            net(batch.images)

    def teacher_forward():
        with torch.no_grad():
            forward_of(loss_fn.teacher)

    def whole_forward():
        return loss_fn(batch.images, batch.labels).loss

    def per_image(function):
        return seconds(function, device, args.repeats) / args.batch

    parts = {"warp": per_image(views)}
    parts["teacher"] = per_image(teacher_forward)
    parts["student forward"] = per_image(lambda: forward_of(loss_fn.student))
    whole = per_image(whole_forward)
    nets = parts["teacher"] + parts["student forward"]
    parts["alignment and losses"] = max(whole - nets, 0)
    parts["backward"] = per_image(lambda: whole_forward().backward()) - whole
    return parts


def measure_floor(args, device, state):
    """Seconds per image of the arithmetic alone, at the rate of a large matrix product.

    Two operations per multiply-add, the teacher once, the student three times (forward, and two
    products backward).
    """
    loss_fn = state.loss_fn
    student_macs = h.count_macs(loss_fn.student, args.size)
    macs = h.count_macs(loss_fn.teacher, args.size) + 3 * student_macs
    side = 8192 if device.type == "cuda" else 2048
    matrix = torch.randn(side, side, device=device).to(loss_fn.dtype or torch.float32)
    return macs / side**3 * seconds(lambda: matrix @ matrix, device)


def measure(args, device):
    """{figure: value} of all that is measured."""
    data = common.find_data(args)
    state, loader = common.prepare(args, data, device, h.plain_student())
    with h.images_on_gpu(loader):
        figures = measure_epochs(args, device, state, loader)
        parts = measure_parts(args, device, state, loader)
    for name, value in parts.items():
        figures[f"part, seconds an image: {name}"] = value
    figures["floor, seconds an image: arithmetic"] = measure_floor(args, device, state)
    return figures


def main(argv=None):
    args = common.arguments(__doc__, argv, size=224, batch=128, steps=4, repeats=3)
    device = h.pick_device()
    rows = [{"figure": name, "value": value} for name, value in measure(args, device).items()]
    machine = f"{common.machine_name()}, {args.size} px, batch {args.batch}, {common.today()}"
    common.store(rows, args.out / f"speed-{device.type}.csv", machine=machine)


if __name__ == "__main__":
    main()
