"""Who may use the server: hosts, origins, keys; and the headers that keep the page to itself.

A page of another site can make the browser of someone on this machine send requests here. It is refused by what browsers add to
them: Origin and Sec-Fetch-Site. With DNS rebinding it can even make them look like its own; then the Host header has its name.
"""

import hmac
import ipaddress
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from papagaio.serving.schema import APIError

LONGEST_HEADERS = 2**15  # bytes
PUBLIC = ("/", "/health")  # and /page/...: what needs no key
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; media-src blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class Guard:
    """ASGI middleware that lets through what may use the server, and adds HEADERS to every answer."""

    def __init__(self, app: ASGIApp, key: str | None, hosts: Iterable[str], origins: Iterable[str]) -> None:
        """`hosts`: names of this server besides localhost and addresses in digits; `origins`: sites that may use the API."""
        self.app, self.key = app, key.encode() if key else None
        self.hosts, self.origins = {"localhost", *(host.lower() for host in hosts)}, {origin.lower() for origin in origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        try:
            self.check(scope["method"], scope["path"], Headers(scope=scope))
        except APIError as error:
            challenge = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
            await JSONResponse(error.content, error.status, challenge)(scope, receive, send_with_headers)
        else:
            await self.app(scope, receive, send_with_headers)

    def check(self, method: str, path: str, headers: Headers) -> None:
        """Raises APIError if a request must not be answered."""
        if sum(len(name) + len(value) for name, value in headers.raw) > LONGEST_HEADERS:
            raise APIError(431, f"the headers have more than {LONGEST_HEADERS:,} bytes")
        hosts = headers.getlist("host")
        if len(hosts) != 1:
            raise APIError(400, "one Host header is needed")
        if not self._is_own(hosts[0]):
            raise APIError(403, "this server is not known by the name in the Host header; see --allow_host", code="host")
        origin, site = headers.get("origin", "").lower(), headers.get("sec-fetch-site", "none").lower()
        allowed = origin != "" and (origin in self.origins or "*" in self.origins)
        if origin and not allowed and origin.partition("://")[2] != hosts[0].lower():
            raise APIError(403, "a page of another site must not use this server; see --allow_origin", code="origin")
        visit = method == "GET" and path == "/" and headers.get("sec-fetch-mode") == "navigate"  # a link leads to the page
        if site not in ("same-origin", "none") and not allowed and not visit:
            raise APIError(403, "a page of another site must not use this server; see --allow_origin", code="origin")
        if self.key is not None and path not in PUBLIC and not path.startswith("/page/"):
            kind, _, given = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), self.key):
                raise APIError(401, "the API key is missing or wrong: Authorization: Bearer KEY", code="invalid_api_key")

    def _is_own(self, host: str) -> bool:
        name, port = host.lower(), ""
        if not name.endswith("]") and ":" in name:
            name, _, port = name.rpartition(":")
        if port and not (port.isascii() and port.isdigit()):
            return False
        try:
            ipaddress.ip_address(name[1:-1] if name.startswith("[") and name.endswith("]") else name)
        except ValueError:
            return name in self.hosts
        return True  # a rebound name is never an address
