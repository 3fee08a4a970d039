"""The experts against a loop over tokens: who is chosen, who finds room, what comes out, and every gradient."""

import math

import pytest
import scipy.stats
import torch

import tiny_models
from msgfm_hf import MsGFMConfig, MsGFMForPreTraining, MsGFMModel, routing_statistics
from msgfm_hf.model.objective import importance_load_loss

TINY = {**tiny_models.TINY, "embed_dim": 8, "num_heads": [2, 2]}


def sparse_block(skew=0.0, implementation="eager", **fields):
    """A block of experts with weights far from zero, and a router that prefers expert 0 by `skew`."""
    model = MsGFMModel(MsGFMConfig(**{**TINY, **fields}))
    model.set_experts_implementation(implementation)
    block = model.encoder.layers[1].blocks[1].mlp
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
        block.router.weight[0] += skew
    return block


def per_token_loop(block, tokens, noise, capacity):
    """The definition: K best experts per token by probability; all first choices before any second, the most confident
    token first; an expert takes `capacity` choices; the gate is the probability; who finds no room adds nothing.

    Returns the output, the logits, the experts of each token (E for none), and the K-th largest logit.
    """
    experts, top_k = block.config.num_experts, block.config.num_experts_per_tok
    logits = tokens @ block.router.weight.t()
    noisy = logits + noise
    probabilities = noisy.softmax(-1)
    choices = [sorted(range(experts), key=lambda e: -row[e])[:top_k] for row in probabilities.tolist()]
    order = sorted(range(len(tokens)), key=lambda t: -max(probabilities[t].tolist()))
    room = [capacity] * experts
    chosen = [[experts] * top_k for _ in tokens]
    outputs = [torch.zeros_like(token) for token in tokens]
    up, up_bias, down, down_bias = (
        getattr(block.experts, name) for name in ("up_proj", "up_proj_bias", "down_proj", "down_proj_bias")
    )
    for choice in range(top_k):
        for t in order:
            e = choices[t][choice]
            if room[e] == 0:
                continue
            room[e] -= 1
            chosen[t][choice] = e
            hidden = torch.nn.functional.gelu(up[e] @ tokens[t] + up_bias[e])
            outputs[t] = outputs[t] + probabilities[t, e] * (down[e] @ hidden + down_bias[e])
    threshold = torch.stack([noisy[t, choices[t][-1]] for t in range(len(tokens))])
    return torch.stack(outputs), logits, torch.tensor(chosen), threshold


def gradients(block, tokens, output, aux_loss):
    """Of everything that has one, under an arbitrary downstream gradient and the auxiliary loss together."""
    towards = torch.linspace(-1, 1, output.numel()).view(output.shape)
    named = {"tokens": tokens, **dict(block.named_parameters())}
    values = torch.autograd.grad((output * towards).sum() + aux_loss, list(named.values()))
    return dict(zip(named, values, strict=True))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("router_noise", [0.0, 2.0])
