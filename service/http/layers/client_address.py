"""The address of the client that a request comes from, also behind proxies."""

import contextlib
import ipaddress
from collections.abc import Iterable

MAX_HOPS = 32  # of one X-Forwarded-For
MAX_ADDRESS = 64  # characters, a port included

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class TrustedProxies:
    """Proxies whose X-Forwarded-For is believed.

    Each proxy appends the address of whoever has connected to it, so the header is read from its end: the first address
    that is no trusted proxy's is the client's. What stands before it is the client's own claim.
    """

    def __init__(self, networks: Iterable[Network]) -> None:
        self._networks = list(networks)

    def client(self, peer: str, forwarded_for: str) -> str:
        """The client's address.

        Args:
            peer: Address at the other end of the connection.
            forwarded_for: X-Forwarded-For, the joined one where there are several; anything may be in it.
        """
        if not self._networks or (address := _parse(peer)) is None:
            return peer.removeprefix("::ffff:")
        hops = forwarded_for.rsplit(",", MAX_HOPS)
        while hops and self._trusts(address):
            if (before := _parse(hops.pop())) is None:  # "unknown", or nonsense: nothing beyond it is sure
                break
            address = before
        return str(address)

    def _trusts(self, address: Address) -> bool:
        return any(address in network for network in self._networks)


def _parse(text: str) -> Address | None:
    """An address as proxies write it, perhaps with a port; None for anything else."""
    text = text.strip()
    if len(text) > MAX_ADDRESS or "%" in text:  # a scope may be any text
        return None
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(text)
        return getattr(address, "ipv4_mapped", None) or address  # as a socket for both families has it
    return None
