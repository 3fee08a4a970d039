"""The small model that several rooms' tests look at, and how to make it lively."""

import torch

from msgfm_hf import (
    SENSORS,
    MsGFMBackbone,
    MsGFMConfig,
    MsGFMForImageClassification,
    MsGFMForPreTraining,
    MsGFMForSemanticSegmentation,
    MsGFMModel,
)

CLASSES = [MsGFMModel, MsGFMBackbone, MsGFMForPreTraining, MsGFMForImageClassification, MsGFMForSemanticSegmentation]
TINY = {
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "image_size": 32,
    "mask_patch_size": 8,
    "num_experts": 4,
    "moe_blocks": [[], [1]],
}
RGB = {"rgb": SENSORS["rgb"].to_dict()}
BANDS = {sensor: len(SENSORS[sensor].bands) for sensor in ("rgb", "s1", "s2", "dsm")}


def lively(model, deviation=0.2):
    """Parameters far from their first values, so that a wrong one shows: norms and biases of sensors differ."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * deviation)
    return model.eval()


def tiny(cls=MsGFMModel, deviation=0.2, **fields):
    return lively(cls(MsGFMConfig(**{**TINY, **fields})), deviation)
