"""Equations 1 and 2, the losses and the masks of the paper, against pencil arithmetic and plain loops."""

import math

import numpy as np
import pytest
import torch

from msgfm_hf.model.masking import draw_mask, mask_to_pixels
from msgfm_hf.model.objective import (
    coefficient_of_variation_squared,
    importance_load_loss,
    masked_l1,
    predict_targets,
    pretraining_loss,
)

# ------------------------------------------------------------------------------------------------ equations 1 and 2

FEATURES = {"i": torch.tensor([1.0]), "j": torch.tensor([10.0])}
DECODERS = {"i": lambda z: 2 * z, "j": lambda z: 3 * z}


@pytest.mark.parametrize(
    "targets, expected",
    [
        # Equation 1, own side of both "or": I'_i = D_i(z_i) = 2 * 1, I'_j = D_j(z_j) = 3 * 10.
        ({"i": "i", "j": "j"}, {"i": 2.0, "j": 30.0}),
        # The crossing: I'_j = D_j(z_i) = 3 * 1 from i, I'_i = D_i(z_j) = 2 * 10 from j.
        ({"i": "j", "j": "i"}, {"i": 3.0, "j": 20.0}),
        # One side each: I'_j twice, from both.
        ({"i": "j", "j": "j"}, {"i": 3.0, "j": 30.0}),
    ],
)
def test_equation_1(targets, expected):
    predictions = predict_targets(FEATURES, DECODERS, targets)
    assert {sensor: value.item() for sensor, value in predictions.items()} == expected


def test_equation_2():
    # A sensor without a partner: I'_i = D_i(z_i) = 2 * 1.
    assert predict_targets({"i": FEATURES["i"]}, DECODERS, {"i": "i"})["i"].item() == 2.0


# ----------------------------------------------------------------------------------------------------------- losses


def test_masked_l1_by_hand():
    # Two images of two bands and 1 x 2 pixels. Differences |I' - I|:
    #   image 0: band 0 (1, 2), band 1 (3, 4), masked: left pixel           -> 1 + 3 = 4
    #   image 1: band 0 (5, 6), band 1 (7, 8), masked: both                 -> 5 + 6 + 7 + 8 = 26
    # Three masked pixels, two bands: (4 + 26) / (3 + 1e-5) / 2 = 4.9999833...
    prediction = torch.tensor([[[[1.0, -2.0]], [[3.0, 4.0]]], [[[5.0, 6.0]], [[-7.0, 8.0]]]])
    mask = torch.tensor([[[1, 0]], [[1, 1]]])
    loss = masked_l1(prediction, torch.zeros_like(prediction), mask)
    assert loss.item() == pytest.approx(30 / 3.00001 / 2, rel=1e-6)
    # The normaliser is the batch's: the mean of the images' own losses, (4/1 + 26/2) / 2 / 2 = 4.25, is not it.
    assert loss.item() != pytest.approx(4.25, rel=1e-2)
    assert masked_l1(prediction, torch.zeros_like(prediction), mask.bool()).item() == loss.item()


