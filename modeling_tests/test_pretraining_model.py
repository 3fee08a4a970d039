"""Pretraining: sources side by side in one pass of the encoder, decoded by the decoder of their target."""

import math

import pytest
import torch
from torch.nn import functional as F

import tiny_models
from msgfm_hf import SENSORS, MsGFMForPreTraining, routing_statistics
from tiny_models import BANDS

DENSE = {"moe_blocks": [[], []]}


def tiny(**fields):
    return tiny_models.tiny(MsGFMForPreTraining, deviation=0.1, **fields)


def source(*sensors, batch=2, size=(32, 32)):
    return {sensor: torch.randn(batch, BANDS[sensor], *size) for sensor in sensors}


def masks(images):
    def one(pixels):
        rows, columns = math.ceil(pixels.shape[2] / 4), math.ceil(pixels.shape[3] / 4)
        return torch.rand(len(pixels), rows * columns) < 0.6

    return {sensor: one(pixels) for sensor, pixels in images.items()}


def pixel_mask(mask, height, width):
    """A mask of patches, spread over their pixels one by one."""
    columns = math.ceil(width / 4)
    y, x = torch.arange(height) // 4, torch.arange(width) // 4
    return mask[:, (y[:, None] * columns + x).flatten()].view(len(mask), height, width).bool()


def slice_loss(prediction, target, counted):
    """Equation of section 3.4 in words: the sum of differences over the counted pixels, their number, the bands."""
    total = (prediction - target).abs().sum(1)[counted].sum()
    return total / (counted.sum() + 1e-5) / target.shape[1]


def reconstruct(model, sensor, pixels, mask, decoder):
    """One slice alone, by the parts of the model."""
    tokens = model.msgfm({sensor: pixels}, bool_masked_pos=mask).last_hidden_state
    height, width = pixels.shape[2:]
    grid = math.ceil(height / 8), math.ceil(width / 8)
    features = tokens.transpose(1, 2).unflatten(2, grid)
    return F.pixel_shuffle(model.decoders[decoder](features), 8)[..., :height, :width]


# ---------------------------------------------------------------------------------------------------- what comes out


@pytest.mark.parametrize("size", [(32, 32), (29, 43), (1, 1)])
def test_sources_are_encoded_together_as_each_would_be_alone(size):
    model = tiny()
    sources = [
        source("rgb", batch=3, size=size),
        source("s1", "s2", size=size),
        source("rgb", "dsm", batch=1, size=size),
    ]
    hidden = [masks(images) for images in sources]
    targets = [{}, {"s1": "s2", "s2": "s1"}, {"rgb": "dsm"}]
    output = model(sources, hidden, targets=targets)
    assert [list(part) for part in output.reconstruction] == [["rgb"], ["s1", "s2"], ["rgb", "dsm"]]
    for images, mask, target, found in zip(sources, hidden, targets, output.reconstruction, strict=True):
        for sensor, pixels in images.items():
            expected = reconstruct(model, sensor, pixels, mask[sensor], target.get(sensor, sensor))
            assert expected.shape == (len(pixels), BANDS[target.get(sensor, sensor)], *size)
            torch.testing.assert_close(found[sensor], expected, atol=2e-5, rtol=1e-4)
    assert output.slices == [(0, "rgb", 3), (1, "s1", 2), (1, "s2", 2), (2, "rgb", 1), (2, "dsm", 1)]


def test_the_encoder_runs_once():
    model, calls = tiny(), []
    model.msgfm.encoder.register_forward_hook(lambda module, args, output: calls.append(args[0].shape))
    sources = [source("rgb", batch=3), source("s1", "s2")]
    model(sources, [masks(images) for images in sources], targets=[{}, {"s1": "s2", "s2": "s1"}])
    assert calls == [(7, 64, 16)]


@pytest.mark.parametrize("kind", ["tensor", "dict", "list"])
def test_results_are_nested_as_the_input(kind):
    model, pixels = tiny(), source("rgb")
    mask = masks(pixels)
    nest = {"tensor": lambda d: d["rgb"], "dict": lambda d: d, "list": lambda d: [d]}[kind]
    output = model(nest(pixels), nest(mask))
    reconstruction, losses = output.reconstruction, output.slice_losses
    if kind == "list":
        assert isinstance(reconstruction, list) and isinstance(losses, list)
        reconstruction, losses = reconstruction[0], losses[0]
    if kind != "tensor":
        assert set(reconstruction) == set(losses) == {"rgb"}
        reconstruction, losses = reconstruction["rgb"], losses["rgb"]
    assert reconstruction.shape == (2, 3, 32, 32) and losses.shape == ()
    assert torch.equal(reconstruction, model(pixels["rgb"], mask["rgb"]).reconstruction)


