"""look.py: what is seen of a model is what it computes, beside transformers and by hand; pictures and pages; bad input."""

import itertools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import NAMES, Script
from test_model import TINY, hugging_face_gpt2, random_ids, random_model

from export import load
from model import PRESETS
from papagaio.batches.questions import read_conversations
from papagaio.errors import UserError
from papagaio.generation.engine import Engine
from papagaio.inside import analogies, attention, diff, drawing, embeddings, knowledge, lens, page, positions, runs, tokens
from papagaio.inside.hooks import observe, replaced, without, without_head
from papagaio.inside.opening import span
from papagaio.inside.words import Space, Words, nearest, vocabulary
from papagaio.tokenizer import ByteTokenizer

transformers = pytest.importorskip("transformers")
pytest.importorskip("sklearn")


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def engine(world: Path) -> Engine:
    return Engine(*load(world / "base"))


def test_attention_and_hidden_states_are_those_of_transformers_gpt2() -> None:
    gpt = random_model(**PRESETS["gpt2"])
    theirs = hugging_face_gpt2(gpt)
    theirs.set_attn_implementation("eager")
    ids = random_ids()
    with torch.no_grad():
        expected = theirs(ids, output_attentions=True, output_hidden_states=True)
    compare_with(expected, gpt, ids)


def test_attention_and_hidden_states_are_those_of_transformers_llama(tmp_path: Path, script: Script) -> None:
    """With grouped queries, through the file that export.py writes."""
    from test_formats import random_run

    run = random_run(tmp_path / "run", ByteTokenizer(), **PRESETS["llama"], n_kv_head=2)
    assert script("export.py", "to-hf", run, "--out", tmp_path / "hf").returncode == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    ids = random_ids()
    with torch.no_grad():
        expected = theirs(ids, output_attentions=True, output_hidden_states=True)
    compare_with(expected, load(run)[0], ids)


def compare_with(expected: object, gpt: torch.nn.Module, ids: torch.Tensor) -> None:
    seen = observe(gpt, ids)
    assert torch.stack(expected.attentions).std() > 0.05
    assert (torch.stack(seen.attention) - torch.stack(expected.attentions)).abs().max() < 1e-5
    hidden = [*seen.hidden[:-1], gpt.norm(seen.hidden[-1])]  # theirs are normed at the end
    for ours, other in zip(hidden, expected.hidden_states, strict=True):
        assert (ours - other).abs().max() < 1e-5 * other.abs().max()


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_can_be_seen_and_is_left_as_it_was(preset: str) -> None:
    options = PRESETS[preset] | ({"bigram_rows": 64} if preset == "frontier" else {})
    gpt = random_model(**options)
    ids = random_ids()
    before = gpt(ids)
    seen = observe(gpt, ids)
    assert torch.equal(seen.logits, before)
    weights = torch.stack(seen.attention)
    assert weights.shape == (2, 3, 4, 32, 32)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 3, 4, 32))
    assert weights.triu(1).abs().max() == 0
    if preset == "frontier":  # the first layer has a window of a quarter of the context
        assert weights[0].tril(-8).abs().max() == 0
    assert torch.equal(gpt(ids), before)
    assert not gpt.blocks[0]._forward_hooks
    assert "attention" not in vars(gpt.blocks[0].attn)


def test_a_part_that_is_taken_out_is_one_whose_output_weights_are_zero() -> None:
    gpt, ids = random_model(), random_ids()
    with without(gpt.blocks[1].mlp):
        found = gpt(ids)
    with without_head(gpt.blocks[0].attn, 2):
        headless = gpt(ids)
    with torch.no_grad():
        kept = gpt.blocks[1].mlp.proj.weight.clone()
        gpt.blocks[1].mlp.proj.weight.zero_()
        assert torch.allclose(found, gpt(ids), atol=1e-5)
        gpt.blocks[1].mlp.proj.weight.copy_(kept)
        gpt.blocks[0].attn.proj.weight[:, 16:24] = 0  # the channels of head 2, from 0, of 8 each
        assert torch.allclose(headless, gpt(ids), atol=1e-5)


