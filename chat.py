"""Talk to a fine-tuned model in the terminal, ask it one question, or a file of independent questions.

    python chat.py --checkpoint out/chat
    python chat.py --checkpoint out/chat --ask "What is the currency of Brazil?"
    python chat.py --checkpoint out/chat --ask "Who is the author?" < passage.txt
    python chat.py --checkpoint out/chat --questions questions.txt > answers.jsonl
    python chat.py --checkpoint out/chat --questions qa.jsonl --out answers.jsonl

With --ask, standard output carries only the answer. A file or pipe on standard input is a passage that goes before the question.

With --questions, each line of a text file, or each row of a .jsonl, .json, .csv or .parquet file, is answered by itself, and
standard output carries one JSON object per question, in the order of the file; "-" reads standard input. With --out the same
command continues where it stopped. The exit status is 2 if a question could not be answered.

Without either, this is a conversation. If standard input is not a terminal, its lines are the user's turns: each is answered with
the earlier ones in view, and each answer is a line. /help lists the commands of a conversation. A model that was not fine-tuned
continues the text instead of answering.
"""

import os
import select
import stat
import sys
from pathlib import Path
from typing import Self

from pydantic import model_validator

from papagaio.errors import UserError, run
from papagaio.generation.options import ModelOptions, SamplingOptions, temperature_option
from papagaio.options import option, parse


class ChatOptions(SamplingOptions, ModelOptions):
    """Options of chat.py."""

    ask: str | None = option(None, "one question; the answer is printed and the script ends", group="Questions")
    questions: Path | None = option(
        None, "file of independent questions, a line or row each; -: standard input", group="Questions"
    )
    out: Path | None = option(None, "append the answers to --questions to this file; those in it are kept", group="Questions")
    encoding: str = option("utf-8", "of the file of --questions; auto: found out from its bytes", group="Questions")
    batch_size: int = option(16, "questions of --questions that are answered at the same time", group="Questions", ge=1)
    system: str = option("", "message to the model before the conversation", group="Questions")
    history: bool = option(True, "keep the questions of a conversation in the terminal for later ones", group="Questions")
    temperature: float = temperature_option(0.0)

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.ask is not None and self.questions:
            raise ValueError("ask and questions exclude each other")
        if self.questions and str(self.questions) != "-" and not self.questions.is_file():
            raise ValueError(f"{self.questions}: no such file; it must contain questions")
        if self.out and not self.questions:
            raise ValueError("out is for the answers to --questions")
        if self.out and (self.out.is_dir() or not self.out.parent.is_dir()):
            raise ValueError(f"{self.out}: a directory, or in a directory that does not exist; a file is needed")
        return self


if __name__ == "__main__":  # a wrong option is refused before torch is imported, which takes a second or two
    OPTIONS = parse(ChatOptions, doc=__doc__)

import contextlib
import io
import json
from collections.abc import Iterator
from typing import Any

from model import GPT, GPTConfig
from papagaio.batches.questions import Reader
from papagaio.generation.asking import NOT_ANSWERED, Question, answer_all, open_answers, read_questions
from papagaio.generation.chat import Chat, Notice, Reply, Text
from papagaio.generation.drawing import Drawing
from papagaio.generation.engine import Engine
from papagaio.report import Report
from papagaio.runs.checkpoint import model_maker
from papagaio.terminal import colours, dim, print_json, without_echo

HELP = """\
/reset             begin a new conversation, with the same system message
/system [TEXT]     begin a new conversation with TEXT as its system message, or without one
/retry             answer the last question again
/temperature [X]   show the temperature, or set it; 0: always the most probable token
/save FILE         append the conversation to FILE, as a JSON line that finetune.py reads
/load FILE         go on with the last conversation in FILE
/help              show this list
Enter sends, Alt-Enter begins a new line, the arrow keys find earlier questions.
Ctrl-C stops the answer, Ctrl-D leaves. A line that begins with // is sent with one / less."""


COMMANDS = ("/reset", "/system", "/retry", "/temperature", "/save", "/load", "/help")
PIPE_SECONDS = 5  # how long --ask waits for the first byte of a pipe on standard input


def main(config: ChatOptions) -> None:
    questions = read_questions(config.questions, config.system, config.encoding) if config.questions else []
    passage = read_passage() if config.ask is not None else ""
    for hint in config.hints():
        print(hint, file=sys.stderr)
    engine = Engine.open(model_maker(GPT, GPTConfig), config)
    chat = Chat(engine, config, config.system)
    if not engine.is_chat:
        print("this model was not fine-tuned (see finetune.py): it continues your text instead of answering", file=sys.stderr)
    if questions:
        answer_questions(engine, questions, config)
    elif config.ask is not None:
        show(chat, chat.ask(f"{passage}\n\n{config.ask}" if passage else config.ask))
    elif interactive():
        converse(chat, config.history)
    else:
        answer_lines(chat)


