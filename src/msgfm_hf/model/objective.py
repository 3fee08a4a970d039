"""The paper's equations as functions: what is predicted from what (equations 1 and 2), how far off it is (the L1 loss
of 3.4 with SimMIM's normaliser), and the auxiliary loss that keeps the experts busy."""

from collections.abc import Callable, Mapping

import torch


def predict_targets(
    features: Mapping[str, torch.Tensor],
    decoders: Mapping[str, Callable[[torch.Tensor], torch.Tensor]],
    targets: Mapping[str, str],
) -> dict[str, torch.Tensor]:
    """Equations 1 and 2 of the paper.

    With z_i = En(f_i(I_i)) the encoded features of sensor i, equation 1 predicts for a pair (i, j)

        I'_i = D_i(z_i)  or  I'_j = D_j(z_i),   and   I'_j = D_j(z_j)  or  I'_i = D_i(z_j);

    `targets` says which side of each "or" is taken. A sensor without a partner has itself as its target, which is
    equation 2: I'_i = D_i(z_i).

    Args:
        features: {input sensor i: z_i}.
        decoders: {sensor: D}.
        targets: {input sensor: sensor whose decoder reads its features}.

    Returns:
        {input sensor: prediction of its target}.
    """
    return {sensor: decoders[targets[sensor]](z) for sensor, z in features.items()}


def masked_l1(
    prediction: torch.Tensor,
    target: torch.Tensor,
    mask: torch.Tensor,
    num_pixels: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """The reconstruction loss of one sensor (paper 3.4; normaliser as in SimMIM, over the whole batch):

        L = sum_{b,c,y,x} |I' - I| m  /  (sum_{b,y,x} m + 1e-5)  /  C.

    Pixels are counted once for all bands, hence the division by C; a batch without a counted pixel has loss 0.

    Args:
        prediction, target: (B, C, H, W).
        mask: (B, H, W), bool or 0/1, 1 = counts (masked in the input, valid in the target).
        num_pixels: instead of sum m, for one of several parts of a batch: the mean of sum m over the parts, so that the
            mean of their losses is the loss of the whole.

    Returns:
        scalar, float32.
    """
    mask = mask.to(torch.float32)
    difference = (prediction.float() - target.float()).abs() * mask.unsqueeze(1)
    return difference.sum() / ((mask.sum() if num_pixels is None else num_pixels) + 1e-5) / target.shape[1]


def coefficient_of_variation_squared(values: torch.Tensor) -> torch.Tensor:
    """var(values) / (mean(values)^2 + 1e-10), the variance unbiased; 0 when all are equal (or there is only one)."""
    if values.numel() < 2:
        return values.new_zeros(())
    return values.var() / (values.mean() ** 2 + 1e-10)


def importance_load_loss(
    router_logits: torch.Tensor, router_noise: float, router_threshold: torch.Tensor
) -> torch.Tensor:
    """The auxiliary loss of Swin-MoE and Tutel, after "Outrageously large neural networks" (arXiv 1701.06538):

        (importance + load) / 2,   each the squared coefficient of variation over the E experts of
        importance_e = sum_t p_te,   p = softmax(router_logits),
        load_e       = sum_t Phi((p_te - threshold_t) / (router_noise / E)).

    Phi is the normal distribution function: load_e is a smooth count of the tokens that noise would send to expert e.
    Like the reference implementation this compares a probability with the noisy *logit* of the last expert chosen
    (`threshold`). Without noise load has no gradient, and importance alone remains.

    Args:
        router_logits: (T, E), without noise.
        router_noise: as in the configuration; the noise has standard deviation `router_noise` / E.
        router_threshold: (T,), the K-th largest logit (with noise, in training) of each token.

    Returns:
        scalar; 0 for perfectly even experts.
    """
    probabilities = router_logits.softmax(-1)
    importance = coefficient_of_variation_squared(probabilities.sum(0))
    if router_noise == 0:
        return importance
    sigma = router_noise / router_logits.shape[-1]
    load = torch.special.ndtr((probabilities - router_threshold.unsqueeze(-1)) / sigma).sum(0)
    return (importance + coefficient_of_variation_squared(load)) / 2


def gshard_loss(noisy_logits: torch.Tensor) -> torch.Tensor:
    """The auxiliary loss of GShard (arXiv 2006.16668) as Tutel has it: E * sum_e mean_t(p_te) * mean_t(first_te).

    p = softmax(noisy_logits), and first_te is 1 where expert e is the first choice of token t. Only p has a gradient.

    Args:
        noisy_logits: (T, E), with the noise of training, if any.

    Returns:
        scalar; 1 for perfectly even experts.
    """
    probabilities = noisy_logits.softmax(-1)
    first = torch.nn.functional.one_hot(probabilities.argmax(-1), noisy_logits.shape[-1])
    return noisy_logits.shape[-1] * (probabilities.mean(0) * first.to(probabilities.dtype).mean(0)).sum()


def pretraining_loss(
    slice_losses: list[dict[str, torch.Tensor]],
    weights: list[float],
    aux_loss: torch.Tensor | None,
    router_aux_loss_coef: float,
) -> torch.Tensor:
    """The loss of one step (paper 3.4): L = sum over sources of weight * sum over its sensors of L_MIM + lambda L_aux.

    Args:
        slice_losses: one {input sensor: scalar} per source.
        weights: one per source.
        aux_loss: the auxiliary loss, summed over the blocks with experts; `None` if there is none.
        router_aux_loss_coef: lambda, 0.01 in the paper.
    """
    loss = sum(weight * sum(losses.values()) for weight, losses in zip(weights, slice_losses, strict=True))
    return loss if aux_loss is None else loss + router_aux_loss_coef * aux_loss