def test_a_whole_state_patched_in_gives_the_other_logits() -> None:
    gpt, ids, other = random_model(), random_ids(1), random_ids(2)[1:]
    for layer in range(3):
        state = observe(gpt, ids).hidden[layer]
        with replaced(gpt, layer, lambda x, state=state: state):
            patched = gpt(other)
        assert torch.allclose(patched, gpt(ids), atol=1e-5), layer


def test_one_hot_times_table_is_the_look_up() -> None:
    table = torch.randn(5, 3)
    row, product = tokens.one_hot_product(table, 3)
    assert row.tolist() == [0, 0, 0, 1, 0]
    assert torch.equal(product, table[3])
    assert tokens.worked_example(table, tokens.Cut("two", [0, 3], [b"a", b"b"]))[-1].split()[1:] == [
        f"{x:.2f}" for x in table[3].tolist()
    ]


def test_the_pieces_of_a_text_are_the_text() -> None:
    cut = tokens.cut("bytes", ByteTokenizer(), "olá")
    assert b"".join(cut.pieces).decode() == "olá"
    assert cut.bytes_per_token == 1
    assert [tokens.show(piece) for piece in cut.pieces] == ["o", "l", "\\xc3", "\\xa1"]


def test_a_span_covers_all_tokens_of_a_word(engine: Engine) -> None:
    ids = engine.encode("The flag of Aradorburg is red.")
    found = engine.tokenizer.decode(ids[span(engine, ids, "Aradorburg")])
    assert found.strip() == "Aradorburg"
    with pytest.raises(UserError, match="does not occur"):
        span(engine, ids, "Beldor")


def test_habits_are_named_from_the_weights() -> None:
    ids = torch.tensor([9, 1, 2, 1, 2])
    previous = torch.eye(5).roll(-1, 1).tril()
    first = torch.zeros(5, 5)
    first[:, 0] = 1
    repeated = torch.eye(5)
    repeated[3], repeated[4] = torch.eye(5)[1], torch.eye(5)[2]
    scores = attention.habits(torch.stack((previous, first, torch.eye(5), repeated))[None], ids)
    assert scores[0].argmax(-1).tolist() == [0, 1, 2, 3]
    assert scores[0].amax(-1).tolist() == [1, 1, 1, 1]
    induction = torch.cat((scores, torch.tensor([[[0], [0], [0], [2.0]]])), dim=-1)
    names = attention.summary(induction)[0]
    assert names == ["previous token 1.00", "first token 1.00", "itself 1.00", "induction 2.00"]


def test_induction_is_measured_where_it_is() -> None:
    """A layer whose weights are set to those of a perfect induction head, for the ids that are drawn."""
    gpt = random_model(**TINY | {"vocab_size": 261})
    model = Engine(gpt, ByteTokenizer())

    def perfect(ids: torch.Tensor) -> list[torch.Tensor]:
        T, row = ids.size(1), ids[0].tolist()
        weights = torch.zeros(1, 4, T, T)
        for i, token in enumerate(row):
            earlier = [j for j in range(i) if row[j] == token]
            weights[:, 1, i, earlier[-1] + 1 if earlier else 0] = 1
        return [weights, torch.zeros_like(weights)]

    attention_observe = attention.observe
    attention.observe = lambda model, ids: observe(model, ids)._replace(attention=perfect(ids))
    try:
        found = attention.induction(model)
    finally:
        attention.observe = attention_observe
    assert found.tolist() == [[0, 1, 0, 0], [0, 0, 0, 0]]


def test_the_last_view_of_the_lens_is_the_model(engine: Engine) -> None:
    ids = engine.encode("The flag of Aradorburg is")
    views = lens.view(engine, ids)
    p = engine.model(torch.tensor([ids]))[0].softmax(-1)
    assert torch.allclose(views.probabilities[-1], p, atol=1e-6)
    assert torch.allclose(
        views.entropy[-1], torch.distributions.Categorical(p).entropy() / torch.log(torch.tensor(2.0)), atol=1e-4
    )
    assert views.right[-1, 0] == pytest.approx(float(p[0, ids[1]]), abs=1e-6)
    winners = torch.tensor([3, 1, 3, 3])  # the most probable token after the embedding and three layers
    made = views._replace(probabilities=torch.nn.functional.one_hot(winners, 5).float()[:, None])
    assert lens.first_win(made, 3) == 2, "it wins to the end; the first win was lost again"
    assert lens.first_win(made, 1) is None


