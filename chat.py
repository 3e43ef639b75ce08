"""Talk to a fine-tuned model in the terminal, or ask it one question.

    python chat.py --checkpoint out/chat
    python chat.py --checkpoint out/chat --ask "What is the currency of Brazil?"
    python chat.py --checkpoint out/chat < questions.txt > answers.txt

With --ask, standard output carries the answer alone; without a terminal, each line is a question, each answer a line. In a
conversation /help lists the commands. A model that was not fine-tuned completes what is typed.
"""

import sys

from papagaio.errors import UserError, run
from papagaio.generation.options import SamplingOptions
from papagaio.options import option, parse


class ChatOptions(SamplingOptions):
    """Options of chat.py."""

    ask: str | None = option(None, "one question; the answer is printed and the script ends")
    system: str = option("", "what the model is told before the conversation")
    temperature: float = option(0.0, "divides the logits: 0 is greedy, 1 the model's own distribution", ge=0)


if __name__ == "__main__":  # a wrong option is refused before torch is imported, which takes a second or two
    OPTIONS = parse(ChatOptions, doc=__doc__)

import json
import time
from pathlib import Path

from model import GPT, GPTConfig
from papagaio import runtime
from papagaio.batches.conversations import Message, render_prompt
from papagaio.generation.engine import Request, complete, special_ids
from papagaio.generation.layers import can_compile, prepare
from papagaio.generation.streaming import TextStream
from papagaio.runs.checkpoint import open_checkpoint
from papagaio.terminal import dim
from papagaio.tokenizer import END_OF_TEXT, Tokenizer

HELP = """\
/reset             begin a new conversation, in which the model is told the same
/system [TEXT]     begin a new one in which the model is told TEXT first
/retry             answer the last question anew
/temperature [X]   show the temperature, or set it: 0 always takes the most probable token
/save FILE         append the conversation to FILE, a JSON line that finetune.py reads
/help              this list
Enter sends, Alt-Enter begins a new line, arrows find what was asked before.
Ctrl-C stops the answer, Ctrl-D leaves. Of a line that begins with //, one / is sent."""


def main(config: ChatOptions) -> None:
    checkpoint = open_checkpoint(config.checkpoint, config.base)
    device = runtime.pick_device(config.device)
    dtype = runtime.pick_dtype(config.dtype, device)
    model = checkpoint.build(lambda fields: GPT(GPTConfig(**fields)), device, dtype)
    prepare(model, config.quantize)
    compiled = config.compile and can_compile(device)
    tuned = checkpoint.state.get("stage") != "pretrain"
    chat = Chat(model, checkpoint.tokenizer, config, tuned, compiled)
    if not chat.tuned:
        print("this model was not fine-tuned (see finetune.py): it continues your text instead of answering", file=sys.stderr)
    with runtime.autocast(device, dtype):
        if config.ask is not None:
            chat.ask(config.ask)
        elif interactive():
            converse(chat)
        else:
            try:
                for line in sys.stdin:
                    if line.strip():
                        chat.respond(line.rstrip("\r\n"))
            except UnicodeDecodeError as error:
                raise UserError(f"standard input: not UTF-8 at byte {error.start}") from None