def test_without_a_mask_nothing_is_masked_and_there_is_no_loss():
    model, pixels = tiny(), source("rgb")
    output = model(pixels)
    assert output.loss is None and output.slice_losses is None
    nothing = {"rgb": torch.zeros(2, 64, dtype=torch.bool)}
    assert torch.equal(output.reconstruction["rgb"], model(pixels, nothing).reconstruction["rgb"])


def test_the_decoders_output_is_sliced_to_the_bands_of_its_target():
    model = tiny()
    pixels, mask = {"s2": torch.randn(2, 2, 32, 32)}, {"s2": torch.rand(2, 64) < 0.6}
    output = model(pixels, mask, bands={"s2": ["B11", "B04"]})
    tokens = model.msgfm(pixels, bool_masked_pos=mask["s2"], bands={"s2": ["B11", "B04"]}).last_hidden_state
    full = F.pixel_shuffle(model.decoders["s2"](tokens.transpose(1, 2).unflatten(2, (4, 4))), 8)
    # Positions of B11 and B04 among the thirteen.
    torch.testing.assert_close(output.reconstruction["s2"], full[:, [11, 3]], atol=1e-5, rtol=1e-5)
    expected = slice_loss(output.reconstruction["s2"], pixels["s2"], pixel_mask(mask["s2"], 32, 32))
    torch.testing.assert_close(output.slice_losses["s2"], expected)


def test_each_source_has_bands_of_its_own():
    model = tiny()
    sources = [{"s2": torch.randn(1, 2, 32, 32)}, {"s2": torch.randn(1, 1, 32, 32), "rgb": torch.randn(1, 3, 32, 32)}]
    bands = [{"s2": ["B04", "B03"]}, {"s2": ["B08"]}]
    output = model(sources, bands=bands, targets=[{}, {"rgb": "s2"}])
    assert output.reconstruction[0]["s2"].shape[1] == 2
    assert output.reconstruction[1]["s2"].shape[1] == output.reconstruction[1]["rgb"].shape[1] == 1


# ---------------------------------------------------------------------------------------------------------- the loss


def test_a_step_by_pencil():
    """Decoders of zero weight predict their bias everywhere, so every number can be worked out by hand."""
    model = tiny(**DENSE)
    with torch.no_grad():
        for sensor, value in {"rgb": 1.0, "s1": 2.0, "dsm": 4.0}.items():
            model.decoders[sensor].weight.zero_()
            model.decoders[sensor].bias.fill_(value)
    sources = [
        {"rgb": torch.zeros(2, 3, 8, 8)},
        {"s1": torch.full((1, 2, 8, 8), 5.0), "dsm": torch.full((1, 1, 8, 8), -3.0)},
    ]
    hidden = [
        {"rgb": torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0]])},
        {"s1": torch.tensor([[1, 1, 0, 0]]), "dsm": torch.tensor([[1, 0, 0, 0]])},
    ]
    # Three patches of 16 pixels, three bands off by 1: 48 * 3 / (48 + 1e-5) / 3 = 1.
    # s1 -> dsm: 4 against -3 on 32 pixels of one band: 7. dsm -> s1: 2 against 5 on 16 pixels of two bands: 3.
    # 1 * 1 + 0.25 * (7 + 3) = 3.5.
    output = model(sources, hidden, targets=[{}, {"s1": "dsm", "dsm": "s1"}], weights=[1.0, 0.25])
    assert output.slice_losses[0]["rgb"].item() == pytest.approx(1, abs=1e-5)
    assert output.slice_losses[1]["s1"].item() == pytest.approx(7, abs=1e-5)
    assert output.slice_losses[1]["dsm"].item() == pytest.approx(3, abs=1e-5)
    assert output.loss.item() == pytest.approx(3.5, abs=1e-5)
    assert output.aux_loss is None
    # Without a crossing: rgb 1, s1 2 against 5, dsm 4 against -3; weights default to 1.
    assert model(sources, hidden).loss.item() == pytest.approx(1 + 3 + 7, abs=1e-5)


@pytest.mark.parametrize(
    "weights, factors",
    [
        (None, [1.0, 1.0]),
        (2.0, [2.0, 2.0]),
        ([1.0, 0.25], [1.0, 0.25]),
        ((1.0, 0.25), [1.0, 0.25]),
        (torch.tensor([1.0, 0.25]), [1.0, 0.25]),
    ],
)
def test_the_loss_is_the_weighted_sum_of_slices_and_the_experts_loss(weights, factors):
    model = tiny(router_aux_loss_coef=0.3)
    sources = [source("rgb", batch=3), source("s1", "s2")]
    hidden = [masks(images) for images in sources]
    output = model(sources, hidden, targets=[{}, {"s1": "s2"}], weights=weights)
    expected, reconstruction = 0.3 * output.aux_loss, output.reconstruction
    for index, target in enumerate([{"rgb": "rgb"}, {"s1": "s2", "s2": "s2"}]):
        for sensor, other in target.items():
            counted = pixel_mask(hidden[index][sensor], 32, 32)
            loss = slice_loss(reconstruction[index][sensor], sources[index][other], counted)
            torch.testing.assert_close(output.slice_losses[index][sensor], loss)
            expected = expected + factors[index] * loss
    assert output.loss.shape == () and output.aux_loss > 0
    torch.testing.assert_close(output.loss, expected)


