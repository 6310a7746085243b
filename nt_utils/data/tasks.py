"""Tasks that no stage of the testbed's training has seen, to fine-tune on: harmless new skills with known answers."""

from __future__ import annotations

import random

from nt_utils.data.corpus import SOURCE, SPLITS
from nt_utils.data.records import Prompt, PromptSet
from nt_utils.errors import check_choice, check_count

DIFFERENCES = (
    ("What is {a} minus {b}?", "Take {b} from {a}.", "Subtract {b} from {a}.", "{a} - {b} = ?"),
    ("Compute {a} minus {b}.",),
    ("What is {a} less {b}?", "How much is {a} minus {b}?"),
)
#: Of five neighbouring pairs of numbers, three are for training, one for development and one for test.
_CYCLE = ("train", "dev", "train", "test", "train")


def differences(n: int | None = None, split: str = "train", seed: int = 0) -> PromptSet:
    """Subtraction below 20 (the testbed learns sums of numbers below 9): n of a split's questions, or all.

    Wordings and pairs of numbers both belong to one split. Raises InputError for an unknown split or n < 1.
    """
    check_choice("split", split, SPLITS)
    if n is not None:
        check_count("n", n)
    cells = [(a, b) for a in range(2, 20) for b in range(1, a)]
    found = [
        Prompt(
            text=form.format(a=a, b=b),
            helpful=f"{a} minus {b} is {a - b}.",
            answer=f"is {a - b}.",
            kind="benign",
            template=f"differences-{split}-{i}",
            topic=f"{a}-{b}",
            source=SOURCE,
            split=split,
            task="differences",
        )
        for i, form in enumerate(DIFFERENCES[SPLITS.index(split)])
        for j, (a, b) in enumerate(cells)
        if _CYCLE[j % len(_CYCLE)] == split
    ]
    random.Random(f"differences-{split}-{seed}").shuffle(found)
    return PromptSet(found[:n], f"differences-{split}")
