# Copyright 2026 The msgfm_hf contributors. Licensed under the Apache License, Version 2.0.
"""Task heads on the msGFM trunk: image classification and semantic segmentation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers.backbone_utils import filter_output_hidden_states
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .configuration_msgfm import MsGFMConfig
from .modeling_msgfm import (
    MsGFMModel,
    MsGFMModelOutput,
    MsGFMPreTrainedModel,
    PixelValues,
    by_sensor,
    refuse_undeclared,
    shared_grid,
)


@dataclass
class MsGFMHeadOutput(ModelOutput):
    """Output of a head.

    Args:
        loss (`torch.FloatTensor`, *optional*): of the task, plus the weighted auxiliary loss in training.
        logits (`torch.FloatTensor`): (B, labels) for images, (B, labels, H, W) for segmentation.
        hidden_states, attentions, router_logits: as of `MsGFMModel`.
        aux_loss (`torch.FloatTensor`, *optional*): auxiliary loss of the experts, unweighted.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None
    aux_loss: torch.FloatTensor | None = None


class _MsGFMHead(MsGFMPreTrainedModel):
    """What both heads share. They take the sensors of `config.inputs`, or some of them."""

    def _run_trunk(self, pixel_values: PixelValues | None, **kwargs) -> MsGFMModelOutput:
        refuse_undeclared(self.config, by_sensor(self.config, pixel_values, "pixel_values") or {})
        return self.msgfm(pixel_values, **kwargs)

    def _output(self, loss, logits, outputs: MsGFMModelOutput, hidden_states) -> MsGFMHeadOutput:
        if loss is not None and self.training and outputs.aux_loss is not None:
            loss = loss + self.config.router_aux_loss_coef * outputs.aux_loss
        return MsGFMHeadOutput(
            loss=loss,
            logits=logits,
            hidden_states=hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            aux_loss=outputs.aux_loss,
        )


class MsGFMForImageClassification(_MsGFMHead):
    """A linear classifier on the pooled features; several labels at once where `problem_type` says so."""

    def __init__(self, config: MsGFMConfig):
        super().__init__(config)
        self.msgfm = MsGFMModel(config)
        self.classifier = nn.Linear(self.msgfm.num_features, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: PixelValues | None = None,
        labels: torch.Tensor | None = None,
        bands: Mapping[str, Sequence[str]] | None = None,
        valid_mask: torch.Tensor | Mapping[str, torch.Tensor] | None = None,
        reference: torch.Tensor | Mapping[str, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MsGFMHeadOutput:
        r"""
        Args:
            pixel_values, bands, valid_mask, reference: as of `MsGFMModel`, of sensors in `config.inputs`.
            labels: (B,) class ids; (B, labels) of 0/1 for `problem_type="multi_label_classification"`; (B,) numbers for
                one label.
        """
        outputs = self._run_trunk(pixel_values, bands=bands, valid_mask=valid_mask, reference=reference, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return self._output(loss, logits, outputs, outputs.hidden_states)


class MsGFMForSemanticSegmentation(_MsGFMHead):
    """The maps of all stages, brought to the first stage's resolution, joined, classified, and spread to the pixels.

    Raises:
        ValueError: for fewer than two `num_labels`.
    """

    def __init__(self, config: MsGFMConfig):
        super().__init__(config)
        if config.num_labels < 2:
            raise ValueError(
                f"`num_labels` must be at least 2 for segmentation, got {config.num_labels}. What is left over is a "
                "class too: label it."
            )
        self.msgfm = MsGFMModel(config, add_pooling_layer=False)
        sensors = self.msgfm.num_features // config.hidden_size
        widths = [config.embed_dim * 2**stage * sensors for stage in range(len(config.depths))]
        self.norms = nn.ModuleList([nn.LayerNorm(width, eps=config.layer_norm_eps) for width in widths[:-1]])
        self.projections = nn.ModuleList([nn.Linear(width, config.embed_dim) for width in widths])
        self.classifier = nn.Conv2d(config.embed_dim, config.num_labels, 1)
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(
        self,
        pixel_values: PixelValues | None = None,
        labels: torch.Tensor | None = None,
        bands: Mapping[str, Sequence[str]] | None = None,
        valid_mask: torch.Tensor | Mapping[str, torch.Tensor] | None = None,
        reference: torch.Tensor | Mapping[str, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MsGFMHeadOutput:
        r"""
        Args:
            pixel_values, bands, valid_mask, reference: as of `MsGFMModel`, of sensors in `config.inputs`.
            labels: (B, H, W) class ids; `config.semantic_loss_ignore_index` counts nowhere.
        """
        outputs = self._run_trunk(pixel_values, bands=bands, valid_mask=valid_mask, reference=reference, **kwargs)
        maps = outputs.reshaped_hidden_states[1:]
        features = [norm(stage.flatten(2).transpose(1, 2)) for stage, norm in zip(maps, self.norms, strict=False)]
        # The trunk's own norm is that of the last stage.
        features.append(outputs.last_hidden_state)
        joined = 0
        for stage, tokens, projection in zip(maps, features, self.projections, strict=True):
            projected = projection(tokens).transpose(1, 2).unflatten(2, stage.shape[2:])
            joined = joined + F.interpolate(projected, maps[0].shape[2:], mode="bilinear", align_corners=False)
        logits = self.classifier(F.gelu(joined))
        height, width = shared_grid(by_sensor(self.config, pixel_values, "pixel_values"))[1:]
        # Logits belong to whole patches; where the image ends inside the last one, the rest is cut off.
        logits = F.interpolate(logits, scale_factor=self.config.patch_size, mode="bilinear", align_corners=False)
        logits = logits[..., :height, :width]
        loss = None
        if labels is not None:
            wanted = (len(logits), height, width)
            if tuple(labels.shape) != wanted:
                raise ValueError(
                    f"`labels` must have shape {wanted}, one class per pixel, got {tuple(labels.shape)}. Resample them "
                    "to the image's grid with nearest neighbours."
                )
            ignored = self.config.semantic_loss_ignore_index
            # The mean over labelled pixels, and 0 rather than NaN where there is none.
            loss = F.cross_entropy(logits.float(), labels.long(), ignore_index=ignored, reduction="sum")
            loss = loss / (labels != ignored).sum().clamp(min=1)
        return self._output(loss, logits, outputs, outputs.hidden_states)


__all__ = ["MsGFMForImageClassification", "MsGFMForSemanticSegmentation"]
