"""Smoke test of a deployment: `python deploy/smoke URL [--key KEY]`, on any machine with Python 3.11 and no packages.

Asks for a little of everything that the service promises, prints a line for each, and ends with exit code 0 where all
of it holds, else 1. It draws a handful of images and changes nothing. Where it is refused for asking too much (429), it
waits for as long as the service says and asks again.
"""

import argparse
import base64
import json
import secrets
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.client import HTTPException
from typing import Any, NamedTuple

TIMEOUT_S = 30
TRIES = 5
PNG = b"\x89PNG\r\n\x1a\n"


class CheckError(Exception):
    """A promise does not hold; the message says which."""


class SkippedError(Exception):
    """A check does not concern this deployment; the message says why."""


class Reply(NamedTuple):
    """What the service answered."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """The body as JSON."""
        try:
            return json.loads(self.body)
        except ValueError:
            raise CheckError(f"this is no JSON: {self.body[:60]!r}") from None


class Service:
    """The deployment, as its clients see it."""

    def __init__(self, url: str, key: str | None, tls: ssl.SSLContext) -> None:
        self.key = key
        self._url = url.rstrip("/")
        # A redirect is an answer here, and so is an error.
        self._opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=tls), _NoRedirects)

    def ask(self, method: str, path: str, body: Any = None, *, expect: int = 200, **headers: str) -> Reply:
        """Send a request, its body as JSON unless it is bytes. Anything but the expected status is a failure.

        Headers are named with underscores; `authorization=""` leaves the key out.
        """
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if self.key:
            named = {"authorization": f"Bearer {self.key}"} | named
        if body is not None and not isinstance(body, bytes):
            body, named = json.dumps(body).encode(), {"content-type": "application/json"} | named
        named = {name: value for name, value in named.items() if value}
        request = urllib.request.Request(self._url + path, body, named, method=method)  # noqa: S310 - the operator's URL
        for _ in range(TRIES):
            try:
                reply = self._send(request)
            except (OSError, HTTPException, ValueError) as error:
                raise CheckError(f"{method} {path}: {getattr(error, 'reason', error)}") from None
            wait = reply.headers.get("retry-after", "")
            if reply.status != 429 or not wait.isdecimal() or int(wait) > TIMEOUT_S:
                break
            time.sleep(int(wait))
        if reply.status != expect:
            raise CheckError(
                f"{method} {path}: {reply.status} in place of {expect}: {reply.body[:200].decode(errors='replace')}"
            )
        return reply

    def _send(self, request: urllib.request.Request) -> Reply:
        try:
            got = self._opener.open(request, timeout=TIMEOUT_S)
        except urllib.error.HTTPError as error:
            got = error
        with got:
            return Reply(got.status, {name.lower(): value for name, value in got.headers.items()}, got.read())


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def require(holds: object, what: str) -> None:
    """Fail unless it holds."""
    if not holds:
        raise CheckError(what)


def probes(service: Service) -> str:
    """The probes answer without a key."""
    for path in ("/livez", "/readyz", "/startupz", "/health"):
        service.ask("GET", path, authorization="")
    return "live, ready, started"


def metrics(service: Service) -> str:
    """Metrics are readable without a key, unless a proxy hides them."""
    try:
        page = service.ask("GET", "/metrics", authorization="").body.decode()
    except CheckError as error:
        if "/metrics: 403 " in str(error) or "/metrics: 404 " in str(error):
            raise SkippedError("a proxy hides them") from None
        raise
    series = dict(line.rsplit(" ", 1) for line in page.splitlines() if line and not line.startswith("#"))
    require(float(series.get("gan_ready", 0)) == 1, "gan_ready is not 1")
    return f"{len(series)} series"


def keys(service: Service) -> str:
    """Where a key is given, nobody gets anything without it."""
    if service.key is None:
        raise SkippedError("no --key")
    for method, path in (("GET", "/bundles"), ("GET", "/sample"), ("GET", "/v1/models"), ("GET", "/v2/models/stats")):
        for authorization in ("", "Bearer wrong"):
            refused = service.ask(method, path, expect=401, authorization=authorization)
            require("www-authenticate" in refused.headers, f"{path}: a 401 without WWW-Authenticate")
    service.ask("GET", "/bundles")
    return "401 without it"


def bundles(service: Service) -> str:
    """Bundles are listed, and each has a version."""
    listed = service.ask("GET", "/bundles").json()["bundles"]
    require(listed, "there are none")
    return ", ".join(f"{one['name']}@{one['version']}" for one in listed)


def sample(service: Service) -> str:
    """A seed gives the same image again, by GET and POST, and 304 to who has it.

    The bytes are the same too, unless GAN_EXACT is off: then the ETag is weak.
    """
    seed = secrets.randbelow(2**53)
    first, again = (service.ask("GET", f"/sample?seed={seed}&format=png") for _ in range(2))
    posted = service.ask("POST", "/sample", {"seed": seed, "format": "png"})
    require(first.body.startswith(PNG), "the image is no PNG")
    require(first.headers.get("x-seed") == str(seed), "X-Seed is not the seed")
    tag = first.headers.get("etag", "")
    require(tag.startswith(('"', 'W/"')), "there is no ETag")
    exact = not tag.startswith("W/")
    require(not exact or first.body == again.body == posted.body, f"seed {seed} gives other bytes the second time")
    service.ask("GET", f"/sample?seed={seed}&format=png", expect=304, if_none_match=tag)
    unseeded = service.ask("GET", "/sample")
    require(unseeded.headers.get("cache-control") == "no-store", "an image without a seed may be cached")
    same = "the same three times" if exact else "not exact"
    return f"seed {seed} of {first.headers.get('x-bundle')}: {len(first.body)} bytes, {same}, 304"


def discriminate(service: Service) -> str:
    """The bundle judges its own image."""
    image = service.ask("GET", "/sample?seed=1&format=png").body
    try:
        judged = service.ask("POST", "/discriminate", image, content_type="image/png").json()["results"]
    except CheckError as error:
        if "no_discriminator" in str(error):
            raise SkippedError("the default bundle has no discriminator") from None
        raise
    require(len(judged) == 1 and 0 <= judged[0]["probability_real"] <= 1, f"this is no verdict: {judged}")
    return f"probability_real {judged[0]['probability_real']:.3f}"


def openai(service: Service) -> str:
    """OpenAI's image API lists models and draws."""
    models = service.ask("GET", "/v1/models").json()["data"]
    drawn = service.ask("POST", "/v1/images/generations", {"prompt": "any", "n": 1}).json()["data"]
    require(base64.b64decode(drawn[0]["b64_json"]).startswith(PNG), "the image is no PNG")
    return f"{len(models)} models, one image"


