"""Answer over HTTP: a page to talk to the model in the browser, and the API of OpenAI, which many programs know.

    python serve.py --checkpoint out/chat
    PAPAGAIO_API_KEY=... python serve.py --checkpoint out/chat --host 0.0.0.0 --port 8000

The address is printed on standard output once the server listens. Only this machine can reach it, unless --host says
otherwise, which needs an API key. docs/serving.md has examples for clients, and for a reverse proxy with TLS.
"""

from papagaio.errors import run
from papagaio.options import parse
from papagaio.serving.options import ServeOptions

if __name__ == "__main__":  # a wrong option is refused before torch is imported, which takes a second or two
    OPTIONS = parse(ServeOptions, doc=__doc__)

import sys

from model import GPT, GPTConfig
from papagaio.errors import UserError
from papagaio.generation.engine import Engine
from papagaio.runs.checkpoint import model_maker


def main(config: ServeOptions) -> None:
    try:
        from papagaio.serving.server import listen, serve
    except ImportError as error:
        raise UserError(
            f"{error.name} is not installed: pip install 'papagaio[serve]', or pip install -r requirements.txt"
        ) from None
    found = listen(config.host, config.port)  # before the model is loaded, which takes longer
    engine = Engine.open(model_maker(GPT, GPTConfig), config)
    if not engine.is_chat:
        print("this model was not fine-tuned (see finetune.py): it continues texts, and the page is a notebook", file=sys.stderr)
    serve(engine, config, found)


if __name__ == "__main__":
    run(main, OPTIONS)
