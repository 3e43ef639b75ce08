"""Chat templates of released models: cut into pieces, checked, or refused."""
# ruff: noqa: E501 - templates as they were released

import pytest

from papagaio.errors import UserError
from papagaio.formats.template import compose, derive, plain_template
from papagaio.formats.vocabulary import jinja_of
from papagaio.tokenizer import OWN_TEMPLATE

VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}
CHATML = (  # SmolLM2's: a system message of its own where there is none
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe good.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ZEPHYR = (  # TinyLlama's
    "{% for message in messages %}\n{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
LLAMA3 = (  # with tools, and a date from a clock if there is one
    "{{- bos_token }}{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d') %}{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}"
    "{%- if not tools is defined %}{%- set tools = none %}{%- endif %}{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content']|trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system_message = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}{%- if tools is not none %}{{- tools | tojson }}{%- endif %}"
    "{{- 'Today Date: ' + date_string + '\n\n' }}{{- system_message }}{{- '<|eot_id|>' }}{%- for message in messages %}"
    "{%- if not (message.role == 'ipython' or 'tool_calls' in message) %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{%- elif 'tool_calls' in message %}{{- raise_exception('no tools') }}"
    "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ '[' + message['role'] + ']' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
TURNS = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes?"), ("user", " x ")]


@pytest.mark.parametrize(
    ("template", "conversation"),
    [
        (
            CHATML,
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n"
            "<|im_start|>user\n x <|im_end|>\n<|im_start|>assistant\n",
        ),
        (ZEPHYR, "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\nYes?</s>\n<|user|>\n x </s>\n<|assistant|>\n"),
        (
            LLAMA3,
            "<s><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nYes?<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nx<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
    ],
)
def test_pieces_compose_what_the_template_renders(template: str, conversation: str) -> None:
    assert compose(derive(template, VARIABLES), TURNS, "assistant") == conversation


def test_a_default_system_message_and_a_missing_one() -> None:
    chat = derive(CHATML, VARIABLES)
    assert compose(chat, TURNS[1:2], "assistant").startswith("<|im_start|>system\nBe good.<|im_end|>\n<|im_start|>user\nHi")
    assert ">system" not in derive(NO_SYSTEM, VARIABLES)["joints"]
    assert derive(LLAMA3, VARIABLES)["trims"] == ["system", "user", "assistant"]


@pytest.mark.parametrize("joints", [OWN_TEMPLATE, plain_template("<a>", "<b>")["joints"]], ids=["own", "plain"])
def test_the_templates_that_are_given_to_other_tools_are_those_pieces(joints: dict[str, str]) -> None:
    found = derive(jinja_of(joints), {})
    assert found["joints"].items() <= joints.items()
    assert len(found["joints"]) == 6
    assert found["trims"] == []


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for", "is not Jinja"),
        ("{% for i in range(9999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "does not come to an end"),
        ("{{ 'a' * 10**11 }}", "MemoryError"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("constant", "does not write each message once"),
        ("{% for m in messages %}{{ m.content }}{{ loop.index }};{% endfor %}", "does not always write the same"),
        ("{% for m in messages %}<{{ m.role }}>{{ m.content | upper }}{% endfor %}", "does not write each message once"),
        (CHATML.replace("message['content']", "message['content'] | replace('\n', ' ')"), "more than pieces"),
        # Qwen3's: earlier answers lose what stands before a mark
        (CHATML.replace("message['content']", "message['content'].split('  ')[-1]"), "more than pieces"),
    ],
)
def test_what_is_no_template_of_pieces_is_refused(template: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        derive(template, VARIABLES)
