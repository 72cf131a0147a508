"""Every series this service exports, each with the question it answers.

Label values come from small, fixed sets: `route` is a route's template or `unmatched`, `method` one of `METHODS` or
`other`, bundles are those loaded. Units are seconds, bytes and images; time buckets start at half a millisecond.
"""

import collections
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, disable_created_metrics
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

METHODS = frozenset({"GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE"})
SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
BYTES = tuple(4**n for n in range(4, 14))  # 256 bytes to 64 MiB
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
PROBABILITY = tuple(n / 20 for n in range(1, 21))
MOST_KEPT = 1024  # values of one histogram, where nobody looks


class Metrics:
    """All series of one app, in a registry of its own, so that two apps in a process don't meet."""

    def __init__(self, registry: CollectorRegistry) -> None:
        # Library-wide, and idempotent: a creation time beside every counter answers none of our questions.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry
        self._kept: list[Observations | RouteSeries | Followed] = []
        # Before all others, for a registry asks them in this order.
        registry.register(_HandOver(self._kept))
        counter = partial(Counter, registry=registry)
        gauge = partial(Gauge, registry=registry)
        seconds = partial(Histogram, buckets=SECONDS, registry=registry)
        size = partial(Histogram, buckets=BYTES, registry=registry)
        work = ["bundle", "operation"]  # operation: sample, discriminate

        # At the edge. How many, how slow, with which outcome? All outcomes: a refusal or a departure is one too.
        self.requests = counter(
            "gan_requests_total",
            "Requests that ended. Status 499: the client left before the answer.",
            ["route", "method", "status"],
        )
        self.request_duration = seconds(
            "gan_request_duration_seconds", "From a request's head to the last byte of its reply.", ["route"]
        )
        self.requests_in_flight = gauge("gan_requests_in_flight", "Requests being answered now.", ["route"])
        # Is anything larger than we think?
        self.request_bytes = size("gan_request_bytes", "Body bytes that were read.", ["route"])
        self.response_bytes = size("gan_response_bytes", "Body bytes that were sent.", ["route"])
        # Why did clients not get what they asked for? One place counts it: where an error becomes a reply.
        self.rejected = counter(
            "gan_rejected_total",
            "Requests refused, by reason: queue_full, deadline, draining, not_ready, unauthorized, too_large, invalid.",
            ["route", "reason"],
        )
        # How much work do departing clients leave behind? The core counts, with logs.current_route().
        self.cancelled = counter(
            "gan_cancelled_total", "Requests whose client left, by phase: queued, running.", ["route", "phase"]
        )

        # The queue, read from the queue itself when scraped (set_function), never counted up and down.
        self.queue_images = gauge("gan_queue_images", "Images waiting.", ["device"])
        self.queue_capacity_images = gauge("gan_queue_capacity_images", "Images that may wait.", ["device"])
        self.queue_oldest_age = gauge(
            "gan_queue_oldest_age_seconds",
            "How long the oldest waiting image has waited; 0 when none does.",
            ["device"],
        )

        # Is time lost waiting, or computing, or in encoding and decoding? These four together say.
        self.queue_wait = seconds("gan_queue_wait_seconds", "From a row's arrival to the start of its batch.", work)
        self.compute = seconds("gan_compute_seconds", "One engine call.", work)
        self.encode = seconds("gan_encode_seconds", "Encoding one reply's images.", ["format"])
        self.decode = seconds("gan_decode_seconds", "Decoding and converting one request's uploaded images.")

        # Does batching work: are batches full, what is wasted, and why do they close?
        self.batch_images = Histogram(
            "gan_batch_images", "Images in one batch, without padding.", work, buckets=IMAGES, registry=registry
        )
        self.batch_padding_images = counter(
            "gan_batch_padding_images_total", "Rows computed only to fill a batch's fixed size.", work
        )
        self.batches = counter(
            "gan_batches_total", "Batches, by why they closed: full, idle, window.", [*work, "closed_by"]
        )
        # What is really produced?
        self.images = counter("gan_images_total", "Images computed, without padding, delivered or not.", work)
        # What does D think of what it sees: does it drift?
        self.discriminator_probability = Histogram(
            "gan_discriminator_probability",
            "D's probability that an image is real, by origin: uploaded.",
            ["bundle", "origin"],
            buckets=PROBABILITY,
            registry=registry,
        )

        # Is the engine healthy?
        self.engine_errors = counter(
            "gan_engine_errors_total",
            "Failures of the engine, by kind: failed_rows, batch, out_of_memory, device.",
            ["kind"],
        )
        self.out_of_memory = counter("gan_out_of_memory_total", "Batches that the device had no memory for.")
        self.engine_last_progress = gauge(
            "gan_engine_last_progress_timestamp_seconds",
            "Unix time at which the engine last finished a batch.",
            ["device"],
        )
        self.ready = gauge("gan_ready", "1 when /readyz says yes, else 0.")
        # What is loaded, where, and how long did it take to get warm?
        self.bundle_info = gauge("gan_bundle_info", "1 for each loaded bundle.", ["bundle", "version", "device"])
        self.bundle_swaps = counter(
            "gan_bundle_swaps_total",
            "Bundles that a reload changed, by result: loaded, unloaded, refused.",
            ["bundle", "result"],
        )
        self.warmup = gauge("gan_warmup_seconds", "How long loading and warming a bundle took.", ["bundle"])
        self.device_memory = gauge(
            "gan_device_memory_bytes", "Memory of the device, by kind: allocated, reserved.", ["device", "kind"]
        )
        self.build_info = gauge("gan_build_info", "1, with the versions that run.", ["version", "torch"])
        # Is the log whole?
        self.log_lines_dropped = counter(
            "gan_log_lines_dropped_total", "Log lines that were lost, as nobody read them or they could not be written."
        )

        self._routes: dict[str, RouteSeries] = {}
        self._work: dict[tuple[str, str], WorkSeries] = {}
        self._formats: dict[str, Observations] = {}
        self._probabilities: dict[tuple[str, str], Observations] = {}

        # process_* and python_*: memory, open files, CPU time, garbage collections.
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)

    def follow(self, counter: Counter, count: Callable[[], int]) -> None:
        """Have a counter say what somebody else counts."""
        self._kept.append(Followed(counter, count))

    def observations(self, histogram: Histogram) -> "Observations":
        """Where a histogram's values are kept until somebody looks."""
        self._kept.append(observations := Observations(histogram))
        return observations

    def of_route(self, route: str) -> "RouteSeries":
        """The edge's series of one route: every request needs them, and to find them takes as long as to count."""
        series = self._routes.get(route)
        if series is None:
            series = self._routes[route] = RouteSeries(self, route)
            self._kept.append(series)
        return series

    def of_work(self, bundle: str, operation: str) -> "WorkSeries":
        """The batcher's series of one kind of work, for the same reason."""
        series = self._work.get((bundle, operation))
        if series is None:
            series = self._work[bundle, operation] = WorkSeries(self, bundle, operation)
        return series

    def of_format(self, name: str) -> "Observations":
        """The seconds that encoding a format takes."""
        series = self._formats.get(name)
        if series is None:
            series = self._formats[name] = self.observations(self.encode.labels(name))
        return series

    def of_probability(self, bundle: str, origin: str) -> "Observations":
        """What D thinks of a bundle's images."""
        series = self._probabilities.get((bundle, origin))
        if series is None:
            histogram = self.discriminator_probability.labels(bundle, origin)
            series = self._probabilities[bundle, origin] = self.observations(histogram)
        return series


