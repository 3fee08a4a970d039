"""The task heads: losses against torch's, what counts in them, and when the experts' loss joins."""

import pytest
import torch
from torch.nn import functional as F

import tiny_models
from msgfm_hf import SENSORS, MsGFMForImageClassification, MsGFMForSemanticSegmentation


def tiny(cls, **fields):
    return tiny_models.tiny(cls, deviation=0.1, **{"num_labels": 3, **fields})


# --------------------------------------------------------------------------------------------------- classification


def test_classification_is_linear_on_the_pooled_features():
    model = tiny(MsGFMForImageClassification)
    images, labels = torch.randn(4, 3, 37, 29), torch.tensor([0, 2, 1, 1])
    output = model(images, labels=labels)
    pooled = model.msgfm(images).pooler_output
    torch.testing.assert_close(output.logits, pooled @ model.classifier.weight.t() + model.classifier.bias)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels))
    assert model(images).loss is None


def test_several_labels_at_once():
    model = tiny(MsGFMForImageClassification, problem_type="multi_label_classification")
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    output = model(images, labels=labels)
    torch.testing.assert_close(output.loss, F.binary_cross_entropy_with_logits(output.logits, labels))


def test_regression_of_one_number():
    model = tiny(MsGFMForImageClassification, num_labels=1)
    images, labels = torch.randn(3, 3, 32, 32), torch.tensor([0.5, -2.0, 7.0])
    output = model(images, labels=labels)
    torch.testing.assert_close(output.loss, F.mse_loss(output.logits.squeeze(1), labels))


def test_classification_passes_on_sensors_bands_masks_and_what_is_asked_for():
    bands = {sensor: SENSORS[sensor].band_names for sensor in ("s1", "s2", "dsm")}
    model = tiny(MsGFMForImageClassification, inputs=bands)
    pixels = {"s2": torch.randn(2, 2, 32, 32), "s1": torch.randn(2, 2, 32, 32)}
    valid = {"s1": torch.rand(2, 32, 32) > 0.5}
    arguments = {"bands": {"s2": ["B04", "B08"]}, "valid_mask": valid}
    output = model(
        pixels, **arguments, output_hidden_states=True, output_router_logits=True, reference={"dsm": torch.zeros(2)}
    )
    torch.testing.assert_close(output.logits, model.classifier(model.msgfm(pixels, **arguments).pooler_output))
    assert len(output.hidden_states) == 3 and len(output.router_logits) == 1 and output.aux_loss is not None


# ----------------------------------------------------------------------------------------------------- segmentation


def test_segmentation_joins_all_stages_at_the_resolution_of_the_first():
    model = tiny(MsGFMForSemanticSegmentation)
    images = torch.randn(2, 3, 64, 40)
    output = model(images)
    maps = model.msgfm(images, output_hidden_states=True).reshaped_hidden_states[1:]
    joined = 0
    assert len(maps) == len(model.norms) + 1
    # The last stage has the norm of the trunk, which a checkpoint brings along.
    for features, norm, projection in zip(maps, [*model.norms, model.msgfm.layernorm], model.projections, strict=True):
        features = projection(norm(features.movedim(1, -1))).movedim(-1, 1)
        joined = joined + F.interpolate(features, (16, 10), mode="bilinear", align_corners=False)
    expected = torch.einsum("bdhw,ld->blhw", F.gelu(joined), model.classifier.weight[:, :, 0, 0])
    expected = expected + model.classifier.bias[None, :, None, None]
    expected = F.interpolate(expected, scale_factor=4, mode="bilinear", align_corners=False)
    torch.testing.assert_close(output.logits, expected)
    assert output.loss is None and output.hidden_states is None
    # Either stage reaches the logits.
    for projection in model.projections:
        with torch.no_grad():
            projection.weight.zero_()
        assert not torch.allclose(model(images).logits, output.logits, atol=1e-4)


def segmentation_loss(logits, labels):
    """The mean over the pixels that count."""
    height, width = labels.shape[1:]
    losses = [
        -logits[b, :, y, x].log_softmax(0)[labels[b, y, x]]
        for b in range(len(labels))
        for y in range(height)
        for x in range(width)
        if labels[b, y, x] != 255
    ]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("height, width", [(16, 16), (13, 7), (1, 1)])
def test_segmentation_loss_at_any_size(height, width):
    model = tiny(MsGFMForSemanticSegmentation)
    images, labels = torch.randn(2, 3, height, width), torch.randint(0, 3, (2, height, width))
    output = model(images, labels=labels)
    assert output.logits.shape == (2, 3, height, width)
    torch.testing.assert_close(output.loss, segmentation_loss(output.logits, labels))


def test_what_a_patch_says_stays_where_the_patch_is():
    """An image that ends inside a patch is not stretched: its logits are those of whole patches, cut."""
    model = tiny(MsGFMForSemanticSegmentation)
    images = torch.randn(1, 3, 29, 31)
    padded, valid = F.pad(images, (0, 1, 0, 3)), F.pad(torch.ones(1, 29, 31, dtype=torch.bool), (0, 1, 0, 3))
    whole = model(padded, valid_mask=valid).logits
    torch.testing.assert_close(model(images).logits, whole[..., :29, :31])


