"""One dial instead of ten options: --depth or --budget, the corpus and the machine decide on everything else.

    --depth 6      6 blocks of 384 channels, 6 heads of 64; as many tokens as that size is worth
    --budget 10m   the deepest model that this machine can train well in ten minutes

What the user sets stays. Each choice comes with the reason, one line each.
"""

import math
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from papagaio.corpus.workers import processors
from papagaio.errors import UserError
from papagaio.options import load_toml
from papagaio.training.options import RunOptions

HEAD_SIZE = 64  # channels of a head; the width grows with the depth by one head per block, as in nanochat
DEPTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)
# Tokens per matrix weight (nanochat's experiment log, 2026-01: 10 to 12 is the best use of compute).
TOKENS_PER_WEIGHT = 12
# In minutes instead of hours a larger model that sees fewer tokens is the better one (LOG.md, 2026-11-23).
LEAST_TOKENS_PER_WEIGHT = 1.5
AGREEMENT, MOST_PROBES = 0.1, 5  # two measured speeds that differ by less agree; probes of a machine that is busy
MAX_EPOCHS = 16  # a text that was read more often has little more to give (Muennighoff et al. 2023, arXiv:2305.16264)
BUDGET_MARGIN = 0.8  # fraction of a budget for training steps; the rest is for evaluations, checkpoints and slower moments


class Choice(NamedTuple):
    values: dict[str, Any]  # options by name
    reasons: list[str]  # one line each
    speed: float | None = None  # tokens per second, if it was measured


def matrix_weights(depth: int, vocab_size: int) -> int:
    """Weights of a model of this depth that multiply every token: 12 C^2 per block, and the head."""
    channels = HEAD_SIZE * depth
    return 12 * depth * channels**2 + vocab_size * channels


def batch_tokens(tokens: float) -> int:
    """Tokens of a step for a run of this many tokens: a power of two from 1,024 to 524,288.

    The curve goes through the two values that were measured to be best: 4,096 for 550 thousand tokens (LOG.md), and 524,288 for
    2.6 billion (nanochat at depth 12 and beyond).
    """
    return 2 ** round(math.log2(min(max(4096 * (tokens / 550e3) ** 0.57, 1024), 524288)))


CHOSEN = (  # what a dial chooses, and a resumed run keeps
    *("n_layer", "n_head", "n_embd", "block_size", "batch_size", "micro_batch_size"),
    *("max_steps", "eval_interval", "eval_tokens"),
)
Measure = Callable[[dict[str, Any]], float]  # options by name -> tokens per second in training


def complete(
    config: RunOptions, corpus: int, vocab_size: int, on_gpu: bool, tokens_per_second: Measure
) -> tuple[Any, float | None]:
    """The options of train.py, completed by what --depth or --budget chooses; the choices are printed with the reasons. Also the
    tokens per second that --budget has measured for them.

    A resumed run keeps the choices of its beginning. Raises UserError if they do not fit what the user has set.
    """
    given = config.model_dump(include=config.model_fields_set)
    saved = config.out_dir / "config.toml"
    if config.resume and saved.exists():
        _, chosen = load_toml(saved)
        return config.with_defaults({key: chosen[key] for key in CHOSEN if key in chosen}), None
    if config.depth:
        choice = by_depth(config.depth, corpus, vocab_size, on_gpu, given)
    else:
        seconds = float(config.budget[:-1]) * {"s": 1, "m": 60, "h": 3600}[config.budget[-1]]
        choice = by_budget(seconds, corpus, vocab_size, on_gpu, given, tokens_per_second)
    for line in choice.reasons:
        print(f"chosen: {line}", file=sys.stderr)
    return config.with_defaults(choice.values), choice.speed