def read_passage() -> str:
    """The text of standard input, if that is a file that nobody has read from yet, or a pipe; else nothing.

    A pipe may be inherited and never end (cron, a build server): one that stays silent for five seconds is not read.
    """
    try:
        number = sys.stdin.fileno()
        mode = os.fstat(number).st_mode
    except (AttributeError, OSError):  # closed
        return ""
    if stat.S_ISREG(mode):
        if os.lseek(number, 0, os.SEEK_CUR) > 0:  # a loop (`while read`) reads the file as well
            return ""
    elif not stat.S_ISFIFO(mode):
        return ""
    elif not select.select([number], [], [], PIPE_SECONDS)[0]:
        print(f"standard input is a pipe without data for {PIPE_SECONDS} seconds: asking without a passage", file=sys.stderr)
        return ""
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input: not UTF-8 at byte {error.start}; with < /dev/null there is no passage") from None
    if text:
        print(f"the text on standard input ({len(text):,} characters) goes before the question", file=sys.stderr)
    return text


def answer_questions(engine: Engine, questions: list[Question], config: ChatOptions) -> None:
    """Answer independent questions on standard output or in --out. Raises UserError at the end if some were not answered."""
    report = Report()
    if config.out is None:
        answer_all(engine, questions, config, config.batch_size, print_json, report)
    else:
        with open_answers(config.out, questions, report) as (write, left):
            if len(left) < len(questions):
                print(f"{config.out}: {len(questions) - len(left):,} of {len(questions):,} are there already", file=sys.stderr)
            answer_all(engine, left, config, config.batch_size, write, report)
    for line in report.lines():
        print(line, file=sys.stderr)
    if failed := report.counts.get(NOT_ANSWERED, 0):
        raise UserError(f'{failed:,} of {len(questions):,} questions were not answered; their lines say why, under "error"')


def answer_lines(chat: Chat) -> None:
    """Take the lines of standard input as the turns of a conversation. Raises UserError at the end if a line failed."""
    if sys.stdin is None:
        raise UserError("standard input is closed: give a question with --ask, or a file of them with --questions")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # whatever the console shows
    failed = asked = 0
    for number, line in enumerate(sys.stdin, 1):
        if not line.strip():
            continue
        asked += 1
        if asked == 2:
            print("each line is answered with the earlier ones in view; --questions - answers them one by one", file=sys.stderr)
        try:
            respond(chat, line.rstrip("\r\n"))
        except UserError as error:
            failed += 1
            print(f"standard input:{number}: {error}", file=sys.stderr)
            if line.split()[0] not in COMMANDS:
                print(flush=True)  # an empty answer, so that answers and questions have the same order
    if failed:
        raise UserError(f"{failed:,} of {asked:,} lines of standard input failed")


def show(chat: Chat, events: Iterator[Text | Notice | Reply]) -> str:
    """Print an answer while it grows; returns its speed. In a terminal Ctrl-C ends the answer."""
    notices = []
    drawing = Drawing(chat.engine.checkpoint if sys.stdout.isatty() else None, colours(sys.stdout))
    silent = without_echo(sys.stdin) if interactive() else contextlib.nullcontext()
    try:
        with silent, contextlib.closing(events):
            for event in events:
                if isinstance(event, Text):
                    print(drawing.push(event.text), end="", flush=True)
                elif isinstance(event, Notice):
                    notices.append(event.text)
    except KeyboardInterrupt:
        if not interactive():
            raise
    print(drawing.close(), flush=True)
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
            hint = "; at temperature 0 the answer is always the same" if chat.sampling.greedy else ""
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
        case "/load":
            return load(chat, rest)
    raise UserError(f"{name}: no such command; /help lists them, // sends a line that begins with /")


def save(chat: Chat, name: str) -> None:
    """Append the conversation to a file, as a line of JSON."""
    if not name:
        raise UserError("/save FILE: a name is needed")
    if not chat.turns:
        raise UserError("nothing to save: the conversation is empty")
    messages = [message.model_dump(include={"role", "content"}) for message in chat.messages()]
    try:
        with Path(name).expanduser().open("a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}; name another file") from None


def load(chat: Chat, name: str) -> str:
    """Go on with the last conversation of a file; returns what it is."""
    if not name:
        raise UserError("/load FILE: a name is needed")
    reader = Reader()
    rows = reader.conversations(Path(name).expanduser())
    for line in reader.check().lines():
        print(line, file=sys.stderr)
    messages = rows[-1].messages
    begin = int(messages[0].role == "system")
    chat.reset(messages[0].content if begin else "")
    chat.turns += messages[begin:]
    count = f"{len(chat.turns) // 2} question{'s' * (len(chat.turns) > 2)}"
    return f"a conversation of {count}, the last of them: {chat.turns[-2].content}"


def open_history() -> Any:
    """The questions of earlier sessions, which only their author can read; none if they cannot be kept."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    path = home / "papagaio" / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
    except OSError as error:
        print(f"{path}: {error.strerror}; earlier questions are kept only in this session", file=sys.stderr)
        return InMemoryHistory()
    return FileHistory(str(path))


def interactive() -> bool:
    return sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()


def converse(chat: Chat, keep_history: bool) -> None:
    """A conversation in the terminal, with line editing, history, and pasting of several lines."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    session: PromptSession[str] = PromptSession(key_bindings=keys, history=open_history() if keep_history else None)
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
