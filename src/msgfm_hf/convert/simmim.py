"""SimMIM's pretraining files (microsoft/SimMIM, arXiv 2111.09886), of Swin and SwinV2: an encoder with a mask token
and a decoder."""

from .source import Source
from .swin import RULES, stated
from .translation import SENSOR, Translation

NAME = "simmim"


def matches(source: Source) -> bool:
    """Whether the keys are those of a Swin encoder and its decoder."""
    return "encoder.patch_embed.proj.weight" in source.tensors and not any(
        key.startswith(("teacher.", "projector.")) for key in source.tensors
    )


def translate(source: Source) -> Translation:
    """Rename the keys below `encoder.`, and the decoder, whose pixels are in the same order here."""
    translation = Translation(source.tensors)
    translation.match(RULES, "encoder.")
    translation.match([(r"decoder\.0\.(weight|bias)", rf"decoders.{SENSOR}.\1")])
    target = (source.config.get("MODEL") or {}).get("SIMMIM") or {}
    if (target.get("NORM_TARGET") or {}).get("ENABLE"):
        translation.remarks.append(
            "the decoder was trained to predict pixels standardised over their surroundings (NORM_TARGET), not plain "
            "normalised pixels: its pictures are not images until it is trained on"
        )
    return translation


__all__ = ["NAME", "matches", "stated", "translate"]
