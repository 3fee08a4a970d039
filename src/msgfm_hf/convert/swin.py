"""Swin as its authors save it (microsoft/Swin-Transformer, arXiv 2103.14030): classifiers and their trunks."""

from .source import Source
from .translation import SENSOR, Translation

NAME = "swin"

_BLOCK = r"layers\.(\d+)\.blocks\.(\d+)\."
_OURS = r"encoder.layers.\1.blocks.\2."
# The names of all programs that grew out of Swin's; rpe_mlp is what SwinV2's authors first called cpb_mlp.
RULES = [
    (r"patch_embed\.proj\.(weight|bias)", rf"embeddings.patch_embeddings.{SENSOR}.projection.\1"),
    (r"patch_embed\.norm\.(weight|bias)", rf"embeddings.patch_embeddings.{SENSOR}.norm.\1"),
    (r"mask_token", "embeddings.mask_token"),
    (_BLOCK + r"norm1\.(weight|bias)", _OURS + r"layernorm_before.\3"),
    (_BLOCK + r"norm2\.(weight|bias)", _OURS + r"layernorm_after.\3"),
    (_BLOCK + r"attn\.((?:qkv|proj)\.(?:weight|bias))", _OURS + r"attention.\3"),
    (_BLOCK + r"attn\.(relative_position_bias_table|logit_scale|q_bias|v_bias)", _OURS + r"attention.\3"),
    (
        _BLOCK + r"attn\.(?:cpb|rpe)_mlp\.(0\.weight|0\.bias|2\.weight)",
        _OURS + r"attention.continuous_position_bias_mlp.\3",
    ),
    (_BLOCK + r"mlp\.(fc[12]\.(?:weight|bias))", _OURS + r"mlp.\3"),
    (_BLOCK + r"attn\.(relative_position_index|relative_coords_table)", "buffer:" + _OURS + r"attention.\3"),
    (_BLOCK + r"(attn_mask)", "buffer:" + _OURS + r"\3"),
    (r"layers\.(\d+)\.downsample\.(norm\.weight|norm\.bias|reduction\.weight)", r"encoder.layers.\1.downsample.\2"),
    (r"norm\.(weight|bias)", r"layernorm.\1"),
    (r"head\.(weight|bias)", r"classifier.\1"),
]


def matches(source: Source) -> bool:
    """Whether the keys are those of a Swin trunk or classifier."""
    return "patch_embed.proj.weight" in source.tensors and not any(".attn.logit_scale" in key for key in source.tensors)


def translate(source: Source) -> Translation:
    """Rename the keys."""
    translation = Translation(source.tensors)
    translation.match(RULES)
    return translation


# Fields of MsGFMConfig by their names in the configuration of Swin's training scripts, below MODEL.<KIND>.
_STATED = {
    "PATCH_SIZE": "patch_size",
    "EMBED_DIM": "embed_dim",
    "DEPTHS": "depths",
    "NUM_HEADS": "num_heads",
    "WINDOW_SIZE": "window_size",
    "PRETRAINED_WINDOW_SIZES": "pretrained_window_sizes",
    "MLP_RATIO": "mlp_ratio",
    "QKV_BIAS": "qkv_bias",
    "TOP_VALUE": "num_experts_per_tok",
    "CAPACITY_FACTOR": "capacity_factor",
    "GATE_NOISE": "router_noise",
    "AUX_LOSS_WEIGHT": "router_aux_loss_coef",
}
# What these scripts can also train and this layout has no place for: (name, the value that is no obstacle).
_WITHOUT = (("APE", False), ("PATCH_NORM", True), ("QK_SCALE", None))


def stated(source: Source) -> dict:
    """The fields that a pickled configuration of Swin's training scripts states; empty without one.

    Raises:
        ValueError: for an option that this architecture does not have.
    """
    model, data = source.config.get("MODEL") or {}, source.config.get("DATA") or {}
    kind = model.get(str(model.get("TYPE", "")).upper()) or {}
    for name, usual in _WITHOUT:
        if kind.get(name, usual) != usual:
            raise ValueError(
                f"`SRC` must be trained with {name} {usual!r}, got {kind[name]!r}. There is no such option here."
            )
    if kind.get("NORMALIZE_GATE") and kind.get("TOP_VALUE", 1) > 1:
        raise ValueError(
            "`SRC` must be trained without NORMALIZE_GATE, got it with several experts per token. Gates are not "
            "renormalised here."
        )
    fields = {ours: kind[name] for name, ours in _STATED.items() if kind.get(name) is not None}
    if "IS_GSHARD_LOSS" in kind:
        fields["router_aux_loss_type"] = "gshard" if kind["IS_GSHARD_LOSS"] else "importance_load"
    for place, name, ours in (
        (data, "IMG_SIZE", "image_size"),
        (data, "MASK_PATCH_SIZE", "mask_patch_size"),
        (model, "NUM_CLASSES", "num_labels"),
        (model, "DROP_RATE", "hidden_dropout_prob"),
        (model, "DROP_PATH_RATE", "drop_path_rate"),
    ):
        if place.get(name) is not None:
            fields[ours] = place[name]
    return fields
