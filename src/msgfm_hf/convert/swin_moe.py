"""Swin-MoE's files (microsoft/Swin-Transformer with Tutel, arXiv 2206.03382): experts of one process or of many, and
its dense baselines."""

import math

import torch

from .source import RankFiles, Source
from .swin import RULES, stated
from .translation import Translation

NAME = "swin_moe"

_EXPERTS = "._moe_layer.experts."
_MLP = r"layers\.(\d+)\.blocks\.(\d+)\.mlp\._moe_layer\."
_OURS = r"encoder.layers.\1.blocks.\2.mlp."
_RULES = [
    (_MLP + r"gates\.0\.wg\.weight", _OURS + "router.weight"),
    (
        _MLP + r"gates\.0\.(temperature|sim_matrix|cosine_projector\.(?:weight|bias))",
        _OURS + r"router.\3",
    ),
    (_MLP + r"experts\.batched_fc1_w", _OURS + "experts.up_proj"),
    (_MLP + r"experts\.batched_fc1_bias", _OURS + "experts.up_proj_bias"),
    (_MLP + r"experts\.batched_fc2_w", _OURS + "experts.down_proj"),
    (_MLP + r"experts\.batched_fc2_bias", _OURS + "experts.down_proj_bias"),
    (_MLP + r"_num_global_experts", "buffer:" + _OURS + "num_global_experts"),
]


def matches(source: Source) -> bool:
    """Whether the keys are those of Swin with Tutel's experts, or of its dense baselines, whose position biases are a
    network of the offset while scores are dot products."""
    networks = any("_mlp.2.weight" in key for key in source.tensors)
    scales = any(".attn.logit_scale" in key for key in source.tensors)
    moe = any("._moe_layer." in key for key in source.tensors)
    return "patch_embed.proj.weight" in source.tensors and (moe or (networks and not scales))


def translate(source: Source) -> Translation:
    """Rename the keys; experts' second layer is transposed here, and a layer without bias gets one of zeros."""
    translation = Translation(source.tensors)
    translation.match(_RULES)
    translation.match(RULES)
    for name, tensor in list(translation.tensors.items()):
        if name.endswith("_proj_bias") and tensor.ndim == 3:
            translation.change(name, tensor.squeeze(1), "as a matrix, which older versions of Tutel do when they load")
        if name.endswith(".experts.down_proj"):
            translation.change(name, tensor.transpose(1, 2).contiguous(), "transposed, (experts, out, hidden)")
            _add_bias(translation, name + "_bias", (tensor.shape[0], tensor.shape[2]))
        if name.endswith(".mlp.fc2.weight"):
            _add_bias(translation, name.removesuffix("weight") + "bias", (len(tensor),))
    for name, stored in translation.buffers.items():
        if name.endswith("num_global_experts"):
            experts = len(translation.tensors[name.replace("num_global_experts", "experts.up_proj")])
            if int(stored) != experts:
                raise ValueError(
                    f"`SRC` must hold all experts, got {experts} of {int(stored)}. Give the files of all ranks."
                )
    if not stated(source) and any(name.endswith(".experts.up_proj") for name in translation.tensors):
        translation.remarks.append(
            "experts per token, capacity, noise and auxiliary loss are not in these files: 1, 1.25, 1.0 and "
            "importance_load x 0.01, as Swin-MoE was trained, are assumed"
        )
    if any(name.endswith(".experts.up_proj") for name in translation.tensors):
        translation.remarks.append(
            "Tutel drops tokens in evaluation too, so that an image's output depends on its batch; here nothing is "
            "dropped unless you load with `eval_capacity_factor=1.25`"
        )
    return translation


def _add_bias(translation: Translation, name: str, shape: tuple[int, ...]):
    if name not in translation.tensors:
        translation.make(name, torch.zeros(shape), "zero: the source has no such bias")


