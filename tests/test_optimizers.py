"""papagaio/training/optimizers.py against torch's own optimizers, linear algebra, and the schedules' definitions."""

import math
from pathlib import Path

import pytest
import torch

from model import GPT, PRESETS, GPTConfig
from papagaio.training import optimizers as optim
from papagaio.training.optimizers import Muon, make_optimizers, orthogonalize, schedule, set_learning_rate
from papagaio.training.options import RunOptions


def options(**values: object) -> RunOptions:
    return RunOptions(out_dir=Path("x"), **values)


def gpt(preset: str = "modern") -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=50, block_size=8, n_layer=2, n_head=2, n_embd=16, **PRESETS[preset]))


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 8, 32), (1, 32, 8)])
@pytest.mark.parametrize(("bfloat16", "tolerance"), [(False, 1e-3), (True, 3e-2)])
def test_orthogonalize_keeps_the_singular_vectors_and_levels_the_values(
    shape: tuple[int, int, int], bfloat16: bool, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optim, "computes_bfloat16", lambda device_type: bfloat16)
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalize(matrices)
    for before, after in zip(matrices, result, strict=True):
        u, s, vh = torch.linalg.svd(before, full_matrices=False)
        core = u.T @ after @ vh.T  # diagonal if the singular vectors are the same
        assert torch.allclose(core, torch.diag(core.diagonal()), atol=tolerance)
        values = core.diagonal()[s > 0.1 * s.max()]
        assert ((values > 0.7) & (values < 1.3)).all()


def test_muon_takes_torchs_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.optim.Muon, with its Newton-Schulz polynomial, computes in bfloat16 and one matrix at a time; the steps agree as
    far as that allows."""
    monkeypatch.setattr(optim, "POLAR_EXPRESS", ((3.4445, -4.7750, 2.0315),) * 5)
    generator = torch.Generator().manual_seed(0)
    shapes = [(16, 16), (16, 16), (32, 16), (16, 32)]
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    start = [p.detach().clone() for p in ours]
    muon = Muon(ours, lr=0.02, momentum=0.95, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.1, adjust_lr_fn="original")
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        muon.step()
        reference.step()
    for a, b, before in zip(ours, theirs, start, strict=True):
        assert (a - b).norm() < 0.03 * (a - before).norm()


def test_every_parameter_is_in_exactly_one_group() -> None:
    for preset in PRESETS:
        for optimizer in ("muon", "adamw"):
            model = gpt(preset)
            groups = [group for o in make_optimizers(model, options(optimizer=optimizer)) for group in o.param_groups]
            found = [p for group in groups for p in group["params"]]
            assert len(found) == len(set(found)) == len(list(model.parameters()))


def test_groups_have_their_rates_and_decay_is_on_matrices_only() -> None:
    config = options(weight_decay=0.1, learning_rate=0.02, embedding_learning_rate=0.2, head_learning_rate=0.01)
    model = gpt("frontier")
    rate = {p: g["lr"] for o in make_optimizers(model, config) for g in o.param_groups for p in g["params"]}
    narrow = math.sqrt(384 / 16)  # the tables' and the head's rates are for 384 channels
    assert rate[model.embed.weight] == pytest.approx(0.2 * narrow)
    assert rate[model.head.weight] == pytest.approx(0.01 * narrow)
    assert rate[model.blocks[1].attn.value_embed.weight] == pytest.approx(0.1 * narrow)
    assert rate[model.previous_token.bigram_embed.weight] == pytest.approx(0.06 * narrow)
    assert rate[model.blocks[0].attn.q.weight] == 0.02
    assert rate[model.blocks[1].attn.value_gate] == rate[model.previous_token.smear_scale] == 0.2
    tied = gpt("gpt2")
    rate = {p: g["lr"] for o in make_optimizers(tied, config) for g in o.param_groups for p in g["params"]}
    assert rate[tied.embed.weight] == pytest.approx(0.01 * narrow)  # it is the head as well
    adamw = make_optimizers(tied, options(optimizer="adamw", weight_decay=0.1))
    decay = {p: g["weight_decay"] for o in adamw for g in o.param_groups for p in g["params"]}
    assert all((decay[p] > 0) == (p.ndim == 2) for p in tied.parameters())


def test_muon_stacks_matrices_of_one_shape_whichever_way_they_lie() -> None:
    """Each moves as it would alone, and nothing else does."""
    generator = torch.Generator().manual_seed(0)
    together = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(16, 32), (32, 16), (16, 32)]]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in together]
    stacked, single = Muon(together, lr=0.1), [Muon([p], lr=0.1) for p in alone]
    assert len(stacked.stacks) == 1
    for _ in range(3):
        for a, b in zip(together, alone, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        stacked.step()
        for optimizer in single:
            optimizer.step()
    for a, b in zip(together, alone, strict=True):
        assert torch.allclose(a, b, atol=1e-2)


def test_schedules_are_their_formulas() -> None:
    cosine = options(schedule="cosine", warmup_steps=10, max_steps=110, learning_rate=1.0, min_learning_rate=0.1)
    assert [schedule(step, cosine) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    for step in (10, 35, 60, 110):
        expected = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 10) / 100))
        assert schedule(step, cosine) == pytest.approx(expected)
    linear = options(schedule="linear", max_steps=100, decay_fraction=0.5)
    assert [schedule(step, linear) for step in (0, 49, 50, 75, 99, 100)] == pytest.approx([1, 1, 1, 0.5, 0.02, 0])
    assert schedule(99, options(max_steps=100, decay_fraction=0)) == 1
    assert schedule(0, options(max_steps=0)) >= 0


def test_a_factor_scales_every_groups_peak() -> None:
    optimizers = make_optimizers(gpt(), options())
    peaks = [group["lr"] for o in optimizers for group in o.param_groups]
    for factor in (0.5, 0.25):
        set_learning_rate(optimizers, factor)
        assert [group["lr"] for o in optimizers for group in o.param_groups] == pytest.approx([factor * p for p in peaks])


def test_one_training_step_is_the_golden_one() -> None:
    """A step of AdamW on GPT-2's architecture, by torch's functions alone; any change of initialisation, loss or update shows."""
    model = gpt("gpt2")
    twin = GPT(model.config)
    twin.load_state_dict(model.state_dict())
    ids = torch.arange(16).view(2, 8) % 50
    config = options(optimizer="adamw", learning_rate=0.01, beta1=0.9, beta2=0.99, weight_decay=0.1)
    (optimizer,) = make_optimizers(model, config)
    model(ids, ids.roll(-1, 1), torch.full((2, 8), 1 / 16)).backward()
    optimizer.step()
    torch.nn.functional.cross_entropy(twin(ids).flatten(0, 1), ids.roll(-1, 1).flatten()).backward()
    with torch.no_grad():
        for p in twin.parameters():  # first step of AdamW: the sign of the gradient, after the decay
            decay = 0.1 if p.ndim == 2 else 0
            p.mul_(1 - 0.01 * decay).sub_(0.01 * p.grad / (p.grad.abs() + 1e-8))
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        used = q.grad.abs() > 1e-6  # below that, rounding decides the sign
        assert torch.allclose(p[used], q[used], atol=1e-4), name
