"""Conversations: messages -> token ids and the mask of what is learnt.

{"question": "What is the currency of Brazil?", "answer": "Brazilian real."}

<|endoftext|><|user|>What is the currency of Brazil?<|end|><|assistant|>Brazilian real.<|end|>
                                                                       ^^^^^^^^^^^^^^^^^^^^^^^ learnt: answer and its end

The files they come from are read in papagaio/batches/questions.py.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from papagaio.tokenizer import ASSISTANT, END, END_OF_TEXT, SYSTEM, USER, Tokenizer

ROLE_TOKENS = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
Taught = Literal["all", "last"]  # which of the assistant's turns are learnt


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(frozen=True, strict=True)

    role: Literal["system", "user", "assistant"]
    content: str

    @field_validator("content")
    @classmethod
    def _whole_characters(cls, text: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"half a surrogate pair at character {error.start}") from None
        return text


class Conversation(BaseModel):
    """Messages, and what the file tells about them: weight of the loss, kind of question, language, place (file:line)."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    messages: list[Message] = Field(min_length=1)
    weight: float = Field(default=1.0, gt=0)
    kind: str = "all"
    language: str = "en"
    place: str = ""

    @property
    def said(self) -> str:
        """All roles and contents in a row: what tells one conversation from another."""
        return "\0".join(f"{message.role}\0{message.content}" for message in self.messages)

    @property
    def answer(self) -> str:
        """What the assistant says at the end."""
        return self.messages[-1].content

    @property
    def has_empty_answer(self) -> bool:
        return any(not message.content.strip() for message in self.messages if message.role == "assistant")

    @model_validator(mode="after")
    def _turns(self) -> "Conversation":
        check_turns(self.messages, "assistant")
        return self


class Preference(BaseModel):
    """Messages up to a question, and two answers, the better one first."""

    model_config = ConfigDict(frozen=True, strict=True)

    messages: list[Message] = Field(min_length=1)
    chosen: Message
    rejected: Message
    place: str = ""

    @property
    def said(self) -> str:
        texts = [f"{message.role}\0{message.content}" for message in (*self.messages, self.chosen, self.rejected)]
        return "\0".join(texts)

    @property
    def has_empty_answer(self) -> bool:
        return not (self.chosen.content.strip() and self.rejected.content.strip())

    @model_validator(mode="after")
    def _turns(self) -> "Preference":
        check_turns(self.messages, "user")
        if {self.chosen.role, self.rejected.role} != {"assistant"}:
            raise ValueError("chosen and rejected must be the assistant's")
        if self.chosen.content == self.rejected.content:
            raise ValueError("chosen and rejected are the same")
        return self


def check_turns(messages: Sequence[Message], last: str) -> None:
    """Raises ValueError unless user and assistant take turns, the user first, after at most one system message."""
    roles = [message.role for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    if not turns or turns[-1] != last:
        raise ValueError(f"the last message must be the {last}'s")
    if turns != [("user", "assistant")[i % 2] for i in range(len(turns))]:
        raise ValueError("after an optional system message, user and assistant must take turns, the user first")


class Tokens(NamedTuple):
    """A conversation as token ids, and for each whether it is learnt."""

    ids: list[int]
    learnt: list[bool]


def render(tokenizer: Tokenizer, messages: Sequence[Message], train_on: Taught = "all") -> Tokens:
    """The chat template: <|endoftext|>, then for each message its role token, its content as ordinary text, <|end|>.

    Learnt are the assistant's contents and the <|end|> after them; with train_on="last" those of the last message alone.
    """
    ids, learnt = [tokenizer.special[END_OF_TEXT]], [False]
    for number, message in enumerate(messages, 1):
        content = [*tokenizer.encode(message.content), tokenizer.special[END]]
        taught = message.role == "assistant" and (train_on == "all" or number == len(messages))
        ids += [tokenizer.special[ROLE_TOKENS[message.role]], *content]
        learnt += [False] + [taught] * len(content)
    return Tokens(ids, learnt)


def render_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Ids of a conversation up to where the assistant's next answer begins."""
    return [*render(tokenizer, messages).ids, tokenizer.special[ASSISTANT]]