def merge_ranks(files: RankFiles) -> Source:
    """One source of the files of all ranks: experts side by side, or, where an expert is spread over ranks, its hidden
    units.

    Raises:
        ValueError: for ranks that do not fit together, or of which some are missing.
    """
    ranks, master = files.ranks, files.master
    first = ranks[0]
    shared = (master or first).tensors
    merged = {key: tensor for key, tensor in shared.items() if _EXPERTS not in key}
    entries = sorted({entry for part in (*ranks, *([master] if master else [])) for entry in part.entries})
    keys = [key for key in first.tensors if _EXPERTS in key]
    if not keys:
        raise ValueError(
            f"`SRC` must hold experts in its `.rank*` files, got none in {first.paths[0].name}. Convert the `.global` "
            "file alone, or give the files of a Swin-MoE model."
        )
    for number, rank in enumerate(ranks):
        mine = {key: tuple(rank.tensors[key].shape) for key in rank.tensors if _EXPERTS in key}
        theirs = {key: tuple(first.tensors[key].shape) for key in keys}
        if mine != theirs:
            strange = sorted(key for key in {*mine, *theirs} if mine.get(key) != theirs.get(key))
            raise ValueError(
                f"`SRC` must hold the ranks of one run, got rank {number} with {strange[0]} of shape "
                f"{mine.get(strange[0])} beside rank 0 with {theirs.get(strange[0])}. They are of different models: "
                "fetch them again."
            )
        other = sorted(
            key for key, tensor in rank.tensors.items() if key in merged and not torch.equal(tensor, merged[key])
        )
        if other:
            raise ValueError(
                f"`SRC` must hold the ranks of one step of one run, got rank {number} with another {other[0]}. They "
                "are of different checkpoints: fetch them again."
            )
    for layer in sorted({key.split(_EXPERTS)[0] for key in keys}):
        merged.update(_merge_layer(layer, ranks, shared, merged))
    unknown = sorted(key for key in shared if _EXPERTS in key and key not in merged)
    if unknown:
        raise ValueError(
            f"`SRC` must hold the experts of every rank, got {unknown[0]} in the `.master` file alone. Give the "
            "`.rank*` files."
        )
    paths = [path for part in (*([master] if master else []), *ranks) for path in part.paths]
    return Source(paths, merged, (master or first).config or first.config, entries=entries)


def _merge_layer(layer: str, ranks: list[Source], shared: dict, merged: dict) -> dict[str, torch.Tensor]:
    """The experts of one block, of all ranks."""
    gate = next(
        (
            merged[key].shape[axis]
            for key, axis in (
                (f"{layer}._moe_layer.gates.0.wg.weight", 0),
                (f"{layer}._moe_layer.gates.0.sim_matrix", 1),
            )
            if key in merged
        ),
        None,
    )
    # New files state the number; legacy ones do not, but have a row per expert in the router.
    count = int(merged.get(f"{layer}._moe_layer._num_global_experts", gate or 0))
    if not count or (gate is not None and gate != count):
        raise ValueError(
            f"`SRC` must tell the number of experts of {layer} by its router, got {gate} rows for {count}. Give the "
            "`.master` file before the `.rank*` files."
        )
    path = layer + _EXPERTS
    local, hidden, width = ranks[0].tensors[path + "batched_fc1_w"].shape
    shards = len(ranks) * local // count
    if local * len(ranks) != count * shards or not shards or (shards > 1 and local != 1):
        raise ValueError(
            f"`SRC` must hold the files of all ranks, got {len(ranks)} with {local} of {count} experts each. Fetch the "
            "missing files, and leave out those of other runs."
        )
    dense = [len(tensor) / tensor.shape[1] for key, tensor in merged.items() if key.endswith(".mlp.fc1.weight")]
    ratio = hidden * shards / width
    if dense and not math.isclose(ratio, dense[0]):
        raise ValueError(
            f"`SRC` must hold the files of all ranks, got {len(ranks)}, which make experts {ratio:g} times as wide as "
            f"their input where other blocks are {dense[0]:g} times. Fetch the missing files."
        )
    layers = {}
    for name, final in (
        ("batched_fc1_w", (count, hidden * shards, width)),
        ("batched_fc2_w", (count, hidden * shards, -1)),
        ("batched_fc1_bias", (count, hidden * shards)),
        ("batched_fc2_bias", (count, -1)),
    ):
        key = path + name
        parts = [rank.tensors[key] for rank in ranks if key in rank.tensors]
        if parts:
            layers[key] = torch.cat(parts).reshape(final)
        elif key in shared:
            # Frozen at zero and therefore in no rank's file: the master has that of its own rank.
            if shared[key].any():
                raise ValueError(
                    f"`SRC` must hold {name} of every rank, got that of one rank in the `.master` file, which is not "
                    "zero. Fetch files that have it."
                )
            layers[key] = torch.zeros(count, ranks[0].tensors[path + "batched_fc2_w"].shape[2])
    bias = path + "batched_fc2_bias"
    if bias in layers:
        # Sharded, each rank has a part of it, rounded up.
        layers[bias] = layers[bias][:, : ranks[0].tensors[path + "batched_fc2_w"].shape[2]]
    return layers


__all__ = ["NAME", "matches", "merge_ranks", "stated", "translate"]
