"""The client's address in the log: the peer's, or what trusted proxies say, and never what a client makes up."""

import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import httpx
import pytest
from fastapi import FastAPI

from service.app import create_app
from service.http.layers.client_address import MAX_HOPS, TrustedProxies
from service.settings import Settings, SettingsError, networks, read_settings

Start = Callable[[FastAPI], AbstractAsyncContextManager[httpx.AsyncClient]]


@pytest.mark.parametrize(
    ("peer", "forwarded_for", "client"),
    [
        pytest.param("203.0.113.9", "198.51.100.1", "203.0.113.9", id="a peer that is no proxy"),
        pytest.param("10.0.0.1", "", "10.0.0.1", id="a proxy that says nothing"),
        pytest.param("10.0.0.1", "198.51.100.1", "198.51.100.1", id="one proxy"),
        pytest.param("10.0.0.1", "6.6.6.6, 198.51.100.1", "198.51.100.1", id="a client that claims to be another"),
        pytest.param("10.0.0.1", "6.6.6.6, 198.51.100.1, 10.9.9.9", "198.51.100.1", id="two proxies"),
        pytest.param("10.0.0.1", "10.1.1.1,10.2.2.2", "10.1.1.1", id="nothing but proxies"),
        pytest.param("10.0.0.1", "6.6.6.6, unknown", "10.0.0.1", id="a proxy that does not know"),
        pytest.param("10.0.0.1", "198.51.100.1:4711", "198.51.100.1", id="with a port"),
        pytest.param("2001:db8::1", "[2001:DB8:0::2]:4711", "2001:db8::2", id="IPv6 in brackets"),
        pytest.param("2001:db8::1", "2001:db9::2", "2001:db9::2", id="IPv6"),
        pytest.param("::ffff:10.0.0.1", "::ffff:198.51.100.1", "198.51.100.1", id="IPv4 as a socket for both has it"),
        pytest.param("::ffff:198.51.100.1", "", "198.51.100.1", id="a peer on such a socket"),
        pytest.param("10.0.0.1", "fe80::1%\x1b[31m evil=1", "10.0.0.1", id="a scope with other text"),
        pytest.param("10.0.0.1", "1.2.3.4\nstatus=200", "10.0.0.1", id="a line end"),
        pytest.param("10.0.0.1", "9" * 60000, "10.0.0.1", id="a long number"),
        pytest.param("10.0.0.1", ":" * 60000, "10.0.0.1", id="colons"),
        pytest.param("10.0.0.1", "," * 60000, "10.0.0.1", id="commas"),
        pytest.param("10.0.0.1", "6.6.6.6" + ",10.1.1.1" * (MAX_HOPS + 1), "10.1.1.1", id="more hops than anybody has"),
        pytest.param("a socket's name", "6.6.6.6", "a socket's name", id="a peer without an address"),
    ],
)
def test_the_rightmost_address_that_is_no_trusted_proxys_counts(peer: str, forwarded_for: str, client: str) -> None:
    """Only proxies' own words are believed, and what is no address ends the search."""
    proxies = TrustedProxies(networks("10.0.0.0/8, 2001:db8::/64"))
    assert proxies.client(peer, forwarded_for) == client


def test_by_default_nobody_is_believed() -> None:
    """Not even this machine."""
    assert TrustedProxies(networks(None)).client("127.0.0.1", "6.6.6.6") == "127.0.0.1"


@pytest.mark.parametrize("value", ["proxy.example", "10.0.0.1/8", "10.0.0.1,", "*", "300.1.1.1"])
def test_what_is_no_address_and_no_network_is_refused(value: str) -> None:
    """At the start, in one line that names the setting."""
    with pytest.raises(SettingsError, match=r"^GAN_TRUSTED_PROXIES \(or --trusted-proxies\) is "):
        read_settings({"trusted_proxies": value})


@pytest.mark.anyio
async def test_the_request_line_has_the_clients_address(
    start: Start, tiny_settings: Callable[..., Settings], caplog: pytest.LogCaptureFixture
) -> None:
    """Several headers of the name count as one."""
    headers = [("X-Forwarded-For", "6.6.6.6, 198.51.100.1"), ("X-Forwarded-For", "10.0.0.1")]
    async with start(create_app(tiny_settings(trusted_proxies="127.0.0.1,10.0.0.0/8"))) as client:
        with caplog.at_level(logging.INFO, "service"):
            await client.get("/bundles")
            await client.get("/bundles", headers=headers)
    lines: list[dict[str, object]] = [record.fields for record in caplog.records if hasattr(record, "fields")]
    assert [line["client"] for line in lines] == ["127.0.0.1", "198.51.100.1"]
