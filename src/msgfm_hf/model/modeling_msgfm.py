# Copyright 2026 The msgfm_hf contributors. Licensed under the Apache License, Version 2.0.
"""msGFM (arXiv 2404.01260): one embedding and one decoder per sensor around a shared Swin encoder with experts.

Axes, in every docstring and comment below:
    B batch          C bands          H, W pixels
    P patch size     L tokens         D channels
    M tokens per window               h, w the token grid, L = h * w
    E experts        K experts per token               T tokens of the whole batch, T = B * L

Three things differ from a textbook Swin: a token may be built from any subset of sensors and bands; any height and
width runs, the rim being padded out of sight of attention, experts and statistics; some MLPs are mixtures of experts.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs, maybe_install_capturing_hooks

from .configuration_msgfm import MsGFMConfig
from .masking import loss_pixels
from .objective import gshard_loss, importance_load_loss, masked_l1, predict_targets, pretraining_loss
from .sensors import SensorSpec

logger = logging.get_logger(__name__)

# What SwinV2 adds to the score of a token that the roll brought. Its cosines, times up to 100, can outweigh it.
WRAPPED_SCORE = -100.0
# A new band takes over a trained kernel only from a band this close to it.
MAX_BAND_DISTANCE_NM = 60.0
# Width of the cosine router's space, and what it first divides cosines by (Swin-MoE's settings).
COSINE_ROUTER_DIM = 256
COSINE_ROUTER_TEMPERATURE = 0.5


# ---------------------------------------------------------------------------------------------------------------------
# Outputs
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class MsGFMEncoderOutput(ModelOutput):
    """Output of the shared encoder.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape (B, L, D)): tokens of the last stage, before the final norm.
        hidden_states (`tuple[torch.FloatTensor]`, *optional*): tokens after the embedding and after each stage (and its
            merge), where `output_hidden_states=True`.
        attentions (`tuple[torch.FloatTensor]`, *optional*): attention weights of the last block of each stage.
        reshaped_hidden_states (`tuple[torch.FloatTensor]`, *optional*): maps (B, D, h, w) of the embedding and of each
            stage before its merge, where `output_hidden_states=True`.
        router_logits (`tuple[torch.FloatTensor]`, *optional*): (T, E) per block with experts, without noise.
        selected_experts (`tuple[torch.LongTensor]`): (T, K) per block with experts; E stands for "dropped".
        aux_loss (`torch.FloatTensor`, *optional*): auxiliary loss summed over the blocks with experts.
    """

    last_hidden_state: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    reshaped_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None
    selected_experts: tuple[torch.LongTensor, ...] | None = None
    aux_loss: torch.FloatTensor | None = None


@dataclass
class MsGFMModelOutput(MsGFMEncoderOutput):
    """Output of `MsGFMModel`: as of the encoder, with the final norm applied.

    In evaluation `selected_experts` and `aux_loss` come only with `output_router_logits=True`.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape (B, L, D)): final features; with late fusion D is the hidden
            size times the number of `config.inputs`.
        pooler_output (`torch.FloatTensor` of shape (B, D), *optional*): mean of the tokens that have a valid pixel.
    """

    pooler_output: torch.FloatTensor | None = None


@dataclass
class MsGFMForPreTrainingOutput(ModelOutput):
    """Output of `MsGFMForPreTraining`.

    Args:
        loss (`torch.FloatTensor`, *optional*): the objective; `None` where nothing is masked.
        reconstruction: the prediction of each input's target in normalised units, (B, C_target, H, W), nested as the
            input was: a tensor, {sensor: tensor}, or a list of such dictionaries.
        slice_losses: the masked L1 of each input, nested as the input was; `None` where nothing is masked.
        aux_loss (`torch.FloatTensor`, *optional*): auxiliary loss summed over the blocks with experts, unweighted.
        slices (`list[tuple[int, str, int]]`): (source, input sensor, rows) in the order of the mixed batch; `None`
            from an exported graph.
        hidden_states, attentions, router_logits, selected_experts: as of `MsGFMModel`, over the mixed batch.
    """

    loss: torch.FloatTensor | None = None
    reconstruction: torch.FloatTensor | dict | list | None = None
    slice_losses: torch.FloatTensor | dict | list | None = None
    aux_loss: torch.FloatTensor | None = None
    slices: list | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None
    selected_experts: tuple[torch.LongTensor, ...] | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Embedding: any subset of sensors and bands -> tokens
# ---------------------------------------------------------------------------------------------------------------------


class MsGFMPatchEmbeddings(nn.Module):
    """f_i of the paper (3.1) for one sensor: a convolution over P x P patches and a layer norm."""

    def __init__(self, config: MsGFMConfig, spec: SensorSpec):
        super().__init__()
        # Built once: a compiler cannot follow how a specification is read from the configuration.
        self.spec = spec
        self.projection = nn.Conv2d(len(spec.bands), config.embed_dim, config.patch_size, stride=config.patch_size)
        self.norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)

    def forward(self, pixels: torch.Tensor, band_index: list[int]) -> torch.Tensor:
        """(B, C, H, W), H and W multiples of P, with the kernel's slice for these bands -> (B, h, w, D)."""
        weight = self.projection.weight
        if band_index != list(range(len(self.spec.bands))):
            # Not by a list of indices, which would have to reach the device first.
            kernels = weight.unbind(1)
            weight = torch.stack([kernels[band] for band in band_index], 1)
        pixels = pixels.to(weight.dtype)
        return F.conv2d(pixels, weight, self.projection.bias, stride=self.projection.stride).permute(0, 2, 3, 1)


def shared_grid(pixel_values: Mapping[str, torch.Tensor]) -> tuple[int, int, int]:
    """The rows, height and width that the images {sensor: (B, C, H, W)} of one place share.

    Raises:
        ValueError: if they do not share them, or there is nothing in them.
    """
    grids = {}
    for sensor, pixels in pixel_values.items():
        if pixels.ndim != 4 or pixels.numel() == 0:
            raise ValueError(
                f"`pixel_values` for sensor {sensor!r} must be (images, bands, height, width), at least 1 each, got "
                f"shape {tuple(pixels.shape)}. Preprocess images with `MsGFMImageProcessor`."
            )
        grids[sensor] = (pixels.shape[0], *pixels.shape[2:])
    first = next(iter(grids.values()))
    for sensor, grid in grids.items():
        if grid != first:
            raise ValueError(
                f"`pixel_values` of all sensors must share one pixel grid, (images, height, width) = {first}, got "
                f"{grid} for sensor {sensor!r}. Warp it to the others' grid first (for files: "
                "rasterio.warp.reproject, or gdalwarp -tr -te)."
            )
    return first


def check_patches(argument: str, mask: torch.Tensor, rows: int, height: int, width: int, patch: int):
    """Raise unless a mask has one entry per embedding patch of `rows` images.

    Raises:
        ValueError: giving the shape it must have.
    """
    shape = (rows, math.ceil(height / patch) * math.ceil(width / patch))
    if tuple(mask.shape) != shape:
        raise ValueError(
            f"`{argument}` must have shape {shape} (one entry per patch of {patch} pixels, row-major), got "
            f"{tuple(mask.shape)}. `masking.draw_mask` makes one."
        )


class EmbeddedTokens(NamedTuple):
    """Tokens on their way into the encoder."""

    hidden_states: torch.Tensor  # (B, L, D)
    grid: tuple[int, int]  # h, w
    patch_valid: torch.Tensor | None  # bool (B, h, w); None: every patch has a valid pixel