def _add(histogram: Histogram, values: NDArray[np.float64]) -> None:
    """Observe several values. The library takes one at a time, hundreds of them in half a millisecond."""
    places = np.searchsorted(histogram._upper_bounds, values)  # noqa: SLF001 - see above
    for place, count in enumerate(np.bincount(places).tolist()):
        if count:
            histogram._buckets[place].inc(count)  # noqa: SLF001
    histogram._sum.inc(float(values.sum()))  # noqa: SLF001


class Observations:
    """Values that a histogram has yet to be told. One thread may add to them: the event loop's.

    The library takes a lock or two and a walk along the buckets for each, some 2 µs; a request has five of them.
    """

    def __init__(self, histogram: Histogram) -> None:
        self._histogram = histogram
        self._new: list[float] = []

    def observe(self, *values: float) -> None:
        """More of them."""
        self._new += values
        if len(self._new) >= MOST_KEPT:
            self.hand_over()

    def hand_over(self) -> None:
        """Tell the histogram."""
        if self._new:
            _add(self._histogram, np.array(self._new, np.float64))
            self._new.clear()


class _HandOver(Collector):
    """Has no metric of its own; who asks a registry for all asks this first."""

    def __init__(self, kept: Iterable["Observations | RouteSeries | Followed"]) -> None:
        self._kept = kept

    def collect(self) -> Iterable[Metric]:
        """Called by the registry."""
        for one in self._kept:
            one.hand_over()
        return ()


class Followed:
    """A counter of what is counted elsewhere."""

    def __init__(self, counter: Counter, count: Callable[[], int]) -> None:
        self._counter = counter
        self._count = count
        self._told = 0

    def hand_over(self) -> None:
        """Tell the counter."""
        count = self._count()
        self._counter.inc(count - self._told)
        self._told = count


class WorkSeries:
    """The series of one bundle's operation in the batcher."""

    def __init__(self, metrics: Metrics, bundle: str, operation: str) -> None:
        labels = bundle, operation
        self.queue_wait = metrics.observations(metrics.queue_wait.labels(*labels))
        self.compute = metrics.compute.labels(*labels)
        self.batch_images = metrics.batch_images.labels(*labels)
        self.batch_padding_images = metrics.batch_padding_images.labels(*labels)
        self.images = metrics.images.labels(*labels)
        self.batches = partial(metrics.batches.labels, *labels)  # by why they closed


class RouteSeries:
    """The series of one route at the edge, which hear of what has ended as late as `Observations` do.

    Attributes:
        in_flight: Requests that are being answered.
    """

    def __init__(self, metrics: Metrics, route: str) -> None:
        self.in_flight = 0
        metrics.requests_in_flight.labels(route).set_function(lambda: self.in_flight)
        self._requests = partial(metrics.requests.labels, route)
        sizes = metrics.request_bytes, metrics.response_bytes
        self._histograms = [histogram.labels(route) for histogram in (metrics.request_duration, *sizes)]
        self._ended: list[tuple[str, int, float, int, int]] = []

    def end(self, method: str, status: int, seconds: float, bytes_in: int, bytes_out: int) -> None:
        """A request has ended like this."""
        self._ended.append((method, status, seconds, bytes_in, bytes_out))
        if len(self._ended) >= MOST_KEPT:
            self.hand_over()

    def hand_over(self) -> None:
        """Tell the series."""
        if not self._ended:
            return
        methods, statuses, *values = zip(*self._ended, strict=True)
        self._ended.clear()
        for (method, status), count in collections.Counter(zip(methods, statuses, strict=True)).items():
            self._requests(method, str(status)).inc(count)
        for histogram, column in zip(self._histograms, values, strict=True):
            _add(histogram, np.array(column, np.float64))
