"""Middleware around every request: context, metrics, log line, errors as problems, keys and admission.

From the outside in: `Observe`, `Problems`, `Authentication`, `Admission` and `Shortcut`; around and within `Problems`
the layers of cross_origin.py, if pages of other origins may call. All are pure ASGI:
middleware that runs a request in another task, or puts its body into a queue, would hide a client's disconnect from the
layers inside it.
"""

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from service.engine.key_limits import KeyLimits
from service.errors import Draining, Internal, MethodNotAllowed, NotFound, ServiceError
from service.http.layers.auth import Keys, KeyScope
from service.http.layers.client_address import TrustedProxies
from service.http.problems import problem_reply
from service.http.requests.memory_budget import MemoryBudget
from service.http.requests.request_context import KEY, UNMATCHED, AsgiRequest, FoundRoute, Header, RequestContext
from service.logs import enter_request
from service.metrics import METHODS, Metrics, RouteSeries

if TYPE_CHECKING:
    from service.http.layers.traces import Traces  # what it imports need not be installed

# All bodies together may hold this many times the largest body.
BUDGET_FACTOR = 8
# Machines request these all the time; their lines would fill the log.
QUIET_ROUTES = frozenset(
    {"/livez", "/readyz", "/health", "/startupz", "/metrics", "/v2/health/live", "/v2/health/ready"}
)

Endpoint = Callable[[Request], Awaitable[Response]]

log = logging.getLogger(__name__)


class RouteTable:
    """Finds a request's route without the router, because metrics and 405 replies need it for every request.

    Args:
        routes: All of them.
        root_path: The prefix that a proxy may leave before the path. By default ASGI's root_path.
    """

    def __init__(self, routes: Iterable[Route], root_path: str | None = None) -> None:
        self._root_path = root_path
        methods: dict[str, set[str]] = {}
        patterns: dict[str, re.Pattern[str]] = {}
        for route in routes:
            methods.setdefault(route.path, set()).update(route.methods or ())
            patterns[route.path] = route.path_regex
        self._exact: dict[str, FoundRoute] = {}
        self._patterns: list[tuple[re.Pattern[str], FoundRoute]] = []
        for path, allowed in methods.items():
            found = FoundRoute(path, tuple(sorted(allowed | ({"HEAD"} if "GET" in allowed else set()))))
            if "{" in path:
                self._patterns.append((patterns[path], found))
            else:
                self._exact[path] = found

    def find(self, scope: Scope) -> FoundRoute | None:
        """The route of a request, whatever the method; None if there is none.

        Where its path has none and begins with the prefix, all layers get the path without it.
        """
        found = self._of_path(scope)
        prefix = self._root_path or scope.get("root_path", "")
        if found is None and prefix and f"{scope['path']}/".startswith(f"{prefix}/"):
            scope["path"] = scope["path"].removeprefix(prefix) or "/"
            found = self._of_path(scope)
        return found

    def _of_path(self, scope: Scope) -> FoundRoute | None:
        if (found := self._exact.get(scope["path"])) is not None:
            return found
        for pattern, found in self._patterns:
            if (match := pattern.match(scope["path"])) is not None:
                scope["path_params"] = match.groupdict()  # as the router would, which the busiest routes skip
                return found
        return None


