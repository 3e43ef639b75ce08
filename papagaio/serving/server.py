"""uvicorn, told what it needs: it prints its address once it listens, and finishes what is being answered when it ends."""

import os
import socket
import sys

import uvicorn

from papagaio.errors import UserError
from papagaio.generation.engine import Engine
from papagaio.serving.app import Service
from papagaio.serving.options import ServeOptions
from papagaio.serving.security import LONGEST_HEADERS


class Server(uvicorn.Server):
    """A server that prints `http://HOST:PORT` on standard output once it listens."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            host, port = sockets[0].getsockname()[:2]
            print(f"http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)


def listen(host: str, port: int) -> socket.socket:
    """A socket for connections to an address. Raises UserError if it is not free."""
    try:
        # With the protocol named, asyncio switches off Nagle's algorithm, which holds tokens back for 40 ms.
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(2048)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise UserError(f"--host={host} --port={port}: {reason}; another address or port is needed") from None
    return found


def serve(engine: Engine, options: ServeOptions, found: socket.socket) -> None:
    """Answer until the process is told to end; then finish what is being answered, for options.grace seconds."""
    config = uvicorn.Config(
        Service(engine, options).app(),
        http="h11",
        ws="none",
        lifespan="on",
        access_log=False,
        log_level="error",
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=LONGEST_HEADERS,
        timeout_graceful_shutdown=options.grace,
    )
    if options.feedback:
        print(f"ratings are appended to {options.feedback}", file=sys.stderr)
    Server(config).run(sockets=[found])
