"""Position biases for another window than they were learned with."""

import math

import numpy as np
import torch


def resize_table(table: torch.Tensor, window: int) -> torch.Tensor:
    """A table of position biases for another window, as SimMIM does when it fine-tunes (`remap_pretrained_keys_swin`).

    The rows of the old table are taken to lie at offsets that grow geometrically from the centre, by the ratio that
    lets them span the new ones; through them runs a cubic spline in both directions, read at the new offsets. SciPy's
    `interp2d`, which SimMIM calls, is gone; where offsets lie outside the old ones it read the rim, as is done here.

    Args:
        table: ((2 w - 1)^2, heads), w at least 3.
        window: the new window.

    Returns:
        ((2 window - 1)^2, heads), float32.

    Raises:
        ImportError: if SciPy is not installed.
        ValueError: for a table too small for a cubic spline.
    """
    old, new = math.isqrt(len(table)), 2 * window - 1
    if old == new:
        return table
    if old < 4:
        raise ValueError(
            f"`--window-size` must be that of the source where it is below 3, got {window} for {(old + 1) // 2}. "
            "Leave it out."
        )
    try:
        from scipy.interpolate import RectBivariateSpline
    except ImportError as error:
        raise ImportError(
            "`--window-size` needs SciPy to resize position biases, got no such package. "
            'Run pip install "msgfm_hf[convert]".'
        ) from error
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio ** (old // 2)) / (1 - ratio) > new // 2:
            high = ratio
        else:
            low = ratio
    # `ratio` is the last one tried, not the middle of what is left: so it is in SimMIM.
    distances = np.cumsum([ratio**step for step in range(old // 2)])
    positions = np.concatenate([-distances[::-1], [0.0], distances])
    wanted = np.arange(-(new // 2), new // 2 + 1).clip(positions[0], positions[-1])
    heads = []
    for head in table.float().T.numpy():
        spline = RectBivariateSpline(positions, positions, head.reshape(old, old))
        heads.append(torch.from_numpy(spline(wanted, wanted)).float().flatten())
    return torch.stack(heads, 1)


def centre_table(table: torch.Tensor, window: int) -> torch.Tensor:
    """A table of small windows inside that of larger ones: the same biases for the offsets it knows, and for farther
    ones those of the rim.

    Args:
        table: ((2 w - 1)^2, heads).
        window: at least w.

    Returns:
        ((2 window - 1)^2, heads).
    """
    old, new = math.isqrt(len(table)), 2 * window - 1
    nearest = (torch.arange(new) - (new - old) // 2).clamp(0, old - 1)
    return table.view(old, old, -1)[nearest][:, nearest].flatten(0, 1)