class Observe:
    """Gives each request its context and its id, measures it whatever its outcome, and writes its log line.

    Args:
        app: The next layer.
        metrics: Where requests are counted.
        routes: Finds the request's route.
        is_draining: Whether the process is about to end. If so, every reply closes its connection, so that the client
            sends its next request over a new one, which a load balancer leads to another process.
        proxies: Those that are believed who their clients are.
        traces: Where requests are traced, if they are.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        routes: RouteTable,
        is_draining: Callable[[], bool],
        proxies: TrustedProxies,
        traces: "Traces | None" = None,
    ) -> None:
        self.app = app
        self.metrics = metrics
        self.routes = routes
        self.is_draining = is_draining
        self.proxies = proxies
        self.traces = traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on and measure it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        context: RequestContext = scope.get(KEY) or AsgiRequest(scope, receive, send)
        context.found = self.routes.find(scope)
        context.method = scope["method"] if scope["method"] in METHODS else "other"
        context.route = context.found.template if context.found else UNMATCHED
        context.arrived_s = time.monotonic()
        context.should_close = self.is_draining
        enter_request(context)
        if self.traces is not None and context.route not in QUIET_ROUTES:
            self.traces.begin(context)
        series = self.metrics.of_route(context.route)
        series.in_flight += 1
        try:
            await self.app(scope, context.receive, context.send)
        finally:
            series.in_flight -= 1
            del scope[KEY]  # it refers to the scope: this reference cycle would keep the unread part of a body
            self._record(context, series)

    def _record(self, context: RequestContext, series: RouteSeries) -> None:
        seconds = time.monotonic() - context.arrived_s
        series.end(context.method, context.status, seconds, context.bytes_in, context.bytes_out)
        level = logging.DEBUG if context.route in QUIET_ROUTES else logging.INFO
        line: dict[str, object] = {
            "method": context.method,
            "route": context.route,
            "status": context.status,
            "duration_ms": round(seconds * 1000, 3),
            "bytes": context.bytes_out,
        }
        for what in ("bundle", "count", "error", "key"):
            if (known := getattr(context, what)) is not None:
                line[what] = known
        for what, took_s in context.took_s.items():
            line[f"{what}_ms"] = round(1000 * took_s, 3)
        client = None
        if context.scope.get("client"):
            client = self.proxies.client(context.scope["client"][0], context.all_of_header(b"x-forwarded-for"))
            line["client"] = client
        line["request_id"] = context.id
        log.log(level, "request", extra={"fields": line})
        if self.traces is not None:
            self.traces.end(context, client)


class Problems:
    """Turns errors into problem replies, and logs those that are not the client's fault.

    Args:
        app: The next layer.
        metrics: Where rejections are counted.
        is_draining: Whether the service is shutting down. Requests that are cancelled then get a `Draining` reply.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, is_draining: Callable[[], bool]) -> None:
        self.app = app
        self.metrics = metrics
        self.is_draining = is_draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and send the problem if it raises."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        context: RequestContext = scope[KEY]
        try:
            context.check()
            await self.app(scope, receive, send)
        except asyncio.CancelledError:
            if not self.is_draining():
                raise
            if context.has_started:
                self._noted(Draining(), context)
                context.hang_up()  # so that the client notices that its reply is incomplete
            else:
                await context.answer(self._problem(Draining(), context))
        except ClientDisconnect:  # while its body was read: nobody is there for a reply
            pass
        except Exception as error:  # noqa: BLE001 - whatever it is, the client gets a problem
            # No name for what is noted: a frame that refers to its error would keep the connection.
            if context.has_started:  # only a broken connection can tell the client that its reply is incomplete
                raise self._noted(error, context) from None
            await context.answer(self._problem(error, context))

    def _problem(self, error: Exception, context: RequestContext) -> Response:
        return problem_reply(self._noted(error, context), context.id, context.scope["path"])

    def _noted(self, error: Exception, context: RequestContext) -> ServiceError:
        """The error that the client gets, once it is logged and counted. It also ends a reply that has begun."""
        if not isinstance(error, ServiceError):
            log.error("unexpected error", exc_info=error)
            error = Internal(repr(error))
        elif isinstance(error, Internal):
            log.error("the engine failed", exc_info=error)
        if error.rejection and context.route not in QUIET_ROUTES:  # a failing probe is no rejection
            self.metrics.rejected.labels(context.route, error.rejection).inc()
            if context.key is not None:
                self.metrics.of_key(context.key).rejected.inc()
        context.error = error.code
        if context.has_started:
            context.status = error.status
        return error


