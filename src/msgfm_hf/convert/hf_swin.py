"""Swin and SwinV2 of Transformers: `SwinModel`, `Swinv2Model` and their heads, in the folders that it saves."""

import re

import torch

from .source import Source
from .translation import SENSOR, Translation

NAME = "hf_swin"

_BLOCK = r"encoder\.layers\.(\d+)\.blocks\.(\d+)\."
_OURS = r"encoder.layers.\1.blocks.\2."
_ATTENTION = _BLOCK + r"attention\.(?:self\.)?"
# Transformers has called the parts of a block by two sets of names; files have the older, models the newer.
_RULES = [
    (
        r"embeddings\.patch_embeddings\.projection\.(weight|bias)",
        rf"embeddings.patch_embeddings.{SENSOR}.projection.\1",
    ),
    (r"embeddings\.norm\.(weight|bias)", rf"embeddings.patch_embeddings.{SENSOR}.norm.\1"),
    (r"embeddings\.mask_token", "embeddings.mask_token"),
    (_BLOCK + r"(layernorm_(?:before|after)\.(?:weight|bias))", _OURS + r"\3"),
    (_BLOCK + r"attention\.(?:output\.dense|o_proj)\.(weight|bias)", _OURS + r"attention.proj.\3"),
    (_BLOCK + r"(?:intermediate\.dense|mlp\.fc1)\.(weight|bias)", _OURS + r"mlp.fc1.\3"),
    (_BLOCK + r"(?:output\.dense|mlp\.fc2)\.(weight|bias)", _OURS + r"mlp.fc2.\3"),
    (
        _ATTENTION + r"(?:relative_position_bias\.)?relative_position_bias_table",
        _OURS + "attention.relative_position_bias_table",
    ),
    (_ATTENTION + r"(logit_scale)", _OURS + r"attention.\3"),
    (
        _ATTENTION + r"continuous_position_bias_mlp\.(0\.weight|0\.bias|2\.weight)",
        _OURS + r"attention.continuous_position_bias_mlp.\3",
    ),
    (
        _ATTENTION + r"(?:relative_position_bias\.)?(relative_position_index|relative_coords_table)",
        "buffer:" + _OURS + r"attention.\3",
    ),
    (r"encoder\.layers\.(\d+)\.(downsample\.(?:norm\.weight|norm\.bias|reduction\.weight))", r"encoder.layers.\1.\2"),
    (r"layernorm\.(weight|bias)", r"layernorm.\1"),
]
_QUERY = re.compile(_ATTENTION + r"(?:query|q_proj)\.(weight|bias)")
_STATED = (
    "image_size",
    "patch_size",
    "embed_dim",
    "depths",
    "num_heads",
    "window_size",
    "pretrained_window_sizes",
    "mlp_ratio",
    "qkv_bias",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "drop_path_rate",
    "encoder_stride",
    "problem_type",
)


def matches(source: Source) -> bool:
    """Whether this is the folder of a Swin or SwinV2 model of Transformers."""
    return source.config.get("model_type") in ("swin", "swinv2")


def stated(source: Source) -> dict:
    """What `config.json` says.

    Raises:
        ValueError: for absolute position embeddings, which this architecture does not have, and for norms of another
            epsilon.
    """
    if source.config.get("use_absolute_embeddings"):
        raise ValueError(
            "`SRC` must have no absolute position embeddings, got use_absolute_embeddings=true in config.json. There "
            "is no such option here."
        )
    if source.config.get("layer_norm_eps", 1e-5) != 1e-5:
        raise ValueError(
            f"`SRC` must have a layer_norm_eps of 1e-05, got {source.config['layer_norm_eps']}. In Transformers only "
            "some norms have it, here all have the same."
        )
    fields = {name: source.config[name] for name in _STATED if source.config.get(name) is not None}
    for name in ("image_size", "patch_size"):
        # Of squares, pairs too.
        if isinstance(fields.get(name), list | tuple) and len(set(fields[name])) == 1:
            fields[name] = fields[name][0]
    labels = source.config.get("id2label")
    if labels:
        fields["id2label"] = {int(number): label for number, label in labels.items()}
        fields["num_labels"] = len(labels)
    return fields


def translate(source: Source) -> Translation:
    """Rename the keys, and join queries, keys and values."""
    prefix = f"{source.config['model_type']}."
    prefix = prefix if any(key.startswith(prefix) for key in source.tensors) else ""
    translation = Translation(source.tensors)
    translation.match(_RULES, prefix)
    for key in translation.left():
        query = _QUERY.fullmatch(key.removeprefix(prefix))
        if query is None:
            continue
        stage, block, kind = query[1], query[2], query[3]
        name = f"encoder.layers.{stage}.blocks.{block}.attention."
        keys = [
            key.replace("query", other[0]).replace("q_proj", other[1])
            for other in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"))
        ]
        parts = {key: source.tensors[key] for key in keys if key in source.tensors}
        if kind == "bias" and len(parts) == 2 and keys[1] not in parts:
            # SwinV2: keys have no bias.
            translation.load(keys[0], name + "q_bias", parts[keys[0]])
            translation.load(keys[2], name + "v_bias", parts[keys[2]])
        elif len(parts) == 3:
            joined = torch.cat([parts[key] for key in keys])
            translation.load(keys, f"{name}qkv.{kind}", joined, "queries, keys and values joined")
    translation.match([(r"decoder\.0\.(weight|bias)", rf"decoders.{SENSOR}.\1")])
    translation.match([(r"classifier\.(weight|bias)", r"classifier.\1")])
    return translation
