"""What is counted in one go is what would have been counted one by one."""

import numpy as np
from prometheus_client import CollectorRegistry, generate_latest

from service.metrics import PROBABILITY, Metrics


def test_many_probabilities_are_observed_as_one_by_one() -> None:
    """On the edges of buckets too, and again into the same histogram."""
    values = np.concatenate([np.linspace(0, 1, 101), PROBABILITY, [1e-12]])
    together, apart = Metrics(CollectorRegistry()), Metrics(CollectorRegistry())
    for _ in range(2):
        together.observe_probabilities("tiny", "uploaded", values)
        for value in values.tolist():
            apart.discriminator_probability.labels("tiny", "uploaded").observe(value)

    def shown(metrics: Metrics) -> dict[str, float]:
        lines = generate_latest(metrics.registry).decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line.startswith("gan_discriminator_probability"))
        return {name: round(float(value), 9) for name, value in pairs}

    assert shown(together) == shown(apart)
    assert len(shown(apart)) == len(PROBABILITY) + 3
