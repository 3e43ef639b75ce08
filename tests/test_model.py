"""model.py against Hugging Face transformers, torch, and its own definitions."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import GPT, PRESETS, GPTConfig, Module, rotate
from papagaio.training.metrics import flops_per_token
from papagaio.training.optimizers import parameter_roles

TINY = {"vocab_size": 97, "block_size": 32, "n_layer": 2, "n_head": 4, "n_embd": 32}


def random_model(**options: object) -> GPT:
    """A model with no weight at zero, so that nothing hides."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(**TINY | options)).eval()
    with torch.no_grad():
        for p in gpt.parameters():
            p.normal_(std=0.3)
    return gpt


def random_ids(batch: int = 3, length: int = 32) -> Tensor:
    return torch.randint(0, TINY["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(1))


def hugging_face_gpt2(gpt: GPT) -> nn.Module:
    """The same model in Hugging Face's GPT-2, which must have the preset `gpt2`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=32, n_embd=32, n_layer=2, n_head=4)).eval()
    names = {"wte.weight": gpt.embed.weight[:97], "wpe.weight": gpt.pos_embed.weight}
    names |= {"ln_f.weight": gpt.norm.weight, "ln_f.bias": gpt.norm.bias}
    for i, block in enumerate(gpt.blocks):
        for kind in ("weight", "bias"):
            # Hugging Face keeps GPT-2's matrices transposed, and queries, keys and values in one.
            qkv = torch.cat([getattr(part, kind) for part in (block.attn.q, block.attn.k, block.attn.v)])
            names |= {
                f"h.{i}.ln_1.{kind}": getattr(block.norm_1, kind),
                f"h.{i}.attn.c_attn.{kind}": qkv.t(),
                f"h.{i}.attn.c_proj.{kind}": getattr(block.attn.proj, kind).t(),
                f"h.{i}.ln_2.{kind}": getattr(block.norm_2, kind),
                f"h.{i}.mlp.c_fc.{kind}": getattr(block.mlp.fc, kind).t(),
                f"h.{i}.mlp.c_proj.{kind}": getattr(block.mlp.proj, kind).t(),
            }
    assert {f"transformer.{name}" for name in names} | {"lm_head.weight"} == set(theirs.state_dict())
    theirs.load_state_dict({f"transformer.{k}": v for k, v in names.items()} | {"lm_head.weight": gpt.embed.weight[:97]})
    return theirs


def hugging_face_nanochat(gpt: GPT) -> nn.Module:
    """The same model in Hugging Face's NanoChat, which must have the preset `modern`."""
    from transformers import NanoChatConfig, NanoChatForCausalLM

    config = NanoChatConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=gpt.config.n_kv_head,
        max_position_embeddings=32,
    )
    theirs = NanoChatForCausalLM(config).eval()
    names = {"model.embed_tokens.weight": gpt.embed.weight[:97], "lm_head.weight": gpt.head.weight[:97]}
    for i, block in enumerate(gpt.blocks):
        names |= {
            f"model.layers.{i}.self_attn.q_proj.weight": block.attn.q.weight,
            f"model.layers.{i}.self_attn.k_proj.weight": block.attn.k.weight,
            f"model.layers.{i}.self_attn.v_proj.weight": block.attn.v.weight,
            f"model.layers.{i}.self_attn.o_proj.weight": block.attn.proj.weight,
            f"model.layers.{i}.mlp.fc1.weight": block.mlp.fc.weight,
            f"model.layers.{i}.mlp.fc2.weight": block.mlp.proj.weight,
        }
    theirs.load_state_dict(names)  # strict: every weight of theirs has one of ours
    return theirs


def test_gpt2_preset_is_hugging_face_gpt2() -> None:
    gpt = random_model(**PRESETS["gpt2"])
    with torch.no_grad():
        assert (gpt(random_ids()) - hugging_face_gpt2(gpt)(random_ids()).logits).abs().max() < 1e-4


@pytest.mark.parametrize("n_kv_head", [None, 2])
def test_modern_preset_is_hugging_face_nanochat(n_kv_head: int | None) -> None:
    gpt = random_model(n_kv_head=n_kv_head)
    with torch.no_grad():
        ours, logits = gpt(random_ids()), hugging_face_nanochat(gpt)(random_ids()).logits
    assert ours.std() > 1, "logits so flat that the comparison would prove nothing"
    assert (ours - logits).abs().max() < 1e-4


def test_gpt2_has_as_many_parameters_as_published() -> None:
    config = GPTConfig(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768, **PRESETS["gpt2"])
    with torch.device("meta"):
        gpt = GPT(config)
    padding = (config.padded_vocab_size - 50257) * 768
    assert sum(p.numel() for p in gpt.parameters()) - padding == 124_439_808
    # 6 x (12 blocks of 12 C^2, and the head) + 12 layers C T
    assert flops_per_token(gpt) == 6 * (12 * 12 * 768**2 + 50304 * 768) + 12 * 12 * 768 * 1024


VARIANTS = [
    {},
    {"position": "none"},
    PRESETS["gpt2"],
    {"position": "sinusoidal"},
    {"position": "learned", "norm_affine": True},
    {"mlp": "swiglu"},
    {"norm": "layernorm", "bias": True, "norm_affine": True},
    {"n_kv_head": 1},
    {"window_pattern": "SL", "window_size": 5},
    {"tie_embeddings": True, "logit_softcap": 0.0, "qk_norm": False},
    PRESETS["llama"] | {"head_dim": 12, "n_kv_head": 2, "rope_scaling": 8.0, "rope_context": 16},
    PRESETS["llama"] | {"qk_norm_affine": True, "qkv_bias": True},
    PRESETS["frontier"],
    {"bigram_rows": 50, "value_embed_interval": 1, "n_kv_head": 2},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_changing_a_token_changes_no_logit_before_it(options: dict) -> None:
    gpt, ids = random_model(**options), random_ids(1)
    with torch.no_grad():
        before = gpt(ids)
        for t in (1, 13, 31):
            changed = ids.clone()
            changed[0, t] = (changed[0, t] + 1) % 97
            after = gpt(changed)
            assert torch.equal(after[:, :t], before[:, :t])
            assert (after[:, t] - before[:, t]).abs().max() > 1e-3


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_config_survives_json_and_rebuilds_the_model(options: dict) -> None:
    gpt = random_model(**options)
    again = GPT(GPTConfig(**dataclasses.asdict(gpt.config))).eval()
    again.load_state_dict(gpt.state_dict())
    with torch.no_grad():
        assert torch.equal(again(random_ids()), gpt(random_ids()))


def test_window_hides_what_lies_before_it() -> None:
    gpt, ids = random_model(n_layer=1, window_pattern="S", window_size=4), random_ids(1)
    changed = ids.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 97
    with torch.no_grad():
        moved = (gpt(changed) - gpt(ids)).abs().amax((0, 2)) > 1e-5
    assert moved.nonzero().flatten().tolist() == [10, 11, 12, 13]
    mask = Module.attention_mask(4, 2, None, torch.device("cpu"))
    assert mask.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]


def test_window_pattern_repeats_over_the_layers() -> None:
    assert random_model(n_layer=5, window_pattern="SSL", window_size=7).config.windows == [7, 7, None, 7, 7]


PACKED = torch.tensor([[0] * 5 + [1] * 9 + [2] * 6, [1] * 12 + [2] + [3] * 7])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window_pattern": "SL", "window_size": 4},
        {"n_kv_head": 2},
        {**PRESETS["gpt2"]},
        {"position": "sinusoidal", "norm": "layernorm"},
        {**PRESETS["frontier"]},
    ],
    ids=["modern", "windows", "grouped", "gpt2", "sinusoidal", "frontier"],
)
def test_documents_packed_in_a_row_do_not_see_each_other(options: dict) -> None:
    """Each has the logits that it has alone, and they do not change with the others."""
    gpt = random_model(**options)
    ids = torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        packed = gpt(ids, doc_ids=PACKED)
        for row, start, stop in ((0, 0, 5), (0, 5, 14), (0, 14, 20), (1, 0, 12), (1, 12, 13), (1, 13, 20)):
            alone = gpt(ids[row : row + 1, start:stop])[0]
            assert torch.allclose(packed[row, start:stop], alone, atol=1e-4), (row, start)
        changed = ids.clone()
        changed[PACKED == 1] = (changed[PACKED == 1] + 1) % 97  # another text in document 1
        assert torch.equal(gpt(changed, doc_ids=PACKED)[PACKED != 1], packed[PACKED != 1])
        assert not torch.equal(gpt(changed)[PACKED != 1], gpt(ids)[PACKED != 1])  # without the mask they do change


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("options", [{}, {"window_pattern": "SL", "window_size": 40}, {"n_kv_head": 2}])
def test_packed_documents_on_a_gpu_are_those_on_the_cpu(options: dict) -> None:
    """FlexAttention, compiled, forward and backward, beside the mask through SDPA."""
    shape = {"block_size": 256, "n_head": 4, "n_embd": 128}
    ids = torch.randint(0, 97, (2, 257), generator=torch.Generator().manual_seed(1))
    doc_ids = (torch.rand(2, 256, generator=torch.Generator().manual_seed(2)) < 0.02).cumsum(1)
    grads = {}
    for device in ("cpu", "cuda"):
        gpt = random_model(**shape | options).to(device).train()
        loss = gpt(ids[:, :-1].to(device), ids[:, 1:].to(device), doc_ids=doc_ids.to(device))
        loss.backward()
        grads[device] = [loss.detach().cpu(), *(p.grad.cpu() for p in gpt.parameters())]
    for one, other in zip(*grads.values(), strict=True):
        assert torch.allclose(one, other, atol=2e-2, rtol=2e-2)


