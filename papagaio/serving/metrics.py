"""What the server counts, as text for Prometheus; and a line of log for each request."""

import asyncio
import sys
import time
from collections.abc import Callable, Collection

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters, gauges and histograms of one server."""

    def __init__(self, running: Callable[[], int], waiting: Callable[[], int]) -> None:
        """The functions give how many answers are computed, and how many wait for a place."""
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("papagaio_requests", "requests", ["path", "status"], registry=registry)
        self.prompt_tokens = Counter("papagaio_prompt_tokens", "tokens of prompts", registry=registry)
        self.cached_tokens = Counter("papagaio_cached_prompt_tokens", "those not read again", registry=registry)
        self.tokens = Counter("papagaio_generated_tokens", "tokens drawn", registry=registry)
        self.first = Histogram(
            "papagaio_time_to_first_token_seconds", "from request to token", buckets=SECONDS, registry=registry
        )
        self.whole = Histogram("papagaio_request_seconds", "from request to its end", buckets=SECONDS, registry=registry)
        Gauge("papagaio_answers_running", "answers that are computed", registry=registry).set_function(running)
        Gauge("papagaio_answers_waiting", "answers that wait for a place", registry=registry).set_function(waiting)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Recorder:
    """ASGI middleware that counts and logs requests, without query strings and texts. `scope["log"]` is what else to say."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Collection[str]) -> None:
        """`paths` are counted by themselves, all others as one."""
        self.app, self.metrics, self.paths = app, metrics, set(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, start = 499, time.perf_counter()  # 499: the client has gone

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        scope["log"] = ""
        try:
            await self.app(scope, receive, watch)
        except asyncio.CancelledError:  # by uvicorn, which would show a traceback
            scope["log"] += "; cut off at the end of --grace"
        finally:
            seconds, path = time.perf_counter() - start, scope["path"]
            path = path if path in self.paths else "/page" if path.startswith("/page/") else "other"
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.whole.observe(seconds)
            if path not in ("/health", "/metrics", "/page"):
                print(f"{scope['method']} {path} {status} {seconds:.3f} s {scope['log']}".rstrip(), file=sys.stderr, flush=True)
