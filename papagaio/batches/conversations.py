"""Conversations: messages -> token ids and the loss mask.

{"question": "What is the currency of Brazil?", "answer": "Brazilian real."}

<|endoftext|><|user|>What is the currency of Brazil?<|end|><|assistant|>Brazilian real.<|end|>
                                                                       ^^^^^^^^^^^^^^^^^^^^^^^ supervised: answer and <|end|>

papagaio/batches/questions.py reads the files.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from papagaio.tokenizer import Tokenizer

TrainOn = Literal["all", "last"]  # the assistant messages that are supervised: all of them, or only the last


class Strict(BaseModel):
    """Base of what is read from a file: values are not converted, and numbers must be finite."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)


class Message(Strict):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str
    supervised: bool = True  # of an answer: whether it is trained on

    @field_validator("content")
    @classmethod
    def _check_surrogates(cls, text: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"half a surrogate pair at character {error.start}") from None
        return text


class Conversation(Strict):
    """Messages that end with an answer, and the row's other fields: weight in the loss, kind of question, language, place."""

    messages: list[Message] = Field(min_length=1)
    weight: float = Field(default=1.0, gt=0)
    kind: str = "all"
    language: str = "en"
    place: str = ""  # file:line

    @property
    def key(self) -> str:
        """Equal for conversations with the same roles, contents and supervised answers."""
        return _key(self.messages)

    @property
    def answer(self) -> str:
        """The content of the last message."""
        return self.messages[-1].content

    @property
    def answers(self) -> list[Message]:
        return [message for message in self.messages if message.role == "assistant"]

    @model_validator(mode="after")
    def _check(self) -> "Conversation":
        check_turns(self.messages, "assistant")
        return self


class Preference(Strict):
    """Messages that end with a question, and two answers to it: the better one (chosen) and the worse one (rejected)."""

    messages: list[Message] = Field(min_length=1)
    chosen: Message
    rejected: Message
    place: str = ""  # file:line

    @property
    def key(self) -> str:
        """Equal for preferences with the same roles and contents."""
        return _key([*self.messages, *self.answers])

    @property
    def answers(self) -> list[Message]:
        return [self.chosen, self.rejected]

    @model_validator(mode="after")
    def _check(self) -> "Preference":
        check_turns(self.messages, "user")
        if {self.chosen.role, self.rejected.role} != {"assistant"}:
            raise ValueError("chosen and rejected must have the role assistant")
        return self


def _key(messages: Iterable[Message]) -> str:
    """Hashed to decide what is held out (questions.hold_out), so it stays as it is for answers that are all supervised."""
    return "\0".join(f"{each.role}\0{each.content}" + "\0not supervised" * (not each.supervised) for each in messages)


def check_turns(messages: Sequence[Message], last: str) -> None:
    """Raises ValueError unless user and assistant take turns, user first and `last` last, after an optional system message."""
    roles = [message.role for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    if not turns or turns[-1] != last:
        raise ValueError(f"the last message must be the {last}'s")
    if turns != [("user", "assistant")[i % 2] for i in range(len(turns))]:
        raise ValueError("after an optional system message, user and assistant must take turns, the user first")


class Tokens(NamedTuple):
    """The token ids of a conversation, and for each whether it is supervised (has a loss)."""

    ids: list[int]
    supervised: list[bool]


def render(tokenizer: Tokenizer, messages: Sequence[Message], train_on: TrainOn = "all", then: str = "") -> Tokens:
    """The chat template: of our own models <|endoftext|>, then for each message its role token, its content as ordinary text,
    <|end|>; of a released model its own, whose texts are encoded together with the contents beside them.

    The assistant's contents and the token that ends each are supervised, unless the message says otherwise; with train_on="last",
    only those of the last message. `then` is the role whose content will follow.
    """
    pieces: list[tuple[str | int, int]] = [(piece, 0) for piece in tokenizer.joint("", messages[0].role)]
    for number, message in enumerate(messages, 1):  # (text or special token, number of the answer or 0)
        joint = tokenizer.joint(message.role, messages[number].role if number < len(messages) else then)
        answer = number if message.role == "assistant" else 0
        end = 1 + next(i for i, piece in enumerate(joint) if isinstance(piece, int)) if answer else 0
        content = message.content.strip() if message.role in tokenizer.trims else message.content
        pieces += [(piece, answer) for piece in (content, *joint[:end])] + [(piece, 0) for piece in joint[end:]]
    ids, supervised = list[int](), list[bool]()
    for (is_text, answer), group in groupby(pieces, lambda piece: (isinstance(piece[0], str), piece[1])):
        found = [piece for piece, _ in group]
        ids += tokenizer.encode("".join(found)) if is_text else found
        trained = answer > 0 and messages[answer - 1].supervised and (train_on == "all" or answer == len(messages))
        supervised += [trained] * (len(ids) - len(supervised))
    return Tokens(ids, supervised)


def render_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """The ids of a conversation up to the place where the next answer begins, after <|assistant|>."""
    return render(tokenizer, messages, then="assistant").ids
