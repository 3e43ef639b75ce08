"""No file is trusted: damage is reported, absurd sizes need no memory, and no file runs code."""

import io
import json
import pickle
import random
import resource
import shutil
import struct
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Call, trained
from safetensors.torch import load_file, save_file

from data import prepare
from model import GPT, GPTConfig
from papagaio.corpus.assembly import read_index
from papagaio.corpus.dataset import SPLITS, Dataset
from papagaio.errors import MachineError, UserError
from papagaio.files import file_sha256, sealed
from papagaio.runs.checkpoint import Checkpoint, contents, model_maker, write_checkpoint
from papagaio.runs.directory import open_checkpoint
from papagaio.tokenizer import Tokenizer
from papagaio.tokenizer_files import load_tokenizer
from papagaio.training.lora import add_adapters
from papagaio.training.optimizers import make_optimizers
from papagaio.training.options import RunOptions

CPU = torch.device("cpu")
BASE, ADAPTED = Path("base/checkpoints/step-1"), Path("lora/checkpoints/step-1")


def adapted(gpt: GPT) -> GPT:
    add_adapters(gpt, ("q", "fc", "head"), rank=2, alpha=4)
    return gpt


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, a run with its tokenizer, a run of adapters for that model, and some questions."""
    home = tmp_path_factory.mktemp("home")
    texts = [f"Text number {i} tells of the parrot, which is {'green' if i % 2 else 'grey'}.\n" * 3 for i in range(40)]
    (home / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = {"vocab_size": 270, "workers": 1, "val_fraction": 0.2, "shard_tokens": 1024}
    prepare.main(prepare.PrepareOptions(input=(str(home / "corpus.jsonl"),), out=home / "data", **options))
    tokenizer = Dataset(home / "data").tokenizer
    write_run(home, tokenizer)
    rows = [{"question": f"Which is {i}?", "answer": "green"} for i in range(9)]
    (home / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


def write_run(home: Path, tokenizer: Tokenizer) -> None:
    torch.manual_seed(1)
    gpt = GPT(GPTConfig(tokenizer.vocab_size, block_size=32, n_layer=1, n_head=1, n_embd=8))
    state = {"step": 1, "stage": "pretrain", "optimizer": "muon"}
    write_checkpoint(home / BASE, contents(gpt, trained(gpt), state), tokenizer)
    state |= {"stage": "finetune", "base_sha256": file_sha256(home / BASE / "model.safetensors")}
    small = contents(adapted(gpt), trained(gpt), state)
    write_checkpoint(home / ADAPTED, small, tokenizer)
    for run in ("base", "lora"):
        (home / run / "checkpoints" / "last").write_text("step-1\n")
    (home / "lora" / "config.toml").write_text(f'init_from = "{home / "base"}"\n')


make = model_maker(GPT, GPTConfig)


def load_all(home: Path) -> None:
    """Load everything in the dataset and in both checkpoints."""
    dataset = Dataset(home / "data")
    for split in SPLITS:
        dataset.shards(split)
    for path in (BASE, ADAPTED):
        checkpoint = open_checkpoint(home / path)
        checkpoint.build(make, CPU, torch.float32)
        model = make(checkpoint.model_fields)
        model = adapted(model) if checkpoint.base else model
        checkpoint.load_model(model)
        checkpoint.load_optimizers(model, make_optimizers(model, RunOptions(out_dir=Path("x"))))


def kept(home: Path) -> list[Path]:
    return sorted(f for part in ("data", BASE, ADAPTED) for f in (home / part).rglob("*") if f.is_file())


def damages(files: list[Path], count: int) -> Iterator[tuple[Path, bytes]]:
    """Pairs (file, its damaged content) for all files in turn: with one bit flipped, or cut short."""
    rng = random.Random(20261124)
    for number in range(count):
        file = files[number % len(files)]
        data = bytearray(file.read_bytes())
        place = rng.choice((rng.randrange(len(data)), rng.randrange(min(len(data), 300)), len(data) - 1))
        if number // len(files) % 4 == 3:
            del data[place:]
        else:
            data[place] ^= 1 << rng.randrange(8)
        yield file, bytes(data)


def check_damages(home: Path, count: int) -> None:
    load_all(home)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for file, damaged in damages(kept(home), count):
        whole = file.read_bytes()
        file.write_bytes(damaged)
        with pytest.raises((UserError, MachineError)) as error:
            load_all(home)
        assert str(file) in str(error.value), (file, str(error.value))
        file.write_bytes(whole)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB
    load_all(home)


def test_a_flipped_bit_or_a_cut_is_seen_and_named(home: Path) -> None:
    check_damages(home, 120)


@pytest.mark.slow
def test_two_thousand_flipped_bits_and_cuts_are_seen_and_named(home: Path) -> None:
    check_damages(home, 2000)


@pytest.mark.slow
def test_every_bit_of_the_small_files_is_watched(home: Path) -> None:
    """The manifests and tokenizer.json, whose sha256 stands in no other file."""
    for file, read in (
        (home / "data" / "manifest.json", lambda: Dataset(home / "data")),
        (home / "data" / "tokenizer" / "tokenizer.json", lambda: Dataset(home / "data")),
        (home / BASE / "manifest.json", lambda: open_checkpoint(home / BASE)),
    ):
        whole = file.read_bytes()
        for place in range(0, len(whole), 13):
            for bit in range(8):
                file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
                with pytest.raises(UserError, match="json"):
                    read()
        file.write_bytes(whole)


def test_a_missing_file_is_named(home: Path) -> None:
    for file in kept(home):
        file.rename(file.with_suffix(".away"))
        with pytest.raises(UserError) as error:
            load_all(home)
        assert str(file) in str(error.value) or file.name == "manifest.json"
        file.with_suffix(".away").rename(file)


def test_what_a_person_puts_beside_is_no_damage(home: Path) -> None:
    (home / BASE / "notes.txt").write_text("mine")
    load_all(home)
    (home / BASE / "notes.txt").unlink()


# Files that are what their manifest says, and still not what they should be


def reseal(directory: Path) -> None:
    """Write a manifest again, so that it verifies the changed files."""
    manifest = json.loads((directory / "manifest.json").read_text())
    del manifest["sha256"]
    if "files" in manifest:
        manifest["files"] = {name: file_sha256(directory / name) for name in manifest["files"]}
    else:
        for shard in (shard for split in manifest["splits"].values() for shard in split["shards"]):
            shard["sha256"] = file_sha256(directory / shard["file"])
        manifest["tokenizer_sha256"] = file_sha256(directory / "tokenizer" / "tokenizer.json")
    (directory / "manifest.json").write_text(sealed(manifest))


@pytest.fixture
def copy(home: Path, tmp_path: Path) -> Path:
    shutil.copytree(home, tmp_path / "home")
    (tmp_path / "home" / "lora" / "config.toml").write_text(f'init_from = "{tmp_path / "home" / "base"}"\n')
    return tmp_path / "home"


def bounded(do: Callable[[], Any]) -> str:
    """The message of the UserError that `do` raises; it must use less than 20 MB until then."""
    tracemalloc.start()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with pytest.raises(UserError) as error:
            do()
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024
    return str(error.value)


DEEP = "[" * 100_000
FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"n_layer": 10**9}, "n_layer is 1000000000"),
    ({"n_embd": 10**9}, "n_embd is 1000000000"),
    ({"block_size": 10**12}, "block_size is 1000000000000"),
    ({"vocab_size": 10**9}, "vocab_size is 1000000000"),
    ({"vocab_size": 269}, "vocab_size is 269"),
    ({"n_layer": 0}, "n_layer is 0"),
    ({"n_layer": 2}, "blocks.1.attn.q.weight is missing"),
    ({"n_layer": "1"}, "n_layer is '1'"),
    ({"n_layer": True}, "n_layer is True"),
    ({"n_head": 10**9}, "n_embd 8 must be divisible by n_head"),
    ({"n_head": "1"}, "n_head must be int, not '1'"),
    ({"n_head": 1.0}, "n_head must be int, not 1.0"),
    ({"mlp_hidden": 10**12}, "where the model has float32 [1000000000000, 8]"),
    ({"mlp_hidden": 10**30}, "model.json"),
    ({"bigram_rows": 10**15}, "bigram_embed.weight is missing"),
    ({"dropout": "much"}, "dropout must be float, not 'much'"),
    ({"bias": 1}, "bias must be bool, not 1"),
    ({"position": 3}, "position must be str, not 3"),
    ({"window_size": -1}, "window_size must not be negative"),
    ({"nn_layer": 1}, "nn_layer"),
]


@pytest.mark.parametrize(("changes", "message"), FIELDS, ids=[str(case[0]) for case in FIELDS])
def test_a_model_json_that_the_weights_are_not_of(copy: Path, changes: dict[str, Any], message: str) -> None:
    fields = json.loads((copy / BASE / "model.json").read_text())
    (copy / BASE / "model.json").write_text(json.dumps(fields | changes))
    reseal(copy / BASE)
    found = bounded(lambda: open_checkpoint(copy / BASE).build(make, CPU, torch.float32))
    assert message in found
    assert str(copy / BASE) in found


@pytest.mark.parametrize("name", ["n_layer", "mlp_hidden", "block_size"])
def test_fine_tuning_makes_no_model_of_absurd_size(copy: Path, name: str, call: Call) -> None:
    fields = json.loads((copy / BASE / "model.json").read_text())
    (copy / BASE / "model.json").write_text(json.dumps(fields | {name: 10**12}))
    reseal(copy / BASE)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status, _, err = call("finetune", "--init_from", copy / BASE, "--data", copy / "qa.jsonl", "--out_dir", copy / "out")
    assert (status, err.count("\n")) == (2, 1), err
    assert str(10**12) in err
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


def changed(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def with_header(path: Path, header: dict[str, Any] | bytes, length: int | None = None) -> None:
    """Write a safetensors file with this header, which claims to have this length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(64))


