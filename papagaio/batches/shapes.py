"""The shapes of a row of questions and answers, recognised by its keys, whose case and surrounding blanks do not matter:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}, ...]}       as in ShareGPT
    {"question": "...", "answer": "..."}           or "response"
    {"prompt": "...", "completion": "..."}         or "response"
    {"instruction": "...", "output": "..."}        or "response"
    {"input": "...", "output": "..."}
    {"prompt": "...", "chosen": "...", "rejected": "..."}          preferences; the answers may be conversations, without prompt

`input` and `context` follow the question after a blank line. `system` (or `system_prompt`) comes first, then `history`, a list of
[question, answer]. `weight`, `kind` (or `category`) and `language` say more about a row; `label: false` marks an answer as bad. A
message with `weight: 0`, `train: false` or `loss: false` is read, but not supervised. Keys that are not read are counted.
"""

import re
from collections.abc import Iterable
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
EMPTY: tuple[Any, ...] = (None, "", [], {})  # what need not be read
Pairs = tuple[tuple[str, str], ...]
MARKS = ("weight", "train", "loss")  # of a message: whether it is supervised
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant"}
KNOWN = (
    "known shapes of a row: messages; conversations; question and answer; prompt and completion (or response); instruction, "
    "input and output; prompt, chosen and rejected; or name the keys with --question_key and --answer_key"
)
HH_TURN = re.compile(r"\n\n(Human|Assistant):")  # of Anthropic's HH-RLHF


class Problem(ValueError):
    """Why a row is not used."""


class Dropped(Problem):
    """A row that is left out on purpose, although it can be read."""


def plain_name(key: Any) -> str:
    """A key without regard to case and surrounding blanks."""
    return str(key).strip().lower()


class Fields:
    """The keys of a row, without regard to case and surrounding blanks; remembers which were read."""

    def __init__(self, value: dict[str, Any], typed: bool) -> None:
        self.names: dict[str, str] = {}
        for key in sorted(value, key=lambda key: key != plain_name(key)):  # of two that differ in case, the plain one
            self.names.setdefault(plain_name(key), key)
        absent = (None,) if typed else (None, "")  # an empty cell of a table
        self.values = {name: value[key] for name, key in self.names.items() if name not in OPTIONAL or value[key] not in absent}
        self.row, self.typed, self.seen = value, typed, set[str]()
        self.unread_parts: set[str] = set()  # keys inside of messages

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def take(self, *names: str, default: Any = None) -> Any:
        """The value of the first of these keys that the row has. This key counts as read, the others do not."""
        name = next((name for name in names if name in self.values), None)
        if name is None:
            return default
        self.seen.add(name)
        return self.values[name]

    def unread(self) -> list[str]:
        """The keys that hold something and were not read."""
        seen = {self.names[name] for name in self.seen}
        kept = [str(key) for key, content in self.row.items() if key not in seen and content not in EMPTY]
        return kept + sorted(self.unread_parts)


def conversation_or_preference(fields: Fields, place: str, named: Pairs = ()) -> Conversation | Preference:
    """A row as a conversation or a preference, by its keys. `named` are pairs of keys that the user has named. Raises Problem."""
    weight = fields.take("weight", default=1.0)
    if not fields.typed:
        with suppress(ValueError):  # what is not a number is refused as in other files
            weight = float(weight)
    if weight == 0 and not isinstance(weight, bool):
        raise Dropped("weight 0")
    label = plain_name(fields.values.get("label"))
    if label == "false":  # as in KTO's files; labels other than false and true are not read
        raise Dropped("marked as a bad answer (label: false)")
    if label == "true":
        fields.take("label")
    opening = opening_messages(fields)
    pair = next((pair for pair in named or PAIRS if all(key in fields for key in pair)), None)
    if "chosen" in fields and "rejected" in fields and not (named and pair):
        return preference(fields, place, opening, [question for question, _ in named])
    if ("messages" in fields or "conversations" in fields) and not (named and pair):
        messages = opening + messages_of(fields, fields.take("messages", "conversations"), "messages")
    elif pair is None:
        found = ", ".join(map(str, fields.row)) or "none"
        asked = "none with the names that --question_key and --answer_key give" if named else f"none of the {KNOWN}"
        raise Problem(f"the keys {found}: {asked}")
    else:
        question, answer = fields.take(pair[0]), fields.take(pair[1])
        question = with_context(fields, question, pair)
        messages = [*opening, *side(fields, "user", question), *side(fields, "assistant", answer)]
    kind = fields.take("kind")
    if kind is None and isinstance(fields.values.get("category"), str):
        kind = fields.take("category")
    more_fields = {"weight": weight, "kind": kind, "language": fields.take("language")}
    given = {key: value for key, value in more_fields.items() if value is not None}
    return checked(Conversation, {"messages": messages} | given, place)