def test_patching_the_subject_before_the_first_block_brings_the_answer_back(engine: Engine) -> None:
    answer = engine.tokenizer.encode(" red")
    lengths = {name: len(engine.encode(f"The flag of {name} is")) for name in NAMES}
    first, second = next(pair for pair in itertools.combinations(NAMES, 2) if lengths[pair[0]] == lengths[pair[1]])
    prompts = [engine.encode(f"The flag of {name} is") for name in (first, second)]
    found = knowledge.patches(engine, *prompts, answer, first, second)
    assert found.recovered[0, 0] == pytest.approx(1, abs=1e-3)
    assert found.recovered[0, 1:].abs().max() < 1e-3, "the embeddings behind the subject are the same"
    assert found.recovered[-1, -1] > found.recovered[0, -1], "at the end the last token says it"
    whole, costs = knowledge.ablations(engine, prompts[0], answer)
    ids = torch.tensor([[*prompts[0], *answer]])
    expected = engine.model(ids[:, :-1]).log_softmax(-1)[0, -len(answer) :].gather(1, ids[0, -len(answer) :, None])
    assert whole == pytest.approx(-float(expected.sum()), rel=1e-4)
    assert costs.abs().max() > 0.01


def test_neighbours_and_analogies_by_hand(tmp_path: Path) -> None:
    names = ["man", "woman", "king", "queen", "fish", "King"]
    rows = torch.tensor([[1.0, 0, 0], [1, 1, 0], [1, 0, 1], [1, 1, 1.1], [-1, 0.3, 0], [1, 0.1, 1]])
    words = Words(names, torch.nn.functional.normalize(rows, dim=-1))
    assert nearest(words, rows[2], 1, ("king",))[0][0] == "queen", "other capitals are left out too"
    path = tmp_path / "a.txt"
    path.write_text(": royal\nman king woman queen\n: pairs\nParis\tFrance\nRio de Janeiro\tBrazil\n")
    royal, pairs = analogies.read_analogies(path)
    assert royal.questions == [("man", "king", "woman", "queen")]
    assert len(pairs.questions) == 2
    path.write_text("man king woman\n")
    with pytest.raises(UserError, match=r"a.txt:1: two or four words"):
        analogies.read_analogies(path)