def big(offsets: list[int], shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"embed.weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


WEIGHTS: list[tuple[Callable[[Path, str], Any], str]] = [
    # what is done to a file and one tensor {t} in it
    (lambda f, t: changed(f, lambda held: held.update({t: held[t].double()})), "{t} is float64 ["),
    (lambda f, t: changed(f, lambda held: held.update({t: held[t].bfloat16()})), "{t} is bfloat16 ["),
    (lambda f, t: changed(f, lambda held: held.update({t: held[t][1:]})), "{t} is float32 ["),
    (lambda f, t: changed(f, lambda held: held.pop(t)), "{t} is missing where"),
    (lambda f, t: changed(f, lambda held: held.update(more=torch.zeros(3))), "more is float32 [3] where"),
    (lambda f, t: with_header(f, b"{}", 2**60), "not a safetensors file"),
    (lambda f, t: with_header(f, b"{}", 0), "not a safetensors file"),
    (lambda f, t: with_header(f, big([0, 2**62], [2**30, 2**30])), "not a safetensors file"),
    (lambda f, t: with_header(f, big([0, 64], [2**62, 2**62])), "not a safetensors file"),
    (lambda f, t: with_header(f, big([0, 64], [16], "F128")), "not a safetensors file"),
    (lambda f, t: with_header(f, big([8, 0], [16])), "not a safetensors file"),
    (lambda f, t: with_header(f, DEEP.encode()), "not a safetensors file"),
    (lambda f, t: f.write_bytes(b""), "not a safetensors file"),
    (lambda f, t: torch.save({"embed.weight": torch.zeros(2)}, f), "reads no pickles"),
    (lambda f, t: f.write_bytes(pickle.dumps({})), "reads no pickles"),
]


@pytest.mark.parametrize(("change", "message"), WEIGHTS, ids=[f"{i} {case[1]}" for i, case in enumerate(WEIGHTS)])
@pytest.mark.parametrize(
    ("file", "tensor"),
    [
        (BASE / "model.safetensors", "head.weight"),
        (ADAPTED / "adapter_model.safetensors", "base_model.model.head.lora_B.weight"),
        (BASE / "optimizer.safetensors", "0.head.weight.exp_avg"),
    ],
)
def test_tensors_that_are_not_the_models(
    copy: Path, file: Path, tensor: str, change: Callable[[Path, str], Any], message: str
) -> None:
    change(copy / file, tensor)
    reseal((copy / file).parent)

    def read() -> None:
        checkpoint = open_checkpoint((copy / file).parent)
        model = checkpoint.build(make, CPU, torch.float32)
        checkpoint.load_optimizers(model, make_optimizers(model, RunOptions(out_dir=Path("x"))))

    found = bounded(read)
    assert f"{copy / file}: " in found
    assert message.format(t=tensor) in found


SHARDS: list[tuple[str, str]] = [
    ("{'descr': '<u2', 'fortran_order': False, 'shape': (1000000000000000,)}", "mmap length is greater"),
    ("{'descr': '<u2', 'fortran_order': False, 'shape': (10000000000000000000000000,)}", "not a whole .npy"),
    ("{'descr': '<u2', 'fortran_order': False, 'shape': (-3,)}", "not a whole .npy"),
    ("{'descr': '<u2', 'fortran_order': False, 'shape': (" + "-" * 9000 + "3,)}", "not a whole .npy"),
    ("{'descr': '|O', 'fortran_order': False, 'shape': (3,)}", "not a whole .npy"),
    ("{'descr': '<f8', 'fortran_order': False, 'shape': (3,)}", "float64 (3,) where the manifest says uint16"),
    ("{'descr': '<u2', 'fortran_order': False, 'shape': (3,)}", "uint16 (3,) where the manifest says uint16"),
    ("{[]: 1}", "not a whole .npy"),
    ("__import__('os').system('touch canary')", "not a whole .npy"),
    ("x" * 60_000, "not a whole .npy"),
]


@pytest.mark.parametrize(("header", "message"), SHARDS, ids=[case[0][:60] for case in SHARDS])
def test_shards_that_are_not_tokens(copy: Path, header: str, message: str) -> None:
    shard = copy / "data" / "train-00000.npy"
    text = header.encode() + b"\n"
    shard.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(64))
    reseal(copy / "data")
    found = bounded(lambda: Dataset(copy / "data").shards("train"))
    assert message in found
    assert str(shard) in found