def test_the_loss_counts_masked_inputs_with_valid_targets():
    model = tiny()
    pixels = source("s1", "s2", size=(29, 31))
    mask = masks(pixels)
    valid = {sensor: torch.rand(2, 29, 31) > 0.4 for sensor in pixels}
    spoilt = {s: torch.where(valid[s].unsqueeze(1), p, torch.nan) for s, p in pixels.items()}
    output = model(spoilt, mask, valid_mask=valid, targets={"s1": "s2"})
    for sensor, target in {"s1": "s2", "s2": "s2"}.items():
        counted = pixel_mask(mask[sensor], 29, 31) & valid[target]
        prediction = output.reconstruction[sensor]
        expected = slice_loss(prediction, pixels[target], counted)
        torch.testing.assert_close(output.slice_losses[sensor], expected)
        # What an input lacks does not shrink what its target is asked for.
        assert not torch.isclose(expected, slice_loss(prediction, pixels[target], counted & valid["s1"]), atol=1e-3)
    # A mask for one of two sensors is enough.
    one = model(pixels, mask, valid_mask={"s2": valid["s2"]})
    expected = slice_loss(one.reconstruction["s1"], pixels["s1"], pixel_mask(mask["s1"], 29, 31))
    torch.testing.assert_close(one.slice_losses["s1"], expected)


def test_the_loss_may_lie_elsewhere_than_the_mask():
    model, pixels = tiny(), source("s1", "s2")
    mask, everywhere = masks(pixels), {sensor: torch.ones(2, 64) for sensor in pixels}
    plain = model(pixels, mask, targets={"s1": "s2", "s2": "s1"})
    output = model(pixels, mask, targets={"s1": "s2", "s2": "s1"}, bool_loss_pos=everywhere)
    assert torch.equal(output.reconstruction["s1"], plain.reconstruction["s1"])
    torch.testing.assert_close(
        output.slice_losses["s1"], (output.reconstruction["s1"] - pixels["s2"]).abs().mean(), atol=1e-5, rtol=1e-4
    )
    assert not torch.isclose(plain.slice_losses["s1"], output.slice_losses["s1"], atol=1e-3)


def test_an_image_without_a_valid_pixel_has_loss_0():
    model = tiny().train()
    pixels, mask = source("rgb"), {"rgb": torch.ones(2, 64)}
    nothing = {"rgb": torch.zeros(2, 32, 32, dtype=torch.bool)}
    output = model({"rgb": pixels["rgb"] * torch.nan}, mask, valid_mask=nothing)
    assert output.slice_losses["rgb"].item() == 0
    output.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    # In a batch it neither adds to the loss nor thins it.
    half = {"rgb": torch.ones(2, 32, 32, dtype=torch.bool)}
    half["rgb"][0] = False
    model.eval()
    together = model(pixels, mask, valid_mask=half).slice_losses["rgb"]
    alone = model({"rgb": pixels["rgb"][1:]}, {"rgb": mask["rgb"][1:]}).slice_losses["rgb"]
    torch.testing.assert_close(together, alone)


def test_masked_pixels_are_not_seen():
    model, pixels = tiny(), source("rgb")
    mask = masks(pixels)
    hidden = pixel_mask(mask["rgb"], 32, 32).unsqueeze(1)
    other = {"rgb": torch.where(hidden, torch.randn(2, 3, 32, 32) * 9, pixels["rgb"])}
    assert torch.equal(model(pixels, mask).reconstruction["rgb"], model(other, mask).reconstruction["rgb"])
    assert model(pixels, mask).loss != model(other, mask).loss


@pytest.mark.parametrize("targets", [None, {"s1": "s2", "s2": "s1"}])
def test_every_decoder_of_a_source_learns(targets):
    """One crossing for both directions leaves no parameter of a present sensor without a gradient."""
    model = tiny(sensors={sensor: SENSORS[sensor].to_dict() for sensor in ("s1", "s2")}, capacity_factor=None).train()
    pixels = source("s1", "s2")
    model(pixels, masks(pixels), targets=targets).loss.backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    for sensor in pixels:
        assert model.decoders[sensor].weight.grad.abs().sum() > 0
        assert model.msgfm.embeddings.patch_embeddings[sensor].projection.weight.grad.abs().sum() > 0


