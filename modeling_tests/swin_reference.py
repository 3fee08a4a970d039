"""Swin, SwinV2 and Swin-MoE as their authors describe and save them, in plain functions over a dictionary of tensors:
the reference of converted checkpoints. Windows are rolled, cut and masked with -100, as published."""

import math

import torch
from torch.nn import functional as F


def make_source(
    kind="v1",
    embed_dim=16,
    depths=(2, 2),
    num_heads=(2, 4),
    window=4,
    image_size=64,
    channels=3,
    pretrained=0,
    classes=0,
    masked=False,
    moe_blocks=None,
    experts=4,
    cosine_router=False,
    fc2_bias=True,
    seed=0,
):
    """A state dict as `kind` ("v1", "v2", "moe") saves it, buffers included, with random weights far from zero."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, deviation=0.15, mean=0.0):
        return torch.randn(shape, generator=generator) * deviation + mean

    def norm(name, width, post=False):
        tensors[f"{name}.weight"] = random(width, mean=0.3 if post else 1.0)
        tensors[f"{name}.bias"] = random(width)

    tensors = {}
    if masked:
        tensors["mask_token"] = random(1, 1, embed_dim)
    tensors["patch_embed.proj.weight"] = random(embed_dim, channels, 4, 4)
    tensors["patch_embed.proj.bias"] = random(embed_dim)
    norm("patch_embed.norm", embed_dim)
    for stage, depth in enumerate(depths):
        width, heads = embed_dim * 2**stage, num_heads[stage]
        grid = image_size // 4 // 2**stage
        side = min(window, grid)
        for block in range(depth):
            path = f"layers.{stage}.blocks.{block}."
            if block % 2 and grid > window:
                tensors[path + "attn_mask"] = shift_mask(grid, side, side // 2)
            norm(path + "norm1", width, kind == "v2")
            if kind == "v1":
                tensors[path + "attn.relative_position_bias_table"] = random((2 * side - 1) ** 2, heads, deviation=0.5)
            else:
                tensors[path + "attn.relative_coords_table"] = coordinates(side, pretrained or side)
                tensors[path + "attn.cpb_mlp.0.weight"] = random(512, 2, deviation=0.5)
                tensors[path + "attn.cpb_mlp.0.bias"] = random(512)
                tensors[path + "attn.cpb_mlp.2.weight"] = random(heads, 512, deviation=0.05)
            tensors[path + "attn.relative_position_index"] = position_index(side)
            tensors[path + "attn.qkv.weight"] = random(3 * width, width)
            if kind == "v2":
                tensors[path + "attn.logit_scale"] = random(heads, 1, 1, mean=math.log(10))
                tensors[path + "attn.q_bias"], tensors[path + "attn.v_bias"] = random(width), random(width)
            else:
                tensors[path + "attn.qkv.bias"] = random(3 * width)
            tensors[path + "attn.proj.weight"] = random(width, width)
            tensors[path + "attn.proj.bias"] = random(width, deviation=0.4)
            norm(path + "norm2", width, kind == "v2")
            if kind == "moe" and moe_blocks and block in moe_blocks[stage]:
                layer = path + "mlp._moe_layer."
                tensors[layer + "_num_global_experts"] = torch.tensor(experts)
                if cosine_router:
                    tensors[layer + "gates.0.temperature"] = torch.tensor([math.log(2)])
                    tensors[layer + "gates.0.cosine_projector.weight"] = random(256, width)
                    tensors[layer + "gates.0.cosine_projector.bias"] = random(256)
                    tensors[layer + "gates.0.sim_matrix"] = random(256, experts)
                else:
                    tensors[layer + "gates.0.wg.weight"] = random(experts, width, deviation=0.5)
                tensors[layer + "experts.batched_fc1_w"] = random(experts, 4 * width, width)
                tensors[layer + "experts.batched_fc2_w"] = random(experts, 4 * width, width)
                tensors[layer + "experts.batched_fc1_bias"] = random(experts, 4 * width)
                bias = random(experts, width)
                tensors[layer + "experts.batched_fc2_bias"] = bias if fc2_bias else torch.zeros_like(bias)
            else:
                tensors[path + "mlp.fc1.weight"] = random(4 * width, width)
                tensors[path + "mlp.fc1.bias"] = random(4 * width)
                tensors[path + "mlp.fc2.weight"] = random(width, 4 * width)
                if fc2_bias:
                    tensors[path + "mlp.fc2.bias"] = random(width, deviation=0.4)
        if stage < len(depths) - 1:
            path = f"layers.{stage}.downsample."
            tensors[path + "reduction.weight"] = random(2 * width, 4 * width)
            norm(path + "norm", (2 if kind == "v2" else 4) * width)
    norm("norm", embed_dim * 2 ** (len(depths) - 1))
    if classes:
        tensors["head.weight"] = random(classes, embed_dim * 2 ** (len(depths) - 1))
        tensors["head.bias"] = random(classes)
    return tensors


def coordinates(window, pretrained):
    offsets = torch.arange(1 - window, window, dtype=torch.float32) / (pretrained - 1) * 8
    offsets = torch.sign(offsets) * torch.log2(offsets.abs() + 1) / 3
    return torch.stack(torch.meshgrid(offsets, offsets, indexing="ij"), -1).unsqueeze(0)


def position_index(window):
    places = [(y, x) for y in range(window) for x in range(window)]
    rows = [[(a - c + window - 1) * (2 * window - 1) + b - d + window - 1 for c, d in places] for a, b in places]
    return torch.tensor(rows)


def cut(image, window):
    """(H, W, ...) -> (windows, window^2, ...)."""
    height, width = image.shape[:2]
    image = image.reshape(height // window, window, width // window, window, -1).transpose(1, 2)
    return image.reshape(-1, window * window, image.shape[-1])


def join(windows, height, width, window):
    windows = windows.reshape(height // window, width // window, window, window, -1).transpose(1, 2)
    return windows.reshape(height, width, -1)


def shift_mask(grid, window, shift):
    regions = torch.zeros(grid, grid)
    number = 0
    for rows in (slice(0, -window), slice(-window, -shift), slice(-shift, None)):
        for columns in (slice(0, -window), slice(-window, -shift), slice(-shift, None)):
            regions[rows, columns] = number
            number += 1
    regions = cut(regions, window).squeeze(-1)
    return torch.where(regions.unsqueeze(1) == regions.unsqueeze(2), 0.0, -100.0)


def _norm(tensors, name, x):
    return F.layer_norm(x, x.shape[-1:], tensors[name + ".weight"], tensors[name + ".bias"], 1e-5)


def attention(tensors, path, x, heads, mask):
    """(windows, tokens, D)."""
    count, tokens, width = x.shape
    bias = tensors.get(path + "qkv.bias")
    if path + "q_bias" in tensors:
        bias = torch.cat([tensors[path + "q_bias"], torch.zeros(width), tensors[path + "v_bias"]])
    q, k, v = F.linear(x, tensors[path + "qkv.weight"], bias).view(count, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    if path + "logit_scale" in tensors:
        scale = tensors[path + "logit_scale"].clamp(max=math.log(100)).exp()
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2) * scale
    else:
        scores = q * (width // heads) ** -0.5 @ k.transpose(-1, -2)
    if path + "relative_position_bias_table" in tensors:
        table = tensors[path + "relative_position_bias_table"]
    else:
        network = path + "cpb_mlp."
        offsets = tensors[path + "relative_coords_table"].view(-1, 2)
        hidden = F.relu(F.linear(offsets, tensors[network + "0.weight"], tensors[network + "0.bias"]))
        table = F.linear(hidden, tensors[network + "2.weight"])
        if path + "logit_scale" in tensors:
            table = 16 * torch.sigmoid(table)
    scores = scores + table[tensors[path + "relative_position_index"].flatten()].view(tokens, tokens, heads).permute(
        2, 0, 1
    )
    if mask is not None:
        scores = scores + mask.unsqueeze(1)
    x = (scores.softmax(-1) @ v).transpose(1, 2).reshape(count, tokens, width)
    return F.linear(x, tensors[path + "proj.weight"], tensors[path + "proj.bias"])


def route(tensors, layer, tokens):
    """Logits of Tutel's linear or cosine gate."""
    if layer + "gates.0.wg.weight" in tensors:
        return tokens @ tensors[layer + "gates.0.wg.weight"].T
    projected = F.linear(
        tokens, tensors[layer + "gates.0.cosine_projector.weight"], tensors[layer + "gates.0.cosine_projector.bias"]
    )
    scale = tensors[layer + "gates.0.temperature"].clamp(max=math.log(100)).exp()
    return F.normalize(projected, dim=1) @ F.normalize(tensors[layer + "gates.0.sim_matrix"], dim=0) * scale