def test_the_loss_of_packed_documents_is_that_of_each_alone() -> None:
    gpt = random_model()
    ids = torch.randint(0, 97, (2, 21), generator=torch.Generator().manual_seed(1))
    losses = gpt(ids[:, :-1], ids[:, 1:], doc_ids=PACKED, reduction="none")
    for row, start, stop in ((0, 5, 14), (1, 13, 20)):
        alone = gpt(ids[row : row + 1, start:stop], ids[row : row + 1, start + 1 : stop + 1], reduction="none")
        assert torch.allclose(losses[row, start:stop], alone[0], atol=1e-4)
    gpt(ids[:, :-1], ids[:, 1:], torch.ones(2, 20), PACKED).backward()
    grads = [p.grad.clone() for p in gpt.parameters()]
    gpt.zero_grad()
    for row, number in ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (1, 3)):
        where = PACKED[row] == number
        gpt(ids[row : row + 1, :-1][:, where], ids[row : row + 1, 1:][:, where], torch.ones(1, int(where.sum()))).backward()
    for packed, alone in zip(grads, gpt.parameters(), strict=True):
        assert torch.allclose(packed, alone.grad, atol=1e-3, rtol=1e-4)


def test_the_loss_is_not_rounded_under_autocast() -> None:
    gpt = random_model()
    ids = random_ids()
    with torch.autocast("cpu", torch.bfloat16):
        loss = gpt(ids[:, :-1], ids[:, 1:])
        losses = gpt(ids[:, :-1], ids[:, 1:], reduction="none")
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(losses.mean().item(), rel=1e-6)