NAMES = ["../../secret", "/etc/passwd", "a/../../../secret", "", ".", "a//b", "nul\0"]


@pytest.mark.parametrize("name", NAMES)
def test_manifests_name_nothing_outside_their_directory(copy: Path, name: str) -> None:
    manifest = json.loads((copy / BASE / "manifest.json").read_text())
    manifest["files"][name] = "0" * 64
    del manifest["sha256"]
    (copy / BASE / "manifest.json").write_text(sealed(manifest))
    assert "is not the name of a file in this directory" in bounded(lambda: open_checkpoint(copy / BASE))
    manifest = json.loads((copy / "data" / "manifest.json").read_text())
    manifest["splits"]["val"]["shards"][0]["file"] = name
    del manifest["sha256"]
    (copy / "data" / "manifest.json").write_text(sealed(manifest))
    assert "is not the name of a file in this directory" in bounded(lambda: Dataset(copy / "data"))


@pytest.mark.parametrize("text", ["../../../elsewhere", "/etc", "", "a\0b", "step-2"])
def test_last_names_a_checkpoint_beside_it(copy: Path, text: str) -> None:
    (copy / "base" / "checkpoints" / "last").write_text(text)
    assert "checkpoints" in bounded(lambda: open_checkpoint(copy / "base"))