class MsGFMEmbeddings(nn.Module):
    """The embeddings of all sensors, and the mask token they share."""

    def __init__(self, config: MsGFMConfig):
        super().__init__()
        self.config = config
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim))
        self.patch_embeddings = nn.ModuleDict(
            {sensor: MsGFMPatchEmbeddings(config, config.sensor(sensor)) for sensor in config.sensors}
        )
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        pixel_values: Mapping[str, torch.Tensor],
        bands: Mapping[str, Sequence[str]] | None = None,
        valid_mask: Mapping[str, torch.Tensor] | None = None,
        bool_masked_pos: torch.Tensor | None = None,
    ) -> EmbeddedTokens:
        """Tokens = LN(sum over sensors of conv_s(x_s)), the norm's weight and bias the mean of the sensors' present.

        A sensor's term is left out, per sample and patch, where all its pixels are invalid; a patch without any valid
        pixel, and a masked one, is the mask token. One sensor alone equals its own embedding exactly.

        Args:
            pixel_values: {sensor: (B, C, H, W)}, normalised, on one pixel grid.
            bands: {sensor: names of its bands}.
            valid_mask: {sensor: bool (B, H, W)}, True = valid.
            bool_masked_pos: (B, L), bool or 0/1, 1 = masked.
        """
        batch_size, height, width = shared_grid(pixel_values)
        patch = self.config.patch_size
        grid = math.ceil(height / patch), math.ceil(width / patch)
        padding = (0, grid[1] * patch - width, 0, grid[0] * patch - height)

        terms, norms, valids = [], [], []
        for sensor, pixels in pixel_values.items():
            index = self.band_index(sensor, pixels, bands)
            pixels = torch.where(torch.isfinite(pixels), pixels, 0)
            valid = None if valid_mask is None else valid_mask.get(sensor)
            if valid is not None:
                if tuple(valid.shape) != (batch_size, height, width):
                    raise ValueError(
                        f"`valid_mask` for sensor {sensor!r} must have shape {(batch_size, height, width)}, got "
                        f"{tuple(valid.shape)}. It is one True or False per pixel, for all bands."
                    )
                valid = valid.to(torch.bool)
                pixels = torch.where(valid.unsqueeze(1), pixels, 0)
                valid = F.max_pool2d(F.pad(valid.float(), padding).unsqueeze(1), patch).squeeze(1) > 0
            embedding = self.patch_embeddings[sensor]
            terms.append(embedding(F.pad(pixels, padding), index))
            norms.append(embedding.norm)
            valids.append(valid)

        if len(terms) == 1:
            hidden_states, patch_valid = norms[0](terms[0]), valids[0]
        else:
            hidden_states, patch_valid = self._fuse(terms, norms, valids)

        hidden_states = hidden_states.flatten(1, 2)
        hidden = None if patch_valid is None else ~patch_valid.flatten(1)
        if bool_masked_pos is not None:
            check_patches("bool_masked_pos", bool_masked_pos, batch_size, height, width, patch)
            masked = bool_masked_pos.to(torch.bool)
            hidden = masked if hidden is None else hidden | masked
        if hidden is not None:
            token = self.mask_token.to(hidden_states.dtype)
            hidden_states = torch.where(hidden.unsqueeze(-1), token, hidden_states)
        elif self.training:
            # Unused in this batch, but not without a gradient: processes that train together would wait for it.
            hidden_states = hidden_states + 0 * self.mask_token.to(hidden_states.dtype)
        return EmbeddedTokens(self.dropout(hidden_states), grid, patch_valid)

    def band_index(
        self, sensor: str, pixels: torch.Tensor, bands: Mapping[str, Sequence[str]] | None = None
    ) -> list[int]:
        """Which bands of its sensor a tensor has: as given, else `config.inputs`, else all of the sensor.

        Raises:
            ValueError: for an unknown sensor or bands, or if the tensor has another number of them.
        """
        if sensor not in self.patch_embeddings:
            self.config.sensor(sensor)
        spec = self.patch_embeddings[sensor].spec
        names = next((found[sensor] for found in (bands or {}, self.config.inputs) if sensor in found), spec.band_names)
        if not names:
            raise ValueError(
                f"`bands` for sensor {sensor!r} must name at least one band, got none. Leave it out for "
                f"{', '.join(spec.band_names)}."
            )
        index = spec.index(names)
        if pixels.shape[1] != len(index):
            names = [spec.band_names[band] for band in index]
            raise ValueError(
                f"`pixel_values` for sensor {sensor!r} must have {len(names)} bands ({', '.join(names)}), got shape "
                f"{tuple(pixels.shape)}. Select bands by name with `bands=`."
            )
        return index

    def _fuse(self, terms, norms, valids) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Sum the terms of several sensors where they are valid, and normalise with the mean of their norms."""
        if all(valid is None for valid in valids):
            weight = torch.stack([norm.weight for norm in norms]).mean(0)
            bias = torch.stack([norm.bias for norm in norms]).mean(0)
            return F.layer_norm(sum(terms), weight.shape, weight, bias, norms[0].eps), None
        everywhere = torch.ones(terms[0].shape[:3], dtype=torch.bool, device=terms[0].device)
        present = [(everywhere if valid is None else valid).unsqueeze(-1) for valid in valids]
        total = sum(torch.where(valid, term, 0) for valid, term in zip(present, terms, strict=True))
        count = sum(valid.to(total.dtype) for valid in present).clamp(min=1)
        weight = sum(valid * norm.weight for valid, norm in zip(present, norms, strict=True)) / count
        bias = sum(valid * norm.bias for valid, norm in zip(present, norms, strict=True)) / count
        hidden_states = F.layer_norm(total, total.shape[-1:], eps=norms[0].eps) * weight + bias
        return hidden_states, torch.stack(present).any(0).squeeze(-1)


# ---------------------------------------------------------------------------------------------------------------------
# Window attention
# ---------------------------------------------------------------------------------------------------------------------


class Windows(NamedTuple):
    """How a grid of tokens is cut into windows of M tokens, in row-major order, plain or shifted."""

    order: torch.Tensor  # int64 (windows * M,), which token of the grid lies there; h * w = padding
    place: torch.Tensor  # int64 (h * w,), the inverse: where each token of the grid lies
    visible: torch.Tensor | None  # bool (windows, M, M), [n, query, key]; None: every token sees all of its window
    wrapped: torch.Tensor | None  # of what is not visible, tokens that the roll brought; None: there are none


def cut_windows(grid: tuple[int, int], window: int, shift: int, device: torch.device) -> Windows:
    """Pad a grid (h, w) right and bottom to whole windows, roll it up and left by `shift`, and cut it.

    A token does not see padding, nor what the roll brought from the other side of the grid. Padding sees itself, so
    that no row of the attention is empty.
    """
    height, width = grid
    rows, columns = height + -height % window, width + -width % window

    def cut(plane: torch.Tensor) -> torch.Tensor:
        plane = plane.view(rows // window, window, columns // window, window)
        return plane.transpose(1, 2).reshape(-1, window * window)

    tokens = torch.arange(height * width, device=device).view(height, width)
    tokens = F.pad(tokens, (0, columns - width, 0, rows - height), value=height * width)
    tokens = torch.roll(tokens, (-shift, -shift), (0, 1))
    order = cut(tokens).flatten()
    place = order.argsort(stable=True)[: height * width]
    if not shift and (rows, columns) == (height, width):
        return Windows(order, place, None, None)
    wrapped_rows = torch.arange(rows, device=device) >= rows - shift
    wrapped_columns = torch.arange(columns, device=device) >= columns - shift
    region = 2 * wrapped_rows[:, None] + wrapped_columns[None, :] + 4 * (tokens == height * width)
    region = cut(region)
    visible = region.unsqueeze(2) == region.unsqueeze(1)
    return Windows(order, place, visible, ~visible & (region < 4).unsqueeze(1) if shift else None)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention: query, key, value (N, heads, M, d) -> (N, M, heads, d) and the weights.

    The additive mask (n, heads, M, M) is of the n windows of one image, or of any window, and serves all images.
    """
    scores = torch.matmul(query * scaling, key.transpose(2, 3))
    scores = (scores.view(-1, *attention_mask.shape) + attention_mask).view(scores.shape)
    attention = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    attention = F.dropout(attention, p=dropout, training=module.training)
    return torch.matmul(attention, value).transpose(1, 2), attention


