"""PromQL for the dashboard: each query follows the chosen instances and bundles, and none divides by zero.

Names and labels are those that the service declares, so a panel can't ask for a series that does not exist. Where
nothing happened, 0 / 0 is NaN; `>= 0` leaves it out, and the panel shows a gap.
"""

from prometheus_client import CollectorRegistry

from service.http.layers.middleware import QUIET_ROUTES
from service.metrics import Metrics

JOB = "gan-service"  # of the scrape
_CLIENTS = "process_"  # the client library's, which other programs have too
_LABELS = {one.name: one.labels for one in Metrics(CollectorRegistry()).declarations}
_WORK = 'route!~"' + "|".join(sorted(QUIET_ROUTES)) + '"'  # probes and scrapes come by the clock, and are no work
_WINDOW = "[$__rate_interval]"  # at least four scrapes


def series(name: str, matchers: str = "", *, bundles: bool = True) -> str:
    """A series of the chosen instances; where it has such labels, of the chosen bundles, and of routes but probes."""
    labels = _labels(name)
    chosen = ['instance=~"$instance"']
    if name.startswith(_CLIENTS):
        chosen.insert(0, f'job="{JOB}"')
    if bundles and "bundle" in labels:
        chosen.append('bundle=~"$bundle"')
    if "route" in labels:
        chosen.append(_WORK)
    return f"{name}{{{', '.join([*chosen, *filter(None, [matchers])])}}}"


def _labels(name: str) -> tuple[str, ...]:
    if name.startswith(_CLIENTS):
        return ()
    return _LABELS[name] if name in _LABELS else _LABELS[name.rpartition("_")[0]]  # of a histogram


def total(name: str, by: str = "", matchers: str = "") -> str:
    """A gauge, or a counter since the start, summed over all labels but these."""
    return f"sum{_by(by)} ({series(name, matchers)})"


def rate(name: str, by: str = "", matchers: str = "") -> str:
    """A counter's growth a second, summed over all labels but these."""
    return f"sum{_by(by)} (rate({series(name, matchers)}{_WINDOW}))"


def ratio(part: str, whole: str) -> str:
    """One sum over another that has the same labels."""
    return f"({part}) / ({whole}) >= 0"


def mean(histogram: str, by: str = "", matchers: str = "") -> str:
    """The average of what a histogram observed."""
    return ratio(rate(f"{histogram}_sum", by, matchers), rate(f"{histogram}_count", by, matchers))


def quantile(share: float, histogram: str, by: str = "") -> str:
    """The value that this share of a histogram's observations stay under, of all instances together."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, {rate(f'{histogram}_bucket', labels)}) >= 0"


def or_zero(query: str) -> str:
    """The same, or 0 while no such series exists; for sums without labels."""
    return f"{query} or vector(0)"


def _by(labels: str) -> str:
    return f" by ({labels})" if labels else ""