class Chat:
    """A conversation, and the model that it is held with."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, config: ChatOptions, tuned: bool, compiled: bool) -> None:
        self.model, self.tokenizer, self.config, self.tuned, self.compiled = model, tokenizer, config, tuned, compiled
        self.temperature = config.temperature
        self.reset(config.system)

    def reset(self, system: str) -> None:
        """Begin a new conversation, in which the model is told this first."""
        self.history = [Message(role="system", content=system)] if system else []
        self.oldest = len(self.history)  # where the turns that the model still sees begin
        self.noticed, self.retries = False, 0

    def ask(self, question: str) -> str:
        """Print the answer to a question, keep both, and tell how fast it came. Raises UserError where it is too long."""
        self.retries = 0
        try:
            self.history.append(Message(role="user", content=question))
        except ValueError:  # bytes that are not UTF-8 reach us as halves of surrogate pairs
            raise UserError("the question is not UTF-8 text") from None
        return self._answer()

    def retry(self) -> str:
        """Answer the last question anew, with the next seed."""
        if len(self.history) < 2:
            raise UserError("nothing was asked yet")
        self.retries += 1
        self.history.pop()
        return self._answer()

    def _answer(self) -> str:
        try:
            prompt = self._prompt()
        except UserError:
            self.history.pop()
            raise
        options = self.config.model_copy(update={"temperature": self.temperature})
        said, tokens, start = "", 0, time.perf_counter()
        forgets: list[bool] = []
        try:
            for step in complete(
                self.model,
                [Request(prompt, self.config.seed + self.retries)],
                options,
                block_size=self.model.config.block_size,
                device=next(self.model.parameters()).device,
                text=lambda: TextStream(self.tokenizer, self.config.stop),
                notice=lambda: forgets.append(True),
                compiled=self.compiled,
                **special_ids(self.tokenizer),
            ):
                print(step.text, end="", flush=True)
                said += step.text
                tokens += 1
        except KeyboardInterrupt:
            if not interactive():
                raise
        print(flush=True)
        if forgets:
            self._notice()
        self.history.append(Message(role="assistant", content=said))
        return f"{tokens} tokens, {tokens / (time.perf_counter() - start):,.0f} tokens/s"

    def _prompt(self) -> list[int]:
        """Ids of what the model is to go on from. Whole turns, the oldest first, are left out where the context is too short."""
        block_size = self.model.config.block_size
        if not self.tuned:
            ids = [self.tokenizer.special[END_OF_TEXT], *self.tokenizer.encode(self.history[-1].content)]
            if len(ids) > block_size:
                print(f"the text has {len(ids)} tokens; the model sees the last {block_size}", file=sys.stderr)
            return ids
        system = self.history[: bool(self.history) and self.history[0].role == "system"]
        room = min(self.config.max_new_tokens, block_size // 4)  # for the answer
        while len(prompt := render_prompt(self.tokenizer, [*system, *self.history[self.oldest :]])) + room > block_size:
            if self.oldest == len(self.history) - 1:
                if len(prompt) >= block_size:
                    message = f"the question has {len(prompt)} tokens, the model's context only {block_size}: ask a shorter one"
                    raise UserError(message)
                break
            self.oldest += 2
            self._notice()
        return prompt

    def _notice(self) -> None:
        if not self.noticed:
            print("(the oldest turns were forgotten: the context is full)", file=sys.stderr)
        self.noticed = True

    def save(self, path: Path) -> None:
        """Append the conversation to a file, as a line of JSON."""
        if not any(message.role == "assistant" for message in self.history):
            raise UserError("nothing was said yet")
        messages = [message.model_dump() for message in self.history]
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; name another file") from None

    def command(self, line: str) -> str:
        """Do what a line that begins with / asks for; returns what is to be told."""
        name, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        match name:
            case "/help":
                return HELP
            case "/reset":
                self.reset(self.history[0].content if self.oldest and self.history[0].role == "system" else "")
                return "a new conversation"
            case "/system":
                self.reset(rest)
                return (
                    f"a new conversation; the model is told: {rest}" if rest else "a new conversation; the model is told nothing"
                )
            case "/retry":
                hint = "; at temperature 0 the answer is always the same" if self.temperature == 0 else ""
                return self.retry() + hint
            case "/temperature":
                if rest:
                    try:
                        self.temperature = ChatOptions(checkpoint="", temperature=rest).temperature
                    except ValueError:
                        raise UserError(f"/temperature {rest}: a number that is 0 or more is needed") from None
                return f"temperature {self.temperature:g}"
            case "/save":
                if not rest:
                    raise UserError("/save FILE: a name is needed")
                self.save(Path(rest).expanduser())
                return f"saved to {rest}"
        raise UserError(f"{name}: no such command; /help lists them, // sends a line that begins with /")

    def respond(self, line: str) -> str:
        """Answer a question, or obey a command; returns what is to be told beside the answer."""
        if line.startswith("/") and not line.startswith("//"):
            return self.command(line)
        return self.ask(line[1:] if line.startswith("//") else line)


def interactive() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def converse(chat: Chat) -> None:
    """A conversation in the terminal: line editing, history, pasting of several lines."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    session: PromptSession[str] = PromptSession(key_bindings=keys)
    print(dim("/help lists the commands, Ctrl-D leaves", sys.stderr), file=sys.stderr)
    while True:
        try:
            line = session.prompt("> ", prompt_continuation="  ")
        except KeyboardInterrupt:  # the line is given up
            continue
        except EOFError:
            return
        if line.strip():
            try:
                told = chat.respond(line)
            except UserError as error:
                told = f"error: {error}"
            print(dim(told, sys.stderr), file=sys.stderr)


if __name__ == "__main__":
    run(main, OPTIONS)