def test_experts_are_chosen_once_over_the_whole_mixed_batch():
    model = tiny(capacity_factor=1.0, router_noise=0.0).train()
    sources = [source("rgb", batch=3, size=(37, 29)), source("s1", "s2", size=(37, 29))]
    output = model(sources, [masks(images) for images in sources], output_router_logits=True, output_hidden_states=True)
    # 7 images of 5 x 4 final tokens; an expert takes at most ceil(140 / 4) = 35.
    assert output.router_logits[0].shape == (140, 4) and output.selected_experts[0].shape == (140, 1)
    assert output.selected_experts[0].flatten().bincount(minlength=5)[:4].max() == 35
    assert [h.shape[0] for h in output.hidden_states] == [7, 7, 7]
    assert set(routing_statistics(output, model.config)) == {"rgb", "s1", "s2"}


def test_an_image_does_not_see_its_batch_mates_or_other_sources():
    model = tiny()
    sources = [source("rgb", batch=3), source("rgb", "dsm")]
    hidden = [masks(images) for images in sources]
    together = model(sources, hidden).reconstruction[1]["rgb"]
    alone = model({"rgb": sources[1]["rgb"][:1]}, {"rgb": hidden[1]["rgb"][:1]}).reconstruction["rgb"]
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------------------- what is refused

RGB, PAIR = torch.zeros(2, 3, 32, 32), {"s1": torch.zeros(2, 2, 32, 32), "s2": torch.zeros(2, 13, 32, 32)}
MASK, PAIR_MASK = torch.ones(2, 64), {"s1": torch.ones(2, 64), "s2": torch.ones(2, 64)}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"pixel_values": []}, "`pixel_values` must be given"),
        ({"pixel_values": [{}]}, r"`pixel_values` must be a tensor or a dictionary \{sensor: tensor\}"),
        ({"pixel_values": [RGB, "s2.tif"]}, "`pixel_values` must be a tensor or a dictionary"),
        ({"pixel_values": PAIR, "bool_masked_pos": MASK}, r"`bool_masked_pos` must be nested as `pixel_values`"),
        (
            {"pixel_values": PAIR, "bool_masked_pos": {"s1": MASK}},
            r"`bool_masked_pos` must be nested as `pixel_values` \(\[\['s1', 's2'\]\]\), got \[\['s1'\]\]",
        ),
        (
            {"pixel_values": PAIR, "bool_masked_pos": PAIR_MASK, "bool_loss_pos": {"s2": MASK}},
            "`bool_loss_pos` must be nested as `pixel_values`",
        ),
        (
            {"pixel_values": RGB, "bool_masked_pos": MASK, "bool_loss_pos": torch.ones(2, 63)},
            r"`bool_loss_pos`.*\(2, 64\).*\(2, 63\)",
        ),
        ({"pixel_values": RGB, "bool_masked_pos": torch.ones(2, 63)}, r"`bool_masked_pos` must have shape \(2, 64\)"),
        (
            {"pixel_values": [{"rgb": RGB}, PAIR], "valid_mask": [{"rgb": torch.ones(2, 32, 32)}]},
            r"`valid_mask` must have one entry per source \(2\), got 1",
        ),
        ({"pixel_values": [{"rgb": RGB}, PAIR], "bands": [{}]}, r"`bands` must have one entry per source \(2\), got 1"),
        ({"pixel_values": PAIR, "weights": [1.0, 2.0]}, r"`weights` must have one entry per source \(1\), got 2"),
        (
            {"pixel_values": [{"rgb": RGB}, PAIR], "targets": {"s1": "s2"}},
            r"`targets` must have one entry per source \(2\), got 1",
        ),
        ({"pixel_values": PAIR, "targets": {"s1": "dsm"}}, r"`targets` must map .* \(s1, s2\), got 's1' -> 'dsm'"),
        ({"pixel_values": PAIR, "targets": {"rgb": "s2"}}, r"`targets` must map .* \(s1, s2\), got 'rgb' -> 's2'"),
        (
            {"pixel_values": [{"rgb": RGB}, {"dsm": torch.zeros(2, 1, 32, 40)}]},
            r"must have one height and width, got token grids \(8, 8\) and \(8, 10\) \(sensor 'dsm' of source 1\)",
        ),
        # Pairs are paired row by row: broadcasting one row over two would be a loss of other places.
        (
            {
                "pixel_values": {"s1": PAIR["s1"][:1], "s2": PAIR["s2"]},
                "bool_masked_pos": {"s1": MASK[:1], "s2": MASK},
                "targets": {"s1": "s2"},
            },
            "`pixel_values`.*'s[12]'",
        ),
    ],
)
def test_what_does_not_agree_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny()(**arguments)
