"""A released model's chat template as data: what stands between two contents, for each pair of roles.

    {"joints": {">user": "<|im_start|>user\\n", "user>assistant": "<|im_end|>\\n<|im_start|>assistant\\n", ...}, "trims": []}

Released models bring a program in Jinja. It is rendered for a few conversations whose contents are known words, and its text is
cut at these words. More conversations show whether the pieces are the whole truth; otherwise the template is refused.
"""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from papagaio.errors import UserError
from papagaio.formats import jinja

ROLES = ("system", "user", "assistant")
Turns = list[tuple[str, str]]  # (role, content)

# For released models that have none: plain text, between the token that begins a document and the one that ends an answer.
PLAIN = {
    ">system": "{start}### System\n",
    ">user": "{start}### User\n",
    "system>user": "\n### User\n",
    "user>assistant": "\n### Assistant\n",
    "assistant>user": "{end}\n### User\n",
    "assistant>": "{end}",
}


def plain_template(start: str, end: str) -> dict[str, Any]:
    """The chat template of a released model that has none."""
    return {"joints": {key: text.format(start=start, end=end) for key, text in PLAIN.items()}, "trims": [], "jinja": None}


def derive(template: str, variables: dict[str, str]) -> dict[str, Any]:
    """{"joints", "trims", "jinja"} of a template in Jinja; `variables` are its bos_token, eos_token and the like.

    Raises UserError if the template is none, or is not made of pieces between contents.
    """
    words = {role: [f"{role.title()}{i}x" for i in range(3)] for role in ROLES}
    whole: Turns = [("system", words["system"][0])]
    whole += [(role, words[role][i]) for i in range(2) for role in ("user", "assistant")]
    padded: Turns = [(role, f" \n{word}\n ") for role, word in whole]
    texts = _render(template, variables, [(whole, False), (whole[1:], False), (padded, False), (padded[1:], False)])
    has_system = "text" in texts[0] and whole[0][1] in texts[0]["text"]
    if "text" not in texts[1]:
        raise UserError(f"the chat template cannot be rendered: {texts[1]['error']}")
    joints = _cut(texts[1]["text"], whole[1:])
    if has_system:
        first = _cut(texts[0]["text"], whole)
        if differing := [key for key in joints.keys() & first.keys() if joints[key] != first[key]]:
            raise UserError(f"the chat template writes something else at {differing[0]} after a system message")
        joints |= first
    turns, answer = (padded, texts[2]) if has_system else (padded[1:], texts[3])
    trims = [role for role, content in turns[:3] if content not in answer.get("text", "")]
    found = {"joints": joints, "trims": trims, "jinja": template}
    _check(found, template, variables, has_system)
    return found


def compose(chat: dict[str, Any], turns: Turns, then: str = "") -> str:
    """The text of a conversation by the pieces; `then` is the role whose content will follow."""
    roles = ["", *(role for role, _ in turns), then]
    joints = [chat["joints"][f"{before}>{after}"] for before, after in itertools.pairwise(roles)]
    contents = [content.strip() if role in chat["trims"] else content for role, content in turns]
    return joints[0] + "".join(content + joint for content, joint in zip(contents, joints[1:], strict=True))


def _cut(text: str, turns: Turns) -> dict[str, str]:
    """The pieces between the contents of a rendered conversation. Raises UserError if it does not hold each of them once."""
    roles = ["", *(role for role, _ in turns), ""]
    pieces = re.split("|".join(content for _, content in turns), text)
    if len(pieces) != len(turns) + 1 or re.findall("|".join(c for _, c in turns), text) != [c for _, c in turns]:
        raise UserError("the chat template does not write each message once and in order")
    joints: dict[str, str] = {}
    for before, after, piece in zip(roles, roles[1:], pieces, strict=False):
        if joints.setdefault(f"{before}>{after}", piece) != piece:
            raise UserError(f"the chat template does not always write the same between {before} and {after or 'the end'}")
    return joints


def _check(found: dict[str, Any], template: str, variables: dict[str, str], has_system: bool) -> None:
    """Raises UserError unless further conversations are composed as the template renders them."""
    contents = [
        "a",
        "",
        "two\nlines\n",
        "  x",
        "{{ messages }} {% raw %}",
        "<|im_end|></s>[INST]",
        "\u00e9\u4e2d\U0001f600 'q' \"d\" &amp;",
    ]
    conversations: list[tuple[Turns, bool]] = []
    for length in range(1, 8):
        turns = [(("user", "assistant")[i % 2], contents[(3 * i + length) % len(contents)]) for i in range(length)]
        conversations += [(turns, length % 2 == 1)]
        if has_system:
            conversations += [([("system", contents[length - 1] or "s"), *turns], length % 2 == 1)]
    for (turns, prompt), answer in zip(conversations, _render(template, variables, conversations), strict=True):
        wanted = compose(found, turns, "assistant" if prompt else "")
        # The prompt of some templates (Zephyr's) stops before a line break that stands before every answer in training.
        text = answer.get("text")
        if text is None or not (text == wanted or (prompt and wanted.startswith(text) and not wanted[len(text) :].strip())):
            what = answer.get("error") or f"{text[-60:]!r} where its pieces give {wanted[-60:]!r}"
            raise UserError(f"the chat template is more than pieces between contents: {len(turns)} messages become {what}")


def _render(template: str, variables: dict[str, str], conversations: list[tuple[Turns, bool]]) -> list[dict[str, str]]:
    """{"text"} or {"error"} for each conversation, from a process of its own. Raises UserError if it does not come to an end."""
    rows = [[[{"role": role, "content": content} for role, content in turns], prompt] for turns, prompt in conversations]
    request = json.dumps({"template": template, "variables": variables, "conversations": rows})
    command = [sys.executable, "-P", str(Path(jinja.__file__))]
    try:
        done = subprocess.run(command, input=request, capture_output=True, text=True, timeout=60, check=False)
        answers = json.loads(done.stdout) if done.returncode == 0 else None
    except (subprocess.TimeoutExpired, ValueError):
        answers = None
    if answers is None:
        raise UserError(f"the chat template does not come to an end in {jinja.SECONDS} s and {jinja.MEMORY >> 30} GiB")
    if isinstance(answers, dict):
        raise UserError(f"the chat template is not Jinja: {answers['error']}")
    return answers
