"""Every series this service exports, each with the question it answers.

Label values come from small, fixed sets: `route` is a route's template or `unmatched`, `method` one of `METHODS` or
`other`, bundles are those loaded. Units are seconds, bytes and images; time buckets start at half a millisecond.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Metric, disable_created_metrics
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from service.logs import lines_dropped

METHODS = frozenset({"GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE"})
SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
BYTES = tuple(4**n for n in range(4, 14))  # 256 bytes to 64 MiB
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
PROBABILITY = tuple(n / 20 for n in range(1, 21))
WORK = ("bundle", "operation")  # operation: sample, discriminate, encode


class Observations:
    """The values of one labelled histogram, counted by bucket."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, *values: float) -> None:
        """Count these values."""
        for value in values:
            self._counts[bisect_left(self._bounds, value)] += 1
            self._sum += value

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        """Write the counts into a page's histogram."""
        names = [floatToGoString(bound) for bound in (*self._bounds, math.inf)]  # type: ignore[no-untyped-call]
        family.add_metric(labels, list(zip(names, accumulate(self._counts), strict=True)), self._sum)


class Histogram(Collector):
    """A histogram without locks, for the event loop alone: prometheus_client's takes five times as long to observe."""

    def __init__(self, name: str, documentation: str, labels: Sequence[str], buckets: Sequence[float]) -> None:
        self.buckets = tuple(buckets)
        self._name, self._documentation, self._label_names = name, documentation, labels
        self._series: dict[tuple[str, ...], Observations] = {}
        if not labels:
            self.labels()  # so that it is on the page before the first value

    def labels(self, *values: str) -> Observations:
        """The series of these label values."""
        series = self._series.get(values)
        if series is None:
            series = self._series[values] = Observations(self.buckets)
        return series

    def remove(self, *values: str) -> None:
        """Drop the series of these label values."""
        self._series.pop(values, None)

    def observe(self, *values: float) -> None:
        """Count values, where the histogram has no labels."""
        self.labels().observe(*values)

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        family = HistogramMetricFamily(self._name, self._documentation, labels=self._label_names)
        for labels, series in list(self._series.items()):
            series.add_to(family, labels)
        yield family


class ReadCounter(Collector):
    """A counter whose value is read when somebody looks."""

    def __init__(self, name: str, documentation: str, read: Callable[[], int]) -> None:
        self._name, self._documentation, self._read = name, documentation, read

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        yield CounterMetricFamily(self._name, self._documentation, self._read())


class Declaration(NamedTuple):
    """One metric as dashboards know it, whether it has a value yet or not."""

    name: str
    kind: str
    labels: tuple[str, ...]


