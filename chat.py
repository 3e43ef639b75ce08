"""Talk to a fine-tuned model in the terminal, or ask it one question.

    python chat.py --checkpoint out/chat
    python chat.py --checkpoint out/chat --ask "What is the currency of Brazil?"

With --ask, standard output carries the answer alone. In a conversation, an empty line is skipped, Ctrl-D leaves. A base model
has no notion of a conversation: it continues each text by itself.
"""

import sys

from papagaio.config import SamplingOptions, UserError, option, parse, run


class ChatOptions(SamplingOptions):
    """Options of chat.py."""

    ask: str | None = option(None, "one question; the answer is printed and the script ends")
    system: str = option("", "what the model is told before the conversation")
    temperature: float = option(0.0, "divides the logits: 0 is greedy, 1 the model's own distribution", ge=0)


if __name__ == "__main__":  # a wrong option is refused before torch is imported, which takes a second or two
    OPTIONS = parse(ChatOptions, doc=__doc__)

import contextlib
from collections.abc import Iterator

from model import GPT, GPTConfig
from papagaio import runtime
from papagaio.checkpoint import open_checkpoint
from papagaio.dialogue import Message, render_prompt
from papagaio.generate import generate, stream_text
from papagaio.tokenizer import END, END_OF_TEXT, Tokenizer


def main(config: ChatOptions) -> None:
    checkpoint = open_checkpoint(config.checkpoint, config.base)
    device = runtime.pick_device(config.device)
    model = GPT(GPTConfig(**checkpoint.model_fields)).to(device).eval()
    checkpoint.load_model(model)
    base = checkpoint.state.get("stage") == "pretrain"
    if base:
        print("this model was not fine-tuned (see finetune.py): it continues your text instead of answering", file=sys.stderr)
    history = [Message(role="system", content=config.system)] if config.system else []
    if config.ask is not None:
        history.append(Message(role="user", content=config.ask))
        say(answer(model, checkpoint.tokenizer, history, config, base))
        return
    with contextlib.suppress(ImportError):  # gives input() line editing and history; not on Windows
        import readline  # noqa: F401
    while True:
        try:
            question = input("> ")
        except EOFError:
            print()
            return
        if question.strip():
            history.append(Message(role="user", content=question))
            history.append(Message(role="assistant", content=say(answer(model, checkpoint.tokenizer, history, config, base))))


def answer(model: GPT, tokenizer: Tokenizer, history: list[Message], config: ChatOptions, base: bool = False) -> Iterator[str]:
    """The assistant's next message, in pieces. The oldest turns are dropped from `history` when it outgrows the context.

    Of a base model, which knows no turns, what follows the last text. Raises UserError where even the last question alone does
    not fit.
    """
    block_size = model.config.block_size
    first = 1 if history[0].role == "system" else 0
    dropped = 0
    if base:
        del history[:-1]

    def render(history: list[Message]) -> list[int]:
        return (
            [tokenizer.special[END_OF_TEXT], *tokenizer.encode(history[-1].content)]
            if base
            else render_prompt(tokenizer, history)
        )

    while len(prompt := render(history)) >= block_size:
        if len(history) <= first + 1:
            raise UserError(f"the question has {len(prompt)} tokens, the model's context only {block_size}: ask a shorter one")
        del history[first : first + 2]
        dropped += 1
    if dropped:
        print(f"({dropped} oldest turns were forgotten: the context is full)", file=sys.stderr)
    device = next(model.parameters()).device
    end = {tokenizer.special[END], tokenizer.special[END_OF_TEXT]}
    banned = set(tokenizer.special.values()) - end
    with runtime.autocast(device, runtime.pick_dtype(config.dtype, device)):
        tokens = generate(model, prompt, config, block_size=block_size, banned=banned, end=end, device=device)
        yield from stream_text(tokenizer, tokens, config.stop)


def say(pieces: Iterator[str]) -> str:
    """Print pieces of text as they come; returns the whole."""
    text = ""
    for piece in pieces:
        print(piece, end="", flush=True)
        text += piece
    print()
    return text


if __name__ == "__main__":
    run(main, OPTIONS)