@pytest.mark.parametrize("position", ["learned", "sinusoidal"])
def test_positions_count_from_the_beginning_of_a_document(position: str) -> None:
    gpt = random_model(position=position, n_layer=1)
    seen: list[Tensor] = []
    gpt.embed_at = lambda ids, positions: seen.append(positions) or GPT.embed_at(gpt, ids, positions)
    gpt(random_ids(2, 6), doc_ids=torch.tensor([[0, 0, 1, 1, 1, 2], [3, 3, 3, 3, 3, 3]]))
    assert seen[0].tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]]


def test_without_positions_order_does_not_matter_to_the_last_token() -> None:
    """A single block without positional encoding sees a set: shuffling the earlier tokens changes nothing."""
    gpt, ids = random_model(position="none", n_layer=1), random_ids(1)
    shuffled = ids[:, [*torch.randperm(31, generator=torch.Generator().manual_seed(2)).tolist(), 31]]
    with torch.no_grad():
        assert torch.allclose(gpt(shuffled)[:, -1], gpt(ids)[:, -1], atol=1e-4)
        rotary = random_model(n_layer=1)
        assert not torch.allclose(rotary(shuffled)[:, -1], rotary(ids)[:, -1], atol=1e-2)


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    gpt = random_model()
    angles = torch.arange(32)[:, None, None] * gpt.frequencies  # (T, 1, D / 2)
    cos, sin = torch.cat((angles.cos(), angles.cos()), -1), torch.cat((angles.sin(), -angles.sin()), -1)
    q, k = torch.randn(2, 1, 1, 1, 8).expand(2, 1, 32, 1, 8)  # (B, T, H, D)
    q, k = (rotate(x, cos, sin).transpose(1, 2) for x in (q, k))
    scores = (q @ k.mT)[0, 0]
    for distance in (0, 3, 9):
        diagonal = scores.diagonal(-distance)
        assert torch.allclose(diagonal, diagonal[0].expand_as(diagonal), atol=1e-4)
    assert (scores.diagonal(-3)[0] - scores.diagonal(0)[0]).abs() > 1e-2


