"""How the neural systems are trained and asked: one loop, one softmax, one scorer; a system adds its network.

Dimension legend of `data`, and D width, P requests, C candidates, I interests.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.literature.data import Data, Sequences
from m5.baselines import CHOICE_METRIC
from m5.data.sequences import AGE_BUCKETS, Windows
from m5.evaluate import Scorer, evaluate

VALIDATIONS = 6  # that a training has time for, spread over it
PATIENCE = 3  # validations without a better NDCG@10 before it ends


class Network(nn.Module):
    """What the loop needs of a system's network. `windows` says what a training example is.

    every: stretches of a viewer's events, each of which is a target (`asked_BL`), cut anew for each epoch; last: single
    events.
    `softmax` is `FullSoftmax` or `SampledSoftmax`. `history`: behaviours that it reads, where fewer than all.
    """

    windows: Literal["every", "last"] = "last"
    softmax: nn.Module
    history: int | None = None

    def queries(self, batch: Sequences) -> Tensor:
        """[B, D] or, with several interests, [B, I, D]: of each sequence's last request."""
        raise NotImplementedError

    def keys(self) -> Tensor:
        """[N, D] of all titles; a title's score is its inner product with the query, the best one of several."""
        raise NotImplementedError

    def loss(self, batch: Sequences) -> Tensor:
        """Scalar, to be minimised; unless a system says otherwise, the softmax of each sequence's last request."""
        return self.softmax(self.queries(batch), self.keys(), batch.last(batch.next_BL))


class BehaviourEmbedding(nn.Module):
    """Behaviours and the features of what follows as vectors, summed: what "with heterogeneous features" means here.

    Args:
        data: for vocabulary sizes.
        width: D.
        heterogeneous: False leaves value, age and the request's features out: titles only.
    """

    def __init__(self, data: Data, width: int, *, heterogeneous: bool = True):
        super().__init__()
        self.n_titles, self.heterogeneous = data.n_titles, heterogeneous
        self.title = nn.Embedding(data.n_titles + 3, width, padding_idx=data.n_titles + 1)  # start, padding, mask
        nn.init.normal_(self.title.weight, std=width**-0.5)
        with torch.no_grad():
            self.title.weight[data.n_titles + 1] = 0
        if heterogeneous:
            self.age = nn.Embedding(AGE_BUCKETS, width)
            self.value = nn.Linear(1, width, bias=False)
            self.features = nn.ModuleList(nn.Embedding(size, width) for size in data.feature_sizes)
            for part in (self.age, *self.features):
                nn.init.normal_(part.weight, std=0.5 * width**-0.5)

    def request(self, feature_XF: Tensor) -> Tensor | float:
        """int64 [..., F] -> [..., D], or 0 without features."""
        if not self.heterogeneous or not len(self.features):
            return 0.0
        return torch.stack([part(feature_XF[..., f]) for f, part in enumerate(self.features)]).sum(0)

    def behaviours(self, batch: Sequences) -> Tensor:
        """[B, L, D] without the features of what follows."""
        x_BLD = self.title(batch.title_BL)
        if self.heterogeneous:
            x_BLD = x_BLD + self.age(batch.age_BL) + self.value(batch.value_BL.unsqueeze(-1))
        return x_BLD

    def forward(self, batch: Sequences) -> Tensor:
        """[B, L, D] of each column, with the features of what follows."""
        return self.behaviours(batch) + self.request(batch.feature_BLF)

    def keys(self) -> Tensor:
        """[N, D]."""
        return self.title.weight[: self.n_titles]


class CausalNetwork(Network):
    """A network of `BehaviourEmbedding`s in which a column sees no later one: each column's request is a target."""

    windows = "every"
    embedding: BehaviourEmbedding

    def hidden(self, batch: Sequences) -> Tensor:
        """[B, L, D] after each column."""
        raise NotImplementedError

    def queries(self, batch: Sequences) -> Tensor:
        return batch.last(self.hidden(batch))

    def keys(self) -> Tensor:
        return self.embedding.keys()

    def loss(self, batch: Sequences) -> Tensor:
        asked_BL = batch.asked_BL
        return self.softmax(self.hidden(batch)[asked_BL], self.keys(), batch.next_BL[asked_BL])


def best_interest(score: Tensor) -> Tensor:
    """[P, C], or [P, I, C] of several interests, -> [P, C]: a title's score is that of the interest it suits best."""
    return score if score.dim() == 2 else score.amax(1)


class FullSoftmax(nn.Module):
    """Softmax over all titles that training has seen; cold ones are no negatives: their content may speak for them."""

    def __init__(self, data: Data):
        super().__init__()
        self.cold_N: Tensor
        self.register_buffer("cold_N", torch.from_numpy(data.cold))

    def forward(self, query_PD: Tensor, key_ND: Tensor, target_P: Tensor) -> Tensor:
        """[P, D] or [P, I, D], [N, D], int64 [P] -> scalar."""
        logit_PN = best_interest(query_PD @ key_ND.T)
        return functional.cross_entropy(logit_PN.masked_fill(self.cold_N, -torch.inf), target_P)


