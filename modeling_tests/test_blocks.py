"""The options of blocks and routers: SwinV2 against Transformers', Swin-MoE and Tutel's routers against plain loops."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

import tiny_models
from msgfm_hf import MsGFMConfig, MsGFMForPreTraining, MsGFMModel
from msgfm_hf.model.objective import gshard_loss
from swin_weights import swinv2_with_our_weights
from tiny_models import TINY, lively, tiny

SWINV2 = {"attention_score": "cosine", "position_bias": "log_cpb", "norm_position": "post"}
SWIN_MOE = {"attention_score": "dot", "position_bias": "log_cpb", "norm_position": "pre"}
DENSE = {"moe_blocks": [[], []]}


# ----------------------------------------------------------------------------------------------------------- SwinV2


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "fields, size",
    [
        ({}, (64, 64)),  # grids 16 and 8: shifted in both stages
        ({"depths": [2, 4]}, (32, 32)),  # grids 8 and 4: a stage as large as its window is not shifted
        ({"pretrained_window_sizes": [12, 6]}, (64, 64)),
        ({"window_size": 6, "depths": [2, 2, 2], "num_heads": [2, 4, 8], "moe_blocks": [[], [], []]}, (96, 96)),
        ({"qkv_bias": False}, (32, 64)),
        ({"window_size": 1}, (16, 16)),  # Transformers, too, guards the division by window - 1
    ],
)
def test_every_stage_equals_transformers_swinv2(fields, size, implementation):
    # A post-norm over few channels magnifies rounding: widths as small as elsewhere differ by 1e-5 between any two
    # ways of adding up.
    fields = {**DENSE, "embed_dim": 32, **fields}
    model = tiny(deviation=0.1, **SWINV2, **fields)
    model.set_attn_implementation(implementation)
    swin = swinv2_with_our_weights(model, size)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        ours = model(images, output_hidden_states=True)
        theirs = swin(images, output_hidden_states=True)
    assert len(ours.hidden_states) == len(theirs.hidden_states)
    for left, right in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert right.abs().max() > 0.1
        torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.last_hidden_state, theirs.last_hidden_state, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.pooler_output, theirs.pooler_output, atol=1e-5, rtol=1e-5)


def test_swinv2_gradients_equal_those_of_transformers():
    model = tiny(deviation=0.1, **SWINV2, **DENSE, embed_dim=32)
    swin = swinv2_with_our_weights(model, 64)
    images = torch.randn(2, 3, 64, 64)
    for network in (model, swin):
        network(images).last_hidden_state.square().mean().backward()
    ours = model.encoder.layers[0].blocks[1].attention
    theirs = swin.encoder.layers[0].blocks[1].attention.self
    torch.testing.assert_close(ours.logit_scale.grad, theirs.logit_scale.grad, atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(ours.q_bias.grad, theirs.query.bias.grad, atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(ours.qkv.weight.grad.chunk(3)[1], theirs.key.weight.grad, atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(
        ours.continuous_position_bias_mlp[0].weight.grad,
        theirs.continuous_position_bias_mlp[0].weight.grad,
        atol=1e-6,
        rtol=1e-3,
    )


def test_fresh_swinv2_blocks_are_the_identity():
    """Its reference implementation starts the norms behind the branches at zero (arXiv 2111.09883, A2)."""
    model = MsGFMModel(MsGFMConfig(**TINY, **SWINV2)).eval()
    tokens = torch.randn(2, 64, 16)
    output = model.encoder.layers[0](tokens, (8, 8))
    assert torch.equal(output[1], tokens)
    assert torch.allclose(model.encoder.layers[0].blocks[0].attention.logit_scale, torch.full((2, 1, 1), math.log(10)))


# --------------------------------------------------------------------------------------------------------- Swin-MoE


def log_offsets(window):
    """Swin-MoE's offsets, one by one: sign(o) log2(1 + 8 |o| / (window - 1)) / log2(8), for rows and columns."""

    def one(offset):
        return math.copysign(math.log2(1 + 8 * abs(offset) / (window - 1)) / 3, offset)

    return [(one(down), one(right)) for down in range(1 - window, window) for right in range(1 - window, window)]


