"""The architecture of a source, read from the shapes of its tensors and checked against what it states itself."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from .translation import SENSOR, Translation

_BLOCK = re.compile(r"encoder\.layers\.(\d+)\.blocks\.(\d+)\.(.+)")
# The origin of a value that a source does not tell, on which a conversion remarks.
ASSUMED = "assumed"
# Read from tensors, so a source that states something else is two checkpoints in one.
_CHECKED = ("patch_size", "embed_dim", "depths", "num_heads", "mlp_ratio", "qkv_bias", "num_labels")
# In no tensor: taken from what a source states, else the defaults.
_TAKEN = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "drop_path_rate",
    "hidden_act",
    "mask_patch_size",
    "problem_type",
)
_TAKEN_WITH_EXPERTS = (
    "num_experts_per_tok",
    "capacity_factor",
    "router_noise",
    "router_aux_loss_type",
    "router_aux_loss_coef",
)


@dataclass
class Architecture:
    """What a source is.

    Attributes:
        fields: of `MsGFMConfig`, without `sensors` and `inputs`.
        origins: {field: where its value is from}.
        num_bands: input channels.
        windows: per stage, the side of the windows that its biases were learned with, in tokens.
        pretrained_windows: per stage, the window whose offsets a `log_cpb` network was learned with.
        whole_windows: whether the maps of the source's images are whole windows.
        decoder_bands: what a decoder predicts, if there is one.
        labels: names of classes, where the source has some.
    """

    fields: dict
    origins: dict[str, str]
    num_bands: int
    windows: list[int]
    pretrained_windows: list[int]
    whole_windows: bool
    decoder_bands: int | None = None
    labels: dict[int, str] = field(default_factory=dict)


def read_architecture(
    translation: Translation, stated: Mapping, image_size: int | None, window_size: int | None
) -> Architecture:
    """The architecture that the translated tensors have.

    Args:
        translation: the tensors and buffers under the names of this layout.
        stated: fields of `MsGFMConfig` (and `num_labels`, `id2label`, `encoder_stride`) that the source states.
        image_size: what the user says, for a source that does not tell.
        window_size: the same, for a source whose biases are a network of the offset and that has no buffers.

    Raises:
        ValueError: for tensors that do not fit together or contradict what is stated, and for what cannot be known,
            which is asked for by the name of its option.
    """
    tensors, buffers = translation.tensors, translation.buffers
    kernel = _need(tensors, f"embeddings.patch_embeddings.{SENSOR}.projection.weight")
    if kernel.ndim != 4 or kernel.shape[2] != kernel.shape[3]:
        _refuse("have a patch embedding of square patches", f"a kernel of shape {tuple(kernel.shape)}")
    _need(tensors, f"embeddings.patch_embeddings.{SENSOR}.norm.weight")
    embed_dim, num_bands, patch_size, _ = kernel.shape
    stages = _blocks(tensors)
    depths = [len(blocks) for blocks in stages]
    kinds = {name for blocks in stages for block in blocks for name in block}
    cosine, table = "attention.logit_scale" in kinds, "attention.relative_position_bias_table" in kinds
    sparse = [[number for number, block in enumerate(blocks) if _is_sparse(block)] for blocks in stages]
    fields = {
        "patch_size": patch_size,
        "embed_dim": embed_dim,
        "depths": depths,
        "num_heads": [_heads(blocks, stage) for stage, blocks in enumerate(stages)],
        "mlp_ratio": _mlp_ratio(stages, embed_dim),
        "qkv_bias": bool({"attention.q_bias", "attention.qkv.bias"} & kinds),
        "attention_score": "cosine" if cosine else "dot",
        "position_bias": "table" if table else "log_cpb",
        "norm_position": "post" if _merges_before_norm(tensors, embed_dim, cosine) else "pre",
        "moe_blocks": sparse,
    }
    routers = {name for name in kinds if name.startswith("mlp.router.")}
    if any(sparse):
        fields["num_experts"] = _same("the number of experts", _experts(stages))
        fields["router_type"] = "cosine" if "mlp.router.sim_matrix" in routers else "linear"
    classifier = tensors.get("classifier.weight")
    if classifier is not None:
        bias = _need(tensors, "classifier.bias")
        if len(bias) != len(classifier) or classifier.shape[1] != embed_dim * 2 ** (len(depths) - 1):
            _refuse(
                "have a whole classifier",
                f"weights of shape {tuple(classifier.shape)} and {len(bias)} biases for features of "
                f"{embed_dim * 2 ** (len(depths) - 1)} channels",
            )
        fields["num_labels"] = len(classifier)
    origins = dict.fromkeys(fields, "tensors")
    for name in _CHECKED:
        if name in stated and name in fields and not _equal(stated[name], fields[name]):
            _refuse(
                f"have the `{name}` that its own configuration states, {stated[name]}",
                f"tensors with {fields[name]}",
                "The two are of different checkpoints: fetch both again.",
            )

    stride = patch_size * 2 ** (len(depths) - 1)
    decoder = tensors.get(f"decoders.{SENSOR}.weight")
    decoder_bands = None
    if decoder is not None:
        if stated.get("encoder_stride", stride) != stride:
            _refuse(
                f"have a decoder of the {stride} x {stride} pixels that its stages make of a token",
                f"encoder_stride {stated['encoder_stride']}",
                "This architecture's decoders have no other.",
            )
        decoder_bands, rest = divmod(len(decoder), stride**2)
        # SimMIM's decoder always has the three bands of a picture, GFM's those of the input.
        if rest or decoder_bands not in (num_bands, 3):
            _refuse(
                f"have a decoder of {stride} x {stride} pixels for {num_bands} (or 3) bands per token",
                f"{len(decoder)} channels",
            )

    windows = _windows(stages, buffers, table)
    known_size = _image_size(buffers, windows, patch_size, len(depths), stated)
    if known_size is None and image_size is None:
        raise ValueError(
            "`--image-size` must say how large the images of the source were, which it does not tell, got nothing. Add "
            "`--image-size N` in pixels; any size runs later."
        )
    origins["image_size"] = "option" if image_size is not None else known_size[1]
    fields["image_size"] = image_size or known_size[0]
    size = known_size[0] if known_size else image_size
    grids = [size // patch_size // 2**stage for stage in range(len(depths))]
    windows, fields["window_size"], origins["window_size"] = _check_windows(windows, grids, size, stated, window_size)

    for name in (*_TAKEN, *(_TAKEN_WITH_EXPERTS if any(sparse) else ())):
        if name in stated:
            fields[name], origins[name] = stated[name], "stored configuration"
    if "mask_patch_size" not in fields:
        fields["mask_patch_size"], origins["mask_patch_size"] = stride, "the encoder's stride"
    pretrained, origins["pretrained_window_sizes"] = _pretrained_windows(buffers, windows, stated)
    return Architecture(
        fields=fields,
        origins=origins,
        num_bands=num_bands,
        windows=windows,
        pretrained_windows=pretrained,
        whole_windows=not any(grid % window for grid, window in zip(grids, windows, strict=True)),
        decoder_bands=decoder_bands,
        labels=stated.get("id2label", {}),
    )


def _check_windows(
    windows: list[int] | None, grids: list[int], size: int, stated: Mapping, window_size: int | None
) -> tuple[list[int], int, str]:
    """The windows of all stages, that of the model, and how it is known. A stage whose map is smaller than the window
    has one of the map's size."""
    wanted = stated.get("window_size")
    if windows is None:
        base = window_size if wanted is None else wanted
        if base is None:
            raise ValueError(
                "`--window-size` must say how large the windows of the source were, which it does not tell, got "
                "nothing. Add `--window-size N` in tokens."
            )
        return [min(base, grid) for grid in grids], base, "option" if wanted is None else "stored configuration"
    for base, rule, remedy in (
        (
            wanted,
            f"its own configuration, {wanted} tokens at",
            "The two are of different checkpoints: fetch both again.",
        ),
        (max(windows), "images of", "Correct `--image-size`, or fetch the file again."),
    ):
        fits = base is None or all(w in (base, min(base, grid)) for w, grid in zip(windows, grids, strict=True))
        if not fits:
            _refuse(
                f"have windows that fit {rule} {size} pixels (token grids {grids})", f"windows of {windows}", remedy
            )
    return windows, max(windows), "tensors"


