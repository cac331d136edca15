"""The synthetic world's oracle: the probability that the world itself gave to every title at a request.

No model can rank better in expectation: the oracle knows the planted tastes and the interest that the viewer last
followed. It does not know which interest the next event follows, nor whether that event is an accidental click: those
are marginalised.

`truth.npz` (R regions, P plans, W weeks, G themes, U users, N titles, T events, S interests of a viewer):

    user_id          str [U]                 raw ids, in the order of the arrays below
    title_id         str [N]                 raw ids
    region, plan     str [R], str [P]        scenario values
    start, week      int64 []                first second of week 0, seconds in a week
    title_theme      int16 [N]
    title_probability float32 [R, P, W, N]   c(i): probability of a title within its theme; 0 where not playable
    theme_appeal     float32 [R, P, W, G]    log factor on a viewer's weights
    spill            float64 [G, G]          from an interest's theme to the theme of the title
    noise_theme      float64 [G]             theme shares of accidental clicks
    noise, persistence float64 []            probability of an accidental click; of staying with the last interest
    interest_theme   int8 [U, S]             a viewer's themes; -1 = fewer than S
    interest_weight  float32 [U, S]          their weights, 0 where the theme is -1
    offset           int64 [U + 1]           events of user u: offset[u] .. offset[u + 1] - 1, in time order
    previous         int8 [T]                interest (0 .. S - 1) followed before the event; -1 = none yet

With pi_k proportional to weight_k exp(appeal of k's theme), and p(k) = pi_k for a viewer's first event, else
persistence [k = previous] + (1 - persistence) pi_k:

    P(i) proportional to c(i) ((1 - noise) sum_k p(k) spill[theme_k, theme_i] + noise noise_theme[theme_i])   (unseen i)
"""

from __future__ import annotations

import numpy as np

from m5.schema import DataError, PreparedDataset


class OracleScorer:
    """Scores by the true probability; a `Scorer` for `m5.evaluate`.

    Args:
        dataset: prepared from a synthetic world, with scenarios `region` and `plan`.

    Raises:
        DataError: there is no truth.npz, or it belongs to other events.
    """

    name = "oracle"

    def __init__(self, dataset: PreparedDataset):
        path = dataset.folder / "truth.npz"
        if not path.is_file():
            raise DataError(f"{path} is missing: only a dataset prepared from a synthetic world has an oracle.")
        with np.load(path) as archive:
            self.truth = {name: archive[name] for name in archive.files}
        self.offsets = np.asarray(dataset.offsets)
        self.dataset = dataset
        self.timestamp = dataset.event_array("timestamp")
        self.user = _rows(self.truth["user_id"], dataset.users["user_id"], f"{path}: users")
        self.column = _rows(self.truth["title_id"], dataset.titles["title_id"], f"{path}: titles")
        self.scenario = {name: self._scenario_value(dataset, name) for name in ("region", "plan")}
        if not np.array_equal(np.diff(self.truth["offset"])[self.user], np.diff(self.offsets)):
            raise DataError(
                f"{path}: users' event counts differ from events/offsets.npy, so the truth does not belong to this "
                "dataset or events were dropped. Prepare the synthetic world again with its own dataset.yaml."
            )

    def _scenario_value(self, dataset: PreparedDataset, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The event column and the truth's index of every vocabulary entry (-1 = none)."""
        vocabulary = next((v for v in dataset.manifest.scenarios if v.name == name), None)
        if vocabulary is None:
            raise DataError(f"{dataset.folder}: the oracle needs the scenario column {name!r}, which was not prepared.")
        known = list(self.truth[name])
        lookup = np.array(
            [
                -1,
                *(known.index(value) if value in known else -1 for value in vocabulary.values),
            ]
        )
        return dataset.event_array(f"scenario_{name}"), lookup

    def cell(self, event_index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Region, plan and week (int64 [B] each) of the events, as the truth numbers them."""
        region, plan = (lookup[column[event_index]] for column, lookup in self.scenario.values())
        if (region < 0).any() or (plan < 0).any():
            raise DataError(
                "the oracle cannot score an event whose region or plan is not one of the synthetic world's."
            )
        week = (self.timestamp[event_index] - self.truth["start"]) // self.truth["week"]
        return region, plan, week

    def interest_probability(self, event_index: np.ndarray, cell: tuple[np.ndarray, ...]) -> np.ndarray:
        """float64 [B, G]: probability of the theme that an event draws from, before seen titles are ruled out."""
        truth, row = self.truth, np.arange(len(event_index))
        user_row = self.dataset.user_of(event_index)
        user = self.user[user_row]
        previous = truth["previous"][truth["offset"][user] + event_index - self.offsets[user_row]]
        theme = truth["interest_theme"][user]
        appeal = truth["theme_appeal"][cell][row[:, None], theme]  # -1 reads some theme, whose weight is 0
        weight = truth["interest_weight"][user] * np.exp(appeal.astype(np.float64))
        share = weight / weight.sum(1, keepdims=True)
        stays = np.where(previous >= 0, float(truth["persistence"]), 0.0)
        share *= (1 - stays)[:, None]
        share[row, np.maximum(previous, 0)] += stays
        followed = np.einsum("bs,bsg->bg", share, truth["spill"][theme])
        return (1 - truth["noise"]) * followed + truth["noise"] * truth["noise_theme"]

    def score(self, event_index: np.ndarray) -> np.ndarray:
        """True probability of every title at the requests that the target events answer.

        Args:
            event_index: int64 [B], places in `events/*.npy`.

        Returns:
            float32 [B, N], rows sum to 1; 0 for titles seen before and titles that may not be played.
        """
        events = np.asarray(event_index, dtype=np.int64)
        cell = self.cell(events)
        theme = self.interest_probability(events, cell)[:, self.truth["title_theme"]]
        probability = (self.truth["title_probability"][cell] * theme)[:, self.column]
        probability[self.dataset.watched_before(events)] = 0.0
        total = probability.sum(1, keepdims=True)
        return np.divide(probability, total, out=np.zeros_like(probability), where=total > 0).astype(np.float32)


def _rows(truth_ids: np.ndarray, ids: np.ndarray, what: str) -> np.ndarray:
    """int64: for every id of the dataset its row in the truth's order."""
    order = np.argsort(truth_ids)
    wanted = np.asarray(ids, dtype=str)
    place = order[np.minimum(np.searchsorted(truth_ids, wanted, sorter=order), len(order) - 1)]
    if not np.array_equal(truth_ids[place], wanted):
        raise DataError(f"{what} of the dataset are not those of the truth: it belongs to another synthetic world.")
    return place
