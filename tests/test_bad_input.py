"""A user's mistakes, script by script: one line that names what is wrong, status 2 (1 for the machine), no file changed."""

import gzip
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import Call, Script
from safetensors.torch import load_file, save_file

from data import prepare
from papagaio.files import file_sha256, sealed


def snapshot(directory: Path) -> dict[str, str]:
    return {str(path): file_sha256(path) for path in directory.rglob("*") if path.is_file()}


def reseal(checkpoint: Path) -> None:
    """Write the manifest again, so that it verifies the changed files."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != "manifest.json")
    manifest = {"files": {str(path.relative_to(checkpoint)): file_sha256(path) for path in files}}
    (checkpoint / "manifest.json").write_text(sealed(manifest))


@pytest.fixture(scope="module")
def corner(world: Path, script: Script, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the cases need: data and a run with another tokenizer, damaged checkpoints, wrong questions."""
    home = tmp_path_factory.mktemp("corner")
    corpus = ["--input", world / "corpus.jsonl"]
    assert script("data/prepare.py", *corpus, "--out", home / "chars", "--tokenizer=char").returncode == 0
    tiny = ["--n_layer=1", "--n_head=1", "--n_embd=16", "--block_size=16", "--max_steps=0", "--sample_tokens=0"]
    assert script("train.py", "--data", home / "chars", "--out_dir", home / "char_run", *tiny).returncode == 0
    for name in ("flipped", "cut", "nan", "missing"):
        shutil.copytree(home / "char_run" / "checkpoints" / "step-0", home / name)
    weights = home / "flipped" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    (home / "cut" / "model.safetensors").write_bytes(weights.read_bytes()[:100])
    (home / "missing" / "model.safetensors").unlink()
    weights = home / "nan" / "model.safetensors"
    tensors = load_file(weights)
    tensors["head.weight"][0, 0] = torch.nan
    save_file(tensors, weights)
    reseal(home / "nan")
    (home / "broken.jsonl").write_text('{"question": "q", "answer": "a"}\n{"question": \n')
    (home / "good.jsonl").write_text('{"question": "q", "answer": "a"}\n' * 3)
    (home / "long.jsonl").write_text(json.dumps({"question": "q" * 5000, "answer": "a"}) + "\n")
    (home / "empty.txt").write_text("\n \n")
    (home / "latin.txt").write_bytes("café"[:3].encode() + b"1\na\xe9\n")
    (home / "run.toml").write_text("# a comment\nmax_stepz = 3\n")
    plain = {"question": "q", "answer": "a"}
    turns = [{"role": "user", "content": "q"}]
    for name, row in {
        "key": {"question": "q"},
        "role": {"messages": [*turns, {"role": "robot", "content": "a"}]},
        "twice": {"messages": [*turns, *turns, {"role": "assistant", "content": "a"}]},
        "number": {"question": "q", "answer": 3},
        "unanswered": {"messages": turns},
        "weightless": plain | {"weight": -1},
        "pair": {"prompt": "q", "chosen": "a", "rejected": "b"},
        "same": {"prompt": "q", "chosen": "a", "rejected": "a"},
        "quiz": {"question": "q", "choices": ["a", "b"], "answer": "c"},
    }.items():
        (home / f"{name}.jsonl").write_text(json.dumps(plain) + "\n" + json.dumps(row) + "\n")
    (home / "pairs.jsonl").write_text(json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"}) + "\n")
    (home / "empty.jsonl").write_text(json.dumps(plain | {"answer": " "}) + "\n")
    (home / "all_long.jsonl").write_text("".join(json.dumps({"question": "q" * 5000, "answer": str(i)}) + "\n" for i in range(9)))
    (home / "table.csv").write_text("question,answer\nq,a\nq\n")
    write_texts(home)
    write_others(home)
    (home / "list.json").write_text('[{"question": "q", "answer": "a"},\n{"question": "q"}]')
    adapters = [
        "--init_from",
        world / "base",
        "--data",
        world / "qa_train.jsonl",
        "--lora_rank=2",
        "--max_steps=1",
        "--sample_tokens=0",
    ]
    done = script("finetune.py", *adapters, "--out_dir", home / "lora")
    assert done.returncode == 0, done.stderr
    (home / "lora" / "config.toml").write_text('init_from = "gone"')
    return home


def write_texts(home: Path) -> None:
    """Wrong files of text and of rows."""
    (home / "folder").mkdir()
    (home / "occupied").mkdir()
    (home / "occupied" / "thesis.txt").write_text("mine")
    for name, data in {
        "utf16.txt": "two bytes each".encode("utf-16"),
        "nul.txt": b"a\nb\0c\n",
        "nothing.txt": b"",
        "short.txt": b"a",
        "strange.txt": "straße und Gasse\n".encode() * 40,
        "deep.jsonl": b"[" * 100_000,
        "deep.json": b"[" * 100_000,
        "deep.toml": b"seed = " + b"[" * 100_000,
        "dots.toml": b"a" + b".a" * 100_000 + b" = 1",
        "digits.jsonl": b'{"text": "a", "question": "q", "answer": "a", "weight": ' + b"9" * 5000 + b"}\n",
        "half.jsonl": b'{"text": "\\ud800", "question": "q", "answer": "\\ud800"}\n',
        "latin.jsonl": b'{"question": "q", "answer": "\xe9"}\n',
        "quote.csv": b'question,answer\nq,"a\n',
        "much.csv": b"question,answer,weight\nq,a,much\n",
        "typed.toml": b'max_steps = "many"\n',
        "not.parquet": b"PAR1 and no more",
        "cut.txt.gz": gzip.compress(b"text " * 99)[:-9],
        "cut.txt.zst": b"\x28\xb5\x2f\xfd\x24",
        "train.bin": bytes(64),
        "ranks.tiktoken": b"IQ== 0\nIg== 2\n",
    }.items():
        (home / name).write_bytes(data)
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), home / "numbers.parquet")