def _refuse(rule: str, value: str, remedy: str = "Fetch the file again, or convert it with the program that wrote it."):
    raise ValueError(f"`SRC` must {rule}, got {value}. {remedy}")


def _need(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in tensors:
        _refuse(f"hold what becomes {name.replace(SENSOR, '<sensor>')}", "no such tensor")
    return tensors[name]


def _equal(left, right) -> bool:
    left, right = (list(value) if isinstance(value, list | tuple) else value for value in (left, right))
    return left == right or (isinstance(left, float) and isinstance(right, float | int) and math.isclose(left, right))


def _same(what: str, values: Iterable) -> int:
    values = sorted(set(values))
    if len(values) != 1:
        _refuse(f"agree on {what}", " and ".join(map(str, values)))
    return values[0]


def _blocks(tensors: Mapping[str, torch.Tensor]) -> list[list[dict[str, torch.Tensor]]]:
    """Per stage and block, {name inside the block: tensor}."""
    found: dict[int, dict[int, dict]] = {}
    for name, tensor in tensors.items():
        inside = _BLOCK.fullmatch(name)
        if inside:
            found.setdefault(int(inside[1]), {}).setdefault(int(inside[2]), {})[inside[3]] = tensor
    for what, numbers in (("stages", found), *((f"blocks of stage {stage}", found[stage]) for stage in sorted(found))):
        if sorted(numbers) != list(range(len(numbers))) or not numbers:
            _refuse(f"hold all {what}", f"only {sorted(numbers)}", "It is incomplete: fetch it again.")
    return [[found[stage][block] for block in sorted(found[stage])] for stage in sorted(found)]


def _is_sparse(block: Mapping) -> bool:
    return any(name.startswith("mlp.experts.") for name in block)


def _heads(blocks: list[dict], stage: int) -> int:
    def heads(block):
        for name, axis in (
            ("attention.relative_position_bias_table", 1),
            ("attention.continuous_position_bias_mlp.2.weight", 0),
            ("attention.logit_scale", 0),
        ):
            if name in block:
                yield block[name].shape[axis]

    found = [count for block in blocks for count in heads(block)]
    if not found:
        _refuse("tell the number of attention heads by its position biases", f"none in stage {stage}")
    return _same(f"the heads of stage {stage}", found)


def _mlp_ratio(stages: list[list[dict]], embed_dim: int) -> float:
    ratios = set()
    for stage, blocks in enumerate(stages):
        for block in blocks:
            for name, axis in (("mlp.fc1.weight", 0), ("mlp.experts.up_proj", 1)):
                if name in block:
                    ratios.add(block[name].shape[axis] / (embed_dim * 2**stage))
    if not ratios:
        _refuse("hold the MLPs of its blocks", "none")
    return float(_same("the width of its MLPs over that of their stages", ratios))


def _experts(stages: list[list[dict]]) -> Iterable[int]:
    for blocks in stages:
        for block in blocks:
            for name, axis in (("mlp.experts.up_proj", 0), ("mlp.router.weight", 0), ("mlp.router.sim_matrix", 1)):
                if name in block:
                    yield block[name].shape[axis]


def _merges_before_norm(tensors: Mapping[str, torch.Tensor], embed_dim: int, cosine: bool) -> bool:
    norm = tensors.get("encoder.layers.0.downsample.norm.weight")
    return cosine if norm is None else len(norm) == 2 * embed_dim


def _windows(stages: list[list[dict]], buffers: Mapping, table: bool) -> list[int] | None:
    """The side of each stage's windows, from its tables or buffers; `None` where neither is there."""
    windows = []
    for stage, blocks in enumerate(stages):
        found = set()
        for number, block in enumerate(blocks):
            path = f"encoder.layers.{stage}.blocks.{number}.attention."
            if table:
                rows = len(_need(block, "attention.relative_position_bias_table"))
                side = math.isqrt(rows)
                if side**2 != rows or side % 2 == 0:
                    _refuse("have tables of position biases of (2 w - 1)^2 rows", f"{rows} in stage {stage}")
                found.add((side + 1) // 2)
            if path + "relative_coords_table" in buffers:
                found.add((buffers[path + "relative_coords_table"].shape[1] + 1) // 2)
            if path + "relative_position_index" in buffers:
                found.add(math.isqrt(math.isqrt(buffers[path + "relative_position_index"].numel())))
        if not found:
            return None
        windows.append(_same(f"the windows of stage {stage}", found))
    return windows


def _image_size(
    buffers: Mapping, windows: list[int] | None, patch_size: int, num_stages: int, stated: Mapping
) -> tuple[int, str] | None:
    """The size of the images that a source was built for, and how that is known."""
    found = {}
    for name, mask in buffers.items():
        if name.endswith(".attn_mask"):
            # Of all windows of one image: (windows, M, M).
            stage, side = int(name.split(".")[2]), math.isqrt(mask.shape[0]) * math.isqrt(mask.shape[1])
            found[side * patch_size * 2**stage] = "tensors"
    if windows is not None and not found:
        # A window is never larger than the map: one that is smaller than the others is as large as its map.
        shrunk = {windows[stage] * patch_size * 2**stage for stage in range(num_stages) if windows[stage] < windows[0]}
        found = dict.fromkeys(shrunk, "tensors")
    if stated.get("image_size") is not None:
        found.setdefault(stated["image_size"], "stored configuration")
    if not found:
        return None
    return _same("the size of its images", found), next(iter(found.values()))


def _pretrained_windows(buffers: Mapping, windows: list[int], stated: Mapping) -> tuple[list[int], str]:
    """Per stage, the window that offsets were divided by, and how it is known: that of the stage, unless the source was
    pretrained with another."""
    pretrained, origin = [], "tensors"
    known = list(stated.get("pretrained_window_sizes") or ())
    for stage, window in enumerate(windows):
        name = f"encoder.layers.{stage}.blocks.0.attention.relative_coords_table"
        if name in buffers and window > 1:
            largest = buffers[name].flatten()[-1].item()
            pretrained.append(round(8 * (window - 1) / (2 ** (3 * largest) - 1)) + 1)
        elif stage < len(known):
            pretrained.append(known[stage] or window)
            origin = "stored configuration"
        else:
            pretrained.append(window)
            origin = ASSUMED if window > 1 else origin
    return pretrained, origin