def test_adapters_are_not_their_own_base(copy: Path) -> None:
    """Opening two runs that name each other as their base must end."""
    state = json.loads((copy / ADAPTED / "state.json").read_text())
    (copy / ADAPTED / "state.json").write_text(
        json.dumps(state | {"base_sha256": file_sha256(copy / ADAPTED / "adapter_model.safetensors")})
    )
    reseal(copy / ADAPTED)
    (copy / "lora" / "config.toml").write_text(f'init_from = "{copy / "lora"}"\n')
    assert "adapters for themselves" in bounded(lambda: open_checkpoint(copy / "lora"))


@pytest.mark.parametrize(
    "name", ["model.json", "state.json", "optimizer.safetensors", "model.safetensors", "tokenizer/tokenizer.json"]
)
def test_a_file_that_the_manifest_leaves_out_is_not_read(copy: Path, name: str) -> None:
    manifest = json.loads((copy / BASE / "manifest.json").read_text())
    del manifest["files"][name], manifest["sha256"]
    (copy / BASE / "manifest.json").write_text(sealed(manifest))
    assert f"does not name {name}" in bounded(lambda: open_checkpoint(copy / BASE))


def test_a_manifest_without_its_own_hash_is_refused(copy: Path) -> None:
    for directory, read in ((copy / BASE, open_checkpoint), (copy / "data", Dataset)):
        manifest = json.loads((directory / "manifest.json").read_text())
        del manifest["sha256"]
        (directory / "manifest.json").write_text(json.dumps(manifest))
        assert "changed or cut short" in bounded(lambda read=read, directory=directory: read(directory))