def swin_moe_block(block, tokens, grid, window, shift):
    """A block of Swin-MoE on tokens (h * w, D) of one image, windows cut by hand: dot products, the raw output of the
    position network, norms before; a routed MLP whose gate is the probability."""
    height, width = grid
    attention = block.attention
    heads, dim = attention.num_heads, tokens.shape[1]
    offsets = torch.tensor(log_offsets(window))
    first, _, last = attention.continuous_position_bias_mlp
    table = F.linear(F.relu(F.linear(offsets, first.weight, first.bias)), last.weight)

    normed = F.layer_norm(tokens, (dim,), block.layernorm_before.weight, block.layernorm_before.bias, 1e-5)
    query, key, value = F.linear(normed, attention.qkv.weight, attention.qkv.bias).chunk(3, -1)
    context = torch.zeros_like(tokens)
    places = [(y, x) for y in range(height) for x in range(width)]

    def cell(size, coordinate):
        """The window a row or column falls into; what the roll wraps around makes a window of its own."""
        return (coordinate - shift) // window

    for i, (y, x) in enumerate(places):
        mates = [
            j
            for j, (v, u) in enumerate(places)
            if cell(height, v) == cell(height, y) and cell(width, u) == cell(width, x)
        ]
        for head in range(heads):
            part = slice(head * dim // heads, (head + 1) * dim // heads)
            scores = []
            for j in mates:
                v, u = places[j]
                row = (y - v + window - 1) * (2 * window - 1) + (x - u + window - 1)
                scores.append(query[i, part] @ key[j, part] / math.sqrt(dim / heads) + table[row, head])
            weights = torch.stack(scores).softmax(0)
            context[i, part] = sum(w * value[j, part] for w, j in zip(weights, mates, strict=True))
    tokens = tokens + F.linear(context, attention.proj.weight, attention.proj.bias)

    normed = F.layer_norm(tokens, (dim,), block.layernorm_after.weight, block.layernorm_after.bias, 1e-5)
    if not block.sparse:
        hidden = F.gelu(F.linear(normed, block.mlp.fc1.weight, block.mlp.fc1.bias))
        return tokens + F.linear(hidden, block.mlp.fc2.weight, block.mlp.fc2.bias)
    update, experts = [], block.mlp.experts
    for token in normed:
        gates = (block.mlp.router.weight @ token).softmax(0)
        best = int(gates.argmax())
        hidden = F.gelu(experts.up_proj[best] @ token + experts.up_proj_bias[best])
        update.append(gates[best] * (experts.down_proj[best] @ hidden + experts.down_proj_bias[best]))
    return tokens + torch.stack(update)


def test_a_stage_of_swin_moe_equals_loops():
    model = tiny(**SWIN_MOE, moe_blocks=[[1], []])
    stage, tokens = model.encoder.layers[0], torch.randn(1, 64, 16)
    with torch.no_grad():
        expected = swin_moe_block(stage.blocks[0], tokens[0], (8, 8), 4, 0)
        expected = swin_moe_block(stage.blocks[1], expected, (8, 8), 4, 2)
        output = stage(tokens, (8, 8))[1][0]
    assert (expected - tokens[0]).abs().mean() > 0.1
    torch.testing.assert_close(output, expected, atol=2e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------- every combination

COMBINATIONS = [
    dict(zip(("attention_score", "position_bias", "norm_position"), choice, strict=True))
    for choice in itertools.product(("dot", "cosine"), ("table", "log_cpb"), ("pre", "post"))
]


@pytest.mark.parametrize("fields", COMBINATIONS, ids=lambda f: "-".join(f.values()))
def test_every_combination_trains_every_parameter_and_survives_saving(fields, tmp_path):
    model = tiny(MsGFMForPreTraining, **fields, router_type="cosine", sensors=tiny_models.RGB).train()
    images, masks = torch.randn(2, 3, 37, 29), torch.rand(2, 80) < 0.5
    model(images, masks).loss.backward()
    still = [
        n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()
    ]
    assert still == []
    model.eval().save_pretrained(tmp_path)
    again = MsGFMForPreTraining.from_pretrained(tmp_path)
    assert torch.equal(again(images).reconstruction, model(images).reconstruction)


@pytest.mark.parametrize("fields", COMBINATIONS, ids=lambda f: "-".join(f.values()))
def test_windows_of_one_token_are_finite(fields):
    model = tiny(**fields, window_size=1).train()
    output = model(torch.randn(2, 3, 16, 20))
    output.last_hidden_state.square().mean().backward()
    assert output.last_hidden_state.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_larger_window_keeps_the_bias_of_the_offsets_it_was_learned_with():
    """`pretrained_window_sizes` scales offsets by the window of pretraining, so equal offsets have equal biases."""
    small = tiny(**SWIN_MOE, window_size=4)
    large = MsGFMModel(MsGFMConfig(**{**TINY, "window_size": 6, "pretrained_window_sizes": [4, 4]}, **SWIN_MOE)).eval()
    large.load_state_dict(small.state_dict())
    ours, theirs = (m.encoder.layers[0].blocks[0].attention.position_bias()[0] for m in (small, large))
    # Queries and keys of a 4 x 4 corner of the 6 x 6 window.
    corner = [6 * y + x for y in range(4) for x in range(4)]
    torch.testing.assert_close(theirs[:, corner][:, :, corner], ours)
    rescaled = MsGFMModel(MsGFMConfig(**{**TINY, "window_size": 6}, **SWIN_MOE)).eval()
    rescaled.load_state_dict(small.state_dict())
    other = rescaled.encoder.layers[0].blocks[0].attention.position_bias()[0]
    assert not torch.allclose(other[:, corner][:, :, corner], ours, atol=1e-3)


def test_keys_have_no_bias_where_scores_are_cosines():
    attention = tiny(**SWINV2).encoder.layers[0].blocks[0].attention
    assert attention.qkv.bias is None and attention.q_bias.shape == attention.v_bias.shape == (16,)
    unbiased = tiny(**SWINV2, qkv_bias=False).encoder.layers[0].blocks[0].attention
    assert unbiased.q_bias is None and unbiased.v_bias is None


# ---------------------------------------------------------------------------------------------------------- routers


def cosine_logits(router, token):
    """Tutel's cosine gate for one token: cos(W x + b, column e) * exp(min(temperature, log 100))."""
    projected = router.cosine_projector.weight @ token + router.cosine_projector.bias
    logits = []
    for expert in range(router.config.num_experts):
        column = router.sim_matrix[:, expert]
        logits.append(projected @ column / (projected.norm() * column.norm()))
    return torch.stack(logits) * torch.exp(torch.clamp(router.temperature, max=math.log(100)))


@pytest.mark.parametrize("temperature", [math.log(2), 9.0])
def test_the_cosine_router_equals_a_loop(temperature):
    router = tiny(router_type="cosine").encoder.layers[1].blocks[1].mlp.router
    with torch.no_grad():
        router.temperature.fill_(temperature)
    tokens = torch.randn(11, 32)
    expected = torch.stack([cosine_logits(router, token) for token in tokens])
    routing = router(tokens)
    torch.testing.assert_close(routing.router_logits, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(routing.selected_experts, expected.argmax(1, keepdim=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(router(tokens).router_logits, routing.router_logits)


def test_a_fresh_cosine_router_starts_as_tutels():
    router = MsGFMModel(MsGFMConfig(**TINY, router_type="cosine")).encoder.layers[1].blocks[1].mlp.router
    assert router.temperature.item() == pytest.approx(math.log(1 / 0.5))
    assert router.sim_matrix.shape == (256, 4) and router.sim_matrix.std().item() == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_gshard_loss_equals_a_loop(training, top_k):
    fields = {"router_aux_loss_type": "gshard", "num_experts_per_tok": top_k, "capacity_factor": 0.75}
    block = tiny(**fields).encoder.layers[1].blocks[1].mlp.train(training)
    tokens = torch.randn(2, 13, 32)
    torch.manual_seed(3)
    aux_loss = block(tokens)[2]
    torch.manual_seed(3)
    noise = torch.randn(26, 4) / 4 if training else torch.zeros(26, 4)
    scores = (tokens.flatten(0, 1) @ block.router.weight.t() + noise).softmax(-1)
    expected = 0
    for expert in range(4):
        # Only first choices count, and they do before anyone finds no room.
        share = sum(int(row.argmax()) == expert for row in scores) / 26
        expected = expected + 4 * share * sum(row[expert] for row in scores) / 26
    torch.testing.assert_close(aux_loss, expected)
    ours = torch.autograd.grad(aux_loss, block.router.weight, retain_graph=True)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(expected, block.router.weight)[0])


def test_gshard_loss_is_1_where_experts_are_even_and_e_where_one_takes_all():
    assert gshard_loss(torch.eye(4).repeat(3, 1)).item() == pytest.approx(1)
    assert gshard_loss(torch.tensor([[100.0, 0, 0, 0]] * 5)).item() == pytest.approx(4)


def test_fresh_options_share_the_initialisation_of_the_rest():
    model = MsGFMModel(MsGFMConfig(**TINY, **SWIN_MOE))
    network = model.encoder.layers[0].blocks[0].attention.continuous_position_bias_mlp
    assert network[0].weight.std().item() == pytest.approx(0.02, rel=0.2)
    # Buffers that no checkpoint holds are right after loading onto the meta device.
    lively(model)
    assert torch.isfinite(model(torch.randn(1, 3, 16, 16)).last_hidden_state).all()
