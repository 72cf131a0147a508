"""What `python -m service capacity` has found, as one JSON object or in words."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.capacity.measure import Seen
from service.capacity.need import Expected, expect, highest_scale, hours_per_million, replicas_for
from service.capacity.traffic import Traffic
from service.settings import variable


@dataclass(frozen=True)
class Found:
    """All that was measured."""

    bundle: str
    device: str
    p99_ms: float
    traffic: Traffic | None
    load: Traffic  # that was asked for: the busiest seconds of the traffic, or single images
    knees: Mapping[int, Seen]  # by workers
    settings: Mapping[str, float]
    curve: Sequence[Seen]  # with these settings
    checked: Seen

    @property
    def knee_scale(self) -> float:
        """The highest rate, times the load's, that keeps the latency with these settings."""
        scale = highest_scale(self.curve, self.p99_ms)
        return self.curve[0].scale if scale is None else scale

    @property
    def expected(self) -> Expected:
        """What the curve says of the rate that was checked."""
        return expect(self.curve, self.checked.scale)

    @property
    def goodput_kept(self) -> float:
        """Requests in time with these settings, over those with the operator's own, at one rate."""
        return self.curve[-1].in_time / self.knees[int(self.settings["workers"])].in_time

    @property
    def replicas(self) -> int | None:
        """How many the traffic needs."""
        return None if self.traffic is None else replicas_for(self.knee_scale)


def facts(found: Found) -> dict[str, Any]:
    """What `--json` prints."""
    scale, load = found.knee_scale, found.load
    latency = expect(found.curve, scale)
    replicas, seconds = found.replicas, found.traffic.seconds if found.traffic else 0
    return {
        "bundle": found.bundle,
        "device": found.device,
        "p99_ms": found.p99_ms,
        "counts": load.counts,
        "settings": {variable(name): value for name, value in found.settings.items()},
        "knee": _rates(scale, load) | _rounded(latency._asdict()),
        "knees_by_workers": {str(number): _rates(seen.scale, load) for number, seen in found.knees.items()},
        "curve": [_rates(seen.scale, load) | _latencies(seen) for seen in found.curve],
        "checked": _rates(found.checked.scale, load)
        | {"expected": _rounded(found.expected._asdict()), "seen": _latencies(found.checked)},
        "goodput_kept": round(found.goodput_kept, 4),
        "client": {
            "cores": round(found.curve[-1].client_cores, 2),
            "late_p99_ms": round(found.curve[-1].late_ms, 2),
        },
        "machine_hours_per_million_images": _short(hours_per_million(scale * load.images_per_s)),
        "load": None if found.traffic is None else _rates(1, load) | {"seconds": seconds},
        "replicas": replicas,
        "replicas_with_a_spare": None if replicas is None else replicas + 1,
        "machine_hours_per_million_images_of_this_traffic": None
        if found.traffic is None or replicas is None
        else _short(replicas * hours_per_million(found.traffic.images_per_s)),
    }


def _rates(scale: float, load: Traffic) -> dict[str, float]:
    return _rounded({"requests_per_s": scale * load.requests_per_s, "images_per_s": scale * load.images_per_s})


def _latencies(seen: Seen) -> dict[str, float | None]:
    values = {name: getattr(seen, name) for name in ("p50_ms", "p95_ms", "p99_ms")}
    return _rounded(values) | {"in_time": round(seen.in_time, 4)}


def _rounded(values: Mapping[str, float]) -> dict[str, Any]:
    """JSON has no number for what took for ever."""
    return {name: _short(value) if math.isfinite(value) else None for name, value in values.items()}


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def words(found: Found) -> Iterator[str]:
    """The same for people, line by line."""
    told = facts(found)
    knee, checked = told["knee"], told["checked"]
    seen, expected = checked["seen"], checked["expected"]
    images = " or ".join(f"{count:,}" for count in found.load.counts[:8])
    plural = "s" * (images != "1")
    yield f"measured   {found.bundle} on {found.device}; requests for {images} image{plural}, at random times"
    yield (
        f"knee       {knee['requests_per_s']:,} requests/s, {knee['images_per_s']:,} images/s: p50 {knee['p50_ms']}, "
        f"p95 {knee['p95_ms']}, p99 {knee['p99_ms']} ms"
    )
    for number, rates in told["knees_by_workers"].items():
        yield f"           {rates['requests_per_s']:,} requests/s with GAN_WORKERS={number} and your other settings"
    yield "settings   " + " ".join(f"{name}={value}" for name, value in told["settings"].items())
    yield f"           they keep {100 * found.goodput_kept:.1f} % of the requests in time that yours keep there"
    yield f"latency    {'requests/s':>12}{'p50':>9}{'p95':>9}{'p99 ms':>9}"
    for point in told["curve"]:
        yield f"{point['requests_per_s']:>23,}" + "".join(f"{point[q]!s:>9}" for q in ("p50_ms", "p95_ms", "p99_ms"))
    yield (
        f"checked    at {checked['requests_per_s']:,} requests/s: p95 {seen['p95_ms']} ms where {expected['p95_ms']} "
        f"was expected, p99 {seen['p99_ms']} and {expected['p99_ms']}"
    )
    yield (
        f"client     ours took {told['client']['cores']} of the processors, and was {told['client']['late_p99_ms']} ms "
        "late with one request of a hundred"
    )
    yield f"cost       {told['machine_hours_per_million_images']} machine hours for a million images at the knee"
    if found.replicas is None:
        yield f"replicas   your requests/s at their most, divided by {knee['requests_per_s']:,}; and one to spare"
        return
    yield f"           {told['machine_hours_per_million_images_of_this_traffic']} with this traffic and these replicas"
    yield (
        f"replicas   {found.replicas} for {told['load']['requests_per_s']:,} requests/s, the busiest "
        f"{found.load.seconds:g} s; {found.replicas + 1} where one may be gone"
    )
