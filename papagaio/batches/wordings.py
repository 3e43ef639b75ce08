"""Whether the questions of a file repeat a few wordings, so that a model may learn these and no others.

What is the currency of Spain?  What is the currency of Peru?  ...      one wording: what is the currency of _
"""

import re
from collections import Counter
from collections.abc import Sequence

OFTEN = 10  # questions of the same wording
MOST = 10  # wordings


def wordings(questions: Sequence[str]) -> list[str]:
    """Each question in lower case, with `_` in place of words that are in fewer than six questions, or one in fifty.

    A question of which fewer than three words are left has no wording in common with others, and stays as it is.
    """
    split = [re.findall(r"\w+", question.lower()) for question in questions]
    counts = Counter(word for words in split for word in set(words))
    least = max(6, len(questions) / 50)
    found = []
    for question, words in zip(questions, split, strict=True):
        kept = " ".join(word if counts[word] >= least else "_" for word in words)
        wording = re.sub(r"_( _)+", "_", kept)
        found.append(wording if len(wording.replace("_", "").split()) > 2 else question)
    return found


def repeated(questions: Sequence[str]) -> str:
    """A line that says so if ten wordings, each of ten questions or more, make most of the questions; otherwise ""."""
    often = [pair for pair in Counter(wordings(questions)).most_common(MOST) if pair[1] >= OFTEN]
    share = sum(count for _, count in often) / max(1, len(questions))
    if share <= 0.5:
        return ""
    have = "the same wording" if len(often) == 1 else f"one of {len(often)} wordings"
    return (
        f"{share:.0%} of the training questions have {have}, for example: {often[0][0]}. Answers to questions in other words may "
        "be much worse: train on several wordings (docs/finetuning.md), and measure others with --test_data"
    )
