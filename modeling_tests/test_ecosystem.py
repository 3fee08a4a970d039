"""What engineers do to a Transformers model: compile, export, adapt, checkpoint, place and shard it."""

import io

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoBackbone, AutoModel

from msgfm_hf import (
    MsGFMBackbone,
    MsGFMConfig,
    MsGFMForImageClassification,
    MsGFMForPreTraining,
)
from tiny_models import CLASSES, RGB, TINY, tiny

# One half of the tokens finds no room, without noise: what a compiled and a plain model must drop alike.
STEADY = {"router_noise": 0.0, "capacity_factor": 0.5, "num_labels": 3}
MASK = torch.arange(80).expand(2, 80) % 3 == 0


def main_tensor(output):
    for name in ("reconstruction", "logits", "last_hidden_state"):
        if name in output:
            return output[name]
    return output.feature_maps[-1]


def arguments(cls, images):
    masks = {"bool_masked_pos": MASK[: len(images)]} if cls is MsGFMForPreTraining else {}
    return {"pixel_values": images, **masks}


# ---------------------------------------------------------------------------------------------------------- compile


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("training", [False, True])
def test_one_graph_holds_the_whole_model(cls, training):
    model = tiny(cls, **STEADY).train(training)
    images = torch.randn(2, 3, 37, 29)
    given = {**arguments(cls, images), **({"output_router_logits": True} if training else {})}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for network in (model, compiled):
        model.zero_grad()
        output = network(**given)
        with torch.set_grad_enabled(training):
            if training:
                loss = output.loss if output.get("loss") is not None else main_tensor(output).square().mean()
                if "aux_loss" in output and cls is not MsGFMForPreTraining:
                    loss = loss + output.aux_loss
                loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((main_tensor(output).detach(), gradients))
    torch._dynamo.reset()
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-5, rtol=1e-5)
    assert set(results[0][1]) == set(results[1][1]) and bool(results[0][1]) is training
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_in_bfloat16_the_compiled_experts_are_one_grouped_product(training):
    """The path of CUDA: sorted tokens, a grouped product in the autocast dtype, nothing read back by Python."""
    model = tiny(**STEADY).train(training)
    images = torch.randn(2, 3, 37, 29)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for network in (model, compiled):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = network(images)
        output.last_hidden_state.float().square().mean().backward()
        experts = model.encoder.layers[1].blocks[1].mlp.experts
        results.append([output.last_hidden_state.float(), *(p.grad.clone() for p in experts.parameters())])
    torch._dynamo.reset()
    # Dropped tokens lie where a grouped product leaves its output as it was in memory.
    assert not training or output.selected_experts[0].eq(4).any()
    for ours, theirs in zip(*results, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, atol=0.03 * theirs.abs().max().item(), rtol=0.05)


