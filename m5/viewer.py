"""Who asks: a history and a request, as indices. Runs and artifacts answer the same viewers."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Viewer:
    """Who asks, as indices.

    Attributes:
        title: int64 [n] watched titles, oldest first.
        timestamp: int64 [n] seconds.
        intensity: kind -> float32 [n] raw values, NaN = not given; a missing kind is given for none.
        scenario, context, user: vocabulary indices by name; a missing name is the unknown value.
        at: time of the request in seconds.
    """

    title: np.ndarray
    timestamp: np.ndarray
    at: int
    intensity: dict[str, np.ndarray] = field(default_factory=dict)
    scenario: dict[str, int] = field(default_factory=dict)
    context: dict[str, int] = field(default_factory=dict)
    user: dict[str, int] = field(default_factory=dict)

    def without(self, place: int) -> Viewer:
        """The same viewer, had they not watched their `place`-th title."""
        return Viewer(
            np.delete(self.title, place),
            np.delete(self.timestamp, place),
            self.at,
            {kind: np.delete(values, place) for kind, values in self.intensity.items()},
            self.scenario,
            self.context,
            self.user,
        )