def test_the_ignored_label_counts_nowhere():
    model = tiny(MsGFMForSemanticSegmentation)
    images, labels = torch.randn(2, 3, 12, 12), torch.randint(0, 3, (2, 12, 12))
    labels[0, :5], labels[1, 3] = 255, 255
    output = model(images, labels=labels)
    torch.testing.assert_close(output.loss, segmentation_loss(output.logits, labels))
    # Which label that is can be chosen.
    model.config.semantic_loss_ignore_index = 0
    nothing_is_0 = torch.where(labels == 255, 0, labels)
    expected = segmentation_loss(output.logits, torch.where(nothing_is_0 == 0, 255, nothing_is_0))
    torch.testing.assert_close(model(images, labels=nothing_is_0).loss, expected)
    model.config.semantic_loss_ignore_index = 255
    # The type of the labels does not matter.
    torch.testing.assert_close(model(images, labels=labels.to(torch.uint8)).loss, output.loss)


def test_an_image_without_a_label_has_loss_0():
    """A crop outside the labelled area is common; not-a-number would end the training."""
    model = tiny(MsGFMForSemanticSegmentation, moe_blocks=[[], []]).train()
    loss = model(torch.randn(1, 3, 32, 32), labels=torch.full((1, 32, 32), 255)).loss
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("shape", [(2, 8, 8), (2, 40, 40), (2, 32), (1, 32, 32), (2, 1, 32, 32)])
def test_labels_of_another_size_are_refused(shape):
    """Fewer would pass for the corner of the image."""
    model = tiny(MsGFMForSemanticSegmentation)
    with pytest.raises(ValueError, match=r"`labels`.*\(2, 32, 32\)"):
        model(torch.randn(2, 3, 32, 32), labels=torch.zeros(shape, dtype=torch.long))


def test_hidden_states_come_out_where_asked_for_only():
    images = torch.randn(1, 3, 32, 32)
    model = tiny(MsGFMForSemanticSegmentation)
    assert model(images).hidden_states is None
    assert len(model(images, output_hidden_states=True).hidden_states) == 3
    assert len(tiny(MsGFMForSemanticSegmentation, output_hidden_states=True)(images).hidden_states) == 3


# ------------------------------------------------------------------------------------------------------------- both


@pytest.mark.parametrize("cls", [MsGFMForImageClassification, MsGFMForSemanticSegmentation])
def test_the_experts_loss_joins_in_training_only(cls):
    # Without noise and capacity, training and evaluation route alike.
    model = tiny(cls, router_noise=0.0, capacity_factor=None, router_aux_loss_coef=0.5)
    images = torch.randn(2, 3, 32, 32)
    labels = torch.tensor([0, 2]) if cls is MsGFMForImageClassification else torch.randint(0, 3, (2, 32, 32))
    evaluated, trained = model(images, labels=labels), model.train()(images, labels=labels)
    torch.testing.assert_close(trained.logits, evaluated.logits)
    assert trained.aux_loss > 0.001
    torch.testing.assert_close(trained.loss, evaluated.loss + 0.5 * trained.aux_loss)
    dense = tiny(cls, moe_blocks=[[], []]).train()(images, labels=labels)
    assert dense.aux_loss is None and dense.loss.isfinite()


@pytest.mark.parametrize("cls", [MsGFMForImageClassification, MsGFMForSemanticSegmentation])
def test_every_parameter_of_a_head_learns(cls):
    model = tiny(cls).train()
    labels = torch.tensor([0, 2]) if cls is MsGFMForImageClassification else torch.randint(0, 3, (2, 32, 32))
    model(torch.randn(2, 3, 32, 32), labels=labels).loss.backward()
    # The final norm belongs to the pooled features, and stems to their sensors.
    idle = ("msgfm.layernorm", "mask_token", "patch_embeddings.dsm", "patch_embeddings.s1", "patch_embeddings.s2")
    for name, parameter in model.named_parameters():
        if not any(part in name for part in idle):
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("cls", [MsGFMForImageClassification, MsGFMForSemanticSegmentation])
def test_late_fusion_widens_the_head(cls):
    model = tiny(cls, fusion="late", inputs={"s2": ["B04", "B03"], "dsm": ["height"]})
    images = {"dsm": torch.randn(2, 1, 32, 32), "s2": torch.randn(2, 2, 32, 32)}
    both = model(images).logits
    assert both.shape[1] == 3
    assert not torch.allclose(model({"s2": images["s2"]}).logits, both, atol=1e-4)


def test_segmentation_wants_two_classes():
    with pytest.raises(ValueError, match="`num_labels` must be at least 2 for segmentation, got 1. What is left over"):
        tiny(MsGFMForSemanticSegmentation, num_labels=1)


@pytest.mark.parametrize("cls", [MsGFMForImageClassification, MsGFMForSemanticSegmentation])
@pytest.mark.parametrize("fusion", ["early", "late"])
def test_a_head_refuses_sensors_it_was_not_made_for(cls, fusion):
    model = tiny(cls, inputs={"s1": ["VV", "VH"], "dsm": ["height"]}, fusion=fusion)
    assert model({"s1": torch.randn(1, 2, 16, 16)}).logits.isfinite().all()
    with pytest.raises(
        ValueError, match=r"must be of `config.inputs` \(dsm, s1\), which heads .* got 'rgb'. For other"
    ):
        model({"s1": torch.randn(1, 2, 16, 16), "rgb": torch.randn(1, 3, 16, 16)})