# ----------------------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("cls", CLASSES)
def test_an_exported_model_reloads_and_takes_other_batch_sizes(cls):
    model = tiny(cls, num_labels=3)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(
        model, (), {"pixel_values": torch.randn(2, 3, 37, 29)}, dynamic_shapes={"pixel_values": {0: batch}}
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    reloaded = torch.export.load(file).module()
    for images in (torch.randn(1, 3, 37, 29), torch.randn(5, 3, 37, 29)):
        ours, theirs = reloaded(pixel_values=images), model(images)
        torch.testing.assert_close(main_tensor(ours), main_tensor(theirs), atol=1e-5, rtol=1e-5)


def test_a_model_of_two_sensors_exports_with_their_valid_masks():
    model = tiny(inputs={"s1": ["VV", "VH"], "s2": ["B02", "B8A"]})
    batch = torch.export.Dim("batch", min=1, max=64)

    def places(count):
        valid = torch.ones(count, 32, 36, dtype=torch.bool)
        valid[:, :9] = False
        return {
            "pixel_values": {"s1": torch.randn(count, 2, 32, 36), "s2": torch.randn(count, 2, 32, 36)},
            "valid_mask": {"s1": valid, "s2": valid.flip(1)},
        }

    dynamic = {name: {"s1": {0: batch}, "s2": {0: batch}} for name in ("pixel_values", "valid_mask")}
    program = torch.export.export(model, (), places(2), dynamic_shapes=dynamic)
    given = places(3)
    theirs = model(**given)
    torch.testing.assert_close(program.module()(**given).pooler_output, theirs.pooler_output, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------- PEFT


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize(
    "target, adapted",
    [
        ({"target_modules": ["qkv"]}, {"qkv"}),
        ({"target_modules": "all-linear"}, {"qkv", "proj", "fc1", "fc2", "reduction"}),
        ({"target_modules": ["cosine_projector"]}, {"cosine_projector"}),
        ({"target_modules": [], "target_parameters": ["mlp.experts.up_proj", "mlp.experts.down_proj"]}, {"experts"}),
    ],
    ids=["qkv", "linear", "router", "experts"],
)
def test_lora_adapts_and_merges(target, adapted):
    router = "cosine" if "cosine_projector" in adapted else "linear"
    model = tiny(MsGFMForImageClassification, num_labels=3, sensors=RGB, router_type=router)
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 1])
    before = model(images).logits
    frozen = model.msgfm.encoder.layers[0].blocks[0].attention.proj.weight
    untouched = frozen.detach().clone()
    network = get_peft_model(model, LoraConfig(r=2, modules_to_save=["classifier"], **target)).eval()
    torch.testing.assert_close(network(images).logits, before)
    trainable = {name: p for name, p in network.named_parameters() if p.requires_grad}
    named = {part for name in trainable for part in name.split(".") if part in adapted | {"qkv", "experts"}}
    assert named == adapted
    optimizer = torch.optim.AdamW(trainable.values(), lr=0.05)
    network.train()
    losses = []
    for _ in range(8):
        loss = network(images, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in trainable.values())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0] and torch.equal(frozen, untouched)
    tuned = network.eval()(images).logits
    assert not torch.allclose(tuned, before, atol=1e-2)
    torch.testing.assert_close(network.merge_and_unload()(images).logits, tuned, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------------------- activation memory


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("head", [MsGFMForPreTraining, MsGFMForImageClassification])
def test_checkpointing_keeps_every_gradient_that_of_the_router_included(head, use_reentrant):
    """The router's share of the auxiliary loss vanishes where logits are recorded inside a re-entrant checkpoint."""
    images = torch.randn(2, 3, 37, 29)
    given = arguments(head, images) if head is MsGFMForPreTraining else {"pixel_values": images}
    if head is MsGFMForImageClassification:
        given["labels"] = torch.tensor([0, 2])
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        # An auxiliary loss so heavy that nothing else decides the router's gradient.
        model = tiny(head, num_labels=3, router_noise=0.0, router_aux_loss_coef=100.0, sensors=RGB).train()
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": use_reentrant})
            # Re-entrant checkpoints need an input that asks for a gradient.
            model.enable_input_require_grads()
        model(**given).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert set(gradients[0]) == set(gradients[1])
    router = next(name for name in gradients[0] if name.endswith("router.weight"))
    assert gradients[0][router].abs().max() > 1
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------------------------------------- places and formats


@pytest.mark.parametrize("cls", CLASSES)
def test_placing_casting_and_sharding_change_nothing_else(cls, tmp_path):
    model = tiny(cls, num_labels=3)
    images = torch.randn(1, 3, 32, 32)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    placed = cls.from_pretrained(tmp_path, device_map="cpu")
    assert torch.equal(main_tensor(placed(images)), main_tensor(model(images)))
    halved = cls.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in halved.parameters()} == {torch.bfloat16}
    assert torch.equal(main_tensor(halved(images)), main_tensor(model.to(torch.bfloat16)(images)))


def test_auto_backbone_builds_from_a_configuration():
    backbone = AutoBackbone.from_config(MsGFMConfig(**TINY, out_features=["stage1", "stage2"]))
    maps = backbone(torch.randn(1, 3, 32, 32)).feature_maps
    assert isinstance(backbone, MsGFMBackbone) and [m.shape[1:] for m in maps] == [(16, 8, 8), (32, 4, 4)]
    assert backbone.channels == [16, 32]


@pytest.mark.parametrize("cls", CLASSES)
def test_every_implementation_of_the_experts_gives_the_same(cls, tmp_path):
    model = tiny(cls, num_labels=3, num_experts_per_tok=2)
    images = torch.randn(2, 3, 32, 32)
    expected = main_tensor(model(images))
    assert model.config._experts_implementation == "eager"
    for implementation in ("grouped_mm", "batched_mm", "eager"):
        model.set_experts_implementation(implementation)
        assert model.config._experts_implementation == implementation
        torch.testing.assert_close(main_tensor(model(images)), expected, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    chosen = cls.from_pretrained(tmp_path, experts_implementation="grouped_mm")
    assert chosen.config._experts_implementation == "grouped_mm"
    with pytest.raises(ValueError, match="fastest.*is not supported"):
        model.set_experts_implementation("fastest")


def test_auto_model_takes_the_implementations_as_arguments(tmp_path):
    tiny().save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, attn_implementation="eager", experts_implementation="batched_mm")
    assert (model.config._attn_implementation, model.config._experts_implementation) == ("eager", "batched_mm")