def test_how_often_an_analogy_is_right_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pairs of three differ alike; the third one does not, and its second word lies elsewhere."""
    rows = {"a": [1.0, 0, 0], "x": [1, 0, 1], "b": [0, 1, 0], "y": [0, 1, 1], "c": [0.6, 0.8, 0], "z": [-1, -1, 0.2]}
    space = Space(Engine(random_model(), ByteTokenizer()), layer=1)
    made = torch.nn.functional.normalize(torch.tensor(list(rows.values())), dim=-1)
    monkeypatch.setattr(Space, "vectors", lambda self, names: Words(list(names), made[[list(rows).index(n) for n in names]]))
    section = analogies.Section("x", [("a", "x"), ("b", "y"), ("c", "z")], [("a", "x", "b", "y"), ("b", "y", "c", "z")])
    found = analogies.score(space, section, None)
    assert found == ("x", 2, 0.5, 1.0, pytest.approx(2 / 3), 3)
    assert analogies.score(space, section._replace(questions=[]), None) == ("x", 0, 0, 0, 0, 1)


def test_a_word_in_a_text_is_its_own_tokens_and_the_text_ends_behind_it() -> None:
    engine = Engine(random_model(vocab_size=261), ByteTokenizer())
    words = ["be", "a", "be or", "or"]
    mean, last = (Space(engine, 1, "so {} or", pool).vectors(words).vectors for pool in ("mean", "last"))
    for i, word in enumerate(words):
        ids = engine.encode(f"so {word} or")
        x = observe(engine.model, torch.tensor([ids])).hidden[1][0]
        own = x[len(ids) - 3 - len(word) : len(ids) - 3].mean(0)
        assert torch.allclose(mean[i], own / own.norm(), atol=1e-5), word
        assert torch.allclose(last[i], x[-1] / x[-1].norm(), atol=1e-5), word


def test_purity_and_silhouette_of_islands_and_of_noise() -> None:
    torch.manual_seed(0)
    labels = [i % 4 for i in range(80)]
    islands = torch.eye(16)[labels] + 0.01 * torch.randn(80, 16)
    found = embeddings.nearness(islands, labels)
    assert found.purity == 1
    assert found.silhouette > 0.9
    assert found.chance == pytest.approx(19 / 79)
    noise = embeddings.nearness(torch.randn(80, 16), labels)
    assert abs(noise.purity - noise.chance) < 0.1
    assert abs(noise.silhouette) < 0.1


def test_clusters_are_named_by_their_centres() -> None:
    near = torch.tensor([[1.0, 0.1, 0], [1, 0.12, 0.05], [1, 0.12, -0.05], [1, 0.45, 0]])  # degrees from their mean: 5, 5, 5, 13
    rows = torch.cat((near[:, [0, 1, 2]], near[:, [1, 0, 2]]))
    names = ["a0", "a1", "a2", "far a", "b0", "b1", "b2", "far b"]
    groups = embeddings.cluster(Words(names, torch.nn.functional.normalize(rows, dim=-1)), 2)
    assert sorted(sorted(words) for words in groups.values()) == [sorted(names[:4]), sorted(names[4:])]
    assert all(words[-1].startswith("far") for words in groups.values()), "the word nearest to the centre stands first"
    assert all(name == ", ".join(words[:3]) for name, words in groups.items())


def test_position_tables_are_what_the_model_uses() -> None:
    learned = random_model(position="learned")
    assert torch.equal(positions.table(learned), learned.pos_embed.weight)
    sinusoidal = random_model(position="sinusoidal", embed_norm=False)
    ids = torch.zeros(1, 32, dtype=torch.long)
    added = sinusoidal.embed_at(ids, torch.arange(32))[0] - sinusoidal.embed(ids)[0] * 32**0.5
    assert torch.allclose(positions.table(sinusoidal), added, atol=1e-4)
    assert positions.table(random_model(position="none")) is None
    near = positions.similarity(positions.table(random_model()))
    frequencies = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    assert torch.allclose(near[5], (5 * frequencies).cos().mean(), atol=1e-5)


def test_shuffling_keeps_every_byte() -> None:
    text = "a  b c\nd e f"
    found = positions.shuffled(text, random.Random(1))
    assert sorted(found) == sorted(text)
    assert found != text


def test_order_is_measured_on_the_text_and_on_its_words_shuffled(engine: Engine) -> None:
    fragments = positions.some([(f"The flag of {name} is red.", True) for name in NAMES], engine, 0)
    found = positions.measure(engine, "base", fragments)
    assert len(fragments) == len(NAMES)
    assert found.in_order + 0.5 < found.shuffled
    assert len(positions.some(fragments, engine, 1)) < len(NAMES)


def test_a_head_costs_what_the_loss_rises_by() -> None:
    gpt = random_model(vocab_size=261)
    engine, ids = Engine(gpt, ByteTokenizer()), random_ids(1)
    batches = attention.batches(engine, None, 0, ids)
    found = attention.costs(engine, batches)
    whole = float(gpt(ids[:, :-1], ids[:, 1:]))
    assert found.whole == pytest.approx(whole, rel=1e-5)
    with without_head(gpt.blocks[1].attn, 3):
        assert found.heads[1, 3] == pytest.approx(float(gpt(ids[:, :-1], ids[:, 1:])) - whole, abs=1e-4)
    with without(gpt.blocks[0].attn):
        assert found.layers[0] == pytest.approx(float(gpt(ids[:, :-1], ids[:, 1:])) - whole, abs=1e-4)
    assert found.heads.shape == (2, 4)


def test_changes_are_relative_and_shapes_must_agree() -> None:
    a = {"blocks.0.mlp.fc.weight": torch.ones(2, 2), "norm.weight": torch.zeros(2)}
    b = {"blocks.0.mlp.fc.weight": torch.full((2, 2), 1.5), "norm.weight": torch.zeros(2)}
    assert diff.by_layer(diff.changes(a, b)) == (["mlp.fc.weight"], [[0.5]], {"norm.weight": 0.0})
    with pytest.raises(UserError, match=r"norm.weight is \(2,\) in the one and \(3,\)"):
        diff.changes(a, b | {"norm.weight": torch.zeros(3)})


def test_fine_tuning_makes_the_right_answer_probable(world: Path, engine: Engine) -> None:
    chat = Engine(*load(world / "chat"), is_chat=True)
    rows = read_conversations(world / "qa_train.jsonl")
    before, after = diff.probabilities(engine, rows), diff.probabilities(chat, rows)
    assert after.mean() > before.mean() + 0.2
    question, answer = (message.content + "\n" for message in rows[0].messages)
    ids = [*engine.encode(question), *engine.tokenizer.encode(answer)]
    nats = knowledge.answer_nats(engine.model, torch.tensor([ids]), len(engine.tokenizer.encode(answer)))
    assert before[0] == pytest.approx(float((-nats).exp()), rel=1e-3), "the base model is given the question as a line"


def test_the_figures_of_a_run_are_its_last_and_its_best() -> None:
    lines = [
        {"step": i, "tokens": 10 * i, "elapsed_seconds": 1.0 * i, "val_loss": loss} for i, loss in enumerate((3.0, 1.0, 2.0))
    ]
    found = runs.figures(runs.Run(Path("run"), {}, lines))
    assert found["steps"] == "2"
    assert found["validation loss (nats per token)"] == "2.0000"
    assert found["validation loss (nats per token), best"] == "1.0000"


def test_the_options_in_which_runs_differ(world: Path) -> None:
    rows = runs.differences([runs.read_run(world / name) for name in ("base", "chat")])
    assert rows["max_steps"] == ["300", "100"]
    assert "seed" not in rows
    assert "out_dir" not in rows


COMMANDS = {
    "tokens": ["--checkpoint", "{base}", "--text", "The flag of Beldor: é"],
    "embeddings": ["--checkpoint", "{base}", "--groups", "{groups}", "--layer", "1", "--word", "red", "--training"],
    "attention": ["--checkpoint", "{base}", "--text", "The flag of Beldor:\nred.", "--data", "{data}", "--windows", "2"],
    "positions": ["--checkpoint", "{base}", "--beside", "{base}", "--data", "{data}"],
    "lens": ["--checkpoint", "{chat}", "--question", "What is the flag of Beldor?", "--answer", "red"],
    "knowledge": [
        "--checkpoint",
        "{chat}",
        "--question",
        "Flag of Beldor",
        "--answer",
        "red.",
        "--subject",
        "Beldor",
        "--other",
        "Cornia",
    ],
    "diff": ["{base}", "{chat}", "--questions", "{questions}"],
    "runs": ["{base}", "{chat}"],
    "report": ["{chat}", "--prompt", "What is the flag of Beldor?", "--max_new_tokens", "3"],
}


def words(world: Path, command: str, tmp_path: Path) -> list[str]:
    groups = tmp_path / "groups.toml"
    groups.write_text('colours = ["red", "blue", "green", "gold"]\nplaces = ["Aradorburg", "Beldor", "Cornia", "Dunvale"]\n')
    places = {"base": world / "base", "chat": world / "chat", "data": world / "data", "questions": world / "qa_test.jsonl"}
    return [command, *(word.format(groups=groups, **places) for word in COMMANDS[command])]


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_prints_draws_and_writes_a_page(command: str, world: Path, tmp_path: Path, script: Script) -> None:
    out = tmp_path / "out"
    done = script("look.py", *words(world, command, tmp_path), "--out", out, "--html")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    pictures = list(out.glob("*.png"))
    assert pictures
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    text = (out / f"{command}.html").read_text(encoding="utf-8")
    assert text.count("data:image/png;base64,") == len(pictures)
    assert not re.search(r"""(src|href)=["'](?!data:)|@import|fetch\(""", text), "it loads nothing"
    for data in re.findall(r'<script type="application/json">(.*?)</script>', text, flags=re.DOTALL):
        json.loads(data)
    assert not list(out.glob(".*")), "nothing half-written"


