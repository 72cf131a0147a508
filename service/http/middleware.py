"""What surrounds every request: id, metrics, log line, errors as problems, and admission.

Pure ASGI throughout: a middleware that puts a request on another task, or its body into a queue, hides a client's
disconnect from what is inside it. From the outside in: `Observe`, `Problems`, `Authentication`, `Admission` and
`Shortcut`.
"""

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import Draining, Internal, MethodNotAllowed, NotFound, ServiceError, TooLarge
from service.http.auth import Keys, KeyScope
from service.http.memory_budget import MemoryBudget
from service.http.problems import problem_reply
from service.http.request_context import KEY, UNMATCHED, AsgiRequest, FoundRoute, RequestContext
from service.logs import enter_request
from service.metrics import METHODS, Metrics, RouteSeries

AT_ONCE = 8  # bodies of the largest size, and replies
# Asked all the time by machines; they would drown the log.
QUIET_ROUTES = frozenset({"/livez", "/readyz", "/startupz", "/metrics"})

Endpoint = Callable[[Request], Awaitable[Response]]

log = logging.getLogger(__name__)


class RouteTable:
    """Finds the template of a path, before and apart from the router: metrics and 405 need it for every request."""

    def __init__(self, routes: Iterable[Route]) -> None:
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

    def find(self, path: str) -> FoundRoute | None:
        """The route that a path leads to, whatever the method."""
        if (found := self._exact.get(path)) is not None:
            return found
        return next((found for pattern, found in self._patterns if pattern.match(path)), None)


class Observe:
    """Names the request, counts and times it whatever becomes of it, and writes its line in the log.

    Args:
        app: What is inside.
        metrics: Where it is counted.
        routes: Finds the route's template.
        is_draining: Whether the process is about to end. Every reply then closes its connection: what the client asks
            next it asks over a new one, which a load balancer leads elsewhere, and no request meets a closing process.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: RouteTable, is_draining: Callable[[], bool]) -> None:
        self.app = app
        self.metrics = metrics
        self.routes = routes
        self.is_draining = is_draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and look at all that goes by."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        context: RequestContext = scope.get(KEY) or AsgiRequest(scope, receive, send)
        context.found = self.routes.find(scope["path"])
        context.method = scope["method"] if scope["method"] in METHODS else "other"
        context.route = context.found.template if context.found else UNMATCHED
        context.arrived_s = time.monotonic()
        context.is_last = self.is_draining
        enter_request(context)
        series = self.metrics.of_route(context.route)
        series.in_flight += 1
        try:
            await self.app(scope, context.receive, context.send)
        finally:
            series.in_flight -= 1
            del scope[KEY]  # which leads back to the scope: the circle would keep what came of an unread body
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
        if context.bundle is not None:
            line["bundle"], line["count"] = context.bundle, context.count
        line["request_id"] = context.id
        log.log(level, "request", extra={"fields": line})


class Problems:
    """Turns whatever is raised inside into a problem reply; what is not the client's fault goes to the log as well.

    Args:
        app: What is inside.
        metrics: Where rejections are counted.
        is_draining: Whether the service is shutting down: requests that it then cancels are told so.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, is_draining: Callable[[], bool]) -> None:
        self.app = app
        self.metrics = metrics
        self.is_draining = is_draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and answer for it if it fails."""
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
                context.hang_up()  # so that the client sees that its reply is not whole
            else:
                await context.answer(self._problem(Draining(), context))
        except Exception as error:
            if context.has_started:  # half a reply is out: only a broken connection can tell the client
                raise
            await context.answer(self._problem(error, context))

    def _problem(self, error: Exception, context: RequestContext) -> Response:
        if not isinstance(error, ServiceError):
            log.error("unexpected error", exc_info=error)
            error = Internal(repr(error))
        elif isinstance(error, Internal):
            log.error("the engine failed", exc_info=error)
        if error.rejection and context.route not in QUIET_ROUTES:  # a probe that hears no was not refused
            self.metrics.rejected.labels(context.route, error.rejection).inc()
        return problem_reply(error, context.id, context.scope["path"])


class Authentication:
    """Lets nobody in who has no key for what they ask, where keys are set.

    Args:
        app: What is inside.
        keys: Those that are set.
        scopes: What is needed for a route, by its template; those that are not named need a client's key.
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
            if found is not None and scope["method"] in found.methods:  # what does not exist is no secret
                needed = self.scopes.get(found.template, KeyScope.USE)
                self.keys.check(context.header(b"authorization"), context.header(b"x-api-key"), needed)
        return self.app(scope, receive, send)


class Admission:
    """Decides on the head of a request alone whether its body is read, and stops work whose client has left.

    The bodies of all requests together are bounded, and so are their images, from before they are computed until the
    client has taken them: memory is finite however many clients there are, and however slow they are.

    Args:
        app: What is inside.
        routes: Those that need the engine, by template, each with the most bytes that its body may have.
        admit: Raises what speaks against taking more work now; O(1).
        max_body_bytes: Largest body of any. Bodies that are held at once have up to `AT_ONCE` times as much.
        max_reply_bytes: Largest reply, before it is encoded; as above.
    """

    def __init__(
        self,
        app: ASGIApp,
        routes: Mapping[str, int],
        admit: Callable[[], None],
        *,
        max_body_bytes: int,
        max_reply_bytes: int,
    ) -> None:
        self.app = app
        self.routes = routes
        self.admit = admit
        self.bodies = MemoryBudget(AT_ONCE * max_body_bytes)
        self.replies = MemoryBudget(AT_ONCE * max_reply_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or pass it on with a watch on its client."""
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
            scope["method"] = "GET"  # the context leaves out the body
        max_body_bytes = self.routes.get(found.template)
        if max_body_bytes is None:
            await self.app(scope, receive, send)
            return
        announced = _announced_bytes(context.header(b"content-length") or "", max_body_bytes)
        self.admit()
        # Counted is what has come, not what is announced: a few clients that send nothing would keep all others out.
        self.bodies.check(announced)
        await context.work(self.app, self.bodies, self.replies, max_body_bytes)


def _announced_bytes(length: str, most: int) -> int:
    if not length.isdecimal():
        return 0
    if len(length) > 18 or int(length) > most:
        raise TooLarge(f"The body has {length[:100]} bytes; the most is {most}.")
    return int(length)


class Shortcut:
    """Calls the busiest routes' endpoints itself.

    FastAPI's way there, through eight layers that have nothing to do for a route that reads its own request, takes
    longer than all that is done here for a request, its image included.

    Args:
        app: The way for all other routes.
        endpoints: By route template and method.
    """

    def __init__(self, app: ASGIApp, endpoints: Mapping[tuple[str, str], Endpoint]) -> None:
        self.app = app
        self.endpoints = endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        context: RequestContext = scope[KEY]
        endpoint = self.endpoints.get((context.route, scope["method"]))
        if endpoint is None:
            await self.app(scope, receive, send)
        else:
            await context.answer(await endpoint(Request(scope, receive, send)))
