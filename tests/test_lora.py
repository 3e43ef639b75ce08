"""papagaio/training/lora.py: adapters against PEFT's, saved alone, merged, refused on another base."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model import GPT, PRESETS, GPTConfig
from papagaio.errors import UserError
from papagaio.runs.checkpoint import contents, model_maker, write_checkpoint
from papagaio.runs.directory import open_checkpoint
from papagaio.tokenizer import ByteTokenizer
from papagaio.training.lora import TARGETS, adapter_state, adapters, add_adapters, merged, round_frozen, train_rows, trained_rows
from papagaio.training.optimizers import make_optimizers
from papagaio.training.options import RunOptions

BYTES = ByteTokenizer()
IDS = torch.arange(48).view(2, 24)


def model(preset: str = "modern", **options: object) -> GPT:
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=261, block_size=24, n_layer=2, n_head=2, n_embd=32, **PRESETS[preset] | options)).eval()
    with torch.no_grad():
        for p in gpt.parameters():
            p.normal_(std=0.3)
    return gpt


def adapted(gpt: GPT, targets: tuple[str, ...] = ("q", "v", "proj", "fc", "head"), **options: object) -> GPT:
    add_adapters(gpt, targets, rank=4, alpha=6, **options)
    with torch.no_grad():
        for layer in adapters(gpt).values():
            layer.lora_B.weight.normal_(std=0.2)
    return gpt


@pytest.mark.parametrize("preset", ["modern", "gpt2", "frontier"])
def test_new_adapters_change_nothing_and_are_all_that_is_trained(preset: str) -> None:
    gpt = model(preset)
    before, names = gpt(IDS), set(gpt.state_dict())
    targets = [name for name in TARGETS if name != "gate" and (name != "head" or gpt.head is not None)]
    add_adapters(gpt, targets, rank=4, alpha=8)
    assert torch.allclose(gpt(IDS), before, atol=1e-5)
    assert names <= set(gpt.state_dict())
    trained = {name for name, p in gpt.named_parameters() if p.requires_grad}
    assert trained == {name for name in gpt.state_dict() if "lora_" in name}
    optimizers = make_optimizers(gpt, RunOptions(out_dir=Path("x"), optimizer="adamw", learning_rate=0.01))
    frozen = {name: p.clone() for name, p in gpt.named_parameters() if name not in trained}
    losses = []
    for _ in range(20):
        loss = gpt(IDS, IDS.roll(-1, 1))
        loss.backward()
        losses.append(loss.item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.3
    assert all(torch.equal(p, dict(gpt.named_parameters())[name]) for name, p in frozen.items())


def test_the_loss_of_a_model_with_an_adapted_head_is_that_of_its_logits() -> None:
    gpt = adapted(model())
    targets = IDS.roll(-1, 1)
    loss = gpt(IDS, targets)
    expected = torch.nn.functional.cross_entropy(gpt(IDS).flatten(0, 1), targets.flatten())
    assert torch.allclose(loss, expected, atol=1e-5)
    for value in (loss, expected):
        gpt.zero_grad()
        value.backward()
        found = {name: p.grad.clone() for name, p in gpt.named_parameters() if p.requires_grad}
        if value is loss:
            first = found
    assert all(torch.allclose(first[name], found[name], atol=1e-5) for name in first)


@pytest.mark.parametrize("preset", ["modern", "gpt2", "llama"])
def test_frozen_weights_may_have_the_type_of_the_products(preset: str) -> None:
    gpt = adapted(model(preset), ("q", "v", "fc"))
    rounded = copy.deepcopy(gpt)
    round_frozen(rounded, torch.bfloat16)
    assert rounded.blocks[0].attn.q.weight.dtype == torch.bfloat16
    found = []
    for each in (gpt, rounded):
        with torch.autocast("cpu", torch.bfloat16):
            loss = each(IDS, IDS.roll(-1, 1))
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in each.parameters() if p.requires_grad)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_merging_gives_the_same_logits() -> None:
    gpt = adapted(model())
    tensors, config = adapter_state(gpt)
    plain = model()
    plain.load_state_dict(merged(plain.state_dict(), tensors, config))
    assert torch.allclose(plain(IDS), gpt(IDS), atol=1e-4)
    assert not torch.allclose(plain(IDS), model()(IDS), atol=0.1)
    with pytest.raises(ValueError, match="another shape"):
        merged(model(n_kv_head=1).state_dict() | {"head.weight": torch.zeros(3, 3)}, tensors, config)


ROWS = [257, 260]  # two of the special tokens


def with_rows(preset: str) -> GPT:
    """A model with adapters in q alone, whose head has trained rows that differ from the base's."""
    gpt = adapted(model(preset), ("q",))
    train_rows(gpt, ROWS)
    with torch.no_grad():
        for rows in trained_rows(gpt).values():
            rows.lora_rows.normal_(std=0.3)
    return gpt


@pytest.mark.parametrize("preset", ["modern", "gpt2"])
def test_rows_of_a_few_tokens_are_trained_and_no_others(preset: str) -> None:
    gpt = model(preset)
    before, base = gpt(IDS), {name: p.clone() for name, p in gpt.state_dict().items()}
    add_adapters(gpt, ("q",), rank=2, alpha=2)
    train_rows(gpt, ROWS)
    assert torch.equal(gpt(IDS), before)
    assert all("lora_" in name for name, p in gpt.named_parameters() if p.requires_grad)
    options = RunOptions(out_dir=Path("x"), optimizer="adamw", learning_rate=0.01, weight_decay=0.1)
    (optimizer,) = make_optimizers(gpt, options)
    targets = torch.full_like(IDS, ROWS[1])
    first = gpt(IDS, targets).item()
    for _ in range(10):
        optimizer.zero_grad()
        gpt(IDS, targets).backward()
        optimizer.step()
    assert gpt(IDS, targets).item() < first - 0.3
    after = merged(base, *adapter_state(gpt))
    changed = {
        (name, row)
        for name, p in base.items()
        if p.ndim == 2
        for row in range(len(p))
        if not torch.equal(after[name][row], p[row])
    }
    table = "embed.weight" if preset == "gpt2" else "head.weight"
    assert {(name, row) for name, row in changed if ".attn.q." not in name} == {(table, row) for row in ROWS}
    plain = model(preset)
    plain.load_state_dict(after)
    assert torch.allclose(plain(IDS), gpt(IDS), atol=1e-4)