class Authentication:
    """Refuses requests whose key does not have the scope that their route needs.

    Args:
        app: The next layer.
        keys: The configured keys.
        scopes: The scope that a route needs, by its template. Other routes need a client's key.
    """

    def __init__(self, app: ASGIApp, keys: Keys, scopes: Mapping[str, KeyScope]) -> None:
        self.app = app
        self.keys = keys
        self.scopes = scopes

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Pass a request on, or refuse it."""
        if scope["type"] == "http":
            context: RequestContext = scope[KEY]
            found = context.found
            if found is not None and scope["method"] in found.methods:  # others get 404 or 405 without a key
                self._check(context, self.scopes.get(found.template, KeyScope.USE))
        return self.app(scope, receive, send)

    def _check(self, context: RequestContext, needed: KeyScope) -> None:
        if self.keys.need_none(needed):
            return
        key = self.keys.find(context.header(b"authorization"), context.header(b"x-api-key"))
        if key is not None:
            context.key = key.name
        self.keys.check(key, needed)


class Admission:
    """Decides by a request's head whether its body is read, and cancels work whose client has left.

    The bodies of all requests together are bounded. So are their images, from before they are computed until the client
    has read them. So memory stays bounded however many clients there are and however slow they are.

    Args:
        app: The next layer.
        routes: The largest body in bytes of each route that needs the engine, by the route's template.
        admit: Raises an error if no more work can be accepted now; O(1).
        max_body_bytes: Largest body of any route. All bodies together may hold `BUDGET_FACTOR` times as much.
        all_reply_bytes: What all replies together may hold, from before they are computed.
        key_limits: Those of clients' keys, if there are any.
        check_key: Raises RateLimited if the request's key may have no image computed now.
    """

    def __init__(
        self,
        app: ASGIApp,
        routes: Mapping[str, int],
        admit: Callable[[], None],
        *,
        max_body_bytes: int,
        all_reply_bytes: int,
        key_limits: KeyLimits | None = None,
        check_key: Callable[[], None] = lambda: None,
    ) -> None:
        self.app = app
        self.routes = routes
        self.key_limits = key_limits
        self.check_key = check_key
        self.admit = admit
        self.bodies = MemoryBudget(BUDGET_FACTOR * max_body_bytes)
        self.replies = MemoryBudget(all_reply_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or pass it on; its work is cancelled if its client leaves."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        context: RequestContext = scope[KEY]
        found = context.found
        if found is None:
            raise NotFound("No such route; /docs lists them all.")
        if scope["method"] not in found.methods:
            raise MethodNotAllowed(found.methods)
        if scope["method"] == "HEAD":
            scope["method"] = "GET"  # the context drops the reply's body
        max_body_bytes = self.routes.get(found.template)
        if max_body_bytes is None:
            await self.app(scope, receive, send)
            return
        announced = context.announced_bytes(max_body_bytes)
        self.admit()
        if self.key_limits is not None and context.key is not None:
            context.limit_headers = partial(_limit_headers, self.key_limits, context.key)
            if scope["method"] == "POST":  # else there is no body to save us, and perhaps nothing to compute
                self.check_key()
        # Only checked: bytes are counted as they arrive. Otherwise a few clients that announce large bodies and send
        # nothing would keep all others out.
        self.bodies.check(announced)
        await context.work(self.app, self.bodies, self.replies, max_body_bytes)


def _limit_headers(limits: KeyLimits, key: str) -> list[Header]:
    return [(name.lower().encode(), value.encode()) for name, value in limits.fields(key).items()]


class Shortcut:
    """Calls the endpoints of the busiest routes directly.

    FastAPI would pass a request through eight layers that do nothing for a route that reads its own request. That takes
    longer than everything else that the service does for a small request, computing its image included.

    Args:
        app: FastAPI, for all other routes.
        endpoints: By route template and method.
    """

    def __init__(self, app: ASGIApp, endpoints: Mapping[tuple[str, str], Endpoint]) -> None:
        self.app = app
        self.endpoints = endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request with its endpoint, or pass it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        context: RequestContext = scope[KEY]
        endpoint = self.endpoints.get((context.route, scope["method"]))
        if endpoint is None:
            await self.app(scope, receive, send)
        else:
            await context.answer(await endpoint(Request(scope, receive, send)))