def inference_protocol(service: Service) -> str:
    """The Open Inference Protocol is live and ready, and infers."""
    for path in ("/v2/health/live", "/v2/health/ready"):
        service.ask("GET", path, authorization="")
    name = service.ask("GET", "/sample?seed=1").headers["x-bundle"].partition("@")[0]
    seed = {"name": "seed", "datatype": "INT64", "shape": [1], "data": [1]}
    reply = service.ask("POST", f"/v2/models/{name}/infer", {"inputs": [seed]}).json()
    [images] = reply["outputs"]
    require(images["name"] == "images" and images["shape"][0] == 1, f"this is no image: {images.get('shape')}")
    return f"{name}: {'×'.join(map(str, images['shape']))}"


def openapi(service: Service) -> str:
    """The API describes itself, without a key."""
    document = service.ask("GET", "/openapi.json", authorization="").json()
    require({"/sample", "/discriminate", "/readyz"} <= set(document["paths"]), "routes are missing")
    service.ask("GET", "/docs", authorization="")
    require(b"<html" in service.ask("GET", "/", authorization="").body, "the page is no HTML")
    return f"{len(document['paths'])} paths, docs and page"


def errors(service: Service) -> str:
    """Errors are problems of the one shape, with the request's id, and are not cached."""
    for method, path, body, status, code in (
        ("GET", "/sample?count=0", None, 422, "invalid"),
        ("GET", "/sample?unknown=1", None, 422, "invalid"),
        ("POST", "/sample", b"{", 400, "malformed"),
        ("GET", "/sample?bundle=none-of-this-name", None, 404, "unknown_bundle"),
        ("GET", "/nothing-here", None, 404, "not_found"),
        ("DELETE", "/sample", None, 405, "method_not_allowed"),
    ):
        reply = service.ask(method, path, body, expect=status, content_type="application/json" if body else "")
        where = f"{method} {path}"
        require(reply.headers.get("content-type") == "application/problem+json", f"{where}: not a problem")
        problem = reply.json()
        require(problem["code"] == code, f"{where}: {problem['code']} in place of {code}")
        require(problem["request_id"] == reply.headers.get("x-request-id"), f"{where}: another request's id")
        require(reply.headers.get("cache-control") == "no-store", f"{where}: an error may be cached")
    return "six problems"


CHECKS: dict[str, Callable[[Service], str]] = {
    "probes": probes,
    "metrics": metrics,
    "keys": keys,
    "bundles": bundles,
    "sample": sample,
    "discriminate": discriminate,
    "v1": openai,
    "v2": inference_protocol,
    "openapi": openapi,
    "errors": errors,
}


def check_all(service: Service) -> Iterator[tuple[str, str, str]]:
    """For each check its name, how it went (ok, skip, FAIL), and more."""
    for name, check in CHECKS.items():
        try:
            yield name, "ok", check(service)
        except SkippedError as reason:
            yield name, "skip", str(reason)
        except CheckError as error:
            yield name, "FAIL", str(error)
        except (KeyError, IndexError, TypeError, ValueError) as error:  # JSON of another shape
            yield name, "FAIL", f"a reply has another shape: {error!r}"


def main() -> int:
    """Run all checks; returns the exit code."""
    parser = argparse.ArgumentParser(prog="smoke", description="Check a deployment of the service from outside.")
    parser.add_argument("url", help="where it is, such as https://images.example.com/gan")
    parser.add_argument("--key", help="a client's key, where the deployment has keys")
    parser.add_argument("--ca", help="file in PEM with the authority of its certificate, where that is a private one")
    arguments = parser.parse_args()
    try:
        tls = ssl.create_default_context(cafile=arguments.ca)
    except OSError as error:
        parser.error(f"--ca {arguments.ca}: {error.strerror or error}")
    if not arguments.url.startswith(("http://", "https://")):
        parser.error(f"{arguments.url!r} is no address of a service: http://localhost:8000 would be one")
    failed = 0
    for name, how, more in check_all(Service(arguments.url, arguments.key, tls)):
        print(f"{how:4} {name}: {more}", flush=True)
        failed += how == "FAIL"
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
