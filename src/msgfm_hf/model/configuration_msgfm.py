# Copyright 2026 The msgfm_hf contributors. Licensed under the Apache License, Version 2.0.
"""Configuration of msGFM (arXiv 2404.01260); the default is the paper's model."""

import dataclasses
import difflib
import math

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

from .sensors import SENSORS, SensorSpec

logger = logging.get_logger(__name__)

# Set from the fields below, stored in config.json for readers of it, and never trusted on the way back.
_DERIVED = ("num_layers", "hidden_size", "stage_names")

# Fields that choose by name; the first is the default.
_CHOICES = {
    "fusion": ("early", "late"),
    "attention_score": ("dot", "cosine"),
    "position_bias": ("table", "log_cpb"),
    "norm_position": ("pre", "post"),
    "router_type": ("linear", "cosine"),
    "router_aux_loss_type": ("importance_load", "gshard"),
}


@strict
class MsGFMConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""
    Configuration of an msGFM model. `MsGFMConfig()` is the model of the paper: Swin-B with patch 4 and window 6, eight
    experts in every other block of stage 3, and one embedding and decoder per sensor (rgb, s2, s1, dsm).

    Args:
        sensors (`dict[str, dict]`, *optional*, defaults to the catalogue's rgb, s2, s1 and dsm):
            Every sensor the model has an embedding for: `{id: SensorSpec(...).to_dict()}`. Kept sorted by id.
        inputs (`dict[str, list[str]]`, *optional*, defaults to `{"rgb": ["red", "green", "blue"]}`):
            What a checkpoint expects: the sensors and, by name, their bands. A bare tensor is this single sensor. Kept
            sorted by id.
        fusion (`str`, *optional*, defaults to `"early"`):
            How several sensors of one place are joined (paper, appendix C.2): `early` sums their embeddings (method 2),
            `late` encodes each alone and concatenates the final features in the (sorted) order of `inputs` (method 1).
        image_size (`int`, *optional*, defaults to 192): height and width of training crops in pixels; any size runs.
        patch_size (`int`, *optional*, defaults to 4): side of an embedding patch in pixels.
        embed_dim (`int`, *optional*, defaults to 128): channels of the first stage; each stage doubles them.
        depths (`list[int]`, *optional*, defaults to `[2, 2, 18, 2]`): blocks per stage.
        num_heads (`list[int]`, *optional*, defaults to `[4, 8, 16, 32]`): attention heads per stage.
        window_size (`int`, *optional*, defaults to 6): side of an attention window in tokens.
        pretrained_window_sizes (`list[int]`, *optional*, defaults to zeros):
            With `position_bias="log_cpb"`, per stage the window the biases were learned with; 0 stands for
            `window_size`.
        mlp_ratio (`float`, *optional*, defaults to 4.0): hidden width of an MLP or expert over its input width.
        qkv_bias (`bool`, *optional*, defaults to `True`): whether queries, keys and values have a bias.
        attention_score (`str`, *optional*, defaults to `"dot"`):
            What a query and a key are compared by: `dot`, scaled (Swin, Swin-MoE), or `cosine` with a learned scale and
            no bias of keys (SwinV2).
        position_bias (`str`, *optional*, defaults to `"table"`):
            What relative positions add to that: a `table` (Swin), or `log_cpb`, a network of the log-spaced offset
            (Swin-MoE; SwinV2, where with `cosine` 16 times its sigmoid is added).
        norm_position (`str`, *optional*, defaults to `"pre"`):
            Whether a block's branches and a merge are normalised before (`pre`: Swin, Swin-MoE) or after (`post`:
            SwinV2).
        hidden_act (`str`, *optional*, defaults to `"gelu"`): activation of MLPs and experts.
        hidden_dropout_prob (`float`, *optional*, defaults to 0.0): dropout after the embedding and in dense MLPs.
        attention_probs_dropout_prob (`float`, *optional*, defaults to 0.0): dropout of attention weights.
        drop_path_rate (`float`, *optional*, defaults to 0.0): stochastic depth of the last block, growing linearly.
        moe_blocks (`list[list[int]]`, *optional*, defaults to `[[], [], [1, 3, ..., 17], []]`):
            Per stage, the blocks (counted inside the stage) whose MLP is a mixture of experts.
        num_experts (`int`, *optional*, defaults to 8): experts per such block.
        num_experts_per_tok (`int`, *optional*, defaults to 1): experts that see a token.
        router_type (`str`, *optional*, defaults to `"linear"`):
            `linear`, or `cosine` between a token's projection and a vector per expert, over a learned temperature.
        router_noise (`float`, *optional*, defaults to 1.0):
            In training, Gaussian noise of standard deviation `router_noise / num_experts` on the router's logits.
        capacity_factor (`float`, *optional*, defaults to 1.25):
            In training an expert takes at most `num_experts_per_tok * int(capacity_factor * ceil(tokens / experts))`
            tokens, the most confident first; the others pass by on the residual. Below 1 that is none of few tokens.
            `None`: no limit.
        eval_capacity_factor (`float`, *optional*):
            The same in evaluation. The default `None` drops nothing, so an image's output does not depend on its batch.
        router_aux_loss_type (`str`, *optional*, defaults to `"importance_load"`):
            The load-balancing loss: `importance_load` (Swin-MoE, V-MoE) or `gshard`.
        router_aux_loss_coef (`float`, *optional*, defaults to 0.01): weight of the load-balancing loss (lambda, 3.4).
        mask_patch_size (`int`, *optional*, defaults to 32): side of a masked cell in pixels.
        initializer_range (`float`, *optional*, defaults to 0.02): standard deviation of fresh linear weights.
        layer_norm_eps (`float`, *optional*, defaults to 1e-5): epsilon of every layer norm.
        semantic_loss_ignore_index (`int`, *optional*, defaults to 255): label that counts in no segmentation loss.
        output_router_logits (`bool`, *optional*, defaults to `False`): whether outputs carry the router's logits.

    Raises:
        ValueError: for values that do not fit together, and for a misspelt name of a field.
    """

    model_type = "msgfm"
    # What `Trainer` does not gather as predictions.
    keys_to_ignore_at_inference = ["hidden_states", "attentions", "router_logits", "selected_experts", "aux_loss"]
    attribute_map = {
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "num_local_experts": "num_experts",
    }

    sensors: dict[str, dict] | None = None
    inputs: dict[str, list[str]] | None = None
    fusion: str = "early"
    image_size: int = 192
    patch_size: int = 4
    embed_dim: int = 128
    depths: list[int] | tuple[int, ...] = (2, 2, 18, 2)
    num_heads: list[int] | tuple[int, ...] = (4, 8, 16, 32)
    window_size: int = 6
    pretrained_window_sizes: list[int] | tuple[int, ...] | None = None
    mlp_ratio: float | int = 4.0
    qkv_bias: bool = True
    attention_score: str = "dot"
    position_bias: str = "table"
    norm_position: str = "pre"
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.0
    moe_blocks: list[list[int]] | None = None
    num_experts: int = 8
    num_experts_per_tok: int = 1
    router_type: str = "linear"
    router_noise: float | int = 1.0
    capacity_factor: float | int | None = 1.25
    eval_capacity_factor: float | int | None = None
    router_aux_loss_type: str = "importance_load"
    router_aux_loss_coef: float | int = 0.01
    mask_patch_size: int = 32
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    semantic_loss_ignore_index: int = 255
    output_router_logits: bool = False
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        self._refuse_misspelt(kwargs)
        if self._auto_class is None:
            # Remote code names itself in a file. These classes need none beside the weights, and saving writes none.
            kwargs.pop("auto_map", None)
            pipelines = kwargs.pop("custom_pipelines", {})
            pipelines = {k: v for k, v in pipelines.items() if not v["impl"].startswith("pipeline_msgfm.")}
            if pipelines:
                kwargs["custom_pipelines"] = pipelines
        for name in _DERIVED:
            kwargs.pop(name, None)
        out_features, out_indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        super().__post_init__(**kwargs)
        if self.sensors is None:
            self.sensors = {sensor: SENSORS[sensor].to_dict() for sensor in ("rgb", "s2", "s1", "dsm")}
        # JSON sorts keys. Parameters are registered in the order of `sensors`, features of late fusion laid out in that
        # of `inputs`: a reloaded model must have the same.
        self.sensors = dict(sorted(self.sensors.items()))
        if self.inputs is None:
            default = "rgb" if "rgb" in self.sensors else next(iter(self.sensors), None)
            self.inputs = {default: self.sensor(default).band_names} if default else {}
        self.inputs = dict(sorted(self.inputs.items()))
        if self.moe_blocks is None:
            # "Every other Swin block", numbered 1, 3, ..., 17: the blocks of stage 3 (the paper's third of four).
            self.moe_blocks = [[] for _ in self.depths]
            if len(self.depths) > 2:
                self.moe_blocks[2] = list(range(1, self.depths[2], 2))
        if self.pretrained_window_sizes is None:
            self.pretrained_window_sizes = [0] * len(self.depths)
        self.num_layers = len(self.depths)
        self.hidden_size = self.embed_dim * 2 ** (self.num_layers - 1)
        self.stage_names = ["stem"] + [f"stage{stage}" for stage in range(1, self.num_layers + 1)]
        self.set_output_features_output_indices(out_indices=out_indices, out_features=out_features)
        self._check()

    def sensor(self, sensor: str) -> SensorSpec:
        """The sensor of that id.

        Raises:
            ValueError: if this model does not have it; the message lists those it has.
        """
        if sensor not in self.sensors:
            raise ValueError(
                f"`pixel_values` must be of the sensors of this model ({', '.join(self.sensors)}), got {sensor!r}. "
                "Give a model a new sensor with `model.add_sensor(SensorSpec(...))`."
            )
        return SensorSpec.from_dict(self.sensors[sensor])

    @property
    def encoder_stride(self) -> int:
        """Pixels per side of a final token: `patch_size` doubled by each merge."""
        return self.patch_size * 2 ** (len(self.depths) - 1)

    def _refuse_misspelt(self, kwargs):
        fields = [field.name for field in dataclasses.fields(self) if not field.name.startswith("_")]
        for name in kwargs:
            # `window` is near enough to `window_size`; what every configuration knows (`num_labels`) is not meant.
            known = name in (*_DERIVED, "out_features", "out_indices") or hasattr(PreTrainedConfig, name)
            near = difflib.get_close_matches(name, fields, n=1, cutoff=0.7)
            if not known and near:
                message = f"`{name}` must be a field of MsGFMConfig, got {kwargs[name]!r}. Did you mean `{near[0]}`?"
                # A file says what version wrote it. It may carry attributes of other origins.
                if self.transformers_version is None:
                    raise ValueError(message)
                logger.warning(message)

    def _check(self):
        def need(holds, field, rule, remedy):
            if not holds:
                raise ValueError(f"`{field}` must {rule}, got {getattr(self, field)!r}. {remedy}")

        for name, value in vars(self).items():
            need(not isinstance(value, float) or math.isfinite(value), name, "be finite", "Correct it.")
        need(self.sensors, "sensors", "name at least one sensor", "Leave it out for the paper's four.")
        for sensor, spec in self.sensors.items():
            if SensorSpec.from_dict(spec).id != sensor:
                raise ValueError(
                    f"`sensors` must be keyed by the id of each sensor, got {sensor!r} for {spec.get('id')!r}. "
                    "Use `{spec.id: spec.to_dict()}`."
                )
            # Modules are kept by these ids, beside the attributes of their container.
            if hasattr(nn.ModuleDict, sensor) or sensor == "training":
                raise ValueError(
                    f"`sensors` must have ids that name no attribute of a module, got {sensor!r}. Give it another id."
                )
        need(self.inputs, "inputs", "name at least one sensor and its bands", "For example {'s1': ['VV', 'VH']}.")
        for sensor, bands in self.inputs.items():
            need(bands, "inputs", "name the bands of every sensor", "For example {'s1': ['VV', 'VH']}.")
            # The canonical names, so that no reader of them has to know the aliases.
            self.inputs[sensor] = [band.name for band in self.sensor(sensor).select(bands)]
        for field, choices in _CHOICES.items():
            rule = "be " + " or ".join(repr(choice) for choice in choices)
            need(getattr(self, field) in choices, field, rule, f"The default is {choices[0]!r}.")
        need(self.depths, "depths", "name at least one stage", "The paper has [2, 2, 18, 2].")
        need(all(depth > 0 for depth in self.depths), "depths", "be above 0 in every stage", "Leave the stage out.")
        for field in (
            "image_size",
            "patch_size",
            "embed_dim",
            "window_size",
            "mlp_ratio",
            "num_experts",
            "num_experts_per_tok",
            "layer_norm_eps",
        ):
            need(getattr(self, field) > 0, field, "be above 0", "Correct it.")
        need(
            int(self.mlp_ratio * self.embed_dim) > 0,
            "mlp_ratio",
            f"leave an MLP at least one of `embed_dim` ({self.embed_dim}) channels",
            "The paper has 4.",
        )
        for field in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"):
            need(0 <= getattr(self, field) < 1, field, "be at least 0 and below 1", "0 turns it off.")
        need(self.hidden_act in ACT2FN, "hidden_act", "be an activation of Transformers", "The paper has 'gelu'.")
        for field in ("num_heads", "moe_blocks", "pretrained_window_sizes"):
            need(
                len(getattr(self, field)) == len(self.depths),
                field,
                f"have one entry per stage {self.depths}",
                "Add or drop some.",
            )
        for stage, heads in enumerate(self.num_heads):
            width = self.embed_dim * 2**stage
            need(
                heads > 0 and width % heads == 0,
                "num_heads",
                f"divide the stages' widths ({width})",
                "Double it per stage.",
            )
        for stage, blocks in enumerate(self.moe_blocks):
            inside = all(0 <= block < self.depths[stage] for block in blocks)
            need(inside, "moe_blocks", f"count blocks inside their stage ({self.depths})", "The first block is 0.")
            need(len(set(blocks)) == len(blocks), "moe_blocks", "name each block once", "Drop the others.")
        need(
            all(window >= 0 for window in self.pretrained_window_sizes),
            "pretrained_window_sizes",
            "not be negative",
            "0 stands for `window_size`.",
        )
        need(
            not any(self.pretrained_window_sizes) or self.position_bias == "log_cpb",
            "pretrained_window_sizes",
            "be zeros where `position_bias` is 'table'",
            "Only 'log_cpb' carries over to other windows.",
        )
        need(
            self.num_experts_per_tok <= self.num_experts,
            "num_experts_per_tok",
            f"be at most `num_experts` ({self.num_experts})",
            "A token sees an expert once.",
        )
        need(
            self.mask_patch_size % self.patch_size == 0 and self.mask_patch_size > 0,
            "mask_patch_size",
            f"be a multiple of `patch_size` ({self.patch_size})",
            "A masked cell covers whole patches.",
        )
        for field in ("capacity_factor", "eval_capacity_factor"):
            value = getattr(self, field)
            need(value is None or value > 0, field, "be above 0, or None for no limit", "The paper has 1.25.")
        for field in ("router_noise", "router_aux_loss_coef", "initializer_range"):
            need(getattr(self, field) >= 0, field, "not be negative", "0 turns it off.")


__all__ = ["MsGFMConfig"]
