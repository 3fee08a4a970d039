"""Transformers' Swin and SwinV2 with the weights of a model of ours: the references of tests and benchmarks."""

from transformers import SwinConfig, SwinModel, Swinv2Config, Swinv2Model


def _shape(config, image_size) -> dict:
    """What both of their configurations call as ours does."""
    return {
        "image_size": image_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "embed_dim": config.embed_dim,
        "depths": config.depths,
        "num_heads": config.num_heads,
        "window_size": config.window_size,
        "drop_path_rate": 0.0,
        "hidden_act": config.hidden_act,
        "layer_norm_eps": config.layer_norm_eps,
    }


def swin_with_our_weights(model, image_size):
    swin = SwinModel(SwinConfig(**_shape(model.config, image_size))).eval()
    ours, theirs = model.state_dict(), {}
    for name in swin.state_dict():
        if name.startswith("embeddings."):
            part = name.removeprefix("embeddings.patch_embeddings.").removeprefix("embeddings.")
            theirs[name] = ours[f"embeddings.patch_embeddings.rgb.{part}"]
        elif any(f".{letter}_proj." in name for letter in "qkv"):
            block, _, rest = name.partition(".attention.")
            letter, kind = rest[0], rest.rpartition(".")[2]
            theirs[name] = ours[f"{block}.attention.qkv.{kind}"].chunk(3)["qkv".index(letter)]
        else:
            source = name.replace(".attention.o_proj.", ".attention.proj.")
            theirs[name] = ours[source.replace(".relative_position_bias.relative", ".relative")]
    swin.load_state_dict(theirs)
    return swin


def swinv2_with_our_weights(model, image_size):
    config = model.config
    more = {"pretrained_window_sizes": config.pretrained_window_sizes, "qkv_bias": config.qkv_bias}
    swin = Swinv2Model(Swinv2Config(**_shape(config, image_size), **more)).eval()
    ours, theirs = model.state_dict(), {}
    renamed = {"intermediate.dense": "mlp.fc1", "attention.output.dense": "attention.proj", "output.dense": "mlp.fc2"}
    for name in swin.state_dict():
        if name.startswith("embeddings."):
            part = name.removeprefix("embeddings.patch_embeddings.").removeprefix("embeddings.")
            theirs[name] = ours[f"embeddings.patch_embeddings.rgb.{part}"]
            continue
        block, _, rest = name.partition(".attention.self.")
        kind = rest.rpartition(".")[2]
        third = ["query", "key", "value"].index(rest.split(".")[0]) if rest[:3] in ("que", "key", "val") else None
        if third is None:
            source = name.replace(".attention.self.", ".attention.")
            for their_part, our_part in renamed.items():
                if f".{their_part}." in source:
                    source = source.replace(their_part, our_part)
                    break
            theirs[name] = ours[source]
        elif kind == "weight":
            theirs[name] = ours[f"{block}.attention.qkv.weight"].chunk(3)[third]
        else:
            theirs[name] = ours[f"{block}.attention.{rest[0]}_bias"]
    swin.load_state_dict(theirs)
    return swin
