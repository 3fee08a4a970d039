"""AdamW with the parameter groups of the paper's reading: which parameters decay, and which learn more slowly."""

from collections.abc import Sequence

import torch

from msgfm_hf.model.modeling_msgfm import MsGFMForPreTraining
from msgfm_hf.train.recipe import Recipe


def source_weights(batch_sizes: Sequence[int], source_sensors: Sequence[Sequence[str]]) -> list[float]:
    """B_s / B_ref for every source, B_ref the largest: how Table 10's learning rates of {1e-4, 0.25e-4, 1e-5} for
    sub-batches of {128, 32, 12} read under one optimiser step.

    Sources of the same sensors are parts of one sub-batch, as GeoPile and MillionAID are of the paper's RGB: B_ref is
    the largest of their sums.
    """
    together: dict[tuple[str, ...], int] = {}
    for size, sensors in zip(batch_sizes, source_sensors, strict=True):
        together[tuple(sorted(sensors))] = together.get(tuple(sorted(sensors)), 0) + size
    return [size / max(together.values()) for size in batch_sizes]


def learning_rate_scales(source_sensors: Sequence[Sequence[str]], weights: Sequence[float]) -> dict[str, float]:
    """Per sensor, what its own embedding and decoder multiply the learning rate by.

    AdamW is indifferent to the scale of a loss, so a source's weight would be lost on parameters that this source alone
    feeds; their learning rate carries it instead. A sensor of several sources keeps the full rate.
    """
    feeding: dict[str, list[float]] = {}
    for sensors, weight in zip(source_sensors, weights, strict=True):
        for sensor in sensors:
            feeding.setdefault(sensor, []).append(weight)
    return {sensor: found[0] if len(found) == 1 else 1.0 for sensor, found in feeding.items()}


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay applies: to matrices and kernels; not to biases, norms, the mask token, tables and networks
    of position biases, and the scale of cosines (the last two as in SwinV2)."""
    last = name.rsplit(".", 1)[-1]
    spared = "bias" in last or "continuous_position_bias_mlp" in name or last in ("mask_token", "logit_scale")
    return parameter.ndim > 1 and not spared


def build_optimizer(
    model: MsGFMForPreTraining, recipe: Recipe, source_sensors: Sequence[Sequence[str]], weights: Sequence[float]
) -> torch.optim.AdamW:
    """AdamW over all parameters; each group carries its `lr_scale`."""
    scales = learning_rate_scales(source_sensors, weights)
    groups: dict[tuple[float, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        path = name.split(".")
        owner = next((path[i + 1] for i, part in enumerate(path) if part in ("patch_embeddings", "decoders")), None)
        groups.setdefault((scales.get(owner, 1.0), decays(name, parameter)), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr_scale": scale, "weight_decay": recipe.weight_decay if decay else 0.0}
            for (scale, decay), parameters in sorted(groups.items(), key=lambda item: item[0])
        ],
        lr=recipe.learning_rate,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        eps=recipe.adam_epsilon,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float):
    """Give every group its share of the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_scale"]