def test_masked_l1_of_nothing_is_zero_and_has_a_gradient():
    prediction = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = masked_l1(prediction, torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and torch.equal(prediction.grad, torch.zeros_like(prediction))


def test_masked_l1_adds_up_in_float32():
    # 61 * 61 = 3721 ones: bfloat16 has 8 bits, and a sum or a count kept in it would be 3728.
    prediction = torch.ones(1, 1, 61, 61, dtype=torch.bfloat16)
    loss = masked_l1(prediction, torch.zeros_like(prediction), torch.ones(1, 61, 61))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(1, rel=1e-6)


def test_pretraining_loss_by_hand():
    # 1 * 2 + 0.25 * (4 + 8) + 0.01 * 50 = 5.5
    losses = [{"rgb": torch.tensor(2.0)}, {"s1": torch.tensor(4.0), "s2": torch.tensor(8.0)}]
    assert pretraining_loss(losses, [1.0, 0.25], torch.tensor(50.0), 0.01).item() == pytest.approx(5.5)
    assert pretraining_loss(losses, [1.0, 0.25], None, 0.01).item() == 5.0


def test_coefficient_of_variation_by_hand():
    # Mean 4, unbiased variance (4 + 0 + 4) / 2 = 4, 4 / 16.
    assert coefficient_of_variation_squared(torch.tensor([2.0, 4.0, 6.0])).item() == pytest.approx(0.25)
    assert coefficient_of_variation_squared(torch.tensor([3.0, 3.0])).item() == 0
    assert coefficient_of_variation_squared(torch.tensor([3.0])).item() == 0


# Softmax: (3/4, 1/4) and (1/2, 1/2).
LOGITS = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
# Importance (5/4, 3/4): mean 1, unbiased variance (1/16 + 1/16) / 1, squared coefficient of variation 1/8.
IMPORTANCE = 0.125


def test_importance_load_loss_by_hand():
    # Noise 2 over two experts: standard deviation 1. With thresholds 1/4 and 1/2 the arguments of Phi are
    # (1/2, 0) and (0, 0); Phi(0) = 0.5 and, from a printed table, Phi(0.5) = 0.69146.
    # Load (1.19146, 1): mean 1.09573, variance 0.19146^2 / 2 = 0.0183285, squared coefficient 0.0152661.
    # (0.125 + 0.0152661) / 2 = 0.0701330.
    loss = importance_load_loss(LOGITS, 2.0, torch.tensor([0.25, 0.5]))
    assert loss.item() == pytest.approx(0.0701330, abs=2e-6)


def test_importance_alone_remains_without_noise():
    logits = LOGITS.clone().requires_grad_()
    loss = importance_load_loss(logits, 0.0, torch.tensor([0.25, 0.5]))
    loss.backward()
    assert loss.item() == pytest.approx(IMPORTANCE)
    assert logits.grad.isfinite().all() and logits.grad.abs().sum() > 0


def test_even_experts_cost_nothing():
    logits = torch.zeros(5, 4)
    assert importance_load_loss(logits, 1.0, logits[:, 0]).item() == pytest.approx(0, abs=1e-9)


# ------------------------------------------------------------------------------------------------------------ masks


def test_the_paper_masks_22_of_36_cells():
    mask = draw_mask(192, 192, 4, 32, 0.6, np.random.default_rng(0))
    assert mask.dtype == bool and mask.shape == (48 * 48,)
    cells = mask.reshape(6, 8, 6, 8)
    assert (cells == cells[:, :1, :, :1]).all()
    assert cells[:, 0, :, 0].sum() == 22


@pytest.mark.parametrize("ratio, cells", [(0, 0), (0.01, 1), (0.5, 2), (0.6, 3), (1, 4)])
def test_the_number_of_masked_cells_is_rounded_up(ratio, cells):
    assert draw_mask(32, 32, 4, 16, ratio, np.random.default_rng(0)).sum() == cells * 16


def test_sizes_that_do_not_divide_keep_the_part_inside():
    # 37 x 61 pixels: 10 x 16 patches of 4, 3 x 4 cells of 16, of which ceil(0.6 * 12) = 8 are masked.
    for seed in range(20):
        mask = draw_mask(37, 61, 4, 16, 0.6, np.random.default_rng(seed)).reshape(10, 16)
        corners = mask[::4, ::4]
        assert corners.sum() == 8
        for row in range(10):
            for column in range(16):
                assert mask[row, column] == corners[row // 4, column // 4]


def test_one_pixel_is_one_cell():
    assert draw_mask(1, 1, 4, 32, 0.6, np.random.default_rng(0)).tolist() == [True]


def test_the_generator_is_the_only_source_of_chance():
    first = draw_mask(96, 96, 4, 16, 0.6, np.random.default_rng(3))
    np.random.seed(1)
    assert (first == draw_mask(96, 96, 4, 16, 0.6, np.random.default_rng(3))).all()
    generator = np.random.default_rng(3)
    draws = [draw_mask(96, 96, 4, 16, 0.6, generator).reshape(24, 24)[::4, ::4] for _ in range(200)]
    assert (draws[0] != draws[1]).any()
    # Every cell is masked with probability 22/36: 200 draws have a standard error of 0.034.
    assert np.abs(np.mean(draws, axis=0) - 22 / 36).max() < 5 * 0.0345


@pytest.mark.parametrize("ratio", [-0.1, 1.01, float("nan")])
def test_a_ratio_outside_0_to_1_is_refused(ratio):
    with pytest.raises(ValueError, match=r"`mask_ratio` must be within 0..1, got"):
        draw_mask(32, 32, 4, 16, ratio, np.random.default_rng(0))


@pytest.mark.parametrize("height, width", [(8, 12), (7, 13), (1, 1)])
def test_a_mask_of_patches_covers_its_pixels(height, width):
    rows, columns = math.ceil(height / 4), math.ceil(width / 4)
    mask = torch.rand(2, rows * columns) < 0.5
    pixels = mask_to_pixels(mask, height, width, 4)
    assert pixels.dtype == torch.bool and pixels.shape == (2, height, width)
    for sample in range(2):
        for y in range(height):
            for x in range(width):
                assert pixels[sample, y, x] == mask[sample, (y // 4) * columns + x // 4]
