"""papagaio/kernels.py: each faster operation has the value and the gradient of the one in model.py that it replaces."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_model import PACKED, VARIANTS, random_ids, random_model
from torch import Tensor

from model import GPT, PRESETS, GPTConfig, Module
from papagaio import kernels, runtime
from papagaio.training.lora import add_adapters


def gradients(gpt: GPT, loss: Tensor) -> list[Tensor]:
    gpt.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in gpt.parameters() if p.grad is not None]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("documents", [False, True])
def test_an_accelerated_model_has_the_losses_and_gradients_of_the_reference(options: dict, documents: bool) -> None:
    reference = random_model(**options)
    fast = kernels.accelerate(copy.deepcopy(reference))
    assert fast.next_token_loss is not reference.next_token_loss
    ids = torch.randint(0, 97, (2, 21), generator=torch.Generator().manual_seed(1))
    ids, targets, doc_ids = ids[:, :-1], ids[:, 1:].clone(), PACKED if documents else None
    targets[0, :3] = -100
    weights = torch.rand(2, 20, generator=torch.Generator().manual_seed(2))
    for arguments in ({"weights": weights}, {}, {"reduction": "none"}):
        found = [gpt(ids, targets, doc_ids=doc_ids, **arguments) for gpt in (reference, fast)]
        assert torch.allclose(*found, rtol=1e-4, atol=1e-5)
        ours, theirs = (gradients(gpt, loss.square().sum()) for gpt, loss in zip((fast, reference), found, strict=True))
        for one, other in zip(ours, theirs, strict=True):
            assert torch.allclose(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))
    with torch.no_grad():
        assert torch.allclose(fast(ids, doc_ids=doc_ids), reference(ids, doc_ids=doc_ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("softcap", [0.0, 15.0])
@pytest.mark.parametrize("chunk", [1, 97 * 5, 2**20])
def test_loss_and_gradients_are_torchs(softcap: float, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CPU_LOGITS", chunk)
    gpt = kernels.accelerate(random_model(logit_softcap=softcap))
    ids, targets = random_ids(), random_ids().roll(-1, 1).clone()
    targets[0, :20] = -100
    weights = torch.rand(3, 32)

    def reference(reduction: str) -> Tensor:
        return F.cross_entropy(gpt(ids).flatten(0, 1), targets.flatten(), ignore_index=-100, reduction=reduction)

    mean, weighted, each = gpt(ids, targets), gpt(ids, targets, weights), gpt(ids, targets, reduction="none")
    assert torch.allclose(mean, reference("mean"), rtol=1e-5)
    assert torch.allclose(weighted, reference("none") @ weights.flatten(), rtol=1e-5)
    assert torch.allclose(each.flatten(), reference("none"), atol=1e-4)
    squares = gradients(gpt, each.square().sum()) + gradients(gpt, reference("none").square().sum())
    for found in (
        gradients(gpt, 2 * weighted) + gradients(gpt, 2 * (reference("none") @ weights.flatten())),
        gradients(gpt, 2 * mean) + gradients(gpt, 2 * reference("mean")),
        squares,
    ):
        half = len(found) // 2
        for ours, torchs in zip(found[:half], found[half:], strict=True):
            assert torch.allclose(ours, torchs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cap", [0.0, 15.0])
def test_the_loss_for_a_gpu_is_the_reference(cap: float) -> None:
    """What a GPU compiles, uncompiled: padded columns do not count, ignored targets have no loss and no gradient."""
    generator = torch.Generator().manual_seed(0)
    products = (10 * torch.randn(20, 128, generator=generator)).requires_grad_()  # of which 97 are tokens
    targets, weights = torch.randint(97, (20,), generator=generator), torch.rand(20, generator=generator)
    targets[3:6] = -100
    logits = (cap * torch.tanh(products / cap) if cap else products)[:, :97]
    expected = F.cross_entropy(logits, targets, reduction="none")
    (gradient,) = torch.autograd.grad(expected @ weights, products)
    losses, found = kernels.losses_and_gradient(products.detach(), targets, weights, 97, cap)
    assert torch.allclose(losses, expected, atol=1e-5)
    assert torch.allclose(found, gradient, atol=1e-6)
    assert torch.equal(kernels.losses_and_gradient(products.detach(), targets, None, 97, cap)[0], losses)


def test_the_loss_of_a_head_with_an_adapter_is_that_of_its_logits() -> None:
    gpt = random_model()
    add_adapters(gpt, ["head", "q"], 3, 6.0)
    for p in gpt.parameters():
        torch.nn.init.normal_(p, std=0.3)
    reference, fast = copy.deepcopy(gpt), kernels.accelerate(gpt)
    weights = torch.rand(3, 32)
    found = [model(random_ids(), random_ids(), weights) for model in (reference, fast)]
    assert torch.allclose(*found, rtol=1e-4)
    for one, other in zip(gradients(reference, found[0]), gradients(fast, found[1]), strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-3)
    assert {name for name, p in fast.named_parameters() if p.grad is not None} == {
        name for name, p in fast.named_parameters() if "lora" in name
    }


@pytest.mark.parametrize("name", ["rms_norm", "squared_relu"])
def test_functions_with_gradients_of_their_own_are_the_references(name: str) -> None:
    x = torch.randn(3, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.allclose(getattr(kernels, name)(x), getattr(Module, name)(x))
    if name == "rms_norm":
        assert torch.allclose(kernels.rms_norm(x, 0.1), Module.rms_norm(x, 0.1))
        assert not torch.allclose(kernels.rms_norm(x, 0.1), kernels.rms_norm(x))
    assert torch.autograd.gradcheck(getattr(kernels, name), x)


@pytest.mark.parametrize("kind", ["causal", "window", "documents"])
def test_plain_attention_is_torchs_fused_one(kind: str) -> None:
    """In float32, where both are exact; in bfloat16 on a CPU it takes the place of the fused one."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 20, 8, generator=generator, requires_grad=True) for _ in range(3))
    window, doc_ids = (5, None) if kind == "window" else (None, PACKED if kind == "documents" else None)
    mask = Module.attention_mask(20, window, doc_ids, q.device)
    found = {}
    for name, function in (("plain", kernels.plain_attention), ("reference", Module.attention), ("fast", kernels.attention)):
        y = function(q, k, v, mask, 0.0)
        found[name] = [y, *torch.autograd.grad(y.square().sum(), (q, k, v))]
    for one, other, third in zip(*found.values(), strict=True):
        assert torch.allclose(one, other, atol=1e-4)
        assert torch.equal(third, other)
    half = kernels.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask, 0.0)
    assert torch.equal(half, kernels.plain_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask, 0.0))
    assert torch.allclose(half.float(), found["plain"][0], atol=0.03)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("doc_ids", [None, PACKED], ids=["", "documents"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_the_dense_mask(window: int | None, doc_ids: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path that a GPU takes for windows and documents, not compiled here."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    monkeypatch.setattr(kernels, "_flex", lambda: (flex_attention, create_block_mask))
    q, k, v = (torch.randn(2, heads, 20, 8, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))
    mask, dense = (make(20, window, doc_ids, q.device) for make in (kernels.block_mask, Module.attention_mask))
    assert (mask is None) == (dense is None)
    assert torch.allclose(kernels.attention(q, k, v, mask, 0.0), Module.attention(q, k, v, dense, 0.0), atol=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("documents", [False, True])
def test_the_compiled_step_is_one_graph(preset: str, documents: bool) -> None:
    """No graph breaks; Dynamo and AOTAutograd run, but no code is generated, which takes a minute."""
    torch._dynamo.reset()
    gpt = kernels.accelerate(GPT(GPTConfig(vocab_size=97, block_size=32, n_layer=2, n_head=2, n_embd=32, **PRESETS[preset])))
    arguments = random_ids(), random_ids(), torch.rand(3, 32), PACKED.new_zeros(3, 32) if documents else None
    with torch.autocast("cpu", torch.bfloat16):
        expected = gpt(*arguments)
        loss = torch.compile(gpt, backend="aot_eager", fullgraph=True)(*arguments)
    ours = gradients(gpt, loss)
    assert torch.allclose(loss, expected, rtol=1e-2)
    for one, other in zip(ours, gradients(gpt, expected), strict=True):
        assert torch.allclose(one, other, atol=0.05 * float(other.abs().max()) + 1e-6)


@pytest.mark.parametrize("options", [{}, PRESETS["gpt2"], PRESETS["frontier"]], ids=["modern", "gpt2", "frontier"])
def test_activation_checkpointing_changes_no_gradient(options: dict) -> None:
    gpt = kernels.accelerate(random_model(dropout=0.2, **options).train())
    kept: list[set[int]] = []
    grads = []

    def note(tensor: Tensor) -> Tensor:
        kept[-1].add(tensor.untyped_storage().data_ptr())
        return tensor

    for recompute in (False, True):
        if recompute:
            kernels.checkpoint_activations(gpt)
        kept.append(set())
        torch.manual_seed(3)  # the same dropout
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = gpt(random_ids(), random_ids().roll(-1, 1))
        grads.append(gradients(gpt, loss))
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))
    assert len(kept[1]) < 0.7 * len(kept[0])


def test_gradients_survive_float16() -> None:
    """A weight of 1 / 2^20 a token, as with large batches, is below float16's smallest number once it meets a probability."""
    gpt, ids = kernels.accelerate(random_model()), random_ids()
    grads = []
    for dtype in (torch.float32, torch.float16):
        gpt.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype == torch.float16):
            loss = gpt(ids[:, :-1], ids[:, 1:], torch.full((3, 31), 2.0**-20))
        (2**20 * loss).backward()
        grads.append(gpt.head.weight.grad.clone())
    assert (grads[1] - grads[0]).norm() < 0.01 * grads[0].norm()


def test_a_break_of_the_graph_is_said_once() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x + 1

    runtime.compilation_notice()  # of other tests
    torch.compile(lambda x: x * 2, backend="eager")(torch.ones(3))
    assert runtime.compilation_notice() == ""
    torch.compile(broken, backend="eager")(torch.ones(3))
    assert "the compiled step is not one graph" in runtime.compilation_notice()
    assert runtime.compilation_notice() == ""
