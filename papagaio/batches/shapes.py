"""The shapes of a row of questions and answers, recognised by its keys, whose case and surrounding blanks do not matter:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}, ...]}       as in ShareGPT
    {"question": "...", "answer": "..."}           or "response"
    {"prompt": "...", "completion": "..."}         or "response"
    {"instruction": "...", "output": "..."}        or "response"
    {"input": "...", "output": "..."}
    {"prompt": "...", "chosen": "...", "rejected": "..."}          preferences; the answers may be conversations, without prompt

`input` or `context` follows the question after a blank line. `system` (or `system_prompt`) comes first, then `history`, a list of
[question, answer]. `weight`, `kind` (or `category`) and `language` say more about a row; `label: false` marks an answer as bad.
Keys that are not read are counted and named.
"""

import re
from contextlib import suppress
from typing import Any, TypeVar

from pydantic import ValidationError

from papagaio.batches.conversations import Conversation, Preference, Strict

ModelT = TypeVar("ModelT", bound=Strict)
PAIRS = (  # keys of a question and its answer; the first pair that a row has counts
    *(("question", "answer"), ("prompt", "completion"), ("prompt", "response"), ("question", "response")),
    *(("instruction", "output"), ("instruction", "response"), ("input", "output")),
)
OPTIONAL = (
    *("weight", "kind", "category", "language", "label"),
    *("system", "system_prompt", "history", "input", "context"),
)
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant"}
SHAPES = (
    "messages; conversations; question and answer; prompt and completion (or response); instruction, input and output; prompt, "
    "chosen and rejected; or name the keys with --question_key and --answer_key"
)
HH_TURN = re.compile(r"\n\n(Human|Assistant):")  # of Anthropic's HH-RLHF


class Problem(ValueError):
    """Why a row is not used."""


class Dropped(Problem):
    """A row that is left out on purpose, although it can be read."""


class Fields:
    """The keys of a row, without regard to case and surrounding blanks; remembers which were read."""

    def __init__(self, value: dict[str, Any], typed: bool) -> None:
        self.names = {str(key).strip().lower(): key for key in value}
        absent = (None,) if typed else (None, "")  # an empty cell of a table
        self.values = {name: value[key] for name, key in self.names.items() if name not in OPTIONAL or value[key] not in absent}
        self.typed, self.seen = typed, set[str]()

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def take(self, *names: str, default: Any = None) -> Any:
        """The value of the first of these keys that the row has. All of them count as read."""
        self.seen |= set(names)
        return next((self.values[name] for name in names if name in self.values), default)

    def unread(self) -> list[str]:
        return [str(key) for name, key in self.names.items() if name not in self.seen]


def conversation_or_preference(fields: Fields, place: str, keys: tuple[str, str], named: bool) -> Conversation | Preference:
    """A row as a conversation or a preference, by its keys. Raises Problem."""
    weight = fields.take("weight", default=1.0)
    if not fields.typed:
        with suppress(ValueError):  # what is not a number is refused as in other files
            weight = float(weight)
    if weight == 0 and not isinstance(weight, bool):
        raise Dropped("weight 0")
    label = fields.take("label")
    if label is False or (isinstance(label, str) and not fields.typed and label.strip().lower() == "false"):  # KTO's files
        raise Dropped("marked as a bad answer (label: false)")
    opening = opening_messages(fields)
    if "chosen" in fields and "rejected" in fields:
        return preference(fields, place, opening)
    if "messages" in fields or "conversations" in fields:
        messages = opening + messages_of(fields.take("messages", "conversations"), "messages")
    else:
        pairs = (keys,) if named else PAIRS
        pair = next((pair for pair in pairs if all(key in fields for key in pair)), None)
        if pair is None:
            found = ", ".join(map(str, fields.names.values())) or "none"
            raise Problem(f"the keys {found}: none of the known shapes of a row: {SHAPES}")
        question, answer = (fields.take(key) for key in pair)
        more = fields.take(*(key for key in ("input", "context") if key not in pair), default="")
        if not isinstance(more, str):
            raise Problem("input: Input should be a valid string")
        if isinstance(question, str) and more.strip():
            question = f"{question}\n\n{more}"
        messages = [*opening, *side("user", question), *side("assistant", answer)]
    more_fields = {"weight": weight, "kind": fields.take("kind", "category"), "language": fields.take("language")}
    given = {key: value for key, value in more_fields.items() if value is not None}
    return checked(Conversation, {"messages": messages} | given, place)


