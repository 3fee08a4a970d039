"""SwinV2 (and Swin) of torchvision, as SatlasPretrain's backbones are saved (allenai/satlas, arXiv 2211.15660)."""

import re

from .source import Source
from .translation import RECOMPUTED, SENSOR, Translation

NAME = "satlas"

_BLOCK = r"features\.(\d+)\.(\d+)\."
# The parts of a block by their names here.
_PARTS = {
    **{f"norm1.{kind}": f"layernorm_before.{kind}" for kind in ("weight", "bias")},
    **{f"norm2.{kind}": f"layernorm_after.{kind}" for kind in ("weight", "bias")},
    **{f"mlp.0.{kind}": f"mlp.fc1.{kind}" for kind in ("weight", "bias")},
    **{f"mlp.3.{kind}": f"mlp.fc2.{kind}" for kind in ("weight", "bias")},
    **{f"attn.{name}": f"attention.{name}" for name in ("qkv.weight", "proj.weight", "proj.bias", "logit_scale")},
    "attn.relative_position_bias_table": "attention.relative_position_bias_table",
    **{
        f"attn.cpb_mlp.{name}": f"attention.continuous_position_bias_mlp.{name}"
        for name in ("0.weight", "0.bias", "2.weight")
    },
}
# Satlas wraps the backbone once for one image, and twice for several images of a place.
_FIRST = re.compile(r"((?:backbone\.)*)features\.0\.0\.weight")


def _prefix(source: Source) -> str | None:
    return next((found[1] for key in source.tensors if (found := _FIRST.fullmatch(key))), None)


def matches(source: Source) -> bool:
    """Whether the keys are those of torchvision, below `backbone.` or not."""
    return _prefix(source) is not None


def stated(source: Source) -> dict:
    """Nothing: these files hold tensors only."""
    return {}


def translate(source: Source) -> Translation:
    """Rename the keys; stages and merges alternate, and the bias of queries, keys and values is one tensor."""
    prefix = _prefix(source)
    translation = Translation(source.tensors)
    translation.match(
        [
            (r"features\.0\.0\.(weight|bias)", rf"embeddings.patch_embeddings.{SENSOR}.projection.\1"),
            (r"features\.0\.2\.(weight|bias)", rf"embeddings.patch_embeddings.{SENSOR}.norm.\1"),
            (r"norm\.(weight|bias)", r"layernorm.\1"),
        ],
        prefix,
    )
    norm = {kind: translation.tensors.get(f"layernorm.{kind}") for kind in ("weight", "bias")}
    untrained = None not in norm.values() and bool((norm["weight"] == 1).all()) and not norm["bias"].any()
    # Torchgeo passes on the bare backbones, whose final norm tells them from classifiers of torchvision.
    translation.from_0_to_1 = bool(prefix) or untrained
    if translation.from_0_to_1:
        translation.ignore_prefixed(f"{prefix}head.", "torchvision's classifier, which Satlas neither trains nor uses")
        translation.remarks.append(
            "Satlas takes its features before the final norm and never trains it: `last_hidden_state` and "
            "`pooler_output` are normalised with its first values"
        )
        for key in translation.left():
            if not key.startswith(prefix):
                translation.ignore(key, "of Satlas's feature pyramid and heads, which this architecture does not have")
    else:
        translation.match([(r"head\.(weight|bias)", r"classifier.\1")])
    for key in translation.left():
        _stage_key(translation, key, key.removeprefix(prefix))
    return translation


def _stage_key(translation: Translation, key: str, inside: str):
    """One key of the stages, features.1, 3, 5 and 7, or of the merges between, features.2, 4 and 6."""
    merge = re.fullmatch(r"features\.(\d+)\.(norm\.weight|norm\.bias|reduction\.weight)", inside)
    if merge and int(merge[1]) % 2 == 0:
        translation.load(key, f"encoder.layers.{int(merge[1]) // 2 - 1}.downsample.{merge[2]}", translation.given[key])
        return
    block = re.fullmatch(_BLOCK + r"(.+)", inside)
    if not block or int(block[1]) % 2 == 0:
        return
    path = f"encoder.layers.{int(block[1]) // 2}.blocks.{block[2]}."
    part, tensor = block[3], translation.given[key]
    if part in _PARTS:
        translation.load(key, path + _PARTS[part], tensor)
    elif part == "attn.qkv.bias" and key.replace("qkv.bias", "logit_scale") in translation.given:
        query, _, value = tensor.chunk(3)
        how = "split; the part of the keys is dropped, which torchvision sets to zero when it runs"
        translation.load(key, path + "attention.q_bias", query.clone(), how)
        translation.load(key, path + "attention.v_bias", value.clone(), how)
    elif part == "attn.qkv.bias":
        translation.load(key, path + "attention.qkv.bias", tensor)
    elif part in ("attn.relative_position_index", "attn.relative_coords_table"):
        translation.buffers[path + part.replace("attn", "attention")] = tensor
        translation.ignore(key, RECOMPUTED)