def test_sinusoidal_table_is_the_papers() -> None:
    gpt = random_model(position="sinusoidal", n_layer=1)
    with torch.no_grad():
        gpt.blocks[0].attn.proj.weight.zero_()
        gpt.blocks[0].mlp.proj.weight.zero_()
        found = gpt.hidden(torch.tensor([[5, 5, 5]]))[0, 2]
        angles = [2 / 10000 ** (2 * i / 32) for i in range(16)]
        table = torch.cat([torch.sin(torch.tensor(angles)), torch.cos(torch.tensor(angles))])
        expected = F.rms_norm(F.rms_norm(gpt.embed.weight[5] * 32**0.5 + table, (32,), eps=1e-6), (32,), eps=1e-6)
    assert torch.allclose(found, expected, atol=1e-5)


def test_grouped_heads_equal_repeated_ones() -> None:
    grouped, full = random_model(n_kv_head=2), random_model()
    state = grouped.state_dict()
    for name in state:
        if name.endswith(("attn.k.weight", "attn.v.weight")):
            state[name] = state[name].view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32)
    full.load_state_dict(state)
    with torch.no_grad():
        assert torch.allclose(full(random_ids()), grouped(random_ids()), atol=1e-4)


def test_swiglu_is_its_formula() -> None:
    mlp = random_model(mlp="swiglu").blocks[0].mlp
    x = torch.randn(4, 32)
    expected = (F.silu(x @ mlp.gate.weight.T) * (x @ mlp.fc.weight.T)) @ mlp.proj.weight.T
    assert torch.allclose(mlp(x), expected, atol=1e-4)


def test_padding_of_the_vocabulary_stays_inside() -> None:
    gpt = random_model()
    assert gpt.embed.weight.shape == (128, 32)
    with torch.no_grad():
        before, loss = gpt(random_ids()), gpt(random_ids(), random_ids())
        gpt.head.weight[97:] = 1e6
        gpt.embed.weight[97:] = 1e6
        assert before.shape == (3, 32, 97)
        assert torch.equal(gpt(random_ids()), before)
        assert torch.equal(gpt(random_ids(), random_ids()), loss)


def test_modern_blocks_begin_as_the_identity() -> None:
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(**TINY))
    x = F.rms_norm(F.rms_norm(gpt.embed(random_ids()), (32,), eps=1e-6), (32,), eps=1e-6)
    assert torch.allclose(gpt.hidden(random_ids()), x, atol=1e-5)