@pytest.mark.parametrize(
    "training, capacity_factor, eval_capacity_factor, skew, drops",
    [
        (True, 1.25, None, 2.0, True),
        (True, 4.0, None, 2.0, False),
        (True, None, None, 2.0, False),
        (True, 0.3, None, 0.0, True),
        (False, 1.25, None, 2.0, False),
        (False, None, 0.5, 0.0, True),
        (False, None, 4.0, 0.0, False),
    ],
)
def test_outputs_and_gradients_equal_a_loop_over_tokens(
    implementation, top_k, router_noise, training, capacity_factor, eval_capacity_factor, skew, drops
):
    block = sparse_block(
        skew=skew,
        implementation=implementation,
        num_experts_per_tok=top_k,
        router_noise=router_noise,
        capacity_factor=capacity_factor,
        eval_capacity_factor=eval_capacity_factor,
    ).train(training)
    # 2 x 13 tokens over 4 experts: ceil(26 / 4) = 7 is not 26 / 4.
    tokens = (torch.randn(2, 13, 16) + 0.3).requires_grad_()
    torch.manual_seed(5)
    output, logits, aux_loss, selected = block(tokens)

    torch.manual_seed(5)
    noise = torch.randn(26, 4) * router_noise / 4 if training else torch.zeros(26, 4)
    factor = capacity_factor if training else eval_capacity_factor
    capacity = 10**6 if factor is None else top_k * int(factor * math.ceil(26 / 4))
    flat = tokens.flatten(0, 1)
    expected, expected_logits, chosen, threshold = per_token_loop(block, flat, noise, capacity)

    assert torch.equal(selected, chosen)
    assert (selected == 4).any().item() is drops
    dropped = (selected == 4).all(1)
    assert torch.equal(output.flatten(0, 1)[dropped], torch.zeros(int(dropped.sum()), 16))
    torch.testing.assert_close(output.flatten(0, 1), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits, expected_logits, atol=1e-5, rtol=1e-5)
    expected_aux = importance_load_loss(expected_logits, router_noise, threshold)
    torch.testing.assert_close(aux_loss, expected_aux, atol=1e-5, rtol=1e-5)

    ours = gradients(block, tokens, output, aux_loss)
    theirs = gradients(block, tokens, expected.view_as(output), expected_aux)
    for name, value in theirs.items():
        assert value.abs().sum() > 0, name
        torch.testing.assert_close(ours[name], value, atol=2e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("fields, dtype", [({"embed_dim": 6}, torch.float32), ({}, torch.float64)])
def test_widths_and_types_that_no_grouped_product_takes(fields, dtype):
    """Rows of grouped_mm are whole 16 bytes, 12 float32 are not when the MLP has 18 (1.5 x 12), and float64 is none."""
    block = sparse_block(skew=1.0, capacity_factor=0.5, router_noise=0.0, mlp_ratio=1.5, **fields).to(dtype).train()
    tokens = (torch.randn(2, 13, 2 * block.config.embed_dim, dtype=dtype) + 0.3).requires_grad_()
    output, _, _, selected = block(tokens)
    capacity = int(0.5 * math.ceil(26 / 4))
    expected, *_ = per_token_loop(block.float(), tokens.flatten(0, 1).float(), torch.zeros(26, 4), capacity)
    assert (selected == 4).any() and (selected < 4).any() and output.dtype == dtype
    torch.testing.assert_close(output.flatten(0, 1).float(), expected, atol=1e-5, rtol=1e-5)


def test_the_gate_of_a_single_choice_is_not_renormalised():
    """A gate of 1 would leave the router without a gradient from the task."""
    block = sparse_block(num_experts_per_tok=1).eval()
    tokens = torch.randn(1, 6, 16)
    _, logits, _, selected = block(tokens)
    gates = block.router(tokens[0]).weights
    torch.testing.assert_close(gates, logits.softmax(-1).max(-1, keepdim=True).values)
    assert (gates < 0.999).any() and (selected < 4).all()


def test_an_expert_nobody_chose_gets_a_gradient_of_zero():
    block = sparse_block(skew=50.0).eval()
    tokens = torch.rand(1, 5, 16).requires_grad_()
    output, _, _, selected = block(tokens)
    output.sum().backward()
    assert (selected == 0).all()
    assert torch.equal(block.experts.up_proj.grad[1:], torch.zeros_like(block.experts.up_proj[1:]))
    assert block.experts.up_proj.grad[0].abs().sum() > 0


def test_all_dropped_is_zero_with_gradients_of_zero():
    # int(0.5 * ceil(3 / 4)) = 0 places.
    block = sparse_block(capacity_factor=0.5, router_noise=0.0).train()
    output, _, _, selected = block(torch.randn(1, 3, 16))
    output.sum().backward()
    assert (selected == 4).all() and torch.equal(output, torch.zeros_like(output))
    assert torch.equal(block.experts.down_proj.grad, torch.zeros_like(block.experts.down_proj))


def test_noise_is_drawn_in_training_only_and_scales_with_the_number_of_experts():
    block = sparse_block(router_noise=3.0, capacity_factor=None)
    tokens = torch.randn(4000, 16)
    block.eval()
    assert torch.equal(block.router(tokens).noisy_logits, block.router(tokens).router_logits)
    block.train()
    torch.manual_seed(1)
    clean = block.router(tokens).router_logits
    torch.manual_seed(1)
    noise = torch.randn_like(clean)
    torch.manual_seed(1)
    routing = block.router(tokens)
    assert torch.equal(routing.router_logits, clean)
    torch.testing.assert_close(routing.weights, (clean + noise * 0.75).softmax(-1).max(-1, keepdim=True).values)


def test_the_router_works_in_float32_whatever_the_model_is_in():
    block = sparse_block().eval()
    tokens = torch.randn(10, 16)
    reduced = block.to(torch.bfloat16).router(tokens.bfloat16())
    assert reduced.router_logits.dtype == reduced.weights.dtype == torch.float32
    expected = tokens.bfloat16().float() @ block.router.weight.float().t()
    assert torch.equal(reduced.router_logits, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(block.router(tokens.bfloat16()).router_logits, expected)


@pytest.mark.parametrize("training", [True, False])
def test_expert_implementations_agree_inside_a_model(training):
    model = MsGFMModel(MsGFMConfig(**TINY, capacity_factor=0.75)).train(training)
    images = torch.randn(3, 3, 37, 29)
    features = {}
    for implementation in ("eager", "grouped_mm"):
        model.set_experts_implementation(implementation)
        torch.manual_seed(2)
        features[implementation] = model(images).last_hidden_state
    torch.testing.assert_close(features["eager"], features["grouped_mm"], atol=1e-5, rtol=1e-5)


# -------------------------------------------------------------------------------------------- speed of the backward


def consumers(output, parameters):
    """Names of the operations that read each of `parameters` in the graph behind `output`."""
    wanted, found = {id(p): n for n, p in parameters.items()}, {}
    seen, stack = set(), [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for before, _ in node.next_functions:
            if before is not None and id(getattr(before, "variable", None)) in wanted:
                found.setdefault(wanted[id(before.variable)], set()).add(node.name())
            stack.append(before)
    return found


def test_stacked_expert_weights_are_never_indexed_under_autograd():
    """`weight[e]` fills a whole stack of zeros per expert in the backward pass: four to ten times the time."""
    block = sparse_block().train()
    parameters = dict(block.experts.named_parameters())
    readers = consumers(block(torch.randn(1, 8, 16))[0], parameters)
    assert set(readers) == set(parameters)
    assert not any("Select" in name or "Index" in name for names in readers.values() for name in names), readers
    indexed = sum(weight[e].sum() for weight in parameters.values() for e in range(4))
    assert all(names == {"SelectBackward0"} for names in consumers(indexed, parameters).values())


# ------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("moe_blocks", [[[], [0, 1]], [[1], [1]]])
def test_routing_statistics_per_sensor_equal_a_loop(moe_blocks):
    config = MsGFMConfig(**{**TINY, "moe_blocks": moe_blocks}, num_experts_per_tok=2, capacity_factor=0.75)
    model = MsGFMForPreTraining(config).train()
    sources = [{"rgb": torch.randn(2, 3, 32, 32)}, {"s1": torch.randn(1, 2, 32, 32), "rgb": torch.randn(1, 3, 32, 32)}]
    output = model(sources, output_router_logits=True)
    statistics = routing_statistics(output, config)
    assert set(statistics) == {"rgb", "s1"}
    rows = ["rgb", "rgb", "s1", "rgb"]
    for sensor, values in statistics.items():
        for block in range(2):
            logits, selected = output.router_logits[block], output.selected_experts[block]
            per_row = len(selected) // len(rows)
            counts, probabilities, mine = [0] * 5, torch.zeros(4), []
            for token in range(len(selected)):
                if rows[token // per_row] == sensor:
                    for expert in selected[token].tolist():
                        counts[expert] += 1
                    probabilities += logits[token].detach().softmax(-1)
                    mine.append(logits[token].detach())
            total = sum(counts)
            torch.testing.assert_close(values["histogram"][block], torch.tensor([n / total for n in counts[:4]]))
            torch.testing.assert_close(values["load"][block], probabilities / len(mine))
            entropies = scipy.stats.entropy(torch.stack(mine).softmax(-1).numpy(), base=2, axis=1)
            assert values["entropy"][block].item() == pytest.approx(entropies.mean(), rel=1e-5)
            assert values["dropped"][block].item() == pytest.approx(counts[4] / total)
            assert values["histogram"][block].sum().item() + values["dropped"][block].item() == pytest.approx(1)
            second = torch.stack([row.sort(descending=True).values[1] for row in mine])
            expected = importance_load_loss(torch.stack(mine), config.router_noise, second)
            torch.testing.assert_close(values["aux_loss"][block], expected)
    assert sum(values["dropped"].sum().item() for values in statistics.values()) > 0


def test_routing_statistics_of_a_dense_model_are_empty():
    model = MsGFMForPreTraining(MsGFMConfig(**{**TINY, "moe_blocks": [[], []]}))
    assert routing_statistics(model(torch.randn(1, 3, 32, 32)), model.config) == {}


def test_routing_statistics_need_the_routers_logits():
    model = MsGFMForPreTraining(MsGFMConfig(**TINY))
    output = model(torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match="`output` must carry router logits, got none.*output_router_logits=True"):
        routing_statistics(output, model.config)


def test_the_auxiliary_loss_is_summed_over_blocks():
    model = MsGFMModel(MsGFMConfig(**{**TINY, "moe_blocks": [[1], [0, 1]]})).eval()
    output = model(torch.randn(2, 3, 32, 32), output_router_logits=True)
    assert len(output.router_logits) == len(output.selected_experts) == 3
    expected = sum(importance_load_loss(logits, 1.0, logits.max(-1).values) for logits in output.router_logits)
    torch.testing.assert_close(output.aux_loss, expected)


def test_a_model_without_experts_has_no_auxiliary_loss():
    output = MsGFMModel(MsGFMConfig(**{**TINY, "moe_blocks": [[], []]}))(torch.randn(1, 3, 32, 32))
    assert output.aux_loss is None and output.selected_experts is None and not output.router_logits


def test_room_goes_to_first_choices_and_then_to_the_confident():
    # Places per expert: 2 * int(0.5 * ceil(4 / 2)) = 2.
    block = sparse_block(num_experts=2, num_experts_per_tok=2, capacity_factor=0.5, router_noise=0.0).train()
    with torch.no_grad():
        block.router.weight.zero_()
        block.router.weight[0, 0] = block.router.weight[1, 1] = 1.0
    tokens = torch.zeros(4, 16)
    # Logits (1, 0), (0, 3), (2, 0), (0, 0.5): expert 0 is the first choice of tokens 0 and 2, expert 1 of 1 and 3. That
    # fills both, and no second choice finds room, though token 1 is surer of its own than anybody.
    tokens[0, 0], tokens[1, 1], tokens[2, 0], tokens[3, 1] = 1.0, 3.0, 2.0, 0.5
    routing = block.router(tokens)
    assert routing.selected_experts.tolist() == [[0, 2], [1, 2], [0, 2], [1, 2]]
    assert torch.equal(routing.weights == 0, routing.selected_experts == 2)
    # Now three first choices for expert 0, and the least sure of them (token 3, logit 0.5) is left out.
    tokens[3, 0], tokens[3, 1] = 0.5, 0.0
    assert block.router(tokens).selected_experts.tolist() == [[0, 2], [1, 2], [0, 1], [2, 2]]
