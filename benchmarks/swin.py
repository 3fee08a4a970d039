"""The dense trunk against `SwinModel` of Transformers: Swin-B at 192 pixels, window 6, equal weights, equal outputs.

    python benchmarks/swin.py [--batch 4] [--repeats 7]

Forward and backward passes in float32 and bf16 autocast; the share of this process's matrix product rate that a
training step reaches; and the peak memory of a step, each model in a process of its own.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import paired
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from msgfm_hf import SENSORS, MsGFMConfig, MsGFMModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "modeling_tests"))
from swin_weights import swin_with_our_weights

SIZE = 192
# What the GEMM rate is measured with: the first product of an MLP of stage 3 at batch 8.
ROWS, INPUTS, OUTPUTS = 1152, 512, 2048


def build():
    """Our dense trunk and theirs with the same weights, the tables of position biases far from zero."""
    torch.manual_seed(0)
    ours = MsGFMModel(MsGFMConfig(sensors={"rgb": SENSORS["rgb"].to_dict()}, moe_blocks=[[], [], [], []])).eval()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name.endswith("bias_table"):
                parameter.normal_(std=0.5)
    return ours, swin_with_our_weights(ours, SIZE).eval()


def forward(model, images):
    def run():
        with torch.no_grad():
            return model(images).last_hidden_state

    return run


def step(model, images, bf16=False):
    def run():
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            features = model(images).last_hidden_state
        features.float().square().mean().backward()

    return run


def count_flops(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def speed(images: torch.Tensor, repeats: int):
    ours, theirs = build()
    difference = (forward(ours, images)() - forward(theirs, images)()).abs().max().item()
    assert difference < 1e-4, difference
    paired.heading(f"Dense trunk against SwinModel (sdpa), batch {len(images)}; outputs differ by {difference:.0e}")
    for label, prepare, must, goal in (
        ("forward fp32 / SwinModel", lambda model: forward(model, images), 0.95, 0.88),
        ("forward+backward fp32 / SwinModel", lambda model: step(model, images), 1.00, 0.92),
        ("forward+backward bf16 autocast / SwinModel", lambda model: step(model, images, bf16=True), 0.85, 0.75),
    ):
        seconds = paired.measure({"ours": prepare(ours), "theirs": prepare(theirs)}, repeats)
        paired.row(label, paired.ratio(seconds, "ours", "theirs"), must, goal)

    rows, weight = torch.randn(ROWS, INPUTS), torch.randn(OUTPUTS, INPUTS)

    def products():
        for _ in range(20):
            F.linear(rows, weight)

    seconds = paired.measure({"step": step(ours, images), "products": products}, repeats)
    work = count_flops(step(ours, images)) / (20 * 2 * ROWS * INPUTS * OUTPUTS)
    share = paired.Ratio(*(work * value for value in paired.ratio(seconds, "products", "step")))
    label = "forward+backward fp32, share of the GEMM rate"
    paired.row(label, share, 0.65, 0.75, higher_is_better=True)


def print_peak(which: str, batch: int):
    """MiB that a step takes above what the process held before it."""

    def held(name: str) -> int:
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

    ours, theirs = build()
    theirs.set_attn_implementation("eager")
    model = ours if which == "ours" else theirs
    del ours, theirs
    step(model, torch.randn(1, 3, SIZE, SIZE))()
    model.zero_grad(set_to_none=True)
    images = torch.randn(batch, 3, SIZE, SIZE)
    Path("/proc/self/clear_refs").write_text("5")
    before = held("VmRSS")
    step(model, images)()
    print((held("VmHWM") - before) / 1024)


def memory(batch: int):
    # Without the settings of the timings: memory that is kept would hide how much a step needs.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    found = {}
    for which in ("ours", "theirs"):
        command = [sys.executable, __file__, "--batch", str(batch), "--peak", which]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        found[which] = float(done.stdout.split()[-1])
    paired.heading(f"Peak memory of a step in fp32 above the weights, batch {batch}")
    label = f"ours, {found['ours']:.0f} MiB / SwinModel (eager), {found['theirs']:.0f} MiB"
    paired.row(label, paired.Ratio(*[found["ours"] / found["theirs"]] * 3), 1.00, 0.80)


def main():
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4, help="images in the timed batches (default 4)")
    parser.add_argument("--repeats", type=int, default=7, help="times each pair is run (default 7)")
    parser.add_argument("--peak", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak:
        return print_peak(arguments.peak, arguments.batch)
    paired.restart_with_settings()
    speed(torch.randn(arguments.batch, 3, SIZE, SIZE), arguments.repeats)
    memory(arguments.batch)


if __name__ == "__main__":
    main()
