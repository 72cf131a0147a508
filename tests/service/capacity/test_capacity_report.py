"""What was found, in words and as JSON."""

import json
import math
from dataclasses import replace

from service.capacity.measure import Seen
from service.capacity.report import Found, facts, words
from service.capacity.traffic import steady


def seen(scale: float, p99_ms: float) -> Seen:
    return Seen(scale, scale, scale, p99_ms / 4, p99_ms / 2, p99_ms, 1.0, 0.0, 0.1, 0.2)


FOUND = Found(
    bundle="tiny@1",
    device="cpu",
    p99_ms=50,
    traffic=None,
    load=steady(1, 1, 3),
    knees={1: seen(100, 50)},
    settings={"workers": 1, "max_queued_images": 4096, "deadline_s": 0.2},
    curve=[seen(40, 10), seen(100, 50)],
    checked=seen(70, 22),
)


def test_without_a_traffic_it_says_what_one_replica_does() -> None:
    """In words: the knee, the settings as variables, the curve, what was checked, the cost."""
    lines = list(words(FOUND))
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == [
        *("measured", "knee", "settings", "latency", "checked", "client", "cost", "replicas")
    ]
    assert "settings   GAN_WORKERS=1 GAN_MAX_QUEUED_IMAGES=4096 GAN_DEADLINE_S=0.2" in lines
    assert lines[1].startswith("knee       100.0 requests/s, 100.0 images/s: p50 12.5, p95 25.0, p99 50.0 ms")
    assert lines[-1] == "replicas   your requests/s at their most, divided by 100.0; and one to spare"
    assert facts(FOUND)["replicas"] is None


def test_with_a_traffic_it_says_how_many_replicas() -> None:
    """As many as it needs, and one to spare; its cost counts all of them."""
    found = replace(FOUND, traffic=steady(250, 1, 60), load=steady(250, 1, 3), curve=[seen(0.16, 10), seen(0.4, 50)])
    assert list(words(found))[-1] == "replicas   3 for 250.0 requests/s, the busiest 3 s; 4 where one may be gone"
    told = facts(found)
    assert (told["replicas"], told["replicas_with_a_spare"]) == (3, 4)
    assert told["machine_hours_per_million_images_of_this_traffic"] == 3.333


def test_what_took_for_ever_is_null_in_json() -> None:
    """JSON has no infinity."""
    told = facts(replace(FOUND, checked=seen(70, math.inf)))
    assert json.loads(json.dumps(told, allow_nan=False))["checked"]["seen"]["p99_ms"] is None
