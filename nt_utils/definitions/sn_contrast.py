"""Importance on harmful minus importance on benign prompts (ours, after [SN: Zhao et al., ICLR 2025]).

    value(N) = mean_c [Imp(N|c) / mean_M Imp(M|c)]  over harmful c   -   the same over benign c.

The paper asks for importance on every harmful query alone, which neurons that matter for any text meet as well; here what a
neuron does for benign prompts of the same wording is subtracted.

1. Compute the exact importance of every neuron on every harmful and every benign prompt, over the last prompt tokens only
   (the template's tokens after the user's text, where the answer is decided).
2. Divide each prompt's scores by their mean over the pool, so that every prompt counts alike.
3. Average over harmful and over benign prompts; the value is the difference.
"""

from nt_utils import selection
from nt_utils.definitions import Material, definition
from nt_utils.models import LanguageModel
from nt_utils.neurons import POOL
from nt_utils.scoring.importance import importance
from nt_utils.selection import Ranking


@definition("contrast", paper="ours, after SN", needs=("benign",))
def contrast(lm: LanguageModel, material: Material) -> Ranking:
    """Normalised mean importance on harmful minus on benign prompts."""

    def last_tokens(side: str):
        texts = getattr(material, side).texts
        return material.scores(
            f"importance of the last tokens, {side}",
            lambda: importance(lm, texts, kinds=POOL, positions="last", **material.options),
        )

    return selection.contrast(last_tokens("harmful"), last_tokens("benign"))
