"""Completions as sample.py prints them: text, with colours and alternatives for its tokens, or JSON objects."""

import codecs
import math
import sys
from typing import Any

from papagaio.generation.drawing import Drawing
from papagaio.generation.engine import Step
from papagaio.terminal import coloured, colours
from papagaio.tokenizer import Tokenizer

ALTERNATIVES = 3  # tokens that are listed beside the one that was drawn


def show(done: list[Step], prompt: str, tokenizer: Tokenizer, probabilities: bool, drawing: Drawing) -> None:
    """Print the last step of a sample as text: its prompt with the first, and with the last one what --show_probs lists."""
    step, in_colour = done[-1], probabilities and colours(sys.stdout)
    if len(done) == 1:
        print(*["-" * 20] * (step.index > 0), drawing.push(prompt), sep="\n", end="")
    if in_colour:  # each code by itself, in the colour of its probability
        print(drawing.close() + drawing.marked(in_colours(done, tokenizer)), end="", flush=True)
    else:
        print(drawing.push(step.text), end="", flush=True)
    if not step.finish:
        return
    print(drawing.close())
    for token in (each.token for each in done) if probabilities else ():
        probability = math.exp(token.logprob)
        shown = f"{probability:.3f} {tokenizer.decode([token.id])!r:<14}"
        others = [(other, logprob) for other, logprob in token.top if other != token.id][:ALTERNATIVES]
        rest = "  ".join(f"{math.exp(logprob):.3f} {tokenizer.decode([other])!r}" for other, logprob in others)
        print(f"{coloured(shown, probability) if in_colour else shown}  {rest}")


def in_colours(done: list[Step], tokenizer: Tokenizer) -> str:
    """The text of the last step, which may begin in earlier tokens, each character in the colour of its token's probability."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    tokens = [step.token for step in done]
    characters = [coloured(c, math.exp(t.logprob)) for t in tokens for c in decoder.decode(tokenizer.decode_bytes([t.id]))]
    end = sum(len(step.text) for step in done)
    return "".join(characters[end - len(done[-1].text) : end])


def as_json(done: list[Step], tokenizer: Tokenizer, seed: int, logprobs: bool) -> dict[str, Any]:
    """A completion as a JSON object: text, reason of its end, number of tokens, and their log-probabilities if wanted."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"id": token, "text": tokenizer.decode([token]), "logprob": round(logprob, 6)}

    result = {"completion": "".join(step.text for step in done), "finish": done[-1].finish, "tokens": len(done), "seed": seed}
    if logprobs:
        tokens = [step.token for step in done]
        result["logprobs"] = [entry(t.id, t.logprob) | {"top": [entry(*pair) for pair in t.top]} for t in tokens]
    return result