@pytest.mark.parametrize(
    ("key", "value"), [("r", 10**12), ("r", "2"), ("r", 0), ("lora_alpha", None), ("lora_alpha", float("nan"))]
)
def test_adapters_of_no_rank(copy: Path, key: str, value: Any) -> None:
    config = json.loads((copy / ADAPTED / "adapter_config.json").read_text())
    (copy / ADAPTED / "adapter_config.json").write_text(json.dumps(config | {key: value}))
    reseal(copy / ADAPTED)
    found = bounded(lambda: open_checkpoint(copy / ADAPTED).build(make, CPU, torch.float32))
    assert f"adapter_config.json: {key} must be a positive number" in found


# Files that would run code, or run away, in every place where a file is read


class Payload:
    """An object that creates the file `canary` when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.canary), "w"))


def npy(value: Any, save: Callable[..., None] = np.save) -> bytes:
    file = io.BytesIO()
    save(file, value)
    return file.getvalue()


def saved(value: Any, zipped: bool) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def payloads(canary: Path) -> list[bytes]:
    bomb = Payload(canary)
    command = f"__import__('pathlib').Path({str(canary)!r}).touch()"
    return [
        *(pickle.dumps(bomb, protocol) for protocol in (0, 2, 4, 5)),
        saved({"embed.weight": bomb}, True),
        saved({"embed.weight": bomb}, False),
        npy(np.array([bomb], object)),
        npy(np.array([bomb], object), np.savez),
        DEEP.encode(),
        b'{"a":' * 100_000,
        ("a = " + "[" * 100_000).encode(),
        ("a" + ".a" * 100_000 + " = 1").encode(),
        b"9" * 5000,
        f'!!python/object/apply:os.system ["touch {canary}"]'.encode(),
        f"{{'descr': {command}}}".encode(),
        f'{{"question": "{{{command}}}", "answer": {command}}}'.encode(),
        f"seed = {command}\n".encode(),
    ]


PLACES: list[tuple[str, str, str]] = [
    # script, arguments, and the file in {h} that the payload becomes, {p}; one that a manifest names gets its sha256 there
    *(
        (script, "{p}" + more, "config.toml")
        for script, more in (
            ("train", " --data={h}/data --out_dir={h}/out"),
            ("finetune", " --init_from={h}/base --data={h}/qa.jsonl --out_dir={h}/out"),
            ("evaluate", " --checkpoint={h}/base --questions={h}/qa.jsonl"),
            ("sample", " --checkpoint={h}/base"),
            ("chat", " --checkpoint={h}/base --ask=hi"),
            ("prepare", " --input={h}/corpus.jsonl --out={h}/out"),
        )
    ),
    *(
        (script, arguments, f"{directory}/{name}")
        for script, arguments in (
            ("finetune", "--init_from={h}/RUN --data={h}/qa.jsonl --out_dir={h}/out"),
            ("evaluate", "--checkpoint={h}/RUN --questions={h}/qa.jsonl"),
            ("sample", "--checkpoint={h}/RUN --max_new_tokens=1"),
            ("chat", "--checkpoint={h}/RUN --ask=hi"),
        )
        for directory, names in (
            (BASE, "manifest.json model.json state.json model.safetensors tokenizer/tokenizer.json tokenizer/ranks.tiktoken"),
            (ADAPTED, "adapter_model.safetensors adapter_config.json state.json"),
        )
        for name in names.split()
    ),
    ("train", "--data={h}/data --out_dir={h}/base --resume", f"{BASE}/optimizer.safetensors"),
    ("sample", "--checkpoint={h}/base", "base/checkpoints/last"),
    ("sample", "--checkpoint={h}/lora", "lora/config.toml"),
    *(("sample", "--checkpoint={p}", name) for name in ("model.pt", "model.safetensors", "pytorch_model.bin", "last")),
    *(("sample", "--checkpoint={h}/theirs", f"theirs/{name}") for name in ("pytorch_model.bin", "x.ckpt", "model.safetensors")),
    ("finetune", "--init_from={p} --data={h}/qa.jsonl --out_dir={h}/out", "theirs.pth"),
    *(
        (script, arguments, f"data/{name}")
        for script, arguments in (
            ("train", "--data={h}/data --out_dir={h}/out --n_head=1 --n_embd=8 --n_layer=1 --block_size=8 --max_steps=0"),
            ("prepare", "--inspect={h}/data"),
            ("evaluate", "--checkpoint={h}/base --text={h}/data"),
            ("finetune", "--init_from={h}/base --data={h}/qa.jsonl --replay_data={h}/data --out_dir={h}/out --max_steps=0"),
            ("prepare", "--input={h}/corpus.jsonl --out={h}/out --tokenizer={h}/data/tokenizer --workers=1"),
        )
        for name in ["manifest.json", "val-00000.npy", "tokenizer/tokenizer.json", "tokenizer/ranks.tiktoken"]
        if "--tokenizer" not in arguments or "tokenizer" in name
    ),
    *(("train", "--data={p} --out_dir={h}/out", name) for name in ("train.bin", "meta.pkl", "tokens.npy")),
    ("prepare", "--input={h}/corpus.jsonl --out={h}/out --tokenizer=gpt2 --ranks={p}", "gpt2.tiktoken"),
    *(
        (script, arguments, name)
        for name in ("x.jsonl", "x.json", "x.csv", "x.parquet", "x.pt", "x.pkl", "x.jsonl.gz")
        for script, arguments in (
            ("finetune", "--init_from={h}/base --data={p} --out_dir={h}/out"),
            ("finetune", "--init_from={h}/base --data={h}/qa.jsonl --val_data={p} --out_dir={h}/out"),
            ("evaluate", "--checkpoint={h}/base --questions={p}"),
            ("evaluate", "--checkpoint={h}/base --choices={p}"),
            ("evaluate", "--checkpoint={h}/base --questions={h}/qa.jsonl --shots_data={p}"),
        )
    ),
    *(
        (script, arguments, name)
        for name in ("x.txt", "x.jsonl", "x.parquet", "x.txt.gz", "x.txt.zst", "x.bin", "x.npy")
        for script, arguments in (
            ("prepare", "--input={p} --out={h}/out --tokenizer=byte --workers=1"),
            ("evaluate", "--checkpoint={h}/base --text={p}"),
        )
    ),
    ("sample", "--checkpoint={h}/base --max_new_tokens=1 --prompts={p}", "x.jsonl"),
    ("sample", "--checkpoint={h}/base --max_new_tokens=1 --prompts={p}", "x.txt"),
]


def is_text(payload: bytes) -> bool:
    try:
        return b"\0" not in payload and bool(payload.decode())
    except UnicodeDecodeError:
        return False


def check_places(home: Path, canary: Path, call: Call, cases: list[tuple[tuple[str, str, str], bytes]]) -> None:
    for (script, arguments, name), payload in cases:
        file = home / name
        whole = file.read_bytes() if file.exists() else None
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(payload)
        directory = next((d for d in (home / BASE, home / ADAPTED, home / "data") if d in file.parents), None)
        manifest = (directory / "manifest.json").read_bytes() if directory and file.name != "manifest.json" else None
        if manifest:
            reseal(directory)
        words = arguments.replace("RUN", "lora" if str(ADAPTED) in name else "base").split()
        status, out, err = call(script, *(word.format(h=home, p=file) for word in words))
        shown = f"{script} {arguments} {name} {payload[:40]!r}: {status} {out[-300:]} {err[-2000:]}"
        assert not canary.exists(), shown
        assert "Traceback" not in err, shown
        welcome = is_text(payload) and name.startswith("x.txt") and not name.endswith(("gz", "zst"))
        assert status in ((0, 2) if welcome else (1, 2)), shown
        if status:
            assert err.splitlines()[-1].startswith("error: "), shown
            assert sum(line.startswith("error: ") for line in err.splitlines()) == 1, shown
        shutil.rmtree(home / "out", ignore_errors=True)
        if manifest:
            (directory / "manifest.json").write_bytes(manifest)
        file.write_bytes(whole) if whole is not None else file.unlink()
        if whole is None and file.parent != home:
            file.parent.rmdir()


@pytest.fixture
def scripts(call: Call, monkeypatch: pytest.MonkeyPatch) -> Call:
    """conftest's `call`, extended to data/prepare.py."""
    monkeypatch.setitem(sys.modules, "prepare", prepare)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b""), isatty=lambda: False))
    return call