def write_others(home: Path) -> None:
    """Checkpoints and datasets of other programs, and wrong ones that their manifests verify."""
    torch.save({"weight": torch.zeros(2)}, home / "weights.pt")
    for folder, name in (("theirs", "pytorch_model.bin"), ("nano", "train.bin")):
        (home / folder).mkdir()
        (home / folder / name).write_bytes(bytes(8))
    shutil.copytree(home / "chars", home / "cut_data")
    shard = home / "cut_data" / "train-00000.npy"
    shard.write_bytes(shard.read_bytes()[:-1])
    shutil.copytree(home / "chars", home / "edited_data")
    manifest = home / "edited_data" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"empty_documents": 0', '"empty_documents": 1'))
    for name, change in CHANGED.items():
        shutil.copytree(home / "char_run" / "checkpoints" / "step-0", home / name)
        change(home / name)
        reseal(home / name)


def fields(**changes: object) -> Callable[[Path], None]:
    def change(checkpoint: Path) -> None:
        path = checkpoint / "model.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def double(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    save_file(tensors | {"head.weight": tensors["head.weight"].double()}, checkpoint / "model.safetensors")


CHANGED: dict[str, Callable[[Path], None]] = {
    "layers": fields(n_layer=10**9),
    "wide": fields(n_embd=10**9),
    "long": fields(block_size=10**12),
    "hidden": fields(mlp_hidden=10**12),
    "typed": fields(n_head="1"),
    "unknown": fields(n_layerz=1),
    "double": double,
    "pickled": lambda checkpoint: torch.save({}, checkpoint / "model.safetensors"),
    "listed": lambda checkpoint: (checkpoint / "state.json").write_text("[]") and None,
}