class Metrics:
    """All series of one app, in a registry of its own, so that two apps in a process don't meet.

    Attributes:
        declarations: Every metric of ours, in order.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        # Library-wide, and idempotent: a creation time beside every counter answers none of our questions.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry
        self.declarations: list[Declaration] = []
        self._routes: dict[str, RouteSeries] = {}
        self._work: dict[tuple[str, str, str], WorkSeries] = {}
        self._keys: dict[str, KeySeries] = {}
        self._declare_requests()
        self._declare_keys()
        self._declare_queue()
        self._declare_batches()
        self._declare_engine()
        self._declare_bundles()
        self._declare_process()

    def _declare_requests(self) -> None:
        # How many, how slow, with which outcome? All outcomes: a refusal or a departure is one too.
        self.requests = self._counter(
            "gan_requests_total",
            "Requests that ended. Status 499: the client left before the end of the answer.",
            ["route", "method", "status"],
        )
        self.request_duration = self._histogram(
            "gan_request_duration_seconds", "From a request's head to the last byte of its reply.", ["route"]
        )
        self.requests_in_flight = self._gauge("gan_requests_in_flight", "Requests being answered now.", ["route"])
        # Is anything larger than we think?
        self.request_bytes = self._histogram("gan_request_bytes", "Body bytes that were read.", ["route"], BYTES)
        self.response_bytes = self._histogram("gan_response_bytes", "Body bytes that were sent.", ["route"], BYTES)
        # Why did clients not get what they asked for? One place counts it: where an error becomes a reply.
        self.rejected = self._counter(
            "gan_rejected_total",
            "Requests refused, by reason: queue_full, rate_limited, deadline, draining, not_ready, unauthorized, "
            "too_large, invalid, request_timeout.",
            ["route", "reason"],
        )
        # How much work do departing clients leave behind? The batcher counts, with logs.current_route().
        self.cancelled = self._counter(
            "gan_cancelled_total", "Requests whose client left, by phase: queued, running.", ["route", "phase"]
        )

    def _declare_keys(self) -> None:
        # Who asks for how much? By the name of the client's key, where keys are needed.
        self.key_images = self._counter("gan_key_images_total", "Images that a key's requests had computed.", ["key"])
        self.key_rejected = self._counter("gan_key_rejected_total", "A key's requests that were refused.", ["key"])
        self.key_images_in_flight = self._gauge(
            "gan_key_images_in_flight", "Images of a key's requests that wait or are being computed.", ["key"]
        )

    def _declare_queue(self) -> None:
        # Read from the queue itself when scraped (set_function), never counted up and down.
        self.queue_images = self._gauge("gan_queue_images", "Images waiting.", ["device"])
        self.queue_requests = self._gauge("gan_queue_requests", "Requests that have images waiting.", ["device"])
        self.queue_capacity_images = self._gauge("gan_queue_capacity_images", "Images that may wait.", ["device"])
        self.queue_oldest_age = self._gauge(
            "gan_queue_oldest_age_seconds",
            "How long the oldest waiting image has waited; 0 when none does.",
            ["device"],
        )
        # Is time lost waiting, or computing, or in encoding and decoding? These four together say.
        self.queue_wait = self._histogram(
            "gan_queue_wait_seconds", "From a row's arrival to the start of its batch.", WORK
        )
        self.compute = self._histogram("gan_compute_seconds", "One engine call.", WORK)
        self.encode = self._histogram("gan_encode_seconds", "Encoding one reply's images.", ["format"])
        self.decode = self._histogram("gan_decode_seconds", "Decoding and converting one request's uploaded images.")

    def _declare_batches(self) -> None:
        # Does batching work: are batches full, what is wasted, and why do they close?
        self.batch_images = self._histogram("gan_batch_images", "Images in one batch, without padding.", WORK, IMAGES)
        self.batch_padding_images = self._counter(
            "gan_batch_padding_images_total", "Rows computed only to fill a batch's fixed size.", WORK
        )
        self.batches = self._counter(
            "gan_batches_total", "Batches, by why they closed: full, idle, window.", [*WORK, "closed_by"]
        )
        # What is really produced?
        self.images = self._counter(
            "gan_images_total",
            "Images computed, without padding, delivered or not.",
            ["bundle", "version", "operation"],
        )
        # What does D think of what it sees: does it drift?
        self.discriminator_probability = self._histogram(
            "gan_discriminator_probability",
            "D's probability that an image is real, by origin: sampled, uploaded.",
            ["bundle", "version", "origin"],
            PROBABILITY,
        )

    def _declare_engine(self) -> None:
        # Is the engine healthy?
        self.engine_errors = self._counter(
            "gan_engine_errors_total",
            "Failures of the engine, by kind: failed_rows, batch, out_of_memory, device.",
            ["kind"],
        )
        self.out_of_memory = self._counter("gan_out_of_memory_total", "Batches that the device had no memory for.")
        self.engine_last_progress = self._gauge(
            "gan_engine_last_progress_timestamp_seconds",
            "Unix time at which the engine last finished a batch.",
            ["device"],
        )
        # At what share of its capacity does it work? The sum of gan_compute_seconds over this.
        self.engine_threads = self._gauge(
            "gan_engine_threads", "Threads that run batches: so many can be computed at once.", ["device"]
        )
        self.ready = self._gauge("gan_ready", "1 when /readyz says yes, else 0.")
        self.device_memory = self._gauge(
            "gan_device_memory_bytes", "Memory of the device, by kind: allocated, reserved.", ["device", "kind"]
        )

    def _declare_bundles(self) -> None:
        # What is loaded, where, and how long did it take to get warm?
        self.bundle_info = self._gauge("gan_bundle_info", "1 for each loaded bundle.", ["bundle", "version", "device"])
        self.bundle_swaps = self._counter(
            "gan_bundle_swaps_total",
            "Bundles that came into memory, left it or could not be loaded, by result: loaded, unloaded, refused.",
            ["bundle", "result"],
        )
        self.warmup = self._gauge("gan_warmup_seconds", "How long loading and warming a bundle took.", ["bundle"])

    def _declare_process(self) -> None:
        self.build_info = self._gauge("gan_build_info", "1, with the versions that run.", ["version", "torch"])
        # Is the log whole?
        name = "gan_log_lines_dropped_total"
        documentation = "Log lines that were lost, as nobody read them or they could not be written."
        self.declarations.append(Declaration(name, "counter", ()))
        self.registry.register(ReadCounter(name, documentation, lines_dropped))
        # process_* and python_*: memory, open files, CPU time, garbage collections.
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    def _counter(self, name: str, documentation: str, labels: Sequence[str] = ()) -> Counter:
        self.declarations.append(Declaration(name, "counter", tuple(labels)))
        return Counter(name, documentation, labels, registry=self.registry)

    def _gauge(self, name: str, documentation: str, labels: Sequence[str] = ()) -> Gauge:
        self.declarations.append(Declaration(name, "gauge", tuple(labels)))
        return Gauge(name, documentation, labels, registry=self.registry)

    def _histogram(
        self, name: str, documentation: str, labels: Sequence[str] = (), buckets: Sequence[float] = SECONDS
    ) -> Histogram:
        self.declarations.append(Declaration(name, "histogram", tuple(labels)))
        histogram = Histogram(name, documentation, labels, buckets)
        self.registry.register(histogram)
        return histogram

    def of_route(self, route: str) -> "RouteSeries":
        """The series of one route: every request needs them, and looking each up takes longer than counting."""
        series = self._routes.get(route)
        if series is None:
            series = self._routes[route] = RouteSeries(self, route)
        return series

    def of_work(self, bundle: str, version: str, operation: str) -> "WorkSeries":
        """The batcher's series of one kind of work, kept for the same reason."""
        series = self._work.get((bundle, version, operation))
        if series is None:
            series = self._work[bundle, version, operation] = WorkSeries(self, bundle, version, operation)
        return series

    def forget_bundles_but(self, versions: Collection[tuple[str, str]]) -> None:
        """Drop the series of all other bundles and versions, so that those of bundles that come and go don't pile up.

        A batch of one of them that still runs makes some anew, which are dropped the next time. Swaps stay: they tell
        of what has left.
        """
        names = {name for name, _ in versions}
        self._work = {key: series for key, series in self._work.items() if key[:2] in versions}
        for metric in (self.images, self.discriminator_probability):
            for labels in _label_values(metric):
                if labels[:2] not in versions:
                    metric.remove(*labels)
        for metric in (self.queue_wait, self.compute, self.batch_images, self.batch_padding_images, self.batches):
            for labels in _label_values(metric):
                if labels[0] not in names:
                    metric.remove(*labels)

    def of_key(self, name: str) -> "KeySeries":
        """The series of one key, by its name."""
        series = self._keys.get(name)
        if series is None:
            series = self._keys[name] = KeySeries(self, name)
        return series


