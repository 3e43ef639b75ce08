"""Conversations: from JSON lines to token ids and the mask of what is learnt.

{"question": "What is the currency of Brazil?", "answer": "Brazilian real."}

<|endoftext|><|user|>What is the currency of Brazil?<|end|><|assistant|>Brazilian real.<|end|>
                                                                       ^^^^^^^^^^^^^^^^^^^^^^^ learnt: answer and its end
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from papagaio.config import UserError
from papagaio.tokenizer import ASSISTANT, END, END_OF_TEXT, SYSTEM, USER, Tokenizer

ROLE_TOKENS = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(frozen=True, strict=True)

    role: Literal["system", "user", "assistant"]
    content: str


class Conversation(BaseModel):
    """Messages, the kind of question if the file tells, and the place they came from (file:line)."""

    model_config = ConfigDict(frozen=True, strict=True)

    messages: list[Message] = Field(min_length=1)
    kind: str = "all"
    place: str = ""

    @property
    def said(self) -> str:
        """All contents in a row: what tells one conversation from another."""
        return "\0".join(message.content for message in self.messages)

    @model_validator(mode="after")
    def _turns(self) -> "Conversation":
        roles = [message.role for message in self.messages]
        turns = roles[1:] if roles[0] == "system" else roles
        if not turns or turns[-1] != "assistant":
            raise ValueError("the last message must be the assistant's")
        if turns != ["user", "assistant"] * (len(turns) // 2):
            raise ValueError("after an optional system message, user and assistant must take turns, the user first")
        if any(not message.content.strip() for message in self.messages if message.role == "assistant"):
            raise ValueError("an empty answer")
        return self


class Tokens(NamedTuple):
    """A conversation as token ids, and for each whether it is learnt."""

    ids: list[int]
    learnt: list[bool]


def read_conversations(path: Path) -> list[Conversation]:
    """Every conversation of a JSON lines file. Raises UserError naming file and line."""
    conversations = []
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; a file of questions and answers in JSON lines is needed") from None
    for number, line in enumerate(data.splitlines(), 1):
        place = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{place}: not UTF-8 at byte {error.start} of the line") from None
        except json.JSONDecodeError as error:
            raise UserError(f"{place}: not JSON: {error.msg} at column {error.colno}") from None
        conversations.append(_conversation(value, place))
    if not conversations:
        raise UserError(f"{path}: no questions and answers in there")
    return conversations


def _conversation(value: Any, place: str) -> Conversation:
    """Recognise one of the four shapes by its keys."""
    messages: Any
    match value:
        case {"messages": messages}:
            pass
        case {"question": question, "answer": answer} | {"prompt": question, "completion": answer}:
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        case {"instruction": str(question), "output": answer}:
            if isinstance(value.get("input"), str) and value["input"].strip():
                question = f"{question}\n\n{value['input']}"
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        case _:
            raise UserError(
                f"{place}: none of the shapes with messages; question and answer; prompt and completion; "
                "instruction, input and output"
            )
    try:
        return Conversation(messages=messages, kind=str(value.get("kind", "all")), place=place)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{place}: {where + ': ' if where else ''}{first['msg'].removeprefix('Value error, ')}") from None


def render(tokenizer: Tokenizer, messages: Sequence[Message]) -> Tokens:
    """The chat template: <|endoftext|>, then for each message its role token, its content as ordinary text, <|end|>.

    Learnt are the assistants' contents and the <|end|> after them.
    """
    ids, learnt = [tokenizer.special[END_OF_TEXT]], [False]
    for message in messages:
        content = [*tokenizer.encode(message.content), tokenizer.special[END]]
        ids += [tokenizer.special[ROLE_TOKENS[message.role]], *content]
        learnt += [False] + [message.role == "assistant"] * len(content)
    return Tokens(ids, learnt)


def render_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Ids of a conversation up to where the assistant's next answer begins."""
    return [*render(tokenizer, messages).ids, tokenizer.special[ASSISTANT]]