CASES = [
    # script, arguments ({w} the world, {c} the corner), status, message
    (
        "train",
        "--data={c}/nowhere --out_dir={c}/out",
        2,
        "nowhere/manifest.json: No such file or directory; data/prepare.py makes",
    ),
    ("train", "--data={w}/base/checkpoints/step-300 --out_dir={c}/out", 2, "not a dataset's manifest"),
    ("train", "--data={w}/data --out_dir={c}/out --block_size=9999999", 2, "fewer than one block of 9999999"),
    ("train", "--data={w}/data --out_dir={c}/out --n_head=5 --n_embd=25", 2, "even head size"),
    ("train", "--data={w}/data --out_dir={c}/out --n_head=5", 2, "n_embd 384 is not divisible by n_head 5"),
    ("train", "--data={w}/data --out_dir={w}/base", 2, "a run is there already; add --resume"),
    (
        "train",
        "--data={c}/chars --out_dir={w}/base --resume --n_layer=2 --n_head=2 --n_embd=64 --block_size=64 --batch_size=16",
        2,
        "vocab_size was",
    ),
    ("train", "--data={w}/data --out_dir={c}/out --device=cuda:77", 2, "CUDA devices"),
    (
        "train",
        "{c}/run.toml --data={w}/data --out_dir={c}/out",
        2,
        "run.toml:2: max_stepz = 3: no such option; did you mean max_steps?",
    ),
    ("train", "{c}/none.toml --data={w}/data --out_dir={c}/out", 2, "none.toml: No such file"),
    ("finetune", "--init_from={c}/nowhere --data={c}/good.jsonl --out_dir={c}/out", 2, "nowhere: no such run or checkpoint"),
    ("finetune", "--init_from={w}/base --data={c}/nowhere.jsonl --out_dir={c}/out", 2, "nowhere.jsonl: no such file"),
    ("finetune", "--init_from={w}/base --data={c}/broken.jsonl --out_dir={c}/out", 2, "broken.jsonl:2: not JSON"),
    (
        "finetune",
        "--init_from={w}/base --data={c}/good.jsonl --val_data={c}/long.jsonl --out_dir={c}/out",
        2,
        "long.jsonl:1: longer than the context of 64 tokens; no conversation is left to validate with",
    ),
    (
        "finetune",
        "--init_from={w}/base --data={c}/good.jsonl --out_dir={c}/out --val_fraction=0.0001",
        2,
        "good.jsonl:2: a duplicate; no conversation is left to validate with",
    ),
    (
        "finetune",
        "--init_from={w}/base --data={w}/qa_train.jsonl --val_data={c}/good.jsonl --out_dir={c}/out --replay_data={c}/chars",
        2,
        "chars: its tokenizer is not the checkpoint's",
    ),
    (
        "finetune",
        "--init_from={w}/base --data={w}/qa_train.jsonl --val_data={c}/good.jsonl --out_dir={w}/chat",
        2,
        "a run is there already",
    ),
    *(
        ("finetune", f"--init_from={{w}}/base --out_dir={{c}}/out --data {{c}}/{name}", 2, message)
        for name, message in (
            (
                "key.jsonl",
                "key.jsonl:2: the keys question: none of the known shapes of a row: messages; conversations; question and answer",
            ),
            ("role.jsonl", "role.jsonl:2: messages.1.role: 'robot' is none of system, user and assistant"),
            ("twice.jsonl", "twice.jsonl:2: after an optional system message, user and assistant must take turns"),
            ("number.jsonl", "number.jsonl:2: messages.1.content: Input should be a valid string"),
            ("unanswered.jsonl", "unanswered.jsonl:2: the last message must be the assistant's"),
            ("weightless.jsonl", "weightless.jsonl:2: weight: Input should be greater than 0"),
            ("pair.jsonl", "pair.jsonl:2: rows with one answer and rows with chosen and rejected answers need files"),
            (
                "same.jsonl",
                "same.jsonl:2: rows with one answer and rows with chosen and rejected answers need files of their own",
            ),
            ("empty.jsonl", "empty.jsonl:1: empty answer; nothing is left to train on"),
            ("all_long.jsonl", "all_long.jsonl:1: longer than the context of 64 tokens; nothing is left to train on"),
            ("all_long.jsonl --too_long=truncate", "all_long.jsonl:1: no room for an answer in the context of 64"),
            ("table.csv", "table.csv:3: 2 columns are needed"),
            ("list.json", "list.json:2: the keys question: none of the known shapes"),
            ("good.jsonl:0", "good.jsonl:0: the weight after the colon must be a positive number"),
            ("good.jsonl:many", "good.jsonl:many: no such file"),
            ("good.jsonl {c}/pairs.jsonl --val_data={w}/qa_test.jsonl", "rows do not go together"),
            ("pairs.jsonl --val_data={w}/qa_test.jsonl", "Conversation and Preference rows do not go together"),
        )
    ),
    *(
        (
            "finetune",
            f"--init_from={{w}}/base --data={{w}}/qa_train.jsonl --out_dir={{c}}/out --val_fraction=0.2 {more}",
            2,
            message,
        )
        for more, message in (
            ("--lora_rank=2 --lora_targets q gate", "no linear layer named gate; it has fc head k proj q v"),
            ("--lora_rank=2 --freeze_layers=1", "nothing else is left to freeze"),
            ("--lora_merge", "lora_merge needs adapters"),
            ("--freeze_layers=3", "--freeze_layers=3: the model has 2 blocks"),
            ("--lora_rank=-1", "--lora_rank=-1"),
            ("--replay=1", "--replay=1"),
            ("--too_long=cut", "--too_long=cut"),
        )
    ),
    ("finetune", "--init_from={c}/lora --data={w}/qa_train.jsonl --out_dir={c}/out", 2, "it is not at gone any more"),
    ("finetune", "--init_from={c}/chars --data={w}/qa_train.jsonl --out_dir={c}/out", 2, "chars: a dataset, not a checkpoint"),
    (
        "finetune",
        "--init_from={w}/base --data={w}/qa_train.jsonl --val_fraction=0.2 --out_dir={w}/chat --resume --lora_rank=2",
        2,
        "lora_rank was 0, now it is 2; resume as it was",
    ),
    (
        "finetune",
        "--init_from={c}/char_run --data={w}/qa_train.jsonl --out_dir={c}/out",
        2,
        "qa_train.jsonl:1: character 'W'",
    ),
    ("chat", "--checkpoint={c}/lora --base={c}/char_run --ask=hi", 2, "adapters for another base than"),
    ("sample", "--checkpoint={c}/lora", 2, "adapters alone; name the checkpoint that they were made for with --base"),
    ("evaluate", "--checkpoint={w}/base", 2, "nothing to measure"),
    ("evaluate", "--checkpoint={c}/nowhere --questions={c}/good.jsonl", 2, "nowhere: no such run"),
    ("evaluate", "--checkpoint={w}/base --questions={c}/nowhere.jsonl", 2, "nowhere.jsonl: no such file"),
    ("evaluate", "--checkpoint={w}/base --questions={c}/broken.jsonl", 2, "broken.jsonl:2: not JSON"),
    (
        "evaluate",
        "--checkpoint={w}/base --questions={c}/pairs.jsonl",
        2,
        "pairs.jsonl:1: a row with chosen and",
    ),
    ("evaluate", "--checkpoint={w}/base --choices={c}/good.jsonl", 2, "good.jsonl:1: question, choices and answer are needed"),
    ("evaluate", "--checkpoint={w}/base --choices={c}/quiz.jsonl", 2, "quiz.jsonl:1: question, choices and answer are needed"),
    ("chat", "--checkpoint={w}/chat --questions={c}/nowhere.txt", 2, "nowhere.txt: no such file; it must contain questions"),
    ("chat", "--checkpoint={w}/chat --questions={c}/empty.txt", 2, "empty.txt: no questions in this file"),
    ("chat", "--checkpoint={w}/chat --questions={c}/good.jsonl --ask=hi", 2, "ask and questions exclude each other"),
    ("chat", "--checkpoint={w}/chat --questions={c}/good.jsonl --out={c}/good.jsonl", 2, "good.jsonl:1: not the answer to"),
    ("chat", "--checkpoint={w}/chat --out={c}/x.jsonl", 2, "out is for the answers to --questions"),
    ("evaluate", "--checkpoint={w}/base --text={c}/nowhere.txt", 2, "nowhere.txt: no such file or directory"),
    (
        "evaluate",
        "--checkpoint={w}/base --text={c}/flipped/model.safetensors",
        2,
        "model.safetensors: weights and arrays are not read",
    ),
    ("evaluate", "--checkpoint={w}/base --text={w}/corpus.jsonl --json={c}/no/where.json", 2, "its directory does not exist"),
    ("sample", "--checkpoint={c}/nowhere", 2, "nowhere: no such run or checkpoint"),
    ("sample", "--checkpoint={w}/data", 2, "data: a dataset, not a checkpoint"),
    ("sample", "--checkpoint={w}", 2, "not a checkpoint (no manifest.json)"),
    ("sample", "--checkpoint={c}/flipped", 2, "flipped/model.safetensors: changed or cut short"),
    ("sample", "--checkpoint={c}/cut", 2, "cut/model.safetensors: changed or cut short"),
    ("sample", "--checkpoint={c}/missing", 2, "missing/model.safetensors: No such file"),
    ("sample", "--checkpoint={c}/nan", 1, "head.weight holds numbers that are not finite"),
    ("sample", "--checkpoint={c}/char_run --prompt=ação", 2, "character 'ç' (position 1"),
    ("sample", "--checkpoint={w}/base --temperature=-1", 2, "--temperature=-1"),
    ("sample", "--checkpoint={w}/base --temperature=nan", 2, "--temperature=nan"),
    ("sample", "--checkpoint={w}/base --temperature=inf", 2, "--temperature=inf"),
    ("sample", "--checkpoint={w}/base --top_k=-1", 2, "--top_k=-1"),
    ("sample", "--checkpoint={w}/base --top_p=0", 2, "--top_p=0"),
    ("sample", "--checkpoint={w}/base --num_samples=0", 2, "--num_samples=0"),
    ("sample", "--checkpoint={w}/base --top_p=1.5", 2, "--top_p=1.5"),
    ("sample", "--checkpoint={w}/base --frequency_penalty=nan", 2, "--frequency_penalty=nan"),
    ("sample", "--checkpoint={w}/base --logit_bias=the=2", 2, "must be written ID=VALUE"),
    ("sample", "--checkpoint={w}/base --logit_bias=99999=1", 2, "token 99999: the vocabulary has the ids 0 to 299"),
    ("sample", "--checkpoint={w}/base --prompts={c}/none.txt", 2, "none.txt: no such file"),
    ("sample", "--checkpoint={w}/base --prompts={c}/broken.jsonl", 2, 'broken.jsonl:1: an object with a text under "prompt"'),
    ("sample", "--checkpoint={w}/base --prompts={c}/empty.txt", 2, "empty.txt: no prompts in this file"),
    ("sample", "--checkpoint={w}/base --prompts={c}/latin.txt", 2, "latin.txt:2: not UTF-8 at byte 1"),
    ("sample", "--checkpoint={w}/base --prompt=a --prompts={c}/latin.txt", 2, "exclude each other"),
    ("sample", "--checkpoint={w}/base --logprobs=3", 2, "logprobs needs --json"),
    ("chat", "--checkpoint={c}/nowhere --ask=hi", 2, "nowhere: no such run"),
    ("chat", "--checkpoint={w}/chat --ask=" + "x" * 300, 2, "ask a shorter one"),
    ("prepare", "", 2, "--input and --out are required"),
    ("prepare", "--input={c}/empty.txt", 2, "--input and --out are required"),
    ("prepare", "--inputs=x --out={c}/out", 2, "--inputs=x: no such option; did you mean --input?"),
    ("prepare", "--inspect={c}/nowhere", 2, "nowhere/manifest.json: No such file or directory; data/prepare.py makes"),
    ("prepare", "--inspect={w}/base", 2, "base/manifest.json: No such file"),
    ("prepare", "--inspect={c}/cut_data", 2, "train-00000.npy: cut short or changed since it was written"),
    ("prepare", "--inspect={c}/edited_data", 2, "manifest.json: changed or cut short since it was written"),
    *(
        ("prepare", f"--out={{c}}/out --workers=1 {more}", 2, message)
        for more, message in (
            ("--input={c}/nowhere.txt", "nowhere.txt: no such file or directory"),
            ("--input={c}/folder", "folder: a directory without files"),
            ("--input={c}/*.nothing", "*.nothing: no file has a name like that"),
            ("--input={c}/empty.txt", "empty.txt: no text in there"),
            ("--input={c}/empty.txt --tokenizer=byte", "empty.txt: no text in there"),
            ("--input={c}/nothing.txt", "nothing.txt: no text in there"),
            ("--input=- --tokenizer=byte", "-: no text in there"),
            ("--input={c}/latin.txt", "latin.txt:2: not utf-8 at byte"),
            ("--input={c}/utf16.txt", "utf16.txt:1: begins like UTF-16; --encoding utf-16 reads it"),
            ("--input={c}/nul.txt", "nul.txt:2: a NUL byte. Not text?"),
            ("--input={c}/short.txt --tokenizer=byte", "too short a text to hold out 0.05 of it"),
            ("--input={c}/empty.txt --encoding=utf-9", "--encoding=utf-9: no such encoding"),
            ("--input={c}/broken.jsonl --text_key=question", "broken.jsonl:2: not JSON"),
            ("--input={c}/good.jsonl", 'good.jsonl:1: no text under the key "text"; --text_key names another'),
            ("--input={c}/deep.jsonl", "deep.jsonl:1: JSON nested too deep"),
            ("--input={c}/digits.jsonl", "digits.jsonl:1: a number with thousands of digits"),
            ("--input={c}/half.jsonl", "half.jsonl:1: half a surrogate pair in the text"),
            ("--input={c}/cut.txt.gz", "cut.txt.gz: cut short or damaged"),
            ("--input={c}/cut.txt.zst", "cut.txt.zst: cut short or damaged"),
            ("--input={c}/not.parquet", "not.parquet: not a whole .parquet file"),
            ("--input={c}/numbers.parquet", "numbers.parquet: column 'text' holds int64, not text"),
            ("--input={c}/numbers.parquet --text_key=body", "numbers.parquet: no column 'body' among text"),
            ("--input={c}/train.bin", "train.bin: papagaio reads no pickles"),
            ("--input={c}/weights.pt", "weights.pt: papagaio reads no pickles"),
            ("--input={c}/chars", "papagaio reads no pickles or bare arrays"),
            ("--input={c}/strange.txt --split_documents=", "the text between documents cannot be empty"),
            ("--input={c}/strange.txt --split_documents=aba", "begins as it ends"),
            ("--input={c}/strange.txt --tokenizer=morse", "--tokenizer=morse: neither byte, char, bpe, gpt2 nor a directory"),
            ("--input={c}/strange.txt --tokenizer={c}/folder", "tokenizer.json: No such file or directory; a tokenizer"),
            ("--input={c}/strange.txt --tokenizer={c}/chars/tokenizer", "character 'ß' (position 4"),
            ("--input={c}/strange.txt --tokenizer=gpt2 --ranks={c}/nowhere", "nowhere: No such file or directory; expected"),
            ("--input={c}/strange.txt --tokenizer=gpt2 --ranks={c}/ranks.tiktoken", "ranks.tiktoken:2: not tiktoken's format"),
            ("--input={c}/strange.txt --vocab_size=100", "--vocab_size=100"),
            ("--input={c}/strange.txt --val_fraction=1", "--val_fraction=1"),
            ("--input={c}/strange.txt --shard_tokens=10", "--shard_tokens=10"),
            ("--input={c}/strange.txt --workers=0", "--workers=0"),
            ("--input={c}/strange.txt --part=2/2", "parts are counted from 0 to n - 1"),
            ("--input={c}/strange.txt --part=first", "--part=first"),
            ("--input=- --part=0/2", "standard input cannot be shared"),
            ("--input={c}/strange.txt --out={c}/occupied", "occupied: exists and is not a dataset"),
            ("--input={c}/strange.txt --out={c}/chars", "chars: a dataset made from other input or with other options"),
        )
    ),
    *(
        ("train", f"--out_dir={{c}}/out {more}", 2, message)
        for more, message in (
            ("--data={c}/train.bin", "train.bin: papagaio reads no pickles"),
            ("--data={c}/nano", "nano/train.bin: papagaio reads no pickles"),
            ("--data={c}/cut_data --block_size=16", "train-00000.npy: cut short or changed since it was written"),
            ("--data={c}/edited_data", "manifest.json: changed or cut short since it was written"),
            ("--data={w}/data --max_steps=1e3", "--max_steps=1e3"),
            ("--data={w}/data --micro_batch_size=5", "micro_batch_size 5 does not divide batch_size 32"),
            ("--data={w}/data --resume --overwrite", "resume and overwrite exclude each other"),
            ("--data={w}/data --depth=2 --budget=1m", "depth and budget exclude each other"),
            ("--data={w}/data --budget=soon", "--budget=soon"),
            ("--data={w}/data --n_kv_head=4", "n_head 6 is not divisible by n_kv_head 4"),
            ("", "--data is required: dataset directories, made by data/prepare.py"),
        )
    ),
    ("train", "{c}/deep.toml --data={w}/data --out_dir={c}/out", 2, "deep.toml: TOML nested too deep"),
    ("train", "{c}/dots.toml --data={w}/data --out_dir={c}/out", 2, "dots.toml: too long, or a key with too many dots"),
    ("train", "{c}/typed.toml --data={w}/data --out_dir={c}/out", 2, "typed.toml:1: max_steps = 'many': Input should be"),
    ("train", "{c}/run.toml {c}/run.toml", 2, "run.toml: unexpected argument; options are written --key=value"),
    ("train", "{c}/weights.pt --data={w}/data --out_dir={c}/out", 2, "weights.pt: not UTF-8 at byte"),
    *(
        ("finetune", f"--init_from={{w}}/base --out_dir={{c}}/out {more}", 2, message)
        for more, message in (
            ("--data={c}/weights.pt", "weights.pt: papagaio reads no pickles"),
            ("--data={c}/deep.json", "deep.json:1: JSON nested too deep"),
            ("--data={c}/digits.jsonl", "digits.jsonl:1: a number with thousands of digits"),
            ("--data={c}/half.jsonl", "half.jsonl:1: messages.1.content: half a surrogate pair"),
            ("--data={c}/latin.jsonl", "latin.jsonl:1: not UTF-8 at byte 29 of the line"),
            ("--data={c}/quote.csv", "quote.csv:2: not CSV"),
            ("--data={c}/much.csv", "much.csv:2: weight: Input should be a valid number"),
            ("--data={c}/not.parquet", "not.parquet: not a whole .parquet file"),
            ("--data={c}/empty.txt", "empty.txt: no questions and answers in this file"),
            ("--data={c}/good.jsonl --val_data={c}/nowhere.jsonl", "nowhere.jsonl: no such file"),
            ("--data={c}/good.jsonl --test_data={c}/broken.jsonl", "broken.jsonl:2: not JSON"),
            ("--data={w}/qa_train.jsonl --replay_data={w}/base", "base/manifest.json: No such file"),
            ("--data={w}/qa_train.jsonl --dpo_beta=0", "--dpo_beta=0"),
            ("--data={w}/qa_train.jsonl --train_on=first", "--train_on=first"),
            ("", "--data is required"),
        )
    ),
    *(
        (script, f"{argument}={{c}}/{name} {more}", 2, message)
        for script, argument, more in (
            ("finetune", "--init_from", "--data={w}/qa_train.jsonl --out_dir={c}/out"),
            ("evaluate", "--checkpoint", "--questions={c}/good.jsonl"),
            ("sample", "--checkpoint", ""),
            ("chat", "--checkpoint", "--ask=hi"),
        )
        for name, message in (
            ("weights.pt", "weights.pt: papagaio reads no pickles"),
            ("theirs", "theirs/pytorch_model.bin: papagaio reads no pickles"),
            ("layers", "layers/model.json: n_layer is 1000000000"),
            ("wide", "wide/model.json: n_embd is 1000000000"),
            ("long", "long/model.json: block_size is 1000000000000"),
            ("hidden", "where the model has float32 [1000000000000, 16]"),
            ("typed", "typed/model.json: n_head must be"),
            ("unknown", "n_layerz"),
            ("double", "double/model.safetensors: head.weight is float64"),
            ("pickled", "pickled/model.safetensors: papagaio reads no pickles"),
            ("listed", "listed/state.json: not a JSON object"),
        )
    ),
    *(
        ("evaluate", f"--checkpoint={{w}}/base {more}", 2, message)
        for more, message in (
            ("--text={c}/train.bin", "train.bin: papagaio reads no pickles"),
            ("--text={c}/utf16.txt", "utf16.txt:1: begins like UTF-16"),
            ("--text={c}/cut.txt.gz", "cut.txt.gz: cut short or damaged"),
            ("--text={c}/folder", "folder: a directory without files"),
            ("--text={c}/edited_data", "manifest.json: changed or cut short since it was written"),
            ("--questions={c}/train.bin", "train.bin: papagaio reads no pickles"),
            ("--questions={c}/empty.txt", "empty.txt: no questions and answers in this file"),
            ("--choices={c}/empty.txt", "empty.txt: no questions with choices in this file"),
            ("--choices={c}/deep.json", "deep.json:1: JSON nested too deep"),
            ("--questions={c}/good.jsonl --shots_data={c}/nowhere.jsonl", "nowhere.jsonl: no such file"),
            ("--questions={c}/good.jsonl --shots=-1", "--shots=-1"),
            ("--questions={c}/good.jsonl --device=tpu", "--device=tpu"),
        )
    ),
    ("evaluate", "--questions={c}/good.jsonl", 2, "--checkpoint is required"),
    *(
        ("sample", f"--checkpoint={{w}}/base {more}", 2, message)
        for more, message in (
            ("--prompts={c}/deep.jsonl", "deep.jsonl:1: JSON nested too deep"),
            ("--prompts={c}/utf16.txt", "utf16.txt:1: not UTF-8 at byte 0"),
            ("--show_probs --json", "show_probs is for people"),
            ("--dtype=float8", "--dtype=float8"),
            ("--logit_bias=-1=1", "token -1: the vocabulary has the ids 0 to 299"),
            ("--logit_bias=5", "must be written ID=VALUE"),
            ("--stop", "--stop"),
        )
    ),
    *(
        ("chat", f"--checkpoint={{w}}/chat {more}", 2, message)
        for more, message in (
            ("--ask=hi --system=" + "x" * 300, "the model's context only 64"),
            ("--asks=hi", "--asks=hi: no such option; did you mean --ask?"),
            ("--ask=hi --temperature=warm", "--temperature=warm"),
            ("--ask=hi --max_new_tokens=0", "--max_new_tokens=0"),
            ("--ask=hi --logit_bias=99999=1", "token 99999: the vocabulary has the ids 0 to 299"),
        )
    ),
    ("chat", "--checkpoint={w}/data --ask=hi", 2, "data: a dataset, not a checkpoint"),
    ("chat", "--checkpoint={c}/char_run --ask=ação", 2, "character 'ç' (position 1"),
    ("chat", "--ask=hi", 2, "--checkpoint is required"),
]


