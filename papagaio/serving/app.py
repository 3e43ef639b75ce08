"""The server: OpenAI's API, a few endpoints beside it, and the page."""

import asyncio
import base64
import contextlib
import json
import struct
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from papagaio.batches.conversations import render_prompt
from papagaio.errors import UserError
from papagaio.generation.drawing import codebooks_near
from papagaio.generation.engine import Engine
from papagaio.serving.answers import Form, Generation
from papagaio.serving.metrics import Metrics, Recorder
from papagaio.serving.options import ServeOptions
from papagaio.serving.scheduler import Event, QueueFull, Scheduler, Ticket, mean_hidden
from papagaio.serving.schema import (
    APIError,
    BodyT,
    ChatBody,
    CompletionBody,
    DecodeBody,
    DetokenizeBody,
    EmbeddingBody,
    FeedbackBody,
    TokenizeBody,
    as_list,
    read_body,
)
from papagaio.serving.security import Guard

PAGE = Path(__file__).parent / "page"
GONE = 499  # nobody reads this status but the log and the metrics
LONGEST_CHARACTER = 4  # bytes of UTF-8, and so the most tokens that it can have


class EventStream(StreamingResponse):
    """Server-sent events of a generation, which is closed when they end or their client goes."""

    def __init__(self, form: Form, at_the_end: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the second has nginx pass events on at once
        super().__init__(form.events(), media_type="text/event-stream", headers=headers)
        self.at_the_end = at_the_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.at_the_end()


class Service:
    """An engine, its scheduler, and the endpoints."""

    def __init__(self, engine: Engine, options: ServeOptions) -> None:
        self.engine, self.options, self.name, self.created = engine, options, options.name, int(time.time())
        self.scheduler = Scheduler(engine, self.deliver, options.max_batch_size, options.max_queue, options.cache_tokens)
        self.codebooks = codebooks_near(engine.checkpoint) if engine.checkpoint else []
        self.metrics = Metrics(lambda: self.scheduler.running, lambda: len(self.scheduler.waiting))

    def app(self) -> Starlette:
        """The ASGI application."""
        options = self.options
        routes = [
            Route("/", self.page, methods=["GET"]),
            Route("/health", self.health, methods=["GET"]),
            Route("/metrics", self.show_metrics, methods=["GET"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{name:path}", self.model, methods=["GET"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/v1/embeddings", self.embed, methods=["POST"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/decode", self.decode, methods=["POST"]),
            Route("/feedback", self.take_feedback, methods=["POST"]),
        ]
        cors = Middleware(
            CORSMiddleware,
            allow_origins=options.allow_origin,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )
        return Starlette(
            routes=[*routes, Mount("/page", StaticFiles(directory=PAGE))],
            middleware=[
                Middleware(Recorder, metrics=self.metrics, paths=[route.path for route in routes]),
                *([cors] if options.allow_origin else []),
                Middleware(Guard, key=options.key, hosts=[options.host, *options.allow_host], origins=options.allow_origin),
            ],
            exception_handlers={
                **dict.fromkeys((APIError, UserError, HTTPException), show_error),
                Exception: show_bug,
                ClientDisconnect: lambda request, error: Response(status_code=GONE),
            },
            lifespan=self.lifespan,
        )

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.loop = asyncio.get_running_loop()
        self.scheduler.start()
        yield
        await asyncio.to_thread(self.scheduler.close)

    def deliver(self, events: list[Event]) -> None:
        def hand_over() -> None:
            for generation, event in events:
                generation.queue.put_nowait(event)

        self.loop.call_soon_threadsafe(hand_over)

    # Endpoints

    async def page(self, request: Request) -> Response:
        return FileResponse(PAGE / "index.html", headers={"Cache-Control": "no-cache"})

    async def health(self, request: Request) -> Response:
        if not self.scheduler.thread.is_alive():
            raise APIError(503, "the scheduler has ended")
        return JSONResponse({"status": "ok"})

    async def show_metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    @property
    def card(self) -> dict[str, Any]:
        """The model, in OpenAI's form, and what the page has to know of it."""
        more = {
            "context_length": self.engine.block_size,
            "chat": self.engine.is_chat,
            "feedback": self.options.feedback is not None,
            "codes": bool(self.codebooks),
        }
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "papagaio", **more}

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self.card]})

    async def model(self, request: Request) -> Response:
        self.check_model(request.path_params["name"])
        return JSONResponse(self.card)

    async def chat(self, request: Request) -> Response:
        body = await self.read(request, ChatBody)
        if not self.engine.is_chat:
            raise APIError(400, "this model was not fine-tuned for conversations; /v1/completions continues a text", "model")
        prompt = await self.work(render_prompt, self.engine.tokenizer, body.conversation)
        return await self.answer(request, body, [prompt], "messages")

    async def complete(self, request: Request) -> Response:
        body = await self.read(request, CompletionBody)
        return await self.answer(request, body, await self.encoded(body.prompt, "prompt"), "prompt")

    async def embed(self, request: Request) -> Response:
        """The mean of the last hidden states of each text."""
        body = await self.read(request, EmbeddingBody)
        texts = await self.encoded(body.input, "input")
        for ids in texts:
            if len(ids) > self.engine.block_size:
                raise self.too_long(len(ids), "input")
        found = []
        for i, ids in enumerate(texts):
            vector = await asyncio.wrap_future(self.scheduler.call(partial(mean_hidden, self.engine, ids)))
            packed = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
            found.append({"object": "embedding", "index": i, "embedding": packed if body.encoding_format == "base64" else vector})
        tokens = sum(map(len, texts))
        self.metrics.prompt_tokens.inc(tokens)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        kind = "mean of the last hidden states"
        return JSONResponse({"object": "list", "data": found, "model": body.model, "pooling": kind, "usage": usage})

    async def tokenize(self, request: Request) -> Response:
        body = await self.read(request, TokenizeBody)
        ids = await self.work(self.engine.tokenizer.encode, body.prompt)
        return JSONResponse({"count": len(ids), "max_model_len": self.engine.block_size, "tokens": ids})

    async def detokenize(self, request: Request) -> Response:
        body = await self.read(request, DetokenizeBody)
        self.check_ids(body.tokens, "tokens")
        return JSONResponse({"prompt": self.engine.tokenizer.decode(body.tokens)})

    async def decode(self, request: Request) -> Response:
        """The file of the first picture or sound in a text; the header X-Remark says what is wrong with its codes."""
        text = (await self.read(request, DecodeBody)).text
        book = next((book for book in self.codebooks if book.opening in text), None)
        if book is None:
            raise APIError(404, "no picture or sound of a codebook beside this model", "text")
        count = len(await self.work(book.found, text))
        return Response(await self.work(book.file, text), headers={"X-Remark": book.remark(count)}, media_type=book.media_type)

    async def take_feedback(self, request: Request) -> Response:
        """Append a rated answer to --feedback, a preference to the file beside it: rows of one kind need a file of their own."""
        body = await self.read(request, FeedbackBody)
        path = self.options.feedback
        if path is None:
            raise APIError(404, "this server keeps no feedback; see --feedback")
        if body.good is None:
            path = path.with_suffix(".preferences.jsonl")
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(body.row, ensure_ascii=False) + "\n")
        except OSError as error:
            print(f"error: {path}: {error.strerror}", file=sys.stderr)
            raise APIError(500, "the feedback could not be written; the server's log says why") from None
        return JSONResponse({"status": "ok"})

    # What they share

    async def read(self, request: Request, kind: type[BodyT]) -> BodyT:
        """The body of a request, for this model. Raises APIError for what is wrong with it."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise APIError(415, "the Content-Type must be application/json")
        content = bytearray()
        try:
            async with asyncio.timeout(self.options.request_timeout):
                async for part in request.stream():
                    content += part
                    if len(content) > self.options.max_body:
                        raise APIError(413, f"the body has more than {self.options.max_body:,} bytes (--max_body)")
        except TimeoutError:
            raise APIError(408, "the body did not come in time") from None
        body = read_body(kind, bytes(content))
        self.check_model(body.model)
        return body

    def check_model(self, name: str) -> None:
        if name != self.name:
            message = f"the model {name[:80]!r} does not exist; this server has {self.name!r}"
            raise APIError(404, message, "model", "model_not_found")

    def check_ids(self, ids: Sequence[int], param: str, ordinary: bool = False) -> None:
        tokenizer = self.engine.tokenizer
        special = set(tokenizer.special.values()) if ordinary else set()
        if wrong := next((str(token) for token in ids if token >= tokenizer.vocab_size or token in special), None):
            kind = "a special token" if int(wrong) < tokenizer.vocab_size else f"not below {tokenizer.vocab_size}"
            raise APIError(400, f"{param}: the token {wrong} is {kind}", param)

    def too_long(self, tokens: int, param: str) -> APIError:
        context = self.engine.block_size
        message = f"the prompt has {tokens:,} tokens; this model's context is {context:,} tokens, and the answer needs room too"
        return APIError(400, message, param, "context_length_exceeded")

    async def work(self, function: Any, *arguments: Any) -> Any:
        """Call what may take long for a long text, beside the event loop. Raises APIError for texts that cannot be encoded."""
        try:
            return await asyncio.to_thread(function, *arguments)
        except UserError as error:
            raise APIError(400, str(error)) from None

    async def encoded(self, texts: Any, param: str) -> list[list[int]]:
        """Texts as the beginnings of documents; lists of ids as they are."""
        found = []
        for text in as_list(texts):
            if not isinstance(text, str):
                self.check_ids(text, param)
            found.append(await self.work(self.engine.encode, text) if isinstance(text, str) else text)
        return found

    async def answer(self, request: Request, body: ChatBody | CompletionBody, prompts: list[list[int]], param: str) -> Response:
        """Answer prompts, whole or as a stream."""
        context, options, first = self.engine.block_size, body.options(self.options.temperature), body.continue_ids or []
        self.check_ids(first, "continue_ids", ordinary=True)
        prompts = [[*prompt, *first] for prompt in prompts]
        places = self.options.max_batch_size + self.options.max_queue
        if len(prompts) * body.n > places:
            raise APIError(400, f"n: {len(prompts) * body.n} answers; this server takes {places} at a time", "n")
        tickets: list[Ticket] = []
        for prompt in prompts:
            if len(prompt) >= context:
                raise self.too_long(len(prompt), param)
            for i in range(body.n):
                limit = min(body.limit or context, context - len(prompt))
                try:
                    ticket = Ticket(self.engine, len(tickets), prompt, body.first_seed + i, limit, options, body.top, None)
                except UserError as error:
                    raise APIError(400, f"logit_bias: {error}", "logit_bias") from None
                # The last character of what is given as ids may end in the first token that is drawn.
                ticket.text.decoder.decode(self.engine.tokenizer.decode_bytes(prompt[-LONGEST_CHARACTER:]))
                tickets.append(ticket)
        generation = Generation(body, tickets, self.metrics, self.options.request_timeout)
        form = Form(generation, self.engine.tokenizer)
        try:
            self.scheduler.submit(tickets)
        except QueueFull:
            waiting = f"{self.options.max_queue} answers wait already (--max_queue); try again later"
            raise APIError(429, waiting, code="queue_full") from None

        def at_the_end() -> None:
            request.scope["log"] = generation.close()
            for ticket, text in zip(tickets, generation.texts, strict=True) if self.options.log_texts else ():
                prompt = self.engine.tokenizer.decode(ticket.ids[: ticket.prompt_length])
                print(json.dumps({"prompt": prompt, "answer": text}, ensure_ascii=False), file=sys.stderr, flush=True)

        if body.stream:
            return EventStream(form, at_the_end)
        try:
            return JSONResponse(await unless_gone(request, form.whole()))
        finally:
            at_the_end()


async def unless_gone(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
    """The result of some work, which is cancelled when the client goes."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


async def show_error(request: Request, error: Exception) -> Response:
    """An error as OpenAI's API shows it."""
    if isinstance(error, HTTPException):
        what = {404: "no such address", 405: f"{request.method} is not a method of this address"}
        error = APIError(error.status_code, what.get(error.status_code, str(error.detail)))
    elif not isinstance(error, APIError):
        error = APIError(400, str(error))
    return JSONResponse(error.content, error.status, {"Retry-After": "1"} if error.status == 429 else None)


async def show_bug(request: Request, error: Exception) -> Response:
    return JSONResponse(APIError(500, "an error of the server; its log says which").content, 500)