def test_no_file_runs_code_wherever_it_is_read(copy: Path, scripts: Call, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    pickle.loads(payloads(canary)[1]).close()
    assert canary.exists(), "the payload works"
    canary.unlink()
    found = payloads(canary)
    check_places(copy, canary, scripts, [(place, found[i * 5 % len(found)]) for i, place in enumerate(PLACES)])


@pytest.mark.slow
def test_no_file_of_any_kind_runs_code_anywhere(copy: Path, scripts: Call, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    check_places(copy, canary, scripts, [(place, payload) for place in PLACES for payload in payloads(canary)])


def test_a_pickle_is_told_from_a_text_by_its_cure(copy: Path, scripts: Call) -> None:
    """The message tells how to save weights, or how to prepare a text."""
    torch.save({}, copy / "model.pt")
    (copy / "train.bin").write_bytes(bytes(64))
    (copy / "theirs").mkdir()
    (copy / "theirs" / "pytorch_model.bin").write_bytes(b"")
    for script, arguments, message in (
        ("sample", "--checkpoint={h}/model.pt", "safetensors.torch.save_file"),
        (
            "finetune",
            "--init_from={h}/theirs --data={h}/qa.jsonl --out_dir={h}/out",
            "pytorch_model.bin: papagaio reads no pickles",
        ),
        ("train", "--data={h}/train.bin --out_dir={h}/out", "data/prepare.py"),
        ("prepare", "--input={h}/train.bin --out={h}/out", "data/prepare.py"),
        ("evaluate", "--checkpoint={h}/base --text={h}/train.bin", "data/prepare.py"),
    ):
        status, _, err = scripts(script, *(word.format(h=copy) for word in arguments.split()))
        assert status == 2
        assert message in err


def test_json_and_toml_beyond_measure_are_refused_cheaply(copy: Path) -> None:
    for name in ("manifest.json", "model.json", "state.json", "tokenizer/tokenizer.json"):
        file = copy / BASE / name
        whole = file.read_bytes()
        for text in (DEEP, '{"a":' * 100_000, "9" * 5000, "[" + "1," * 2**24):
            file.write_text(text)
            if name != "manifest.json":
                reseal(copy / BASE)
            assert str(file) in bounded(lambda: open_checkpoint(copy / BASE)), text[:9]
        file.write_bytes(whole)
        if name != "manifest.json":
            reseal(copy / BASE)
    assert isinstance(open_checkpoint(copy / BASE), Checkpoint)


def test_a_tokenizer_is_what_it_was_to_the_byte(copy: Path) -> None:
    """A tokenizer directory alone, as given to data/prepare.py's --tokenizer, is verified too."""
    file = copy / "data" / "tokenizer" / "tokenizer.json"
    whole = file.read_text()
    for text in (whole[:-1], whole + "\n", whole.replace("\n", "\r\n"), whole.replace(": ", ":", 1)):
        file.write_bytes(text.encode())
        with pytest.raises(UserError, match=r"tokenizer\.json: does not describe"):
            load_tokenizer(file.parent)
    ranks = file.parent / "ranks.tiktoken"
    lines = ranks.read_bytes().splitlines()
    file.write_text(whole)
    ranks.write_bytes(b"\n".join([b"//79 0", *lines[1:]]) + b"\n")  # no token for the byte 0 any more
    with pytest.raises(UserError, match=r"ranks\.tiktoken: .* lack some of the 256 bytes"):
        load_tokenizer(file.parent)


def test_the_index_of_an_interrupted_run_runs_no_code(tmp_path: Path) -> None:
    for payload in payloads(tmp_path / "canary"):
        (tmp_path / "000000.npy").write_bytes(payload)
        with pytest.raises(UserError, match=r"000000\.npy: damaged .*; delete it"):
            read_index(tmp_path / "000000.npy")
    assert not (tmp_path / "canary").exists()