def test_dropout_works_in_training_only() -> None:
    gpt = random_model(dropout=0.5)
    with torch.no_grad():
        assert torch.equal(gpt(random_ids()), gpt(random_ids()))
        gpt.train()
        assert not torch.equal(gpt(random_ids()), gpt(random_ids()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_layer": 0}, "n_layer"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"n_embd": 30}, "divisible by n_head"),
        ({"n_kv_head": 3}, "divisible by n_kv_head"),
        ({"n_embd": 12}, "even head size"),
        ({"position": "absolute"}, "rope, learned, sinusoidal, none"),
        ({"norm": "batch"}, "rmsnorm, layernorm"),
        ({"mlp": "relu"}, "relu2, gelu, swiglu"),
        ({"dropout": 1.0}, "dropout"),
        ({"logit_softcap": -1.0}, "logit_softcap"),
        ({"window_size": -1}, "window_size must not be negative"),
        ({"head_dim": 7}, "even head size"),
        ({"rope_scaling": 0.0}, "rope_scaling must not be 0"),
        ({"norm_eps": float("nan")}, "norm_eps must not be nan"),
        ({"window_pattern": "LX"}, "letters L and S"),
        ({"window_pattern": ""}, "letters L and S"),
        ({"position": "sinusoidal", "n_embd": 33, "n_head": 3}, "even n_embd"),
    ],
)
def test_config_refuses_what_cannot_be(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTConfig(**TINY | options)


def test_config_is_frozen_and_context_is_bounded() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        GPTConfig(**TINY).n_layer = 3  # type: ignore[misc]
    with pytest.raises(ValueError, match="33 tokens do not fit"):
        random_model()(random_ids(1, 33))


def test_bigrams_have_rows_of_their_own_where_there_are_enough() -> None:
    for rows, exact in ((16384, True), (500, False)):
        gpt = random_model(bigram_rows=rows, n_embd=4, n_head=1)
        table = gpt.previous_token.bigram_embed.weight
        assert len(table) == min(rows, 97 * 98)
        table.data[:] = torch.arange(len(table))[:, None]
        ids = torch.cartesian_prod(torch.arange(97), torch.arange(97))
        found = gpt.previous_token(torch.zeros(len(ids), 2, 4), ids, None, None, gpt.embed_at)[:, :, 0]
        assert found.min() >= 0
        assert len(set(found[:, 1].tolist())) == (97 * 97 if exact else 500)
        first = found[:, 0]  # no token before it: a row of its own for each token
        assert len(set(first.tolist())) == 97
        assert not exact or not set(first.tolist()) & set(found[:, 1].tolist())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_gives_the_cpus_loss_and_logits() -> None:
    gpt = random_model()
    ids, targets = random_ids(), random_ids().roll(-1, 1)
    with torch.no_grad():
        logits, loss = gpt(ids), gpt(ids, targets)
        gpt.cuda()
        assert (gpt(ids.cuda()).cpu() - logits).abs().max() < 1e-3
        assert abs(float(gpt(ids.cuda(), targets.cuda()) - loss)) < 1e-3
        with torch.autocast("cuda", torch.bfloat16):
            assert abs(float(gpt(ids.cuda(), targets.cuda()) - loss)) < 0.1


def test_flops_count_the_window_of_layers_that_have_one() -> None:
    full, windowed = (flops_per_token(random_model(n_layer=4, window_pattern=pattern, window_size=8)) for pattern in ("L", "SL"))
    assert full - windowed == 12 * 32 * 2 * (32 - 8)


def test_every_parameter_has_a_role() -> None:
    roles = parameter_roles(random_model(**PRESETS["frontier"]))
    found = {role: {name for name in roles if roles[name] == role} for role in set(roles.values())}
    assert found.pop("matrix") == {
        f"blocks.{i}.{part}.weight" for i in (0, 1) for part in ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc", "mlp.proj")
    }
    assert found == {
        "table": {"embed.weight"},
        "head": {"head.weight"},
        "value_table": {"blocks.1.attn.value_embed.weight"},
        "bigram_table": {"previous_token.bigram_embed.weight"},
        "gate": {"blocks.1.attn.value_gate", "previous_token.smear_gate", "previous_token.smear_scale"},
    }
    gpt2 = parameter_roles(random_model(**PRESETS["gpt2"]))
    assert {name for name in gpt2 if gpt2[name] == "table"} == {"embed.weight", "pos_embed.weight"}
    assert {gpt2[name] for name in gpt2 if name.endswith("bias") or "norm" in name} == {"vector"}
