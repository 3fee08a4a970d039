"""SwinV2 as its authors save it (microsoft/Swin-Transformer, arXiv 2111.09883): classifiers and their trunks."""

from .source import Source
from .swin import stated, translate

NAME = "swinv2"


def matches(source: Source) -> bool:
    """Whether the keys are those of a SwinV2 trunk or classifier: its attention has a learned scale."""
    return "patch_embed.proj.weight" in source.tensors and any(".attn.logit_scale" in key for key in source.tensors)


__all__ = ["NAME", "matches", "stated", "translate"]
