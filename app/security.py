"""Who may see what. Until there are accounts, callers' words are for the machine they are kept on."""

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from fastapi import HTTPException
from starlette.requests import HTTPConnection

# Any of these says that the client at the socket only passes on what another one asks.
PASSED_ON = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")
# Python's own `is_private` takes in much more, such as the addresses kept for examples.
PRIVATE = tuple(ip_network(net) for net in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7"))
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")

HERE_ONLY = (
    "Calls and their words are shown on this machine only, as long as there is no sign-in. "
    "Open http://localhost with the service's port on the machine itself, or through `ssh -L`."
)
NEAR_ONLY = "Metrics are for this machine and its private network only, and not through a proxy."


async def here_only(connection: HTTPConnection) -> None:
    """Let only this machine in, and nothing that a proxy or tunnel passes on.

    The Host must be local too: a page on the web could give its own name this machine's address and then read
    the answers (DNS rebinding). Raises HTTPException 403.
    """
    client = _client(connection)
    host = connection.url.hostname or ""
    local_name = host in LOCAL_NAMES or host.endswith(".localhost")
    if client is None or not client.is_loopback or not local_name or _passed_on(connection):
        raise HTTPException(403, HERE_ONLY)


async def near_only(connection: HTTPConnection) -> None:
    """Let in loopback and private addresses: a Prometheus beside us. Raises HTTPException 403."""
    client = _client(connection)
    near = client is not None and (client.is_loopback or any(client in net for net in PRIVATE))
    if not near or _passed_on(connection):
        raise HTTPException(403, NEAR_ONLY)


def _client(connection: HTTPConnection) -> IPv4Address | IPv6Address | None:
    try:
        address = ip_address(connection.client.host) if connection.client else None
    except ValueError:
        return None
    # A socket that listens on both kinds reports an IPv4 client as ::ffff:192.0.2.1.
    return (isinstance(address, IPv6Address) and address.ipv4_mapped) or address


def _passed_on(connection: HTTPConnection) -> bool:
    return any(name in connection.headers for name in PASSED_ON)