class MsGFMWindowAttention(nn.Module):
    """Attention inside windows, with a bias for the relative position of query and key.

    Scores are scaled dot products (Swin, arXiv 2103.14030) or cosines with a learned scale (SwinV2, arXiv 2111.09883);
    the bias is a table, or a small network of the log-spaced offset, which carries over to other window sizes (SwinV2).
    """

    def __init__(self, config: MsGFMConfig, stage: int):
        super().__init__()
        dim, num_heads = config.embed_dim * 2**stage, config.num_heads[stage]
        self.config = config
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.cosine = config.attention_score == "cosine"
        self.scaling = 1.0 if self.cosine else self.head_dim**-0.5
        self.is_causal = False
        # A key's bias shifts all dot products of a query alike, which the softmax forgets; cosines it would change.
        self.qkv = nn.Linear(dim, 3 * dim, bias=config.qkv_bias and not self.cosine)
        if self.cosine:
            self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10)))
            self.q_bias = nn.Parameter(torch.zeros(dim)) if config.qkv_bias else None
            self.v_bias = nn.Parameter(torch.zeros(dim)) if config.qkv_bias else None
        self.proj = nn.Linear(dim, dim)
        if config.position_bias == "table":
            self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * config.window_size - 1) ** 2, num_heads))
        else:
            self.continuous_position_bias_mlp = nn.Sequential(
                nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, num_heads, bias=False)
            )
            self.coords_window = config.pretrained_window_sizes[stage] or config.window_size
            self.register_buffer("relative_coords_table", self.make_relative_coords_table(), persistent=False)
        self.register_buffer("relative_position_index", self.make_relative_position_index(), persistent=False)

    def make_relative_position_index(self) -> torch.Tensor:
        """(M * M,) rows of the bias table, for each query and key of a window."""
        window = self.config.window_size
        y, x = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        y, x = y.flatten(), x.flatten()
        down, right = y[:, None] - y[None, :] + window - 1, x[:, None] - x[None, :] + window - 1
        return (down * (2 * window - 1) + right).flatten()

    def make_relative_coords_table(self) -> torch.Tensor:
        """((2 window - 1)^2, 2) offsets (down, right), from -8 to 8 over the window of pretraining, on a log scale."""
        window = self.config.window_size
        # A window of one token has no offsets to scale.
        offset = torch.arange(1 - window, window).float() * 8 / max(self.coords_window - 1, 1)
        offset = offset.sign() * torch.log2(offset.abs() + 1) / math.log2(8)
        return torch.stack(torch.meshgrid(offset, offset, indexing="ij"), -1).flatten(0, 1)

    def position_bias(self) -> torch.Tensor:
        """(1, heads, M, M), what is added to the scores."""
        if self.config.position_bias == "table":
            table = self.relative_position_bias_table
        else:
            # Loaded in half precision, buffers stay in float32.
            network = self.continuous_position_bias_mlp
            table = network(self.relative_coords_table.to(network[0].weight.dtype))
            table = 16 * torch.sigmoid(table) if self.cosine else table
        side = self.config.window_size**2
        return table.t().index_select(1, self.relative_position_index).view(1, self.num_heads, side, side)

    def forward(
        self, hidden_states: torch.Tensor, cut: Windows, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B * windows, M, D), and how they were cut -> the same shape, and attention (B * windows, heads, M, M)."""
        windows, tokens, dim = hidden_states.shape
        qkv = self.qkv(hidden_states)
        if self.cosine and self.q_bias is not None:
            qkv = qkv + torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]).to(qkv.dtype)
        query, key, value = qkv.view(windows, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        if self.cosine:
            scale = self.logit_scale.clamp(max=math.log(100)).exp()
            # Keys of padding are zero, and the usual epsilon is too in float16.
            epsilon = max(1e-12, torch.finfo(qkv.dtype).tiny)
            query = F.normalize(query, dim=-1, eps=epsilon) * scale.to(query.dtype)
            key = F.normalize(key, dim=-1, eps=epsilon)
        mask = self.position_bias().to(query.dtype)
        if cut.visible is not None:
            hidden = ~cut.visible
            if self.cosine and cut.wrapped is not None:
                hidden = hidden & ~cut.wrapped
                mask = mask + WRAPPED_SCORE * cut.wrapped.unsqueeze(1).to(mask.dtype)
            mask = mask.masked_fill(hidden.unsqueeze(1), torch.finfo(mask.dtype).min / 2)

        implementation = self.config._attn_implementation
        # On CPU, SDPA with a mask that needs a gradient takes an unfused path: in bf16 three times as slow.
        unfused = implementation == "sdpa" and torch.is_grad_enabled() and not hidden_states.is_cuda
        if unfused:
            implementation = "eager"
            if kwargs.get("output_attentions"):
                logger.warning_once("SDPA returns no attention weights: use `set_attn_implementation('eager')`.")
        if implementation != "eager" and cut.visible is not None:
            # The kernels want one mask per window. Repeating it costs less than giving windows and heads one axis.
            mask = mask.repeat(windows // cut.visible.shape[0], 1, 1, 1)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        context, attention = attend(self, query, key, value, mask, scaling=self.scaling, dropout=dropout, **kwargs)
        # SDPA returns no weights, with gradients or without.
        return self.proj(context.reshape(windows, tokens, dim)), None if unfused else attention


# ---------------------------------------------------------------------------------------------------------------------
# Mixture of experts
# ---------------------------------------------------------------------------------------------------------------------


class MsGFMMLP(nn.Module):
    """The dense MLP of a Swin block."""

    def __init__(self, config: MsGFMConfig, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, int(config.mlp_ratio * dim))
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(int(config.mlp_ratio * dim), dim)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.fc2(self.dropout(self.activation(self.fc1(hidden_states)))))


class Routing(NamedTuple):
    """What a router decided for T tokens."""

    router_logits: torch.Tensor  # float32 (T, E), without noise
    noisy_logits: torch.Tensor  # float32 (T, E), what the choice was made by: with noise in training
    selected_experts: torch.Tensor  # int64 (T, K); E = dropped
    weights: torch.Tensor  # float32 (T, K), what each expert's output is multiplied by; 0 = dropped


class MsGFMTopKRouter(nn.Module):
    """Chooses K experts per token and, where there is a capacity, whom they have room for.

    Logits are linear in the token, or cosines between its projection and a vector per expert over a learned temperature
    (X-MoE, arXiv 2204.09179). Gates are the softmax probabilities themselves, as in Swin-MoE. They are not renormalised
    over the K chosen: for one expert per token the gate would be 1, and the router without a gradient.
    """

    def __init__(self, config: MsGFMConfig, dim: int):
        super().__init__()
        self.config = config
        if config.router_type == "linear":
            self.weight = nn.Parameter(torch.zeros(config.num_experts, dim))
        else:
            self.cosine_projector = nn.Linear(dim, COSINE_ROUTER_DIM)
            self.sim_matrix = nn.Parameter(torch.zeros(COSINE_ROUTER_DIM, config.num_experts))
            self.temperature = nn.Parameter(torch.zeros(1))

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(T, D) -> (T, E), in float32 whatever autocast says; of weights in half precision the cosine router projects
        in these."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            hidden_states = hidden_states.float()
            if self.config.router_type == "linear":
                return F.linear(hidden_states, self.weight.float())
            # A call of the module, so that an adapter put in its place is heard.
            projected = self.cosine_projector(hidden_states.to(self.sim_matrix.dtype)).float()
            cosines = F.normalize(projected, dim=1) @ F.normalize(self.sim_matrix.float(), dim=0)
            return cosines * self.temperature.float().clamp(max=math.log(100)).exp()

    def forward(self, hidden_states: torch.Tensor) -> Routing:
        """(T, D) -> the routing of these tokens."""
        config = self.config
        router_logits = self.logits(hidden_states)
        noisy_logits = router_logits
        if self.training and config.router_noise > 0:
            noise = torch.randn_like(router_logits) * (config.router_noise / config.num_experts)
            noisy_logits = router_logits + noise
        weights, selected = noisy_logits.softmax(-1).topk(config.num_experts_per_tok, dim=-1)

        factor = config.capacity_factor if self.training else config.eval_capacity_factor
        if factor is not None:
            capacity = config.num_experts_per_tok * int(factor * math.ceil(selected.shape[0] / config.num_experts))
            has_room = self._has_room(weights[:, 0].detach(), selected, capacity, config.num_experts)
            selected = torch.where(has_room, selected, config.num_experts)
            weights = torch.where(has_room, weights, 0)
        return Routing(router_logits, noisy_logits, selected, weights)

    @staticmethod
    def _has_room(confidence: torch.Tensor, selected: torch.Tensor, capacity: int, num_experts: int) -> torch.Tensor:
        """Batch-prioritised routing (arXiv 2106.05974): the most confident tokens go first, all first choices before
        any second. From (T,) and (T, K), bool (T, K): whether that choice finds room."""
        tokens, choices = selected.shape
        order = confidence.argsort(descending=True, stable=True)
        queue = selected[order].t().reshape(-1)
        # Each choice's place in the queue of its expert.
        place = F.one_hot(queue, num_experts).cumsum(0).gather(1, queue.unsqueeze(1)).squeeze(1)
        has_room = torch.empty_like(selected, dtype=torch.bool)
        has_room[order] = (place <= capacity).view(choices, tokens).t()
        return has_room


def router_aux_loss(config: MsGFMConfig, router_logits: torch.Tensor, noisy_logits: torch.Tensor) -> torch.Tensor:
    """The load-balancing loss of `config.router_aux_loss_type` for the logits (T, E) of one block."""
    if config.router_aux_loss_type == "gshard":
        return gshard_loss(noisy_logits)
    threshold = noisy_logits.topk(config.num_experts_per_tok, dim=-1).values[:, -1]
    return importance_load_loss(router_logits, config.router_noise, threshold)


@use_experts_implementation(has_gate=False, has_bias=True)
class MsGFMExperts(nn.Module):
    """E MLPs with their weights stacked, in the layout Transformers' expert kernels read.

    `forward` is what the implementation "eager" stands for, and the default: tokens sorted by expert and one grouped
    product per layer, in the autocast dtype; on CUDA without a transfer to the host. Where there is no such product
    (`_fit_grouped_mm`) experts run one after another, and compiled in other types than bf16 by Transformers' fallback;
    both wait for the host. The other implementations of Transformers take rows of whole 16 bytes only.
    """

    def __init__(self, config: MsGFMConfig, dim: int):
        super().__init__()
        hidden = int(config.mlp_ratio * dim)
        self.num_experts = config.num_experts
        self.act_fn = ACT2FN[config.hidden_act]
        self.up_proj = nn.Parameter(torch.zeros(config.num_experts, hidden, dim))
        self.up_proj_bias = nn.Parameter(torch.zeros(config.num_experts, hidden))
        self.down_proj = nn.Parameter(torch.zeros(config.num_experts, dim, hidden))
        self.down_proj_bias = nn.Parameter(torch.zeros(config.num_experts, dim))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of each token's experts.

        Args:
            hidden_states: (T, D).
            top_k_index: int64 (T, K); E = dropped, which contributes exactly nothing.
            top_k_weights: (T, K).
        """
        device = hidden_states.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else hidden_states.dtype
        fits = self._fit_grouped_mm(device, dtype)
        compiling = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
        if compiling and not (fits and dtype == torch.bfloat16):
            # The compiler knows grouped products in bf16 only; Transformers hides the others from it.
            return ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states, top_k_index, top_k_weights)
        if torch.compiler.is_exporting() or not fits:
            return self._one_after_another(hidden_states, top_k_index, top_k_weights)

        tokens, top_k = top_k_index.shape
        expert, order = top_k_index.flatten().sort(stable=True)
        numbers = torch.arange(self.num_experts, device=device)
        # Where each expert's run of tokens ends; dropped ones lie behind the last, where grouped_mm leaves its output,
        # and the gradient of its input, as they were in memory.
        ends = torch.searchsorted(expert, numbers, right=True)
        on_host = not compiling and not hidden_states.is_cuda
        kept = int(ends[-1]) if on_host else tokens * top_k
        dropped = None if on_host else (expert == self.num_experts).unsqueeze(1)
        # A product with the one-hot choice adds the biases: a gather of them would have a slow backward.
        choice = (expert[:kept].unsqueeze(1) == numbers).to(dtype)

        def linear(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            rows = rows if dropped is None else rows.masked_fill(dropped, 0)
            rows = F.grouped_mm(rows, weight.to(dtype).transpose(1, 2), offs=ends.to(torch.int32))
            rows = rows.addmm_(choice, bias.to(dtype))
            return rows if dropped is None else rows.masked_fill(dropped, 0)

        outputs = hidden_states.index_select(0, order[:kept] // top_k).to(dtype)
        outputs = self.act_fn(linear(outputs, self.up_proj, self.up_proj_bias))
        outputs = linear(outputs, self.down_proj, self.down_proj_bias)
        outputs = outputs * top_k_weights.flatten().index_select(0, order[:kept]).unsqueeze(1).to(dtype)
        if kept < tokens * top_k:
            outputs = F.pad(outputs, (0, 0, 0, tokens * top_k - kept))
        outputs = outputs.index_select(0, order.argsort())
        return outputs if top_k == 1 else outputs.view(tokens, top_k, -1).sum(1)

    def _fit_grouped_mm(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether there is a grouped product here: for rows of whole 16 bytes, not in double precision, and of NVIDIA's
        devices on those since Ampere."""
        there = device.type == "cpu" or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0))
        rows = all(width * dtype.itemsize % 16 == 0 for width in self.up_proj.shape[1:])
        return there and rows and dtype != torch.float64

    def _one_after_another(self, hidden_states, top_k_index, top_k_weights) -> torch.Tensor:
        """Without sizes that Python would have to know: an exported graph serves any number of tokens per expert."""
        # `unbind` once: indexing a stacked weight per expert would make each backward fill a whole stack of zeros.
        weights = (w.unbind(0) for w in (self.up_proj, self.up_proj_bias, self.down_proj, self.down_proj_bias))
        outputs = 0
        for number, (up, up_bias, down, down_bias) in enumerate(zip(*weights, strict=True)):
            token, choice = torch.where(top_k_index == number)
            output = F.linear(self.act_fn(F.linear(hidden_states[token], up, up_bias)), down, down_bias)
            output = output * top_k_weights[token, choice].unsqueeze(1).to(output.dtype)
            outputs = outputs + output.new_zeros(hidden_states.shape).index_add(0, token, output)
        return outputs


class MsGFMSparseMoeBlock(nn.Module):
    """A mixture of experts in the place of an MLP (paper 3.4)."""

    def __init__(self, config: MsGFMConfig, dim: int):
        super().__init__()
        self.config = config
        self.router = MsGFMTopKRouter(config, dim)
        self.experts = MsGFMExperts(config, dim)
        # Transformers' kernels know the index E, "no expert", from experts spread over devices: here, dropped tokens.
        self.experts._is_expert_parallel = True

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, L, D) -> the same, the router's logits (T, E), the auxiliary loss, and the selected experts (T, K)."""
        tokens = hidden_states.flatten(0, 1)
        routing = self.router(tokens)
        outputs = self.experts(tokens, routing.selected_experts, routing.weights)
        aux_loss = router_aux_loss(self.config, routing.router_logits, routing.noisy_logits)
        return outputs.view_as(hidden_states), routing.router_logits, aux_loss, routing.selected_experts


def routing_statistics(output: MsGFMForPreTrainingOutput, config: MsGFMConfig) -> dict[str, dict[str, torch.Tensor]]:
    """Where the tokens of each sensor went.

    Args:
        output: of `MsGFMForPreTraining` called with `output_router_logits=True`.
        config: of the model.

    Returns:
        {sensor: {"histogram": (blocks, E) share of the sensor's choices that chose each expert, dropped ones not
        counted; "load": (blocks, E) mean router probability; "entropy": (blocks,) mean over tokens of the entropy of
        their router probabilities, in bits: log2 E where the router does not care, 0 where it is sure; "dropped":
        (blocks,) share of choices without room; "aux_loss": (blocks,) the auxiliary loss of this sensor's tokens
        alone, without noise}}. Empty without experts.

    Raises:
        ValueError: if the output has no router logits.
    """
    if not output.selected_experts:
        return {}
    if not output.router_logits:
        raise ValueError(
            "`output` must carry router logits, got none. Call the model with `output_router_logits=True`."
        )
    sensors = sorted({sensor for _, sensor, _ in output.slices})
    device = output.selected_experts[0].device
    owner = torch.tensor([sensors.index(sensor) for _, sensor, _ in output.slices], device=device)
    owner = owner.repeat_interleave(torch.tensor([count for _, _, count in output.slices], device=device))
    statistics = {}
    for number, sensor in enumerate(sensors):
        blocks = {"histogram": [], "load": [], "entropy": [], "dropped": [], "aux_loss": []}
        for logits, selected in zip(output.router_logits, output.selected_experts, strict=True):
            mine = owner.repeat_interleave(len(selected) // len(owner)) == number
            logits, selected = logits[mine].detach(), selected[mine]
            counts = torch.bincount(selected.flatten(), minlength=config.num_experts + 1).float() / selected.numel()
            blocks["histogram"].append(counts[: config.num_experts])
            probabilities = logits.float().softmax(-1)
            blocks["load"].append(probabilities.mean(0))
            blocks["entropy"].append(torch.special.entr(probabilities).sum(-1).mean() / math.log(2))
            blocks["dropped"].append(counts[config.num_experts])
            blocks["aux_loss"].append(router_aux_loss(config, logits, logits))
        statistics[sensor] = {name: torch.stack(values) for name, values in blocks.items()}
    return statistics


# ---------------------------------------------------------------------------------------------------------------------
# Blocks, stages, encoder
# ---------------------------------------------------------------------------------------------------------------------


class MsGFMDropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): a sample's residual branch is left out with this probability."""

    def __init__(self, probability: float):
        super().__init__()
        self.probability = probability

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.probability == 0 or not self.training:
            return hidden_states
        keep = 1 - self.probability
        shape = (hidden_states.shape[0],) + (1,) * (hidden_states.ndim - 1)
        return hidden_states * hidden_states.new_empty(shape).bernoulli_(keep).div_(keep)


class MsGFMPostNorm(nn.LayerNorm):
    """The norm behind a branch. As in SwinV2 it starts at zero, so that a fresh block is the identity."""


class MsGFMLayer(GradientCheckpointingLayer):
    """A Swin block: window attention and an MLP or experts, each inside a residual, with a norm before it or after."""

    def __init__(self, config: MsGFMConfig, stage: int, block: int, drop_path: float):
        super().__init__()
        dim = config.embed_dim * 2**stage
        self.shifted = block % 2 == 1
        self.sparse = block in config.moe_blocks[stage]
        self.post_norm = config.norm_position == "post"
        norm = MsGFMPostNorm if self.post_norm else nn.LayerNorm
        self.layernorm_before = norm(dim, eps=config.layer_norm_eps)
        self.attention = MsGFMWindowAttention(config, stage)
        self.drop_path = MsGFMDropPath(drop_path)
        self.layernorm_after = norm(dim, eps=config.layer_norm_eps)
        self.mlp = MsGFMSparseMoeBlock(config, dim) if self.sparse else MsGFMMLP(config, dim)

    def forward(
        self, hidden_states: torch.Tensor, windows: Windows, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor | None, ...]:
        """Tokens (B, L, D) -> tokens, attention, and of experts: logits, auxiliary loss, selection.

        All five leave as plain tensors so that they keep their gradients under every kind of checkpointing.
        """
        update = hidden_states if self.post_norm else self.layernorm_before(hidden_states)
        update, attention = self._attend(update, windows, **kwargs)
        update = self.layernorm_before(update) if self.post_norm else update
        hidden_states = hidden_states + self.drop_path(update)

        update = hidden_states if self.post_norm else self.layernorm_after(hidden_states)
        if self.sparse:
            update, router_logits, aux_loss, selected_experts = self.mlp(update)
        else:
            update, router_logits, aux_loss, selected_experts = self.mlp(update), None, None, None
        update = self.layernorm_after(update) if self.post_norm else update
        hidden_states = hidden_states + self.drop_path(update)
        return hidden_states, attention, router_logits, aux_loss, selected_experts

    def _attend(self, hidden_states: torch.Tensor, windows: Windows, **kwargs: Unpack[TransformersKwargs]):
        """Attention inside windows: (B, L, D) -> (B, L, D)."""
        batch_size, tokens, dim = hidden_states.shape
        if len(windows.order) > tokens:
            # What `order` calls h * w: a token of zeros.
            hidden_states = F.pad(hidden_states, (0, 0, 0, 1))
        # One gather each way, where rolling, padding and cutting would copy all tokens several times.
        hidden_states = hidden_states.index_select(1, windows.order)
        side = self.attention.config.window_size**2
        hidden_states, attention = self.attention(hidden_states.view(-1, side, dim), windows, **kwargs)
        return hidden_states.view(batch_size, -1, dim).index_select(1, windows.place), attention


class MsGFMPatchMerging(nn.Module):
    """Joins 2 x 2 tokens and doubles the channels; an odd side is first padded with zeros, right and bottom."""

    def __init__(self, config: MsGFMConfig, dim: int):
        super().__init__()
        self.post_norm = config.norm_position == "post"
        self.norm = nn.LayerNorm((2 if self.post_norm else 4) * dim, eps=config.layer_norm_eps)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, hidden_states: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """(B, h * w, D) -> (B, ceil(h / 2) * ceil(w / 2), 2 D)."""
        batch_size, _, dim = hidden_states.shape
        height, width = grid
        hidden_states = hidden_states.view(batch_size, height, width, dim)
        if height % 2 or width % 2:
            hidden_states = F.pad(hidden_states, (0, 0, 0, width % 2, 0, height % 2))
        height, width = math.ceil(height / 2), math.ceil(width / 2)
        # Column before row, as in Swin: channels of (even, even), (odd row, even), (even, odd column), (odd, odd).
        hidden_states = hidden_states.view(batch_size, height, 2, width, 2, dim).permute(0, 1, 3, 4, 2, 5)
        hidden_states = hidden_states.reshape(batch_size, height * width, 4 * dim)
        return self.norm(self.reduction(hidden_states)) if self.post_norm else self.reduction(self.norm(hidden_states))


class MsGFMStage(nn.Module):
    """Blocks at one resolution, windows shifted in every second of them, and the merge to the next."""

    def __init__(self, config: MsGFMConfig, stage: int, drop_path: list[float]):
        super().__init__()
        self.window_size = config.window_size
        self.blocks = nn.ModuleList(
            [MsGFMLayer(config, stage, block, drop_path[block]) for block in range(config.depths[stage])]
        )
        last = stage == len(config.depths) - 1
        self.downsample = None if last else MsGFMPatchMerging(config, config.embed_dim * 2**stage)

    def forward(
        self, hidden_states: torch.Tensor, grid: tuple[int, int], **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, list[torch.Tensor], list[torch.Tensor]]:
        """Tokens (B, L, D) of a grid -> tokens after the merge, tokens before it, attention of the last block, and per
        block with experts the auxiliary loss and the selection."""
        # One window is enough for a map no larger than it: shifting it would only cut it up.
        shift = 0 if min(grid) <= self.window_size else self.window_size // 2
        plain = cut_windows(grid, self.window_size, 0, hidden_states.device)
        shifted = cut_windows(grid, self.window_size, shift, hidden_states.device) if shift else plain
        attention, aux_losses, selections = None, [], []
        for block in self.blocks:
            windows = shifted if block.shifted else plain
            hidden_states, attention, _, aux_loss, selected_experts = block(hidden_states, windows, **kwargs)
            if aux_loss is not None:
                aux_losses.append(aux_loss)
                selections.append(selected_experts)
        merged = hidden_states if self.downsample is None else self.downsample(hidden_states, grid)
        return merged, hidden_states, attention, aux_losses, selections


class MsGFMPreTrainedModel(PreTrainedModel):
    """What all msGFM models share: initialisation, loading that reports, and new sensors."""

    config: MsGFMConfig
    base_model_prefix = "msgfm"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["MsGFMStage", "MsGFMEmbeddings"]
    _supports_sdpa = True
    # Flash attention takes no additive bias, flex attention reads one head of it only.
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": OutputRecorder(MsGFMStage, index=0, capture_initial_hidden_state=True),
        "attentions": OutputRecorder(MsGFMStage, index=2, capture_initial_hidden_state=False),
        "router_logits": OutputRecorder(MsGFMLayer, index=2, capture_initial_hidden_state=False),
    }
    # Read by `Trainer`: losses here have several terms or an ignored label, which a count of items cannot divide.
    accepts_loss_kwargs = False
    # Outputs are recorded by hooks of the encoder; a second set, of a model around it, would record them twice.
    _output_capturing_hooks_installed = True
    _input_embed_layer = "patch_embeddings"
    # What pretraining leaves behind; a model without decoders does not miss them.
    _keys_to_ignore_on_load_unexpected = [r"^decoders\."]

    # Transformers looks for these answers in the text of the file a class is written in, which for a head is not this.
    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        return super().get_correct_experts_implementation(requested_experts or "eager")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """As in SimMIM: truncated normal everywhere, but convolutions as torch initialises them."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            bound = 1 / math.sqrt(module.weight[0].numel())
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.LayerNorm):
            init.constant_(module.weight, 0.0 if isinstance(module, MsGFMPostNorm) else 1.0)
            init.zeros_(module.bias)
        elif isinstance(module, MsGFMEmbeddings):
            init.trunc_normal_(module.mask_token, std=std)
        elif isinstance(module, MsGFMWindowAttention):
            if self.config.position_bias == "table":
                init.trunc_normal_(module.relative_position_bias_table, std=std)
            else:
                init.copy_(module.relative_coords_table, module.make_relative_coords_table())
            init.copy_(module.relative_position_index, module.make_relative_position_index())
            if module.cosine:
                init.constant_(module.logit_scale, math.log(10))
                if module.q_bias is not None:
                    init.zeros_(module.q_bias)
                    init.zeros_(module.v_bias)
        elif isinstance(module, MsGFMTopKRouter):
            if self.config.router_type == "linear":
                init.trunc_normal_(module.weight, std=std)
            else:
                init.normal_(module.sim_matrix, std=0.01)
                init.constant_(module.temperature, math.log(1 / COSINE_ROUTER_TEMPERATURE))
        elif isinstance(module, MsGFMExperts):
            init.trunc_normal_(module.up_proj, std=std)
            init.trunc_normal_(module.down_proj, std=std)
            init.zeros_(module.up_proj_bias)
            init.zeros_(module.down_proj_bias)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """As `PreTrainedModel.from_pretrained`, but an encoder that is not all in the checkpoint is an error.

        Raises:
            ValueError: naming the keys of the trunk that are missing or unexpected, unless `output_loading_info=True`
                asks for a report of them instead.
            RuntimeError: naming the keys of another shape, unless `ignore_mismatched_sizes=True` allows them.
        """
        allowed = kwargs.pop("ignore_mismatched_sizes", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        missing = sorted(key for key in info["missing_keys"] if _is_trunk_key(key))
        if missing and pretrained_model_name_or_path is not None and not output_loading_info:
            raise ValueError(
                f"`pretrained_model_name_or_path` must hold the whole encoder, got {pretrained_model_name_or_path!r} "
                f"without {_shortened(missing)}. Load it with the configuration it was saved with, or convert it first."
            )
        extra = sorted(key for key in info["unexpected_keys"] if _is_trunk_key(key))
        if extra and not output_loading_info:
            raise ValueError(
                f"`pretrained_model_name_or_path` must hold no more of the encoder than the configuration has, got "
                f"{pretrained_model_name_or_path!r} with {_shortened(extra)}. Load it with the configuration it was "
                "saved with."
            )
        mismatched = sorted(
            f"{key} {tuple(stored)} for {tuple(wanted)}" for key, stored, wanted in info["mismatched_keys"]
        )
        if mismatched and not allowed:
            raise RuntimeError(
                f"`pretrained_model_name_or_path` must have the shapes of the configuration, got "
                f"{pretrained_model_name_or_path!r} with {_shortened(mismatched)}. Load it with its own configuration, "
                "or give `ignore_mismatched_sizes=True` to start these afresh."
            )
        return (model, info) if output_loading_info else model

    def add_sensor(self, spec: SensorSpec, init_from: str | None = None) -> list[tuple[str, str | None, float | None]]:
        """Give the model an embedding (and, where it has decoders, a decoder) for a new sensor; nothing else changes.

        Args:
            spec: the new sensor.
            init_from: id of a sensor to start from. Each new band takes the kernel of the nearest band of that sensor
                by wavelength, within 60 nm, or of the one with the same name; others start fresh.

        Returns:
            per band of the new sensor (band, source band or `None` for fresh, distance in nm or `None`); also printed.

        Raises:
            ValueError: if the model has a sensor of that id, or none called `init_from`.
        """
        config = self.config
        if spec.id in config.sensors:
            raise ValueError(
                f"`spec` must be of a sensor the model does not have ({', '.join(config.sensors)}), got {spec.id!r}. "
                "Give it another id."
            )
        if init_from is not None and init_from not in config.sensors:
            raise ValueError(
                f"`init_from` must be a sensor of the model ({', '.join(config.sensors)}), got {init_from!r}. Leave it "
                "out to start afresh."
            )
        source = None if init_from is None else config.sensor(init_from)
        matches = [(band.name, *_nearest_band(band, source)) for band in spec.bands]
        config.sensors = dict(sorted({**config.sensors, spec.id: spec.to_dict()}.items()))
        embeddings = next(module for module in self.modules() if isinstance(module, MsGFMEmbeddings))
        device, dtype = embeddings.mask_token.device, embeddings.mask_token.dtype
        stem = MsGFMPatchEmbeddings(config, spec).to(device, dtype)
        stem.apply(self._init_weights)
        decoders = getattr(self, "decoders", None)
        if decoders is not None:
            decoder = make_decoder(config, len(spec.bands)).to(device, dtype)
            decoder.apply(self._init_weights)
        with torch.no_grad():
            if source is not None:
                old = embeddings.patch_embeddings[init_from]
                stem.norm.load_state_dict(old.norm.state_dict())
                stem.projection.bias.copy_(old.projection.bias)
            for row, (_, band, _) in enumerate(matches):
                if band is None:
                    continue
                old_row = source.band_names.index(band)
                stem.projection.weight[:, row] = old.projection.weight[:, old_row]
                if decoders is not None:
                    area = config.encoder_stride**2
                    new, old_rows = slice(row * area, (row + 1) * area), slice(old_row * area, (old_row + 1) * area)
                    decoder.weight[new] = decoders[init_from].weight[old_rows]
                    decoder.bias[new] = decoders[init_from].bias[old_rows]
        embeddings.patch_embeddings = _with_sorted(embeddings.patch_embeddings, spec.id, stem)
        if decoders is not None:
            self.decoders = _with_sorted(decoders, spec.id, decoder)
        for band, taken, distance in matches:
            came = (
                "fresh"
                if taken is None
                else f"{init_from} {taken}" + ("" if distance is None else f", {distance:g} nm")
            )
            print(f"{spec.id} {band} <- {came}")
        return matches


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _is_trunk_key(key: str) -> bool:
    key = key.removeprefix(MsGFMPreTrainedModel.base_model_prefix + ".")
    return key.split(".")[0] in ("embeddings", "encoder", "layernorm")


def _with_sorted(modules: nn.ModuleDict, name: str, module: nn.Module) -> nn.ModuleDict:
    """The modules and a new one in the order a reloaded model will have them."""
    modules = {**modules, name: module}
    return nn.ModuleDict({key: modules[key] for key in sorted(modules)})


def _nearest_band(band, source: SensorSpec | None) -> tuple[str | None, float | None]:
    """The band of `source` to start a new band from and how far away it is, in nm where wavelengths are known."""
    if source is None:
        return None, None
    if band.wavelength is None:
        return (band.name, None) if band.name in source.band_names else (None, None)
    known = [other for other in source.bands if other.wavelength is not None]
    nearest = min(known, key=lambda other: abs(other.wavelength - band.wavelength), default=None)
    if nearest is None or abs(nearest.wavelength - band.wavelength) > MAX_BAND_DISTANCE_NM:
        return None, None
    return nearest.name, abs(nearest.wavelength - band.wavelength)


class MsGFMEncoder(MsGFMPreTrainedModel):
    """The shared encoder En of the paper: tokens of any sensors, in stages of falling resolution."""

    _output_capturing_hooks_installed = False

    def __init__(self, config: MsGFMConfig):
        super().__init__(config)
        blocks = sum(config.depths)
        rates = [config.drop_path_rate * block / max(blocks - 1, 1) for block in range(blocks)]
        starts = [sum(config.depths[:stage]) for stage in range(len(config.depths))]
        self.layers = nn.ModuleList([MsGFMStage(config, stage, rates[start:]) for stage, start in enumerate(starts)])
        self.post_init()
        # Now, not at the first forward: `torch.compile(fullgraph=True)` could not install them.
        maybe_install_capturing_hooks(self)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        hidden_states: torch.Tensor,
        grid: tuple[int, int],
        output_hidden_states: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MsGFMEncoderOutput:
        """Tokens (B, L, D) of a grid (h, w) -> tokens of the last stage and what was asked for on the way."""
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        maps = (_as_map(hidden_states, grid),) if output_hidden_states else None
        aux_losses, selections = [], []
        for stage in self.layers:
            hidden_states, unmerged, _, stage_losses, stage_selections = stage(hidden_states, grid, **kwargs)
            aux_losses += stage_losses
            selections += stage_selections
            if output_hidden_states:
                maps += (_as_map(unmerged, grid),)
            if stage.downsample is not None:
                grid = math.ceil(grid[0] / 2), math.ceil(grid[1] / 2)
        return MsGFMEncoderOutput(
            last_hidden_state=hidden_states,
            reshaped_hidden_states=maps,
            selected_experts=tuple(selections) or None,
            aux_loss=torch.stack(aux_losses).sum() if aux_losses else None,
        )


def _as_map(tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """(B, h * w, D) -> (B, D, h, w)."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], *grid)


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------

# A tensor of the checkpoint's single input sensor, or {sensor: tensor}.
PixelValues = torch.Tensor | Mapping[str, torch.Tensor]


def by_sensor(config: MsGFMConfig, values, argument: str) -> dict[str, torch.Tensor] | None:
    """Name the sensor of a bare tensor: it is the single sensor of `config.inputs`.

    Raises:
        ValueError: if there are several, or the value is neither a tensor nor a dictionary of tensors.
    """
    if values is None:
        return None
    if isinstance(values, torch.Tensor):
        if len(config.inputs) != 1:
            raise ValueError(
                f"`{argument}` must name its sensor where `config.inputs` has several ({', '.join(config.inputs)}), "
                f"got a tensor of shape {tuple(values.shape)}. Pass {{sensor: tensor}}."
            )
        return {next(iter(config.inputs)): values}
    if not isinstance(values, Mapping) or not values or not all(isinstance(v, torch.Tensor) for v in values.values()):
        raise ValueError(
            f"`{argument}` must be a tensor or a dictionary {{sensor: tensor}} with at least one entry, got "
            f"{type(values).__name__}. Preprocess images with `MsGFMImageProcessor`."
        )
    return dict(values)


def refuse_unmatched(argument: str, given: Mapping | None, pixel_values: Mapping):
    """Raise for an entry that belongs to no input: it would be left unread.

    Raises:
        ValueError: naming it.
    """
    unmatched = sorted(set(given or ()) - set(pixel_values))
    if unmatched:
        raise ValueError(
            f"`{argument}` must be for sensors of `pixel_values` ({', '.join(pixel_values)}), got {unmatched[0]!r}. "
            "Correct the name or leave it out."
        )


def refuse_undeclared(config: MsGFMConfig, pixel_values: Mapping):
    """Raise for a sensor that `config.inputs` lacks: a head, or joined features, have no place for it.

    Raises:
        ValueError: naming it.
    """
    undeclared = sorted(set(pixel_values) - set(config.inputs))
    if undeclared:
        raise ValueError(
            f"`pixel_values` must be of `config.inputs` ({', '.join(config.inputs)}), which heads and late fusion are "
            f"made for, got {undeclared[0]!r}. For other sensors load the model with `inputs={{sensor: bands}}` and "
            "train it on them."
        )


# What Transformers itself sends through every forward, and no more: a misspelt argument must not vanish in `**kwargs`.
_KNOWN_KWARGS = {*TransformersKwargs.__annotations__, "return_dict", "output_attentions", "output_hidden_states"}


def refuse_unknown(kwargs: Mapping):
    """Raise for a keyword argument that nothing would read.

    Raises:
        TypeError: naming it.
    """
    unknown = sorted(set(kwargs) - _KNOWN_KWARGS)
    if unknown:
        raise TypeError(
            f"`{unknown[0]}` must be an argument of this model's forward, got {', '.join(unknown)}. Check the spelling."
        )


class MsGFMModel(MsGFMPreTrainedModel):
    """The trunk: embeddings, shared encoder and final norm.

    Args:
        config: the configuration.
        add_pooling_layer: whether to compute `pooler_output`.
    """

    def __init__(self, config: MsGFMConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = MsGFMEmbeddings(config)
        self.encoder = MsGFMEncoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.add_pooling_layer = add_pooling_layer
        self.post_init()

    def get_input_embeddings(self) -> nn.ModuleDict:
        return self.embeddings.patch_embeddings

    @property
    def num_features(self) -> int:
        """Channels of the final features: with late fusion, those of all `config.inputs` side by side."""
        return self.config.hidden_size * (len(self.config.inputs) if self.config.fusion == "late" else 1)

    @can_return_tuple
    def forward(
        self,
        pixel_values: PixelValues | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        bands: Mapping[str, Sequence[str]] | None = None,
        valid_mask: torch.Tensor | Mapping[str, torch.Tensor] | None = None,
        reference: torch.Tensor | Mapping[str, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MsGFMModelOutput:
        r"""
        Args:
            pixel_values: (B, C, H, W), normalised, of the single sensor of `config.inputs`; or {sensor: tensor} of any
                subset of `config.sensors`, on one pixel grid. Any height and width.
            bool_masked_pos: (B, ceil(H/P) * ceil(W/P)), bool or 0/1, 1 = replaced by the mask token.
            bands: {sensor: names of its bands}; default `config.inputs`, else all bands of the sensor.
            valid_mask: bool (B, H, W), True = valid, or {sensor: mask}; default all valid.
            reference: heights the image processor subtracted; not read, so that its output can be passed whole.

        Returns:
            `MsGFMModelOutput`. An image without a valid pixel has features of zeros.

        Raises:
            ValueError: for an unknown sensor or band, or shapes that do not agree.
        """
        del reference
        refuse_unknown(kwargs)
        pixel_values = by_sensor(self.config, pixel_values, "pixel_values")
        if pixel_values is None:
            raise ValueError("`pixel_values` must be given, got None. Preprocess images with `MsGFMImageProcessor`.")
        valid_mask = by_sensor(self.config, valid_mask, "valid_mask")
        shared_grid(pixel_values)
        refuse_unmatched("valid_mask", valid_mask, pixel_values)
        refuse_unmatched("bands", bands, pixel_values)

        if self.config.fusion == "early":
            slices = [pixel_values]
        else:
            refuse_undeclared(self.config, pixel_values)
            slices = [{sensor: pixels} for sensor, pixels in pixel_values.items()]
        parts = [self.embeddings(part, bands, valid_mask, bool_masked_pos) for part in slices]
        grid, rows = parts[0].grid, [part.hidden_states.shape[0] for part in parts]

        outputs: MsGFMEncoderOutput = self.encoder(torch.cat([part.hidden_states for part in parts]), grid, **kwargs)
        hidden_states = self.layernorm(outputs.last_hidden_state)
        pooled = None
        if self.add_pooling_layer:
            per_part = zip(hidden_states.split(rows), parts, strict=True)
            pooled = torch.cat([self._pool(features, part) for features, part in per_part])

        def join(states: torch.Tensor, dim: int) -> torch.Tensor:
            """Slices side by side; zeros for a sensor that is absent, and for an image without a valid pixel."""
            if self.config.fusion == "early":
                # Not a view of it: hidden states keep the gradient that somebody asks for.
                return _seen(states, parts[0])
            per_sensor = [_seen(state, part) for state, part in zip(states.split(rows), parts, strict=True)]
            given = dict(zip(pixel_values, per_sensor, strict=True))
            nothing = torch.zeros_like(per_sensor[0])
            return torch.cat([given.get(sensor, nothing) for sensor in self.config.inputs], dim)

        def join_all(states, dim):
            if states is None:
                return None
            return tuple(None if state is None else join(state, dim) for state in states)

        # In use, nobody asks for the experts' accounts, and a pipeline could not take a batch's scalars apart.
        asked = self.training or outputs.router_logits is not None
        return MsGFMModelOutput(
            last_hidden_state=join(hidden_states, -1),
            pooler_output=None if pooled is None else join(pooled, -1),
            hidden_states=join_all(outputs.hidden_states, -1),
            attentions=outputs.attentions,
            reshaped_hidden_states=join_all(outputs.reshaped_hidden_states, 1),
            router_logits=outputs.router_logits,
            selected_experts=outputs.selected_experts if asked else None,
            aux_loss=outputs.aux_loss if asked else None,
        )

    def _pool(self, features: torch.Tensor, part: EmbeddedTokens) -> torch.Tensor:
        """The mean of the features (B, L, D) with a valid pixel under them."""
        if part.patch_valid is None:
            return features.mean(1)
        side = 2 ** (len(self.config.depths) - 1)
        valid = F.max_pool2d(part.patch_valid.float().unsqueeze(1), side, ceil_mode=True).flatten(1).unsqueeze(-1)
        valid = valid.to(features.dtype)
        return (features * valid).sum(1) / valid.sum(1).clamp(min=1)


def _seen(features: torch.Tensor, part: EmbeddedTokens) -> torch.Tensor:
    """Features (B, ...) of any shape, with zeros for an image without a valid pixel."""
    if part.patch_valid is None:
        return features
    seen = part.patch_valid.any((1, 2)).view(-1, *[1] * (features.ndim - 1))
    return torch.where(seen, features, 0)


class MsGFMBackbone(BackboneMixin, MsGFMPreTrainedModel):
    """Feature maps for dense heads: one per stage, before its merge, at strides P, 2P, 4P, ... (4, 8, 16, 32)."""

    def __init__(self, config: MsGFMConfig):
        super().__init__(config)
        self.msgfm = MsGFMModel(config, add_pooling_layer=False)
        width = config.embed_dim * (len(config.inputs) if config.fusion == "late" else 1)
        self.num_features = [width] + [width * 2**stage for stage in range(len(config.depths))]
        self.hidden_states_norms = nn.ModuleDict(
            {
                stage: nn.LayerNorm(channels, eps=config.layer_norm_eps)
                for stage, channels in zip(self.out_features, self.channels, strict=True)
            }
        )
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(
        self,
        pixel_values: PixelValues | None = None,
        bands: Mapping[str, Sequence[str]] | None = None,
        valid_mask: torch.Tensor | Mapping[str, torch.Tensor] | None = None,
        reference: torch.Tensor | Mapping[str, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BackboneOutput:
        r"""
        Args:
            pixel_values, bands, valid_mask, reference: as of `MsGFMModel`.

        Returns:
            `BackboneOutput` with `feature_maps`, one (B, D, h, w) per name in `out_features` ("stem", "stage1", ...).
        """
        outputs = self.msgfm(pixel_values, bands=bands, valid_mask=valid_mask, reference=reference, **kwargs)
        maps = dict(zip(self.stage_names, outputs.reshaped_hidden_states, strict=True))
        feature_maps = tuple(
            norm(maps[stage].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            for stage, norm in self.hidden_states_norms.items()
        )
        return BackboneOutput(
            feature_maps=feature_maps, hidden_states=outputs.reshaped_hidden_states, attentions=outputs.attentions
        )


def make_decoder(config: MsGFMConfig, num_bands: int) -> nn.Conv2d:
    """D_i of the paper (3.2): one 1 x 1 convolution to the pixels under a token, `encoder_stride` squared per band."""
    return nn.Conv2d(config.hidden_size, num_bands * config.encoder_stride**2, 1)


class MsGFMForPreTraining(MsGFMPreTrainedModel):
    """Masked image modelling of several sensors at once, of themselves and of their partners (paper, section 3)."""

    def __init__(self, config: MsGFMConfig):
        super().__init__(config)
        self.msgfm = MsGFMModel(config, add_pooling_layer=False)
        self.decoders = nn.ModuleDict(
            {sensor: make_decoder(config, len(spec["bands"])) for sensor, spec in config.sensors.items()}
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: PixelValues | Sequence[Mapping[str, torch.Tensor]] | None = None,
        bool_masked_pos: torch.Tensor | Mapping | Sequence | None = None,
        bands: Mapping | Sequence | None = None,
        valid_mask: torch.Tensor | Mapping | Sequence | None = None,
        targets: Mapping[str, str] | Sequence[Mapping[str, str]] | None = None,
        weights: float | Sequence[float] | torch.Tensor | None = None,
        bool_loss_pos: torch.Tensor | Mapping | Sequence | None = None,
        num_loss_pixels: Mapping[str, torch.Tensor] | Sequence[Mapping[str, torch.Tensor]] | None = None,
        reference: torch.Tensor | Mapping | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MsGFMForPreTrainingOutput:
        r"""
        All images, whatever their sensor, are embedded, joined along the batch, encoded in one pass, and decoded by the
        decoder of their target.

        Args:
            pixel_values: a tensor (B, C, H, W) of the single sensor of `config.inputs`; or {sensor: tensor}, paired row
                by row; or a list of such dictionaries, one per source. All of one height and width.
            bool_masked_pos: nested as `pixel_values`, (B, ceil(H/P) * ceil(W/P)), bool or 0/1, 1 = masked. Without it
                nothing is masked and there is no loss.
            bands: {sensor: names}, or a list of such, one per source; default as of `MsGFMModel`.
            valid_mask: nested as `pixel_values`, bool (B, H, W), True = valid.
            targets: {input sensor: sensor to predict}, or a list of such; default each itself. The target must be an
                input of the same source, which is where its pixels come from.
            weights: one per source, default 1.
            bool_loss_pos: nested as `bool_masked_pos`: patches that carry the loss, default the masked ones.
            num_loss_pixels: {input sensor: what its loss is divided by}, or a list of such, one per source; default the
                pixels counted here. Where a batch is spread over processes or calls: the mean count of its parts, so
                that the mean of their losses is that of the whole batch (`objective.masked_l1`).
            reference: as of `MsGFMModel`.

        Returns:
            `MsGFMForPreTrainingOutput`; `loss` = sum over sources of weight * sum over slices of the masked L1
            (`objective.masked_l1`), plus `router_aux_loss_coef` times the auxiliary loss.

        Raises:
            ValueError: for nesting, sensors, targets or shapes that do not agree.
        """
        del reference
        refuse_unknown(kwargs)
        sources = self._nest(pixel_values, "pixel_values")
        if not sources:
            raise ValueError("`pixel_values` must be given, got None. Preprocess images with `MsGFMImageProcessor`.")
        masks = self._nest(bool_masked_pos, "bool_masked_pos", sources)
        loss_masks = masks if bool_loss_pos is None else self._nest(bool_loss_pos, "bool_loss_pos", sources)
        valids = self._nest(valid_mask, "valid_mask", sources)
        bands = [None] * len(sources) if bands is None else [bands] if isinstance(bands, Mapping) else list(bands)
        targets = self._targets(targets, sources)
        if weights is None or isinstance(weights, int | float):
            weights = [1.0 if weights is None else weights] * len(sources)
        counts = [num_loss_pixels] if isinstance(num_loss_pixels, Mapping) else num_loss_pixels
        counts = [{}] * len(sources) if counts is None else list(counts)
        for name, values in (("bands", bands), ("weights", weights), ("num_loss_pixels", counts)):
            if len(values) != len(sources):
                raise ValueError(
                    f"`{name}` must have one entry per source ({len(sources)}), got {len(values)}. Add or drop some."
                )

        parts, slices = [], []
        for index, source in enumerate(sources):
            rows, height, width = shared_grid(source)
            for mask in () if bool_loss_pos is None or not masks else loss_masks[index].values():
                check_patches("bool_loss_pos", mask, rows, height, width, self.config.patch_size)
            refuse_unmatched("valid_mask", valids[index] if valids else None, source)
            refuse_unmatched("bands", bands[index], source)
            for sensor, pixels in source.items():
                mask = masks[index].get(sensor) if masks else None
                valid = {sensor: valids[index][sensor]} if valids and sensor in valids[index] else None
                parts.append(self.msgfm.embeddings({sensor: pixels}, bands[index], valid, mask))
                slices.append((index, sensor, pixels.shape[0]))
        grid = parts[0].grid
        for part, (index, sensor, _) in zip(parts, slices, strict=True):
            if part.grid != grid:
                raise ValueError(
                    f"`pixel_values` of all sources must have one height and width, got token grids {grid} and "
                    f"{part.grid} (sensor {sensor!r} of source {index}). Crop them to `config.image_size`."
                )
        outputs: MsGFMEncoderOutput = self.msgfm.encoder(
            torch.cat([part.hidden_states for part in parts]), grid, **kwargs
        )
        features = self.msgfm.layernorm(outputs.last_hidden_state).split([rows for _, _, rows in slices])

        reconstructions: list[dict] = [{} for _ in sources]
        for (index, sensor, _), tokens, part in zip(slices, features, parts, strict=True):
            reconstructions[index][sensor] = _seen(tokens, part)
        losses: list[dict] = [{} for _ in sources]
        for index, source in enumerate(sources):
            decoders = {sensor: self._decoder(sensor, bands[index], grid, pixels) for sensor, pixels in source.items()}
            reconstructions[index] = predict_targets(reconstructions[index], decoders, targets[index])
            for sensor, prediction in reconstructions[index].items() if masks else ():
                target = targets[index][sensor]
                counted = loss_pixels(
                    loss_masks[index][sensor],
                    valids[index].get(target) if valids else None,
                    *prediction.shape[2:],
                    self.config.patch_size,
                )
                wanted = source[target]
                wanted = torch.where(torch.isfinite(wanted), wanted, 0)
                losses[index][sensor] = masked_l1(prediction, wanted, counted, counts[index].get(sensor))

        loss = None
        if masks:
            loss = pretraining_loss(losses, list(weights), outputs.aux_loss, self.config.router_aux_loss_coef)
        return MsGFMForPreTrainingOutput(
            loss=loss,
            reconstruction=_unnest(reconstructions, pixel_values),
            slice_losses=_unnest(losses, pixel_values) if masks else None,
            aux_loss=outputs.aux_loss,
            # An exported graph has no place for strings.
            slices=None if torch.compiler.is_exporting() else slices,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            selected_experts=outputs.selected_experts,
        )

    def _nest(self, values, argument: str, like: list[dict] | None = None) -> list[dict[str, torch.Tensor]]:
        """A tensor, a dictionary or a list of dictionaries -> a list of dictionaries, checked against the input's."""
        if values is None:
            return []
        if isinstance(values, torch.Tensor | Mapping):
            values = [values]
        nested = [by_sensor(self.config, value, argument) or {} for value in values]
        if like is not None and argument != "valid_mask" and [set(v) for v in nested] != [set(v) for v in like]:
            raise ValueError(
                f"`{argument}` must be nested as `pixel_values` ({[sorted(v) for v in like]}), got "
                f"{[sorted(v) for v in nested]}. Give one entry per input."
            )
        if like is not None and len(nested) != len(like):
            raise ValueError(
                f"`{argument}` must have one entry per source ({len(like)}), got {len(nested)}. Add or drop some."
            )
        return nested

    def _targets(self, targets, sources: list[dict]) -> list[dict[str, str]]:
        if targets is None:
            targets = [{} for _ in sources]
        elif isinstance(targets, Mapping):
            targets = [targets]
        if len(targets) != len(sources):
            raise ValueError(
                f"`targets` must have one entry per source ({len(sources)}), got {len(targets)}. Add or drop some."
            )
        complete = []
        for source, given in zip(sources, targets, strict=True):
            for sensor, target in given.items():
                if sensor not in source or target not in source:
                    raise ValueError(
                        f"`targets` must map an input to an input of the same source ({', '.join(source)}), got "
                        f"{sensor!r} -> {target!r}. A target's pixels come from its own input."
                    )
            complete.append({sensor: given.get(sensor, sensor) for sensor in source})
        return complete

    def _decoder(self, sensor: str, bands, grid: tuple[int, int], pixels: torch.Tensor):
        """D of a sensor, for the bands its input has: features (B, L, D) -> (B, C, H, W)."""
        stride, index = self.config.encoder_stride, self.msgfm.embeddings.band_index(sensor, pixels, bands)
        convolution = self.decoders[sensor]
        merges = 2 ** (len(self.config.depths) - 1)
        final = math.ceil(grid[0] / merges), math.ceil(grid[1] / merges)
        height, width = pixels.shape[2:]

        def decode(features: torch.Tensor) -> torch.Tensor:
            weight, bias = convolution.weight, convolution.bias
            if index != list(range(len(bias) // stride**2)):
                kernels, biases = weight.split(stride**2), bias.split(stride**2)
                weight = torch.cat([kernels[band] for band in index])
                bias = torch.cat([biases[band] for band in index])
            return F.pixel_shuffle(F.conv2d(_as_map(features, final), weight, bias), stride)[..., :height, :width]

        return decode


def _unnest(values: list[dict], like):
    """Nest results as the input `like` was."""
    if isinstance(like, torch.Tensor):
        return next(iter(values[0].values()))
    return values[0] if isinstance(like, Mapping) else values


class ParameterCount(NamedTuple):
    """Parameters of a model, and those that one pass uses."""

    total: int
    active: int


def count_parameters(
    model: MsGFMPreTrainedModel, inputs: Sequence[str] | None = None, targets: Sequence[str] | None = None
) -> ParameterCount:
    """Count parameters: all, and those active when images of `inputs` are turned into `targets`.

    Active are the embeddings of the inputs, the decoders of the targets, and of every E experts the K that see a token.

    Args:
        model: any msGFM model.
        inputs: sensors that go in, default `config.inputs`.
        targets: sensors that come out, default the inputs; read only where the model has decoders.

    Raises:
        ValueError: for a sensor the model does not have, or a bare string.
    """
    inputs = list(model.config.inputs) if inputs is None else inputs
    targets = inputs if targets is None else targets
    for name, sensors in (("inputs", inputs), ("targets", targets)):
        if isinstance(sensors, str):
            raise ValueError(f"`{name}` must be a list of sensors, got {sensors!r}. Use [{sensors!r}].")
    for sensor in (*inputs, *targets):
        model.config.sensor(sensor)
    share = model.config.num_experts_per_tok / model.config.num_experts
    total = active = 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        path = name.split(".")
        if "patch_embeddings" in path and path[path.index("patch_embeddings") + 1] not in inputs:
            continue
        if path[0] == "decoders" and path[1] not in targets:
            continue
        active += int(parameter.numel() * share) if "experts" in path else parameter.numel()
    return ParameterCount(total, active)


__all__ = [
    "MsGFMBackbone",
    "MsGFMForPreTraining",
    "MsGFMModel",
    "MsGFMPreTrainedModel",
    "count_parameters",
    "routing_statistics",
]