def test_peft_reads_trained_rows_and_its_own_are_read(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    gpt = with_rows("modern")
    theirs = peft.PeftModel.from_pretrained(model(), save(gpt, tmp_path, {})).eval()
    assert torch.allclose(theirs(IDS), gpt(IDS), atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    plain = model()
    plain.load_state_dict(merged(plain.state_dict(), load_file(tmp_path / "theirs" / "adapter_model.safetensors"), config))
    assert torch.allclose(plain(IDS), gpt(IDS), atol=1e-4)


def test_a_checkpoint_keeps_trained_rows(tmp_path: Path) -> None:
    base, gpt = save(model("gpt2"), tmp_path / "base", {}), with_rows("gpt2")
    path = save(gpt, tmp_path / "run", {"base_sha256": open_checkpoint(base).weights_sha256})
    twin = with_rows("gpt2")
    open_checkpoint(path, base).load_model(twin)
    assert torch.equal(twin(IDS), gpt(IDS))
    with pytest.raises(UserError, match=r"trainable_tokens_delta is .* where the model with adapters has missing"):
        open_checkpoint(path, base).load_model(adapted(model("gpt2"), ("q",)))  # without rows


@pytest.mark.parametrize("indices", [{"embed": [1, 900]}, {"embed": [1]}, {"other": [1, 2]}, {"embed": [-1, 2]}, [1, 2], None])
def test_other_rows_than_those_that_were_trained_are_refused(tmp_path: Path, indices: object) -> None:
    base = save(model("gpt2"), tmp_path / "base", {})
    written = contents(with_rows("gpt2"), [], {"step": 1, "base_sha256": open_checkpoint(base).weights_sha256})
    config = json.loads(written.texts["adapter_config.json"]) | {"trainable_token_indices": indices}
    path = tmp_path / "step-1"
    write_checkpoint(path, written._replace(texts=written.texts | {"adapter_config.json": json.dumps(config)}), BYTES)
    with pytest.raises(UserError):
        open_checkpoint(path, base).outline(model_maker(GPT, GPTConfig))


def save(gpt: GPT, path: Path, state: dict) -> Path:
    path = path / "step-1"
    write_checkpoint(path, contents(gpt, [], {"step": 1, "optimizer": "adamw"} | state), BYTES)
    return path


def test_peft_reads_what_is_saved_and_gives_the_same_logits(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    gpt = adapted(model())
    path = save(gpt, tmp_path, {})
    assert not (path / "model.safetensors").exists()
    theirs = peft.PeftModel.from_pretrained(model(), path)
    loaded = {name for name, p in theirs.named_parameters() if "lora_" in name}
    assert len(loaded) == len(load_file(path / "adapter_model.safetensors"))
    assert torch.allclose(theirs(IDS), gpt(IDS), atol=1e-4)
    assert torch.allclose(theirs.merge_and_unload()(IDS), gpt(IDS), atol=1e-4)


def test_what_peft_saves_is_read(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(model(), peft.LoraConfig(r=3, lora_alpha=5, target_modules=["k", "fc", "head"]))
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.2)
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    plain = model()
    plain.load_state_dict(merged(plain.state_dict(), load_file(tmp_path / "adapter_model.safetensors"), config))
    assert torch.allclose(plain(IDS), theirs.eval()(IDS), atol=1e-4)


def test_a_checkpoint_of_adapters_finds_its_base(tmp_path: Path) -> None:
    base, other = save(model(), tmp_path / "base", {}), save(model("frontier"), tmp_path / "other", {})
    gpt = adapted(model())
    run = tmp_path / "run"
    path = save(gpt, run / "checkpoints", {"base_sha256": open_checkpoint(base).weights_sha256})
    with pytest.raises(UserError, match=r"adapters alone; name the checkpoint that they were made for with --base$"):
        open_checkpoint(path)
    (run / "config.toml").write_text(f'init_from = "{base}"\n')
    for found in (open_checkpoint(path), open_checkpoint(path, base)):
        plain = GPT(GPTConfig(**found.model_fields)).eval()
        found.load_model(plain)
        assert torch.allclose(plain(IDS), gpt(IDS), atol=1e-4)
    twin = model()
    add_adapters(twin, ("q", "v", "proj", "fc", "head"), rank=4, alpha=6)
    open_checkpoint(path).load_model(twin)
    assert torch.equal(twin(IDS), gpt(IDS))
    wrong = model()
    add_adapters(wrong, ("q",), rank=4, alpha=6)
    with pytest.raises(UserError, match="other targets"):
        open_checkpoint(path).load_model(wrong)
    with pytest.raises(UserError, match="adapters for another base than"):
        open_checkpoint(path, other)
    (run / "config.toml").write_text('init_from = "gone"\n')
    with pytest.raises(UserError, match="it is not at gone any more"):
        open_checkpoint(path)


def test_unknown_targets_are_refused() -> None:
    with pytest.raises(ValueError, match="no linear layer named gate, query"):
        add_adapters(model(), ("q", "query", "gate"), rank=2, alpha=2)
