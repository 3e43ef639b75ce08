"""Exported models in the tools that people use: transformers' pipeline, and lm-evaluation-harness where it is installed."""

import json
from pathlib import Path

import pytest
import torch
from conftest import Script
from test_model import TINY

from export import load
from model import GPT, PRESETS, GPTConfig
from papagaio.generation.engine import Engine, Request
from papagaio.generation.options import SamplingOptions
from papagaio.runs.checkpoint import contents, write_checkpoint
from papagaio.tokenizer import train_bpe

transformers = pytest.importorskip("transformers")

TEXT = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
TASK = """
task: local_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, script: Script) -> tuple[Path, Path]:
    """(our checkpoint, the directory that to-hf made of it) of a random llama model."""
    home, tokenizer = tmp_path_factory.mktemp("elsewhere"), train_bpe([TEXT], 400)
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(**TINY | PRESETS["llama"] | {"vocab_size": tokenizer.vocab_size, "block_size": 64}))
    for p in gpt.parameters():
        torch.nn.init.normal_(p, std=0.3)
    write_checkpoint(home / "run", contents(gpt, [], {"step": 1}), tokenizer)
    done = script("export.py", "to-hf", home / "run", "--out", home / "hf")
    assert done.returncode == 0, done.stderr
    return home / "run", home / "hf"


def test_transformers_pipeline_continues_as_we_do(exported: tuple[Path, Path]) -> None:
    ours, tokenizer = load(exported[0])
    prompt = [tokenizer.start, *tokenizer.encode("The model is")]
    greedy = SamplingOptions(temperature=0, max_new_tokens=20)
    steps = Engine(ours, tokenizer).complete([Request(prompt)], greedy, end={-1}, banned={tokenizer.start})
    expected = [step.token.id for step in steps]
    run = transformers.pipeline("text-generation", model=str(exported[1]))
    (found,) = run("The model is", max_new_tokens=20, min_new_tokens=20, do_sample=False, return_tensors=True)
    assert found["generated_token_ids"] == prompt + expected


def test_lm_evaluation_harness_measures_a_local_task(exported: tuple[Path, Path], tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    rows = [
        {"question": f"{question}:", "choices": ["one", "two words", "a model"], "answer": i % 3}
        for i, question in enumerate(["What is it", "How many", "And then", "Why"])
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "local.yaml").write_text(TASK.format(data=tmp_path / "rows.jsonl"))
    found = lm_eval.simple_evaluate(
        *("hf", f"pretrained={exported[1]},dtype=float32,add_bos_token=True,device=cpu"),
        tasks=["local_choices"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        batch_size=2,
    )  # fmt: skip
    ours, tokenizer = load(exported[0])
    right = []
    for row, sample in zip(rows, found["samples"]["local_choices"], strict=True):
        expected = []
        for choice in row["choices"]:
            prompt, answer = [tokenizer.start, *tokenizer.encode(row["question"])], tokenizer.encode(f" {choice}")
            logits = ours(torch.tensor([prompt + answer])).log_softmax(-1)[0, len(prompt) - 1 : -1]
            expected.append(float(logits.gather(1, torch.tensor(answer)[:, None]).sum()))
        theirs = [float(response[0][0]) for response in sample["resps"]]
        assert theirs == pytest.approx(expected, abs=1e-3)
        right.append(expected.index(max(expected)) == row["answer"])
    assert found["results"]["local_choices"]["acc,none"] == sum(right) / len(right)
