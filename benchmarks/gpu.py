"""Speed on a CUDA device: Swin-B at 192 pixels in bf16, as a share of the GEMM rate of the same run.

    python benchmarks/gpu.py [--batch 256] [--repeats 7]

Training and inference of our dense trunk, eager and compiled, against `SwinModel` eager and compiled, all in turns; a
step of the model with experts against a dense one; whether a step of pretraining, from two sources to the optimiser,
waits for the host; and the activations that a training step keeps per image. Weights are equal, and outputs are
compared in float32 first. Without a CUDA device the program says so and ends; `--device cpu --batch 1 --repeats 1` only
shows that it runs.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import paired
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from msgfm_hf import SENSORS, MsGFMConfig, MsGFMForPreTraining, MsGFMModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "modeling_tests"))
from swin_weights import swin_with_our_weights

SIZE, STEPS = 192, 20


class Bench:
    """Runs on one device, timed by the wall after the device is done."""

    def __init__(self, device: str, repeats: int):
        self.device, self.repeats = torch.device(device), repeats
        self.steps = STEPS if self.device.type == "cuda" else 1

    def wait(self):
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, functions) -> dict[str, list[float]]:
        """Seconds per call, by function and repeat; each repeat runs all of them."""
        found = {name: [] for name in functions}
        for function in functions.values():
            for _ in range(3 if self.device.type == "cuda" else 1):
                function()
        for _ in range(self.repeats):
            for name, function in functions.items():
                self.wait()
                start = time.perf_counter()
                for _ in range(self.steps):
                    function()
                self.wait()
                found[name].append((time.perf_counter() - start) / self.steps)
        return found

    def training_step(self, model, images):
        """Forward and backward in bf16 autocast, the auxiliary loss included."""

        def run():
            model.zero_grad(set_to_none=True)
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                output = model(images)
                loss = output.last_hidden_state.float().square().mean()
                if getattr(output, "aux_loss", None) is not None:
                    loss = loss + 0.01 * output.aux_loss
            loss.backward()

        return run

    def inference(self, model, images):
        """Forward in bf16 autocast."""

        def run():
            with torch.no_grad(), torch.autocast(self.device.type, dtype=torch.bfloat16):
                model(images)

        return run

    def gemm_rate(self) -> float:
        """FLOP per second of a bf16 product of two 8192 x 8192 matrices."""
        side = 8192 if self.device.type == "cuda" else 512
        a, b = (torch.randn(side, side, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        return 2 * side**3 / statistics.median(self.seconds({"product": lambda: a @ b})["product"])


def build(device, **fields):
    torch.manual_seed(0)
    model = MsGFMModel(MsGFMConfig(sensors={"rgb": SENSORS["rgb"].to_dict()}, **fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias_table"):
                parameter.normal_(std=0.5)
    return model.to(device)


def count_flops(model, images) -> tuple[int, int]:
    """Of the forward pass and of a step; the step is three forward passes."""
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    model.set_attn_implementation("sdpa")
    return counter.get_total_flops(), 3 * counter.get_total_flops()


def compare(bench: Bench, images, rate: float):
    dense = build(bench.device, moe_blocks=[[], [], [], []]).eval()
    swin = swin_with_our_weights(dense, SIZE).to(bench.device).eval()
    with torch.no_grad():
        difference = (dense(images[:1]).last_hidden_state - swin(images[:1]).last_hidden_state).abs().max().item()
    assert difference < 1e-4, difference
    flops = dict(zip(("inference", "training"), count_flops(dense, images[:1]), strict=True))
    models = {"ours": dense, "SwinModel": swin}
    if bench.device.type == "cuda":
        models |= {f"{name}, compiled": torch.compile(model) for name, model in list(models.items())}
    for kind, prepare in (("training", bench.training_step), ("inference", bench.inference)):
        seconds = bench.seconds({name: prepare(model, images) for name, model in models.items()})
        print(f"\n## {kind}, batch {len(images)}; outputs in fp32 differ by {difference:.0e}\n")
        print("| model | images/s | share of the GEMM rate | ours / this |\n|---|---|---|---|")
        best = min((name for name in models if name.startswith("ours")), key=lambda n: statistics.median(seconds[n]))
        for name, found in seconds.items():
            speed = len(images) / statistics.median(found)
            print(f"| {name} | {speed:.0f} | {speed * flops[kind] / rate:.3f} | {paired.ratio(seconds, best, name)} |")
        share = len(images) / statistics.median(seconds[best]) * flops[kind] / rate
        print(f"\n{best}: {share:.3f} of the GEMM rate (must 0.25, goal 0.40)")


def experts(bench: Bench, images):
    models = {"experts": build(bench.device).train(), "dense": build(bench.device, moe_blocks=[[]] * 4).train()}
    seconds = bench.seconds({name: bench.training_step(model, images) for name, model in models.items()})
    found = paired.ratio(seconds, "experts", "dense")
    print(f"\n## Experts\n\nstep with experts / dense step: {found} (must 1.15, goal 1.06)")
    if bench.device.type != "cuda":
        return
    for name, model in models.items():
        kept = []
        for rows in (len(images) // 2, len(images)):
            model.zero_grad(set_to_none=True)
            bench.wait()
            before = torch.cuda.memory_allocated()
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = model(images[:rows]).last_hidden_state.float().square().mean()
            kept.append(torch.cuda.memory_allocated() - before)
            del loss
        per_image = (kept[1] - kept[0]) / (len(images) - len(images) // 2) / 2**20
        print(f"activations kept per image, {name}: {per_image:.0f} MiB")


def synchronisations(bench: Bench):
    """A whole step of pretraining, from pixels and masks on the device to the optimiser, under the debugger's eyes."""
    torch.manual_seed(0)
    model = MsGFMForPreTraining(MsGFMConfig()).to(bench.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=bench.device.type == "cuda")
    bands = [{"rgb": SENSORS["rgb"].band_names}, {"s2": ["B04", "B03", "B02", "B08"], "s1": ["VV", "VH"]}]
    place = {"device": bench.device}
    pixels = [{name: torch.randn(2, len(names), SIZE, SIZE, **place) for name, names in s.items()} for s in bands]
    masks = [{name: torch.rand(2, (SIZE // 4) ** 2, **place) < 0.6 for name in s} for s in bands]

    def step():
        with torch.autocast(bench.device.type, dtype=torch.bfloat16):
            loss = model(pixels, masks, bands, targets=[{}, {"s2": "s1", "s1": "s2"}]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    waits = "0"
    if bench.device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        waits = f"at least 1: {error}"
    finally:
        if bench.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    print(f"host synchronisations in a step of pretraining: {waits} (must 0)")


def main():
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256, help="images per step (default 256)")
    parser.add_argument("--repeats", type=int, default=7, help="times all are run in turn (default 7)")
    parser.add_argument("--device", default="cuda", help="default cuda")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        return print("No CUDA device: nothing measured.")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    bench = Bench(arguments.device, arguments.repeats)
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else "CPU (shows that it runs, no result)"
    rate = bench.gemm_rate()
    print(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}, transformers {transformers.__version__}")
    print(f"python {' '.join(sys.argv)}: bf16 GEMM rate of this run {rate / 1e12:.2f} TFLOP/s")
    images = torch.randn(arguments.batch, 3, SIZE, SIZE, device=bench.device)
    compare(bench, images, rate)
    experts(bench, images)
    synchronisations(bench)


if __name__ == "__main__":
    main()
