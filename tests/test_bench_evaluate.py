"""The service that the benchmark of evaluation makes."""

from __future__ import annotations

from benchmarks.evaluate import TRAINING_EVENTS, made_service
from m5.evaluate import select_requests


def test_the_last_event_of_every_viewer_is_the_request():
    dataset = made_service(users=30, titles=200)
    requests = select_requests(dataset, "valid", eligibility=None)
    assert requests.user.tolist() == list(range(30))
    assert (requests.event - dataset.offsets[requests.user] == TRAINING_EVENTS).all()
    assert dataset.rights is not None and 0 < (dataset.rights["region"] > 0).sum() < 100
