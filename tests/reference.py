"""Slow and obvious: every layer of the model as loops over single numbers and vectors in float64.

Weights come as a dictionary named like the layer's `state_dict`. Nothing here is shared with `m5.model` but the names.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

Weights = dict[str, Tensor]


def randomise(module: nn.Module) -> nn.Module:
    """Every weight random, so that no zero start hides a mistake."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    """W x + b of one vector."""
    y = weights[f"{name}.weight"] @ x
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def layer_norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean()
    variance = (centred * centred).mean()
    y = centred / torch.sqrt(variance + 1e-5) * weights[f"{name}.weight"]
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def softmax(values: list[Tensor]) -> list[Tensor]:
    largest = max(float(value.detach()) for value in values)
    powers = [torch.exp(value - largest) for value in values]
    total = sum(powers)
    return [power / total for power in powers]


def part(weights: Weights, prefix: str) -> Weights:
    """The weights of the submodule `prefix`."""
    return {name.removeprefix(f"{prefix}."): w for name, w in weights.items() if name.startswith(f"{prefix}.")}


def visible(position: int, length: int, causal: bool) -> range:
    """Positions that `position` attends to in a sequence of `length`."""
    return range(position + 1) if causal else range(length)


def attend(query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    shares = softmax([query @ key / math.sqrt(len(query)) for key in keys])
    return sum(share * value for share, value in zip(shares, values, strict=True))


def rotate(x: Tensor, position: int) -> Tensor:
    """Turn the pair (x_{2i}, x_{2i + 1}) by the angle position * 10000^(-i / half)."""
    half = len(x) // 2
    turned = [torch.zeros((), dtype=x.dtype)] * len(x)
    for i in range(half):
        angle = position * 10_000.0 ** (-i / half)
        first, second = x[2 * i], x[2 * i + 1]
        turned[2 * i] = first * math.cos(angle) - second * math.sin(angle)
        turned[2 * i + 1] = first * math.sin(angle) + second * math.cos(angle)
    return torch.stack(turned)


def transformer_block(weights: Weights, x: Tensor, *, heads: int, causal: bool) -> Tensor:
    """One unpadded sequence [L, D] -> [L, D]."""
    length, width = x.shape
    head = width // heads
    packed = [linear(weights, "query_key_value", layer_norm(weights, "attention_norm", row)) for row in x]

    def slot(position: int, kind: int, h: int) -> Tensor:
        first = kind * width + h * head
        return packed[position][first : first + head]

    rows = []
    for i in range(length):
        attended = [
            attend(
                rotate(slot(i, 0, h), i),
                [rotate(slot(j, 1, h), j) for j in visible(i, length, causal)],
                [slot(j, 2, h) for j in visible(i, length, causal)],
            )
            for h in range(heads)
        ]
        row = x[i] + linear(weights, "attention_output", torch.cat(attended))
        hidden = gelu(
            linear(
                weights,
                "perceptron_hidden",
                layer_norm(weights, "perceptron_norm", row),
            )
        )
        rows.append(row + linear(weights, "perceptron_output", hidden))
    return torch.stack(rows)


def subsidiary_intensity(weights: Weights, subsidiary: Tensor, *, causal: bool) -> Tensor:
    """One unpadded sequence [L, F] -> [L]."""
    own = [gelu(linear(weights, "own", row)) for row in subsidiary]
    query_key = [linear(weights, "query_key", row) for row in own]
    width = len(own[0])
    intensities = []
    for i in range(len(own)):
        around = visible(i, len(own), causal)
        related = attend(
            query_key[i][:width],
            [query_key[j][width:] for j in around],
            [own[j] for j in around],
        )
        raw = linear(weights, "scalar", torch.cat([own[i], related]))[0]
        intensities.append(10 * torch.tanh(raw / 10))
    return torch.stack(intensities)


def category_aggregation(
    weights: Weights,
    h: Tensor,
    intensity: Tensor,
    category: list[int],
    last: int,
    *,
    max_slope: float,
) -> Tensor:
    """Interests [K, D] of the prefix 0 .. last: per category an explicit softmax over its behaviours."""
    interests = []
    for k in range(len(weights["slope"])):
        members = [i for i in range(last + 1) if category[i] == k]
        if not members:
            interests.append(weights["default"][k])
            continue
        slope = torch.sigmoid(weights["slope"][k]) * max_slope
        shares = softmax([intensity[i] + slope * i for i in members])
        interests.append(sum(share * h[i] for share, i in zip(shares, members, strict=True)))
    return torch.stack(interests)


def extraction(
    weights: Weights,
    e: Tensor,
    subsidiary: Tensor,
    category: list[int],
    last: int,
    *,
    blocks: int,
    heads: int,
    causal: bool,
    max_slope: float,
) -> Tensor:
    """One unpadded sequence -> [K + 1, D]: the interests of the prefix, then the state at `last`."""
    h = e
    if subsidiary.shape[1]:
        h = torch.stack([e[i] + linear(weights, "decoration", torch.cat([e[i], subsidiary[i]])) for i in range(len(e))])
    for block in range(blocks):
        h = transformer_block(part(weights, f"blocks.{block}"), h, heads=heads, causal=causal)
    h = torch.stack([layer_norm(weights, "norm", row) for row in h])
    intensity = torch.zeros(len(e), dtype=e.dtype)
    if subsidiary.shape[1]:
        intensity = subsidiary_intensity(part(weights, "intensity"), subsidiary, causal=causal)
    aggregation = part(weights, "aggregation")
    interests = category_aggregation(aggregation, h, intensity, category, last, max_slope=max_slope)
    return torch.cat([interests, h[last : last + 1]])


def content_embedding(weights: Weights, content: Tensor, title: int) -> Tensor:
    """E^CG of one title, or the learned vector of a special row behind the last title."""
    if title >= len(content):
        return weights["special"][title - len(content)]
    return layer_norm(
        weights,
        "norm",
        linear(weights, "output", gelu(linear(weights, "hidden", content[title]))),
    )


def crossing(weights: Weights, features: Tensor, scenarios: Tensor) -> Tensor:
    """One request: features [F, D], scenario embeddings [M, D] -> one long vector."""
    pieces = [*features, *scenarios]
    if len(scenarios):
        scenario = linear(weights, "scenario_projection", torch.cat(list(scenarios)))
        pieces += [linear(weights, "feature_projection", feature) * scenario for feature in features]
    return torch.cat(pieces)


def expert(first: Tensor, bias: Tensor, second: Tensor, x: Tensor) -> Tensor:
    """W_2 gelu(W_1 x + b), with W_1 [H, I] and W_2 [D, H]."""
    return second @ gelu(first @ x + bias)


def own_expert(rows: Tensor, x: Tensor) -> Tensor:
    """An expert held as rows of width H: W_1 transposed, its bias, W_2."""
    width = len(x)
    return expert(rows[:width].T, rows[width], rows[width + 1 :], x)


def linear_expert(weights: Weights, x: Tensor) -> Tensor:
    return expert(weights["hidden.weight"], weights["hidden.bias"], weights["output.weight"], x)


def split_mixture(weights: Weights, x: Tensor, scenario: Tensor, owned: list[Tensor], *, shared: int) -> Tensor:
    """One request: x [I], scenario embeddings [M * D], its own experts M x [R, H] -> [D]."""
    shares = softmax(list(linear(weights, "gate", torch.cat([x, scenario]))))
    outputs = [linear_expert(part(weights, f"shared.{e}"), x) for e in range(shared)]
    outputs += [own_expert(rows, x) for rows in owned]
    return sum(share * output for share, output in zip(shares, outputs, strict=True))


def multi_gate_mixture(weights: Weights, x: Tensor, scenario: list[int], *, experts: int) -> Tensor:
    """One request: x [I], vocabulary indices of its scenario -> [D]."""
    logits = linear(weights, "default_gate", x)
    for m, value in enumerate(scenario):
        logits = logits + weights[f"gates.{m}"][value] @ x
    outputs = [linear_expert(part(weights, f"experts.{e}"), x) for e in range(experts)]
    return sum(share * output for share, output in zip(softmax(list(logits)), outputs, strict=True))


def matching_score(
    weights: Weights,
    user: dict[str, Tensor],
    title: dict[str, Tensor],
    crossed: Tensor,
    *,
    cosine: bool,
) -> Tensor:
    """Score of one title for one request; vectors by branch (`id`, `cg`)."""
    inner = {}
    for place, branch in enumerate(user):
        u, e = user[branch], title[branch]
        if cosine:
            u, e = u / torch.sqrt(u @ u), e / torch.sqrt(e @ e)
        inner[branch] = torch.exp(weights["log_scale"][place]) * (u @ e)
    if "cg" not in inner:
        return inner["id"]
    logit = weights["gate_bias"][0]
    if len(crossed):
        logit = logit + linear(weights, "gate_output", gelu(linear(weights, "gate_hidden", crossed)))[0]
    gate = torch.sigmoid(logit)
    return gate * inner["id"] + (1 - gate) * inner["cg"]


def candidate_loss(
    query: Tensor,
    keys: Tensor,
    positive: Tensor,
    log_q: Tensor,
    own: list[int],
    playable: list[list[bool]],
) -> Tensor:
    """Sum over the requests of -log p(target); negatives are playable, not the target, and corrected by log Q."""
    losses = []
    for p in range(len(query)):
        target = query[p] @ positive[p]
        negatives = [query[p] @ keys[c] - log_q[c] for c in range(len(keys)) if c != own[p] and playable[p][c]]
        losses.append(-torch.log(softmax([target, *negatives])[0]))
    return sum(losses)


def row_wise_adagrad(table: Tensor, sums: Tensor, gradient: Tensor, lr: float) -> tuple[Tensor, Tensor]:
    """One step on a table [rows, D] with one accumulator a row: the mean of the squared gradient."""
    table, sums = table.clone(), sums.clone()
    for row in range(len(table)):
        if gradient[row].abs().sum() == 0:
            continue
        sums[row] += (gradient[row] ** 2).mean()
        table[row] -= lr * gradient[row] / (torch.sqrt(sums[row]) + 1e-8)
    return table, sums
