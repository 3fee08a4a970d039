"""What experts cost: a block with experts against a dense one, and a step of the whole model.

    python benchmarks/experts.py [--repeats 7]

The block is one of stage 3 (512 channels, 8 experts, one per token, capacity 1.25) on 12 x 12 tokens per image,
attention, the router's noise and the auxiliary loss included. Outputs are first compared with those of Transformers'
own implementation of experts.
"""

import argparse

import paired
import torch

from msgfm_hf import SENSORS, MsGFMConfig, MsGFMModel
from msgfm_hf.model.modeling_msgfm import MsGFMLayer, cut_windows

GRID = (12, 12)


def build_block(sparse: bool, implementation: str = "eager") -> MsGFMLayer:
    """One plain block of stage 3, as a fresh model has it, in training."""
    torch.manual_seed(0)
    config = MsGFMConfig(moe_blocks=[[], [], [0] if sparse else [], []])
    config._attn_implementation, config._experts_implementation = "sdpa", implementation
    block = MsGFMLayer(config, stage=2, block=0, drop_path=0.0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in block.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.02, generator=generator)
    return block.train()


def block_step(block, tokens, bf16=False):
    windows = cut_windows(GRID, block.attention.config.window_size, 0, tokens.device)

    def run():
        block.zero_grad(set_to_none=True)
        inputs = tokens.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            output, _, _, aux_loss, _ = block(inputs, windows)
        loss = output.float().square().mean()
        (loss if aux_loss is None else loss + 0.01 * aux_loss).backward()
        return output.detach()

    return run


def model_step(model, images):
    def run():
        model.zero_grad(set_to_none=True)
        output = model(images)
        loss = output.last_hidden_state.square().mean()
        (loss if output.aux_loss is None else loss + 0.01 * output.aux_loss).backward()

    return run


def blocks(repeats: int):
    dense, sparse = build_block(False), build_block(True)
    theirs = build_block(True, "grouped_mm")
    theirs.load_state_dict(sparse.state_dict())
    # batch 32 and 8: tokens, bf16, must, goal
    for images, bf16, must, goal in (
        (32, False, 1.08, 1.03),
        (8, False, 1.20, 1.10),
        (32, True, 1.30, 1.12),
        (8, True, 1.65, 1.40),
    ):
        tokens = torch.randn(images, GRID[0] * GRID[1], 512)
        runs = {"dense": block_step(dense, tokens, bf16), "ours": block_step(sparse, tokens, bf16)}
        runs["transformers"] = block_step(theirs, tokens, bf16)
        # The same noise for both.
        with torch.random.fork_rng():
            ours = runs["ours"]()
        others = runs["transformers"]()
        assert torch.allclose(ours, others, atol=2e-2 if bf16 else 1e-5), (ours - others).abs().max()
        seconds = paired.measure(runs, repeats)
        dtype = "bf16" if bf16 else "fp32"
        label = f"block with experts / dense block, forward+backward {dtype}, {images * GRID[0] * GRID[1]} tokens"
        paired.row(label, paired.ratio(seconds, "ours", "dense"), must, goal)
        print(f"| the same with Transformers' grouped_mm | {paired.ratio(seconds, 'transformers', 'dense')} | | | |")


def whole_model(repeats: int):
    sensors = {"rgb": SENSORS["rgb"].to_dict()}
    models = {}
    for name, fields in (("dense", {"moe_blocks": [[], [], [], []]}), ("experts", {})):
        torch.manual_seed(0)
        models[name] = MsGFMModel(MsGFMConfig(sensors=sensors, **fields)).train()
    images = torch.randn(8, 3, 192, 192)
    seconds = paired.measure({name: model_step(model, images) for name, model in models.items()}, repeats)
    paired.row(
        "whole model with experts / dense, step in fp32, batch 8", paired.ratio(seconds, "experts", "dense"), 1.10, 1.05
    )


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="times each pair is run (default 7)")
    arguments = parser.parse_args()
    paired.restart_with_settings()
    torch.set_num_threads(1)
    paired.heading("Blocks with experts against dense ones")
    blocks(arguments.repeats)
    whole_model(arguments.repeats)


if __name__ == "__main__":
    main()