def by_depth(
    depth: int, corpus: int, vocab_size: int, on_gpu: bool, given: dict[str, Any], tokens: float | None = None
) -> Choice:
    """All other options for this depth, for a run of `tokens` or of as many as this size is worth.

    `corpus`: tokens of the training split; `given`: what the user has set.
    """
    block_size = given.get("block_size", 1024 if on_gpu else 256)
    while "block_size" not in given and block_size > 32 and corpus < 64 * block_size:
        block_size //= 2
    if tokens is None:
        tokens = TOKENS_PER_WEIGHT * matrix_weights(depth, vocab_size)
    limited, tokens = tokens > MAX_EPOCHS * corpus, min(tokens, MAX_EPOCHS * corpus)
    batch_size = given.get("batch_size", max(1, batch_tokens(tokens) // block_size))
    max_steps = given.get("max_steps", int(tokens // (batch_size * block_size)))
    # A power of two that divides the batch: larger micro-batches take memory and are no faster.
    micro_batch_size = math.gcd(batch_size, 2 ** int(math.log2(max(1, (32768 if on_gpu else 8192) / block_size))))
    tokens = max_steps * batch_size * block_size
    # Nine evaluations; a token takes a third of the time of a trained one: about 6 % of the run.
    eval_interval, eval_tokens = max(1, math.ceil(max_steps / 8)), max(16384, tokens // 50)
    values = {
        **dict(n_layer=depth, n_head=depth, n_embd=HEAD_SIZE * depth, block_size=block_size, batch_size=batch_size),
        **dict(micro_batch_size=micro_batch_size, max_steps=max_steps, eval_interval=eval_interval, eval_tokens=eval_tokens),
    }
    most = f"all that is useful (at most {MAX_EPOCHS} epochs)" if limited else "what this size or time calls for"
    lines = [
        f"n_layer {depth}, n_embd {HEAD_SIZE * depth}, n_head {depth}: {HEAD_SIZE} channels per block, heads of {HEAD_SIZE}",
        f"eval_tokens {eval_tokens:,}: validation tokens at most, so that evaluations take little time",
        f"block_size {block_size}: usual on a {'GPU' if on_gpu else 'CPU'}, halved for a very small corpus",
        f"batch_size {batch_size}: {batch_size * block_size:,} tokens per step measured best for a run of {tokens:,}",
        f"max_steps {max_steps:,}: {tokens:,} tokens, {tokens / corpus:.1f} epochs of the corpus of {corpus:,}, {most}",
        "learning rates: the defaults, which fit every width and depth (those of tables and head fall with the width)",
    ]
    return Choice({key: value for key, value in values.items() if key not in given}, lines)


def by_budget(
    seconds: float, corpus: int, vocab_size: int, on_gpu: bool, given: dict[str, Any], tokens_per_second: Measure
) -> Choice:
    """The deepest model that sees enough tokens in this time; `tokens_per_second` measures the speed for given options.

    Raises UserError if the time is too short even for the smallest model.
    """
    best, busy = None, False
    for depth in [given["n_layer"]] if "n_layer" in given else DEPTHS:
        trial = by_depth(depth, corpus, vocab_size, on_gpu, given).values | given
        trial["batch_size"] = min(trial["batch_size"], 2 * trial["micro_batch_size"])  # enough to measure
        speed, steady = steady_speed(partial(tokens_per_second, trial))
        busy = busy or not steady
        tokens = BUDGET_MARGIN * seconds * speed
        if best is not None and tokens < LEAST_TOKENS_PER_WEIGHT * matrix_weights(depth, vocab_size):
            break
        best = depth, tokens, speed
    depth, tokens, speed = best
    choice = by_depth(depth, corpus, vocab_size, on_gpu, given, tokens)
    choice.reasons.insert(
        1,
        f"the deepest of {', '.join(map(str, DEPTHS[:6]))} ... that sees {LEAST_TOKENS_PER_WEIGHT} tokens for each weight in "
        f"{seconds:g} s at {speed:,.0f} tokens/s",
    )
    if notice := busy_notice(not busy):
        choice.reasons.append(notice)
    if choice.values.get("max_steps", 1) < 1:
        raise UserError(f"--budget: {seconds:g} s is not enough for a step; give it minutes")
    return choice._replace(speed=speed)


def steady_speed(measure: Callable[[], float]) -> tuple[float, bool]:
    """The highest measured speed, and whether it can be trusted: another measurement agrees with it. Other programs make a
    machine slower and never faster, so the highest is nearest to the truth."""
    speeds = [measure()]
    while len(speeds) < MOST_PROBES:
        speeds.append(measure())
        second, first = sorted(speeds)[-2:]
        if second >= (1 - AGREEMENT) * first:
            return first, True
    return max(speeds), False


def busy_notice(steady: bool) -> str | None:
    """What to say if other programs slow this machine down: its measured speed is not steady, or more threads are ready to run
    than there are processors."""
    load, count = os.getloadavg()[0], processors()
    if steady and load <= count:
        return None
    return f"the machine is busy (load {load:.1f} on {count} processors): the run may take longer than its speed promises"