def moe(tensors, layer, tokens, capacity_factor):
    """Tutel's top-1 layer over all tokens of a batch, one after another: (output, chosen expert; -1 = dropped)."""
    scores = route(tensors, layer, tokens).softmax(-1)
    gates, chosen = scores.max(-1)
    count = scores.shape[1]
    room = len(tokens) if capacity_factor is None else int(capacity_factor * math.ceil(len(tokens) / count))
    taken, output, kept = [0] * count, torch.zeros_like(tokens), chosen.clone()
    for token in torch.argsort(gates, descending=True, stable=True).tolist():
        expert = int(chosen[token])
        taken[expert] += 1
        if taken[expert] > room:
            kept[token] = -1
            continue
        experts = layer + "experts.batched_"
        hidden = F.gelu(tensors[experts + "fc1_w"][expert] @ tokens[token] + tensors[experts + "fc1_bias"][expert])
        result = hidden @ tensors[experts + "fc2_w"][expert] + tensors[experts + "fc2_bias"][expert]
        output[token] = gates[token] * result
    return output, kept


def forward(tensors, images, num_heads, window, mask=None, capacity_factor=None, mlp_gates=None):
    """Images (B, C, H, H) -> {"tokens": (B, L, D) after the final norm, "experts": per sparse block the choices}.

    `mask`: (B, h, h) of 0 and 1, 1 = replaced by the mask token. `mlp_gates`: {path of a block: (E, D) router weights}
    multiplies the output of that dense MLP by its top-1 gate.
    """
    x = F.conv2d(images, tensors["patch_embed.proj.weight"], tensors["patch_embed.proj.bias"], stride=4)
    x = _norm(tensors, "patch_embed.norm", x.permute(0, 2, 3, 1))
    if mask is not None:
        weight = mask.unsqueeze(-1).float()
        x = x * (1 - weight) + tensors["mask_token"].view(-1) * weight
    post = any(key.endswith(".attn.logit_scale") for key in tensors)
    chosen, stage = [], 0
    while f"layers.{stage}.blocks.0.norm1.weight" in tensors:
        block = 0
        while f"layers.{stage}.blocks.{block}.norm1.weight" in tensors:
            path, grid = f"layers.{stage}.blocks.{block}.", x.shape[1]
            side = min(window, grid)
            shift = side // 2 if block % 2 and grid > window else 0
            update = x if post else _norm(tensors, path + "norm1", x)
            update = torch.roll(update, (-shift, -shift), (1, 2))
            visible = shift_mask(grid, side, shift) if shift else None
            update = torch.stack(
                [
                    join(
                        attention(tensors, path + "attn.", cut(one, side), num_heads[stage], visible), grid, grid, side
                    )
                    for one in update
                ]
            )
            update = torch.roll(update, (shift, shift), (1, 2))
            x = x + (_norm(tensors, path + "norm1", update) if post else update)
            update = x if post else _norm(tensors, path + "norm2", x)
            layer = path + "mlp._moe_layer."
            if layer + "experts.batched_fc1_w" in tensors:
                output, kept = moe(tensors, layer, update.flatten(0, 2), capacity_factor)
                chosen.append(kept)
                update = output.view_as(update)
            else:
                gate = 1.0
                if mlp_gates and path in mlp_gates:
                    gate = (update @ mlp_gates[path].T).softmax(-1).max(-1, keepdim=True).values
                update = F.gelu(F.linear(update, tensors[path + "mlp.fc1.weight"], tensors[path + "mlp.fc1.bias"]))
                update = gate * F.linear(update, tensors[path + "mlp.fc2.weight"], tensors.get(path + "mlp.fc2.bias"))
            x = x + (_norm(tensors, path + "norm2", update) if post else update)
            block += 1
        path = f"layers.{stage}.downsample."
        if path + "reduction.weight" in tensors:
            x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
            x = x if post else _norm(tensors, path + "norm", x)
            x = F.linear(x, tensors[path + "reduction.weight"])
            x = _norm(tensors, path + "norm", x) if post else x
        stage += 1
    return {"tokens": _norm(tensors, "norm", x).flatten(1, 2), "experts": chosen}


def simmim_loss(tensors, images, num_heads, window, mask):
    """SimMIM's reconstruction and loss, `tensors` with `encoder.` and `decoder.`; mask (B, H / 4, H / 4)."""
    encoder = {key.removeprefix("encoder."): value for key, value in tensors.items() if key.startswith("encoder.")}
    tokens = forward(encoder, images, num_heads, window, mask)["tokens"]
    side = math.isqrt(tokens.shape[1])
    maps = tokens.transpose(1, 2).reshape(len(images), -1, side, side)
    pixels = F.conv2d(maps, tensors["decoder.0.weight"], tensors["decoder.0.bias"])
    stride = images.shape[-1] // side
    pixels = F.pixel_shuffle(pixels, stride)
    weight = mask.float().repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(1)
    loss = ((images - pixels).abs() * weight).sum() / (weight.sum() + 1e-5) / images.shape[1]
    return pixels, loss
