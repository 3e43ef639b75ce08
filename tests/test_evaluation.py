"""papagaio/evaluation.py, metrics.py, plots.py and checkpoint.py: measured by hand beside what they say."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_dataset, trained

import finetune
from model import GPT, GPTConfig
from papagaio import terminal
from papagaio.batches.conversations import Conversation, render_prompt
from papagaio.batches.windows import ValidationWindows
from papagaio.errors import UserError
from papagaio.evaluation import answer_questions, endings, evaluate_loss, exact_match_line, exact_match_table
from papagaio.generation.engine import Engine
from papagaio.options import read_options
from papagaio.report import Report
from papagaio.runs.checkpoint import contents, write_checkpoint
from papagaio.runs.directory import open_checkpoint, prune, steps_saved
from papagaio.tokenizer import ByteTokenizer
from papagaio.training.metrics import RunLog, read_metrics
from papagaio.training.optimizers import make_optimizers
from papagaio.training.options import RunOptions
from papagaio.training.plots import plot_losses
from papagaio.training.progress import Progress

BYTES = ByteTokenizer()


@pytest.fixture
def gpt() -> GPT:
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=261, block_size=16, n_layer=1, n_head=2, n_embd=16, dropout=0.3))
    with torch.no_grad():
        for p in gpt.parameters():
            p.normal_(std=0.4)
    return gpt


def test_loss_and_bits_per_byte_are_their_definitions(gpt: GPT, tmp_path: Path) -> None:
    documents = [b"first document", b"second one", b"third"]
    batches = ValidationWindows(make_dataset(tmp_path, [b"x" * 99], documents, 1000), 16, 2)
    found = evaluate_loss(gpt.train(), batches, BYTES, torch.float32)
    assert gpt.training
    stream = torch.tensor([token for document in documents for token in (256, *document)])
    nats, text_nats, n_bytes = [], 0.0, 0
    gpt.eval()
    for start in range(0, len(stream) - 1, 16):
        window = stream[start : start + 17]
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(gpt(window[None, :-1])[0].double(), window[1:], reduction="none")
        nats += losses.tolist()
        text_nats += float(losses[window[1:] < 256].sum())
        n_bytes += int((window[1:] < 256).sum())
    assert n_bytes == sum(map(len, documents))
    assert found["val_loss"] == pytest.approx(sum(nats) / len(nats), rel=1e-5)
    assert found["val_bpb"] == pytest.approx(text_nats / math.log(2) / n_bytes, rel=1e-5)
    assert evaluate_loss(gpt, batches, BYTES, torch.float32) == found


def test_answers_are_the_models_greedy_ones_and_counted_right(gpt: GPT) -> None:
    gpt.eval()

    def ask(question: str, answer: str, kind: str = "a") -> Conversation:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return Conversation(messages=turns, kind=kind)

    questions = [ask("ab", "x" * 4), ask("c", "x" * 4), ask("toolong" * 5, "x", "b")]
    answers = answer_questions(Engine(gpt, BYTES), questions)
    for answer in answers[:2]:
        ids = render_prompt(BYTES, answer.conversation.messages[:-1])
        said: list[int] = []
        while len(said) < 7 and 260 not in said:
            with torch.no_grad():
                said.append(int(gpt(torch.tensor([ids + said]))[0, -1].argmax()))
        assert answer.text == BYTES.decode(t for t in said if t != 260)
        assert answer.ended == (260 in said)
    assert not answers[2].correct
    with torch.no_grad():  # a model that always ends at once
        gpt.head.weight.zero_()
        gpt.head.weight[260] = 0
        gpt.norm = torch.nn.LayerNorm(16, elementwise_affine=True)
        gpt.norm.weight.data.zero_()
        gpt.norm.bias.data.fill_(1.0)
        gpt.head.weight[260] = 1
    empty = answer_questions(Engine(gpt, BYTES), [ask("a", "x"), ask("b", "y")])
    assert [(a.text, a.ended, a.correct) for a in empty] == [("", True, False)] * 2
    mixed = [empty[0], empty[1]._replace(correct=True), answers[2]]
    assert exact_match_line(mixed) == "0.333 (1/3)"
    rows = [line.split() for line in exact_match_table(mixed).splitlines()[1:]]
    assert rows == [["a", "2", "0.500"], ["b", "1", "0.000"]]


def question(text: str, answer: str) -> Conversation:
    return Conversation(
        messages=[{"role": "user", "content": text}, {"role": "assistant", "content": answer}], place=f"qa.jsonl:{text}"
    )


@pytest.mark.parametrize("shots", [None, []])
def test_one_long_question_leaves_the_others_their_room(gpt: GPT, shots: list | None) -> None:
    """Of 16 tokens, the long questions leave room for none or one; the others' answers may have seven."""
    engine = Engine(gpt.eval(), BYTES)
    others = [question(text, "xxxx") for text in ("a", "bc", "d", "ef")]
    long = [question("l" * 12, "xx"), question("m" * 40, "xx")]
    report, everyone = Report(), [others[0], long[0], *others[1:], long[1]]
    answers = answer_questions(engine, everyone, report, shots=shots and [shots] * 6)
    alone = [answer_questions(engine, [row], shots=shots and [shots])[0] for row in others]
    assert [answers[i] for i in (0, 2, 3, 4)] == alone
    assert max(len(answer.text.encode()) for answer in alone) > 2, "more than the long question would have left"
    assert [answer.fits for answer in answers] == [True, False, True, True, True, False]
    assert report.lines() == [
        f"counted wrong, question and answer exceed the context of 16 tokens: 2 (qa.jsonl:{'l' * 12}, qa.jsonl:{'m' * 40})"
    ]
    assert not any(answer.correct or answer.cut for answer in answers if not answer.fits)
    assert answers[-1].shown == " (does not fit the context)"


