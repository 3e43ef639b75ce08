"""Talk to a fine-tuned model in the terminal, or ask it one question.

    python chat.py --checkpoint out/chat
    python chat.py --checkpoint out/chat --ask "What is the currency of Brazil?"
    python chat.py --checkpoint out/chat < questions.txt > answers.txt

With --ask, standard output carries only the answer. If the input is not a terminal, each line is a question and each answer a
line. In a conversation /help lists the commands. A model that was not fine-tuned continues the text instead of answering.
"""

import sys

from papagaio.errors import UserError, run
from papagaio.generation.options import ModelOptions, SamplingOptions, sampling_option
from papagaio.options import option, parse


class ChatOptions(SamplingOptions, ModelOptions):
    """Options of chat.py."""

    ask: str | None = option(None, "one question; the answer is printed and the script ends", group="Questions")
    system: str = option("", "message to the model before the conversation", group="Questions")
    temperature: float = sampling_option(0.0, "divides the logits; 0: always the most probable token, 1: as trained", ge=0)


if __name__ == "__main__":  # a wrong option is refused before torch is imported, which takes a second or two
    OPTIONS = parse(ChatOptions, doc=__doc__)

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from model import GPT, GPTConfig
from papagaio.generation.chat import Chat, Notice, Reply, Text
from papagaio.generation.engine import Engine
from papagaio.runs.checkpoint import model_maker
from papagaio.terminal import dim

HELP = """\
/reset             begin a new conversation, with the same system message
/system [TEXT]     begin a new conversation with TEXT as its system message, or without one
/retry             answer the last question again
/temperature [X]   show the temperature, or set it; 0: always the most probable token
/save FILE         append the conversation to FILE, as a JSON line that finetune.py reads
/help              show this list
Enter sends, Alt-Enter begins a new line, the arrow keys find earlier questions.
Ctrl-C stops the answer, Ctrl-D leaves. A line that begins with // is sent with one / less."""


def main(config: ChatOptions) -> None:
    engine = Engine.open(model_maker(GPT, GPTConfig), config)
    chat = Chat(engine, config, config.system)
    if not engine.is_chat:
        print("this model was not fine-tuned (see finetune.py): it continues your text instead of answering", file=sys.stderr)
    if config.ask is not None:
        show(chat, chat.ask(config.ask))
    elif interactive():
        converse(chat)
    else:
        try:
            for line in sys.stdin:
                if line.strip():
                    respond(chat, line.rstrip("\r\n"))
        except UnicodeDecodeError as error:
            raise UserError(f"standard input: not UTF-8 at byte {error.start}") from None


def show(chat: Chat, events: Iterator[Text | Notice | Reply]) -> str:
    """Print an answer while it grows; returns its speed. In a terminal Ctrl-C ends the answer."""
    notices = []
    try:
        with contextlib.closing(events):
            for event in events:
                if isinstance(event, Text):
                    print(event.text, end="", flush=True)
                elif isinstance(event, Notice):
                    notices.append(event.text)
    except KeyboardInterrupt:
        if not interactive():
            raise
    print(flush=True)
    for notice in notices:
        print(f"({notice})", file=sys.stderr)
    return f"{chat.reply.tokens} tokens, {chat.reply.tokens / max(chat.reply.seconds, 1e-9):,.0f} tokens/s"


def respond(chat: Chat, line: str) -> str:
    """Answer a question or execute a command; returns what to tell the user besides the answer."""
    if not line.startswith("/") or line.startswith("//"):
        return show(chat, chat.ask(line.removeprefix("/")))
    name, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    match name:
        case "/help":
            return HELP
        case "/reset":
            chat.reset(chat.system)
            return "a new conversation"
        case "/system":
            chat.reset(rest)
            return f"a new conversation; system message: {rest or 'none'}"
        case "/retry":
            hint = "; at temperature 0 the answer is always the same" if chat.sampling.temperature == 0 else ""
            return show(chat, chat.retry()) + hint
        case "/temperature":
            if rest:
                try:
                    temperature = SamplingOptions(temperature=rest).temperature
                except ValueError:
                    raise UserError(f"/temperature {rest}: a number that is 0 or more is needed") from None
                chat.sampling = chat.sampling.model_copy(update={"temperature": temperature})
            return f"temperature {chat.sampling.temperature:g}"
        case "/save":
            save(chat, rest)
            return f"saved to {rest}"
    raise UserError(f"{name}: no such command; /help lists them, // sends a line that begins with /")


def save(chat: Chat, name: str) -> None:
    """Append the conversation to a file, as a line of JSON."""
    if not name:
        raise UserError("/save FILE: a name is needed")
    if not chat.turns:
        raise UserError("nothing to save: the conversation is empty")
    messages = [message.model_dump() for message in chat.messages()]
    try:
        with Path(name).expanduser().open("a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}; name another file") from None


def interactive() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def converse(chat: Chat) -> None:
    """A conversation in the terminal, with line editing, history, and pasting of several lines."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    session: PromptSession[str] = PromptSession(key_bindings=keys)
    print(dim("/help lists the commands, Ctrl-D leaves", sys.stderr), file=sys.stderr)
    while True:
        try:
            line = session.prompt("> ", prompt_continuation="  ")
        except KeyboardInterrupt:  # clears the line
            continue
        except EOFError:
            return
        if line.strip():
            try:
                message = respond(chat, line)
            except UserError as error:
                message = f"error: {error}"
            print(dim(message, sys.stderr), file=sys.stderr)


if __name__ == "__main__":
    run(main, OPTIONS)