class SampledSoftmax(nn.Module):
    """Softmax over the target and titles drawn by popularity, corrected by log Q; the batch shares the draw.

    Source: Bengio & Senecal 2008, doi 10.1109/TNN.2007.912312; power 0.75 as in word2vec.
    """

    def __init__(self, data: Data, count: int):
        super().__init__()
        weight_N = (data.train_count + 1) ** 0.75 * ~data.cold
        self.count = min(count, int((~data.cold).sum()))
        self.probability_N: Tensor
        self.register_buffer("probability_N", torch.from_numpy(weight_N / weight_N.sum()).float())

    def forward(self, query_PD: Tensor, key_ND: Tensor, target_P: Tensor) -> Tensor:
        """[P, D] or [P, I, D], [N, D], int64 [P] -> scalar; of several interests each title meets its best one."""
        drawn_C = torch.multinomial(self.probability_N, self.count, replacement=True).unique()
        own = torch.einsum("p...d,pd->p...", query_PD, key_ND[target_P])
        own_P = (own if own.dim() == 1 else own.amax(1)) - self._log_q(target_P)
        logit_PC = best_interest(query_PD @ key_ND[drawn_C].T) - self._log_q(drawn_C)
        logit_PC = logit_PC.masked_fill(drawn_C == target_P.unsqueeze(-1), -torch.inf)
        return (torch.logsumexp(torch.cat([own_P.unsqueeze(-1), logit_PC], dim=-1), dim=-1) - own_P).mean()

    def _log_q(self, title_X: Tensor) -> Tensor:
        """log of the probability to be among the draws."""
        return (-torch.expm1(self.count * torch.log1p(-self.probability_N[title_X]))).clamp(min=1e-12).log()


class NetworkScorer:
    """A trained network as a `Scorer`."""

    def __init__(self, name: str, network: Network, data: Data):
        self.name, self.network, self.data = name, network.eval(), data
        with torch.no_grad():
            self.key_ND = network.keys().clone()
        self.parameters = sum(parameter.numel() for parameter in network.parameters())

    @torch.no_grad()
    def score(self, event_index: np.ndarray) -> Tensor:
        """int64 [B] -> float32 [B, N]."""
        parts = []
        for first in range(0, len(event_index), 256):
            query = self.network.queries(self.data.sequences(event_index[first : first + 256], self.network.history))
            parts.append(best_interest(query @ self.key_ND.T))
        return torch.cat(parts)


def train_network(
    name: str,
    network: Network,
    data: Data,
    *,
    seed: int,
    seconds: float,
    lr: float = 1e-3,
    batch_size: int = 128,
    weight_decay: float = 0.0,
    warmup_steps: int = 0,
) -> NetworkScorer:
    """Train with AdamW until the clock, or validation, ends it; the weights that did best on validation stay.

    Args:
        name: of the row.
        network: freshly initialised; draw its weights after `torch.manual_seed(seed)`.
        data: what to train on.
        seed: of the order and of all draws.
        seconds: of wall-clock time, validations included. The learning rate falls linearly with the clock.
        lr, batch_size, weight_decay: of AdamW; a batch has that many sequences.
        warmup_steps: over which the learning rate rises linearly.
    """
    began = time.monotonic()
    generator = np.random.default_rng(seed)
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=weight_decay)
    best, best_value, stale, due = copy.deepcopy(network.state_dict()), -1.0, 0, seconds / VALIDATIONS
    for step, event in enumerate(_shuffled(network, data, batch_size, generator), start=1):
        elapsed = time.monotonic() - began
        if elapsed >= due:
            value = validate(NetworkScorer(name, network, data), data)
            stale = 0 if value > best_value else stale + 1
            if value > best_value:
                best, best_value = copy.deepcopy(network.state_dict()), value
            due = min(seconds, time.monotonic() - began + seconds / VALIDATIONS)
            if stale >= PATIENCE or elapsed >= seconds:
                break
        network.train()
        optimizer.param_groups[0]["lr"] = lr * min(1.0, step / max(1, warmup_steps)) * max(0.02, 1 - elapsed / seconds)
        loss = network.loss(data.sequences(event, network.history))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    network.load_state_dict(best)
    return NetworkScorer(name, network, data)


def _shuffled(
    network: Network, data: Data, size: int, generator: np.random.Generator
) -> Iterator[np.ndarray | Windows]:
    """Batches for ever, in a new order each epoch, and with new cuts between a viewer's stretches."""
    while True:
        events = data.training_windows(generator) if network.windows == "every" else data.train
        order = generator.permutation(len(events))
        for first in range(0, len(order), size):
            yield events[order[first : first + size]]


def validate(scorer: Scorer, data: Data) -> float:
    """NDCG@10 on the validation targets that all choices are made on."""
    report = evaluate(
        data.dataset,
        [scorer],
        split="valid",
        filter_seen=data.filter_seen,
        max_targets=data.validation_targets,
        bootstrap=0,
    )
    return report["models"][scorer.name]["overall"][CHOICE_METRIC]