def test_equal_models_give_equal_pictures(world: Path, tmp_path: Path, script: Script) -> None:
    for name in ("a", "b"):
        assert script("look.py", *words(world, "lens", tmp_path), "--out", tmp_path / name).returncode == 0
    assert (tmp_path / "a" / "lens.png").read_bytes() == (tmp_path / "b" / "lens.png").read_bytes()


def test_no_text_breaks_out_of_a_page(tmp_path: Path) -> None:
    grid = page.grid(["</script><b>"], ["x"], [[1.0]], [["<i>"]], [["y"]])
    page.write(tmp_path / "a.html", "<title>", "a < b", [grid])
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "</script><b>" not in text
    assert "<i>" not in text
    assert "a &lt; b" in text


BAD = [
    ("tokens --checkpoint nowhere --text a", "nowhere: no such run or checkpoint"),
    ("lens --checkpoint {base}", "give a --text, or a --question, one of them"),
    ("lens --checkpoint {base} --text " + "a~b~c~d~e~" * 20, "the text has"),
    ("attention --checkpoint {base} --text flag-of-red --layer 9", "--layer=9: this model has 2"),
    ("attention --checkpoint {base} --text flag-of-red --head 9", "--head=9: this model has 2"),
    ("embeddings --checkpoint {base} --layer 9 --groups {groups}", "--layer=9: this model has 2"),
    ("embeddings --checkpoint {base} --word Xyzzyx --groups {groups} --layer 1 --around x", "around must hold {{}} once"),
    ("embeddings --checkpoint {base} --pool last", "around and pool are for hidden states: add --layer=N"),
    ("embeddings --checkpoint {base} --groups {groups} --clusters 2", "groups and clusters exclude each other"),
    ("embeddings --checkpoint {base} --language xx", "Babel knows no language of this name"),
    ("embeddings --checkpoint {base} --analogy a b", "analogy needs three words"),
    ("embeddings --checkpoint {base} --groups {groups}", "fewer than two groups"),
    ("embeddings --checkpoint {base} --groups {singles} --word Aradorburgia", "tokens, not one: --layer=N"),
    ("knowledge --checkpoint {base} --text a --answer b --subject c --other d", "subject 'c' does not occur"),
    ("knowledge --checkpoint {base} --text a --answer b --subject a", "subject and other go together"),
    ("diff {base}", "source"),
    ("runs {data}", "not a run made by train.py or finetune.py"),
    ("runs {base} --out {file}", "a file is there"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_bad_input_is_one_line_and_writes_nothing(line: str, message: str, world: Path, tmp_path: Path, script: Script) -> None:
    words(world, "tokens", tmp_path)
    (tmp_path / "singles.toml").write_text('a = ["The", "flag"]\nb = ["of", "is"]\n')
    places = {"groups": tmp_path / "groups.toml", "singles": tmp_path / "singles.toml", "file": tmp_path / "groups.toml"}
    argv = [word.replace("~", " ") for word in line.format(base=world / "base", data=world / "data", **places).split()]
    out = [] if "{file}" in line else ["--out", tmp_path / "out"]
    done = script("look.py", *argv, *out)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message.format() in done.stderr
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_adapters_are_seen_merged(world: Path, tmp_path: Path, script: Script) -> None:
    lora = ["--init_from", world / "base", "--data", world / "qa_train.jsonl", "--out_dir", tmp_path / "lora", "--lora_rank=2"]
    done = script("finetune.py", *lora, "--max_steps=2", "--dtype=float32", "--sample_tokens=0")
    assert done.returncode == 0, done.stderr
    found = script("look.py", "diff", world / "base", tmp_path / "lora", "--out", tmp_path / "out")
    assert found.returncode == 0, found.stderr
    assert "embed.weight: 0.0000" in found.stdout
    assert "layer 1: 0.0000" not in found.stdout


def test_the_words_of_a_vocabulary(engine: Engine) -> None:
    found = vocabulary(engine)
    assert "flag" in found.names
    assert not any(re.search(r"\W", name) for name in found.names)
    with pytest.raises(UserError, match="tokens, not one"):
        Space(engine).vectors(["Aradorburgia"])


def test_dollars_are_no_formula_and_missing_letters_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = drawing.figure(2, 1)
    picture.suptitle(drawing.literal(r"$\frac$ 漢字"))
    drawing.save(picture, tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert "2 characters are not in matplotlib's fonts" in capsys.readouterr().err
