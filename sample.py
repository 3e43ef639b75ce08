"""Complete a text with a trained model.

    python sample.py --checkpoint out/run --prompt "To be, or" --num_samples 3 --temperature 0.8 --top_k 50
    echo "To be, or" | python sample.py --checkpoint out/run --prompt -

Standard output carries the prompt and its completion alone, a line of dashes between samples.
"""

import sys

from papagaio.config import SamplingOptions, UserError, option, parse, run


class SampleOptions(SamplingOptions):
    """Options of sample.py."""

    prompt: str = option("", "text to complete; - reads standard input; empty starts a new document")
    num_samples: int = option(1, "completions, each with the next seed", ge=1)


if __name__ == "__main__":  # a wrong option is refused before torch is imported, which takes a second or two
    OPTIONS = parse(SampleOptions, doc=__doc__)

from model import GPT, GPTConfig
from papagaio import runtime
from papagaio.checkpoint import open_checkpoint
from papagaio.generate import generate, stream_text
from papagaio.tokenizer import END, END_OF_TEXT


def main(config: SampleOptions) -> None:
    checkpoint = open_checkpoint(config.checkpoint, config.base)
    tokenizer = checkpoint.tokenizer
    prompt = config.prompt
    if prompt == "-":
        try:
            prompt = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"standard input: not UTF-8 at byte {error.start}") from None
    ids = [tokenizer.special[END_OF_TEXT], *tokenizer.encode(prompt)]  # every document began so in training
    device = runtime.pick_device(config.device)
    model = GPT(GPTConfig(**checkpoint.model_fields)).to(device).eval()
    checkpoint.load_model(model)
    if len(ids) > model.config.block_size:
        print(f"the prompt has {len(ids)} tokens; the model sees the last {model.config.block_size}", file=sys.stderr)
    if checkpoint.state.get("stage") == "finetune":
        print("this is a chat model: chat.py asks it questions", file=sys.stderr)

    end = {tokenizer.special[END_OF_TEXT], tokenizer.special[END]}
    for number in range(config.num_samples):
        if number:
            print("-" * 20)
        print(prompt, end="", flush=True)
        options = config.model_copy(update={"seed": config.seed + number})
        with runtime.autocast(device, runtime.pick_dtype(config.dtype, device)):
            tokens = generate(
                model,
                ids,
                options,
                block_size=model.config.block_size,
                banned=set(tokenizer.special.values()) - end,
                end=end,
                device=device,
            )
            for text in stream_text(tokenizer, tokens, config.stop):
                print(text, end="", flush=True)
        print()


if __name__ == "__main__":
    run(main, OPTIONS)