def with_context(fields: Fields, question: Any, pair: Iterable[str] = ()) -> Any:
    """The question and, each after a blank line, the row's `input` and `context`, unless they are in `pair` themselves."""
    parts = [question]
    for key in ("input", "context"):
        more = fields.take(key, default="") if key not in pair else ""
        if not isinstance(more, str):
            raise Problem(f"{key}: Input should be a valid string")
        if more.strip():
            parts.append(more)
    if len(parts) == 1:
        return question
    if not isinstance(question, str):
        raise Problem("content: a question with input or context should be a valid string")
    return "\n\n".join(parts)


def opening_messages(fields: Fields) -> list[Any]:
    """The messages of `system` and `history`, which come before the others."""
    system = fields.take("system") or fields.take("system_prompt")
    history = fields.take("history", default=[])
    messages: list[Any] = [{"role": "system", "content": system}] if system else []
    if not isinstance(history, list):
        raise Problem("history must be a list of [question, answer]")
    for turn in history:
        if isinstance(turn, dict):
            messages += messages_of(fields, [turn], "history")
        elif isinstance(turn, list) and len(turn) == 2:
            messages += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), turn, strict=True)]
        else:
            raise Problem("history must be a list of [question, answer]")
    return messages


def messages_of(fields: Fields, value: Any, name: str) -> list[dict[str, Any]]:
    """A list of messages with role and content, or from and value, as fields of Message. Raises Problem for other lists."""
    if not isinstance(value, list):
        raise Problem(f"{name} must be a list")
    found = []
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise Problem(f"{name}.{i} must be an object with role and content")
        role_key, content_key = ("role" if "role" in message else "from"), ("content" if "content" in message else "value")
        role, content = message.get(role_key), message.get(content_key)
        if not isinstance(role, str):
            raise Problem(f"{name}.{i}.role is missing")
        role = ROLES.get(role.strip().lower(), role.strip().lower())
        if role not in ("system", "user", "assistant"):
            raise Problem(f"{name}.{i}.role: {role!r} is none of system, user and assistant")
        if message.get("tool_calls") or message.get("function_call"):
            raise Problem(f"{name}.{i}: tool calls cannot be learnt from")
        marks = {key: message[key] for key in MARKS if message.get(key) is not None}
        for key, mark in marks.items():
            if mark not in (0, 1):  # which True and False are equal to
                raise Problem(f"{name}.{i}.{key}: {mark!r}: a message is learnt from (1 or true) or not (0 or false)")
        read = (role_key, content_key, *MARKS)
        fields.unread_parts |= {f"{name}: {key}" for key, each in message.items() if key not in read and each not in EMPTY}
        found.append({"role": role, "content": text_of(content)} | ({} if all(marks.values()) else {"supervised": False}))
    return found


def text_of(content: Any) -> Any:
    """The text of a content, which may be a list of text parts. Raises Problem for other parts, such as images."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        if isinstance(part, str):  # several answers, perhaps
            raise Problem("content: a list of texts, where one text is needed")
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else None
        if not isinstance(text, str):
            raise Problem("content: parts other than text cannot be learnt from")
        texts.append(text)
    return "".join(texts)


def side(fields: Fields, role: str, content: Any) -> list[Any]:
    """The messages of a question or an answer, which is a text, one message, or a list of messages."""
    if isinstance(content, dict):
        content = [content]
    if isinstance(content, list) and all(isinstance(part, dict) and "type" not in part for part in content):
        return messages_of(fields, content, role)
    return [{"role": role, "content": text_of(content)}]


def preference(fields: Fields, place: str, opening: list[Any], named: Iterable[str] = ()) -> Preference:
    """A row of preference tuning. Chosen and rejected are answers, or conversations that differ in the last answer.

    The question is under one of the keys `named`, else prompt, question or instruction, else it is what the conversations share.
    """
    prompt = with_context(fields, fields.take(*named, "prompt", "question", "instruction"))
    chosen, rejected = (dialogue(fields, "assistant", fields.take(key)) for key in ("chosen", "rejected"))
    context = chosen[:-1]
    if context != rejected[:-1]:
        raise Problem("chosen and rejected answer different conversations")
    before = dialogue(fields, "user", prompt) if prompt not in (None, "") else []
    if not (before or context):  # as in LLaMA-Factory's files
        before = messages_of(fields, fields.take("messages", "conversations", default=[]), "messages")
    if before and before[-1].get("role") == "assistant" and before[-1]["content"] == "":  # "Assistant:", left open
        before = before[:-1]
    if before and context and context[-len(before) :] != before and context[: len(before)] != before:
        raise Problem("the prompt is not in the chosen conversation")
    weight = fields.take("weight", default=1.0)
    if weight != 1:
        raise Problem("weight: preferences all count alike")
    both = {"chosen": chosen[-1] if chosen else None, "rejected": rejected[-1] if rejected else None}
    return checked(Preference, {"messages": opening + (context or before)} | both, place)


def dialogue(fields: Fields, role: str, content: Any) -> list[Any]:
    """As `side`; a text in the form of Anthropic's HH-RLHF, "\\n\\nHuman: ...\\n\\nAssistant: ...", is several messages."""
    if not isinstance(content, str) or not content.lstrip(" ").startswith("\n\nHuman:"):
        return side(fields, role, content)
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
