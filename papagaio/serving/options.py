"""Options of serve.py."""

import ipaddress
import os
import re
from functools import partial
from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from papagaio.generation.options import HIGHEST_TEMPERATURE, ModelOptions, model_option
from papagaio.options import option

KEY_VARIABLE = "PAPAGAIO_API_KEY"
server_option, limit_option = partial(option, group="Server"), partial(option, group="Limits")


class ServeOptions(ModelOptions):
    """Options of serve.py."""

    host: str = server_option("127.0.0.1", "address to listen on; any but this machine's own (localhost) needs an api_key")
    port: int = server_option(8000, "port to listen on; 0: any that is free", ge=0, le=65535)
    api_key: str | None = server_option(None, f"key that requests must carry; better in the environment, as {KEY_VARIABLE}")
    no_auth: bool = server_option(False, "let everyone who reaches this address use the model, without a key")
    allow_host: tuple[str, ...] = server_option((), "more names of this server, as in its address, without a port")
    allow_origin: tuple[str, ...] = server_option((), "other sites whose pages may use the API, as in https://example.org")
    model_name: str | None = server_option(None, "name of the model in the API (default: that of the run's directory)")
    feedback: Path | None = server_option(None, "append the page's ratings to this .jsonl file, for finetune.py")
    log_texts: bool = server_option(False, "log prompts and answers too")
    max_batch_size: int = limit_option(16, "answers that are computed at the same time", ge=1, le=1024)
    max_queue: int = limit_option(64, "answers that wait for a place; more are refused (429)", ge=0)
    request_timeout: float = limit_option(600.0, "longest time for a request, in seconds", gt=0)
    grace: float = limit_option(30.0, "seconds for the answers in progress when the server is told to end", ge=0)
    max_body: int = limit_option(2**22, "largest body of a request, in bytes", ge=1024)
    cache_tokens: int = limit_option(16384, "tokens of earlier requests that need not be read again (0: off)", ge=0)
    temperature: float = limit_option(1.0, "of requests that name none", ge=0, le=HIGHEST_TEMPERATURE)
    dtype: Literal["auto", "float32", "bfloat16"] = model_option(
        "float32",
        "float32: an answer at temperature 0 does not depend on other requests; bfloat16: large models are faster, and nearly "
        "equal tokens may change places; auto: bfloat16 if in hardware",
    )

    @property
    def key(self) -> str | None:
        """The API key, from the options or the environment."""
        if self.no_auth:
            return None
        return self.api_key if self.api_key is not None else os.environ.get(KEY_VARIABLE) or None

    @property
    def name(self) -> str:
        """The model's name in the API."""
        if self.model_name:
            return self.model_name
        path = self.checkpoint.absolute()
        return path.parent.parent.name if path.parent.name == "checkpoints" else path.name

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.api_key is not None and not re.fullmatch(r"[!-~]+", self.api_key):
            raise ValueError("api_key: must consist of visible ASCII characters, without blanks, and not be empty")
        if not re.fullmatch(r"[!-~]*", os.environ.get(KEY_VARIABLE, "")):
            raise ValueError(f"{KEY_VARIABLE} in the environment must consist of visible ASCII characters, without blanks")
        if self.no_auth and self.api_key is not None:
            raise ValueError("no_auth and api_key exclude each other")
        if not is_local(self.host) and not self.key and not self.no_auth:
            cure = f"set {KEY_VARIABLE} or api_key, or say no_auth"
            raise ValueError(f"host {self.host}: other machines reach this address; {cure}")
        if self.compile:
            raise ValueError("compile: the number of answers that are computed together changes; it is for sample.py and chat.py")
        for origin in self.allow_origin:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                raise ValueError(f"allow_origin {origin}: must be written as in https://example.org, without a path")
        for host in self.allow_host:
            if not re.fullmatch(r"[\w.-]+", host):
                raise ValueError(f"allow_host {host}: must be a name as in chat.example.org, without https:// and port")
        if self.feedback and (self.feedback.suffix != ".jsonl" or self.feedback.is_dir() or not self.feedback.parent.is_dir()):
            raise ValueError(f"feedback {self.feedback}: must be a .jsonl file in a directory that exists")
        return self


def is_local(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
