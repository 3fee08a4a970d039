"""Masks of SimMIM (arXiv 2111.09886), as the paper uses them (3.2 and B.1): one per sample and sensor, the same for all
bands of a sensor, different between sensors."""

import math

import numpy as np
import torch


def draw_mask(
    height: int,
    width: int,
    patch_size: int,
    mask_patch_size: int,
    mask_ratio: float,
    generator: np.random.Generator,
) -> np.ndarray:
    """Draw a random mask of square cells.

    The image has ceil(height / mask_patch_size) x ceil(width / mask_patch_size) cells, of which
    ceil(mask_ratio * cells) are masked; each is then repeated to the embedding patches it covers. At 192 pixels with
    cells of 32 that is 22 of 36.

    Args:
        height, width: size of the image in pixels.
        patch_size: side of an embedding patch in pixels.
        mask_patch_size: side of a cell in pixels, a multiple of `patch_size`.
        mask_ratio: share of cells to mask, 0..1.
        generator: the only source of chance.

    Returns:
        bool array of ceil(height / patch_size) * ceil(width / patch_size) entries, row-major, True = masked.

    Raises:
        ValueError: if the ratio is outside 0..1.
    """
    if not 0 <= mask_ratio <= 1:
        raise ValueError(f"`mask_ratio` must be within 0..1, got {mask_ratio}. The paper masks 0.6.")
    rows, columns = math.ceil(height / mask_patch_size), math.ceil(width / mask_patch_size)
    cells = np.zeros(rows * columns, dtype=bool)
    cells[generator.permutation(cells.size)[: math.ceil(mask_ratio * cells.size)]] = True
    repeat = mask_patch_size // patch_size
    patches = cells.reshape(rows, columns).repeat(repeat, axis=0).repeat(repeat, axis=1)
    return patches[: math.ceil(height / patch_size), : math.ceil(width / patch_size)].reshape(-1)


def mask_to_pixels(mask: torch.Tensor, height: int, width: int, patch_size: int) -> torch.Tensor:
    """Spread a mask of embedding patches over their pixels.

    Args:
        mask: (B, ceil(height / patch_size) * ceil(width / patch_size)), row-major, bool or 0/1.

    Returns:
        (B, height, width), of the same type.
    """
    grid = mask.view(mask.shape[0], math.ceil(height / patch_size), math.ceil(width / patch_size))
    pixels = grid.repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)
    return pixels[:, :height, :width]


def loss_pixels(
    mask: torch.Tensor, valid_mask: torch.Tensor | None, height: int, width: int, patch_size: int
) -> torch.Tensor:
    """The pixels that count in the loss: those of the loss mask, where the target is valid.

    Args:
        mask: patches that carry the loss, as in `mask_to_pixels`.
        valid_mask: bool (B, height, width) of the target, True = valid; `None`: all are.

    Returns:
        bool (B, height, width).
    """
    pixels = mask_to_pixels(mask.to(torch.bool), height, width, patch_size)
    return pixels if valid_mask is None else pixels & valid_mask.to(torch.bool)
