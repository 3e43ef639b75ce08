"""Where an answer comes from: parts are taken out, and states are patched from one text into another (activation patching:
Vig et al., arXiv:2004.12265; causal tracing: Meng et al., arXiv:2202.05262)."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from papagaio.generation.engine import Engine
from papagaio.inside import drawing, page
from papagaio.inside.hooks import observe, replaced, without
from papagaio.inside.opening import open_engine, prompt_ids, span, spell
from papagaio.inside.options import KnowledgeOptions
from papagaio.runs.checkpoint import MakeModel


def look(config: KnowledgeOptions, make: MakeModel) -> page.Found:
    """What the answer loses without each part, and where the states of the subject decide it."""
    engine = open_engine(config, make)
    answer = engine.tokenizer.encode(config.answer)
    prompt = prompt_ids(engine, config.text, config.question, len(answer))
    whole, costs = ablations(engine, prompt, answer)
    shown = f"{config.text or config.question} -> {config.answer}"
    found = page.Found([f"{shown}: {whole:.3f} nats, probability {math.exp(-whole):.3f}"])
    found.lines += ["layer  attention out  MLP out"]
    found.lines += [f"{i:>5}  {a:>13.2f}  {m:>7.2f}" for i, (a, m) in enumerate(costs.tolist(), 1)]
    patched = None
    if config.subject and config.other:
        swapped = [text and text.replace(config.subject, config.other) for text in (config.text, config.question)]
        other = prompt_ids(engine, *swapped, len(answer))
        patched = patches(engine, prompt, other, answer, config.subject, config.other)
        values = patched.recovered.tolist()
        found.lines += ["", f"answer recovered by the state after a layer, at {', '.join(patched.places)}:"]
        found.lines += [f"{i:>5}  " + " ".join(f"{value:>6.2f}" for value in row) for i, row in enumerate(values)]
        texts = [[f"{value:.2f}" for value in row] for row in values]
        details = [[f"{value:.4f} of the answer comes back" for value in row] for row in values]
        shades = patched.recovered.clamp(0, 1)
        found.parts.append(page.grid(drawing.layers(len(values)), patched.places, shades, texts, details))
    found.pictures["knowledge"] = draw(whole, costs, patched, drawing.clip(shown, 100))
    return found


@torch.no_grad()
def answer_nats(model: Any, ids: Tensor, answer: int) -> Tensor:
    """Nats (B,) of the last `answer` tokens of ids (B, T), summed."""
    losses = -model(ids).float().log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]  # (B, T - 1)
    return losses[:, -answer:].sum(1)


def ablations(engine: Engine, prompt: list[int], answer: list[int]) -> tuple[float, Tensor]:
    """The answer's nats, and how many more there are without each layer's attention and without its MLP: (L, 2)."""
    model, ids = engine.model, torch.tensor([[*prompt, *answer]], device=engine.device)
    whole = float(answer_nats(model, ids, len(answer)))
    found = torch.zeros(len(model.blocks), 2)
    for i, block in enumerate(model.blocks):
        for j, part in enumerate((block.attn, block.mlp)):
            with without(part):
                found[i, j] = float(answer_nats(model, ids, len(answer))) - whole
    return whole, found


class Patches(NamedTuple):
    """How much of the answer comes back when states of the text are put into the other text."""

    probabilities: tuple[float, float]  # of the answer, after the text and after the other one
    recovered: Tensor  # (L + 1, places): 0: the answer is as improbable as in the other text, 1: as probable as in the text
    places: list[str]  # the subject's tokens together, then each token after it


def patches(engine: Engine, prompt: list[int], other: list[int], answer: list[int], subject: str, instead: str) -> Patches:
    """Run the other text, and put in its residual stream after each layer the text's: at the subject, or at one token after it.
    Both texts are the same but for the subject. If it has another number of tokens, its last ones are paired."""
    model = engine.model
    ours, theirs = span(engine, prompt, subject), span(engine, other, instead)
    common = min(ours.stop - ours.start, theirs.stop - theirs.start)
    after = len(prompt) - ours.stop  # the tokens behind the subject, the same in both
    after = min(after, len(other) - theirs.stop)
    pairs = [(range(ours.stop - common, ours.stop), range(theirs.stop - common, theirs.stop))]
    pairs += [
        (range(len(prompt) - k, len(prompt) - k + 1), range(len(other) - k, len(other) - k + 1)) for k in range(after, 0, -1)
    ]
    ids = torch.tensor([[*prompt, *answer]], device=engine.device)
    disturbed = torch.tensor([[*other, *answer]], device=engine.device)
    hidden = observe(model, ids).hidden
    best, worst = (float(answer_nats(model, row, len(answer))) for row in (ids, disturbed))
    rows = disturbed.expand(len(pairs), -1)
    recovered = torch.zeros(len(hidden), len(pairs))
    for layer, states in enumerate(hidden):

        def put(x: Tensor, states: Tensor = states) -> Tensor:
            x = x.clone()  # (places, T, C)
            for row, (from_, to) in enumerate(pairs):
                x[row, list(to)] = states[0, list(from_)]
            return x

        with replaced(model, layer, put):
            nats = answer_nats(model, rows, len(answer))
        recovered[layer] = ((worst - nats) / (worst - best)).cpu()
    return Patches(
        (math.exp(-best), math.exp(-worst)),
        recovered,
        [subject, *(spell(engine, token) for token in prompt[len(prompt) - after :])],
    )


def draw(whole: float, found: Tensor, patched: Patches | None, title: str) -> Any:
    """Left: what each part's absence costs the answer. Right: where the subject's states decide it."""
    L = len(found)
    wide = 0 if patched is None else max(3.6, 0.62 * len(patched.places) + 1.6)
    picture = drawing.figure(5.2 + wide, max(3.6, 0.27 * L + 2.2))
    panels = picture.subplots(1, 1 + (patched is not None), squeeze=False, width_ratios=(5.2, wide) if wide else None)[0]
    left = panels[0]
    places = torch.arange(1, L + 1)
    left.barh(places - 0.2, found[:, 0], height=0.38, color=drawing.COLOURS[0], label="attention out")
    left.barh(places + 0.2, found[:, 1], height=0.38, color=drawing.COLOURS[1], hatch="//", edgecolor="white", label="MLP out")
    left.axvline(0, color="black", linewidth=0.8)
    left.set_yticks(places.tolist(), [f"layer {i}" for i in places.tolist()])
    left.invert_yaxis()
    left.set(xlabel=f"nats more for the answer (now {whole:.2f})", title="a part taken out")
    left.legend()
    if patched is not None:
        columns = [drawing.literal(drawing.clip(place, 14)) for place in patched.places]
        values = patched.recovered.clamp(-1, 1)
        texts = [[f"{value:.2f}" for value in row] for row in patched.recovered.tolist()]
        drawing.heatmap(
            panels[1],
            values,
            drawing.layers(L + 1),
            columns,
            diverging=True,
            limit=1.0,
            texts=texts,
            bar="answer recovered",
            size=7,
        )
        clean, other = patched.probabilities
        panels[1].set_title(f"the state put into the other text\n(answer {clean:.3f} here, {other:.3f} there)")
    picture.suptitle(drawing.literal(title))
    return picture