def test_answers_that_are_cut_are_marked_and_counted_apart(gpt: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(gpt.eval(), BYTES)
    monkeypatch.setattr(engine, "greedy", lambda prompts, limits, end: [[120] * limit for limit in limits])  # never ends
    answers = answer_questions(engine, [question("a", "xx"), question("b" * 40, "x")])
    assert [answer.cut for answer in answers] == [True, False]
    assert answers[0].shown == "xxxx (cut)"
    assert endings(answers) == (
        "answers that ended by themselves: 0.000; cut, and counted as wrong: 1; without room in the context: 1"
    )


def test_progress_without_a_terminal_is_plain_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(terminal.progress(range(3), "batches")) == [0, 1, 2]
    assert capsys.readouterr().err == "", "short work is silent"
    monkeypatch.setattr(terminal, "PROGRESS_SECONDS", -1.0)
    assert list(terminal.progress(range(3), "batches")) == [0, 1, 2]
    assert capsys.readouterr().err == "batches: 0 of 3\nbatches: 1 of 3\nbatches: 2 of 3\n"


def test_the_report_has_the_first_file_last(gpt: GPT, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    config = SimpleNamespace(out_dir=tmp_path, seed=1)
    tests = {Path("a/qa_test.jsonl"): [question("a", "x")], Path("b/qa_reworded.jsonl"): [question("b" * 40, "x")] * 2}
    finetune.report(Engine(gpt.eval(), BYTES), tests, [], None, config)
    out, err = capsys.readouterr()
    assert out.splitlines()[-2:] == ["qa_reworded.jsonl: exact match 0.000 (0/2)", "held-out exact match 0.000 (0/1)"]
    assert out.count("questions  exact match") == 2
    assert "exceed the context of 16 tokens: 2" in err
    toml = tmp_path / "a.toml"
    toml.write_text(f'test_data = "{toml}"\ninit_from = "x"\nout_dir = "x"\ndata = ["{toml}"]\n')
    assert read_options(finetune.FinetuneOptions, [str(toml)]).test_data == (toml,)


def test_metrics_go_on_after_a_resume(tmp_path: Path) -> None:
    config = RunOptions(out_dir=tmp_path, max_steps=9)
    with RunLog(config, Progress()) as log:
        log.write(Progress(step=1, tokens=10), train_loss=3.0, tokens_per_second=1.0)
        log.write(Progress(step=2, tokens=20), val_loss=2.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "tok')  # cut short by a crash
    with RunLog(config, Progress(step=1, metrics_lines=1)) as log:
        log.write(Progress(step=2, tokens=20), val_loss=1.0)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines[1]["elapsed_seconds"] >= lines[0]["elapsed_seconds"]
    assert [(line["step"], line.get("val_loss")) for line in lines] == [(1, None), (2, 1.0)]
    plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 5000


def test_checkpoints_are_whole_equal_and_come_back(gpt: GPT, tmp_path: Path) -> None:
    optimizers = trained(gpt)
    state = {"step": 7, "optimizer": "muon"}
    path, other = (tmp_path / name / "checkpoints" / "step-7" for name in "ab")
    for place in (path, other):
        write_checkpoint(place, contents(gpt, optimizers, state), BYTES)
    assert (path / "manifest.json").read_bytes() == (other / "manifest.json").read_bytes()
    (path.parent / "last").write_text("step-7\n")
    checkpoint = open_checkpoint(tmp_path / "a")
    assert checkpoint.path == path
    assert checkpoint.state == state
    assert checkpoint.tokenizer.sha256 == BYTES.sha256
    twin = GPT(GPTConfig(**checkpoint.model_fields))
    checkpoint.load_model(twin)
    assert all(torch.equal(a, b) for a, b in zip(gpt.parameters(), twin.parameters(), strict=True))
    restored = make_optimizers(twin, RunOptions(out_dir=Path("x")))
    checkpoint.load_optimizers(twin, restored)
    for model, steps in ((gpt, optimizers), (twin, restored)):
        model.eval()
        model.zero_grad()
        model(torch.arange(16)[None], torch.arange(16)[None]).backward()
        for optimizer in steps:
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(gpt.parameters(), twin.parameters(), strict=True))
    wrong = make_optimizers(twin, RunOptions(out_dir=Path("x"), optimizer="adamw"))
    with pytest.raises(UserError, match="another optimizer"):
        checkpoint.load_optimizers(twin, wrong)


def test_pruning_keeps_the_newest_and_what_is_named(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20, 100):
        (tmp_path / f"step-{step}").mkdir()
    (tmp_path / "best").write_text("step-5\n")
    (tmp_path / "last").write_text("step-20\n")
    prune(tmp_path, 20, keep=2)
    assert steps_saved(tmp_path) == [5, 15, 20, 100], "what is beyond the step is another matter"
    prune(tmp_path, 20, keep=1)
    assert steps_saved(tmp_path) == [5, 20, 100]
