"""Generation-time activation contrasting [Chen et al. 2024, arXiv 2406.14144, section 3.1].

    value(N) = sqrt( mean over response tokens of (a_N(aligned) - a_N(unaligned))^2 ).

1. Let the aligned model answer every harmful prompt.
2. Read every activation of the aligned and of the unaligned model on the same prompt and answer.
3. Rank by the root mean square of their difference over all response tokens.

**Ours**: see :mod:`nt_utils.scoring.activation_change` (whose text, which positions, which neurons).
"""

from nt_utils import selection
from nt_utils.definitions import Material, definition
from nt_utils.models import LanguageModel
from nt_utils.scoring.activation_change import activation_change
from nt_utils.selection import Ranking


@definition("activation change", paper="Chen et al. 2024", needs=("base", "responses"))
def change_by_alignment(lm: LanguageModel, material: Material) -> Ranking:
    """Root mean square change of each activation from the unaligned to the aligned model."""
    base, prompts, responses = material.base, material.harmful, material.responses
    assert base is not None, "the definition needs it"
    change = material.scores(
        "activation change", lambda: activation_change(lm, base, prompts, responses, **material.options)
    )
    return selection.root_mean_square(change)
