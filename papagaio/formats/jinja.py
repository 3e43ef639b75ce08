"""Renders a released model's chat template in a process of its own: python -P jinja.py < request > answer, both JSON.

A template is a program in Jinja, written by others. It runs in Jinja's sandbox (no attributes that begin with an underscore, no
changes to what it is given, no loader for files), and the process has little time and memory. No clock: `strftime_now`, which
templates ask for first, does not exist, so they write the date that they have for this case.

Request: {"template", "variables": {"bos_token": ...}, "conversations": [[messages, add_generation_prompt], ...]}.
Answer: for each conversation {"text"} or {"error"}, or one {"error"} if the template is none.
"""

import json
import resource
import sys
from typing import Any, NoReturn

SECONDS, MEMORY, LARGEST = 5, 2**30, 2**20  # of processor time; bytes of address space; characters of one conversation


def main(request: dict[str, Any]) -> dict[str, str] | list[dict[str, str]]:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    # The environment that transformers gives to templates.
    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    jinja.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    jinja.globals["raise_exception"] = refuse
    try:
        template = jinja.from_string(request["template"])
    except (jinja2.TemplateError, RecursionError, MemoryError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    answers = []
    for messages, add_generation_prompt in request["conversations"]:
        variables = request["variables"] | {"messages": messages, "add_generation_prompt": add_generation_prompt, "tools": None}
        try:
            text = template.render(**variables)
            answers.append({"text": text} if len(text) <= LARGEST else {"error": f"more than {LARGEST:,} characters"})
        except Exception as error:  # whatever a program in a template can do wrong
            answers.append({"error": f"{type(error).__name__}: {error}"})
    return answers


if __name__ == "__main__":
    json.dump(main(json.load(sys.stdin)), sys.stdout)