def opening_messages(fields: Fields) -> list[Any]:
    """The messages of `system` and `history`, which come before the others."""
    system, history = fields.take("system", "system_prompt"), fields.take("history", default=[])
    messages: list[Any] = [{"role": "system", "content": system}] if system else []
    if not isinstance(history, list):
        raise Problem("history must be a list of [question, answer]")
    for turn in history:
        if isinstance(turn, dict):
            messages += messages_of([turn], "history")
        elif isinstance(turn, list) and len(turn) == 2:
            messages += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), turn, strict=True)]
        else:
            raise Problem("history must be a list of [question, answer]")
    return messages


def messages_of(value: Any, name: str) -> list[dict[str, Any]]:
    """A list of messages with role and content, or from and value, as fields of Message."""
    if not isinstance(value, list):
        raise Problem(f"{name} must be a list")
    found = []
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise Problem(f"{name}.{i} must be an object with role and content")
        role, content = (message.get(key, message.get(other)) for key, other in (("role", "from"), ("content", "value")))
        if not isinstance(role, str):
            raise Problem(f"{name}.{i}.role is missing")
        role = ROLES.get(role.strip().lower(), role.strip().lower())
        if role not in ("system", "user", "assistant"):
            raise Problem(f"{name}.{i}.role: {role!r} is none of system, user and assistant")
        skipped = message.get("weight", 1) == 0 or message.get("train", True) is False or message.get("loss", True) is False
        found.append({"role": role, "content": text_of(content)} | ({"supervised": False} if skipped else {}))
    return found


def text_of(content: Any) -> Any:
    """The text of a content, which may be a list of text parts. Raises Problem for other parts, such as images."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            raise Problem("content: parts other than text cannot be learnt from")
        texts.append(text)
    return "".join(texts)


def side(role: str, content: Any) -> list[Any]:
    """The messages of a question or an answer, which is a text, one message, or a list of messages."""
    if isinstance(content, dict):
        content = [content]
    if isinstance(content, list) and all(isinstance(part, dict) and "type" not in part for part in content):
        return messages_of(content, role)
    return [{"role": role, "content": text_of(content)}]


def preference(fields: Fields, place: str, opening: list[Any]) -> Preference:
    """A row of preference tuning. Chosen and rejected are answers, or conversations that differ in the last answer."""
    prompt = fields.take("prompt", "question")
    chosen, rejected = (dialogue("assistant", fields.take(key)) for key in ("chosen", "rejected"))
    context = chosen[:-1]
    if context != rejected[:-1]:
        raise Problem("chosen and rejected answer different conversations")
    before = dialogue("user", prompt) if prompt not in (None, "") else []
    if before and before[-1].get("role") == "assistant" and before[-1]["content"] == "":  # "Assistant:", left open
        before = before[:-1]
    if before and context and context[-len(before) :] != before and context[: len(before)] != before:
        raise Problem("the prompt is not in the chosen conversation")
    weight = fields.take("weight", default=1.0)
    if weight != 1:
        raise Problem("weight: preferences all count alike")
    fields.take("kind", "category", "language")
    both = {"chosen": chosen[-1] if chosen else None, "rejected": rejected[-1] if rejected else None}
    return checked(Preference, {"messages": opening + (context or before)} | both, place)


def dialogue(role: str, content: Any) -> list[Any]:
    """As `side`; a text in the form of Anthropic's HH-RLHF, "\\n\\nHuman: ...\\n\\nAssistant: ...", is several messages."""
    if not isinstance(content, str) or not content.lstrip(" ").startswith("\n\nHuman:"):
        return side(role, content)
    _, *parts = HH_TURN.split(content)
    speakers = {"Human": "user", "Assistant": "assistant"}
    return [{"role": speakers[name], "content": text.strip()} for name, text in zip(parts[::2], parts[1::2], strict=True)]


def checked(kind: type[ModelT], fields: dict[str, Any], place: str) -> ModelT:
    """Raises Problem if the fields are not those of this kind of row."""
    try:
        return kind(**fields, place=place)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise Problem(f"{where + ': ' if where else ''}{first['msg'].removeprefix('Value error, ')}") from None
