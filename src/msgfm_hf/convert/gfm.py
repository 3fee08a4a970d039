"""GFM's training files (mmendiet/GFM, arXiv 2302.04476): SimMIM's student, and the teacher it was distilled from."""

from . import simmim
from .simmim import stated
from .source import Source
from .translation import Translation

NAME = "gfm"


def matches(source: Source) -> bool:
    """Whether the keys are those of a student with its teacher."""
    return "encoder.patch_embed.proj.weight" in source.tensors and any(
        key.startswith(("teacher.", "projector.")) for key in source.tensors
    )


def translate(source: Source) -> Translation:
    """The student, by SimMIM's names; its teacher stays behind."""
    translation = simmim.translate(source)
    translation.ignore_prefixed("teacher.", "of the teacher, an ImageNet classifier that distillation needed")
    translation.ignore_prefixed("projector.", "projects onto the teacher's features, for distillation only")
    return translation


__all__ = ["NAME", "matches", "stated", "translate"]