def _label_values(metric: Counter | Histogram) -> set[tuple[str, ...]]:
    """The label values of each of a metric's series, in order."""
    samples = (sample for family in metric.collect() for sample in family.samples)
    return {tuple(value for name, value in sample.labels.items() if name != "le") for sample in samples}


class KeySeries:
    """The series of one client's key.

    Attributes:
        in_flight: Images of its requests that are accepted and not yet computed.
    """

    def __init__(self, metrics: Metrics, name: str) -> None:
        self.in_flight = 0
        metrics.key_images_in_flight.labels(name).set_function(lambda: self.in_flight)
        self.images = metrics.key_images.labels(name)
        self.rejected = metrics.key_rejected.labels(name)


class WorkSeries:
    """The series of one bundle's operation in the batcher; all but the images are those of every version."""

    def __init__(self, metrics: Metrics, bundle: str, version: str, operation: str) -> None:
        labels = bundle, operation
        self.queue_wait = metrics.queue_wait.labels(*labels)
        self.compute = metrics.compute.labels(*labels)
        self.batch_images = metrics.batch_images.labels(*labels)
        self.batch_padding_images = metrics.batch_padding_images.labels(*labels)
        self.images = metrics.images.labels(bundle, version, operation)
        self._batches = metrics.batches
        self._labels = labels

    def batches(self, closed_by: str) -> Counter:
        """Batches that closed for this reason."""
        return self._batches.labels(*self._labels, closed_by)


class RouteSeries:
    """The series of one route.

    Attributes:
        in_flight: Requests that are being answered.
    """

    def __init__(self, metrics: Metrics, route: str) -> None:
        self.in_flight = 0
        metrics.requests_in_flight.labels(route).set_function(lambda: self.in_flight)
        self._route = route
        self._requests = metrics.requests
        self._ended: dict[tuple[str, int], Counter] = {}  # by method and status
        self._seconds = metrics.request_duration.labels(route)
        self._bytes_in = metrics.request_bytes.labels(route)
        self._bytes_out = metrics.response_bytes.labels(route)

    def end(self, method: str, status: int, seconds: float, bytes_in: int, bytes_out: int) -> None:
        """Count a request that has ended like this."""
        ended = self._ended.get((method, status))
        if ended is None:
            ended = self._ended[method, status] = self._requests.labels(self._route, method, str(status))
        ended.inc()
        self._seconds.observe(seconds)
        self._bytes_in.observe(bytes_in)
        self._bytes_out.observe(bytes_out)