@pytest.mark.parametrize(("name", "arguments", "status", "message"), CASES, ids=[f"{case[0]} {case[3][:40]}" for case in CASES])
def test_a_mistake_is_one_line_and_changes_nothing(
    name: str, arguments: str, status: int, message: str, world: Path, corner: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    monkeypatch.setitem(sys.modules, "prepare", prepare)
    before = snapshot(world) | snapshot(corner)
    found, out, err = call(name, *(word.format(w=world, c=corner) for word in arguments.split()))
    assert found == status, err
    assert message in err
    assert out.strip() == ""
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert errors == [err.splitlines()[-1]]
    assert "Traceback" not in err
    assert snapshot(world) | snapshot(corner) == before


def test_a_prompt_that_is_not_utf8(world: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"ab\xff")))
    status, _, err = call("sample", "--checkpoint", world / "base", "--prompt=-")
    assert status == 2
    assert "standard input: not UTF-8 at byte 2" in err


def test_a_long_prompt_is_said_and_works(world: Path, call: Call) -> None:
    status, out, err = call("sample", "--checkpoint", world / "base", "--prompt", "x " * 200, "--max_new_tokens=2")
    assert status == 0
    assert "the model sees the last 64" in err
    assert out.startswith("x " * 200)


def test_a_top_k_above_the_vocabulary_is_all_of_it(world: Path, call: Call) -> None:
    command = ["--checkpoint", world / "base", "--max_new_tokens=8", "--dtype=float32"]
    assert call("sample", *command, "--top_k=99999") == call("sample", *command)
