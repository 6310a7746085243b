"""Safety neurons as the paper writes them [SN: Zhao et al., ICLR 2025, section 3.1, Eq. 1 and 2].

    Imp(N|c) = || h_without_N(c) - h(c) ||_2,    N is a safety neuron if Imp(N|c) is large for EVERY harmful query c,

h = the output of the block that holds N, over all tokens of the rendered query.

1. Compute the exact importance of every neuron on every harmful prompt (:mod:`nt_utils.scoring.importance`).
2. Rank the neurons of the pool on each prompt, 1 = most important.
3. A neuron's value is minus the worst rank it has on any prompt: the top k of this ranking for some k are the neurons that
   are in the top k' of every prompt.

**Ours**: ranks are taken over the pool of all layers instead of a threshold that the paper does not give.
"""

from nt_utils import selection
from nt_utils.definitions import Material, definition
from nt_utils.models import LanguageModel
from nt_utils.neurons import POOL
from nt_utils.scoring.importance import importance
from nt_utils.selection import Ranking


@definition("as written", paper="SN")
def consistent(lm: LanguageModel, material: Material) -> Ranking:
    """Minus the worst rank of each neuron over the harmful prompts."""
    texts = material.harmful.texts
    scores = material.scores(
        "importance of all tokens", lambda: importance(lm, texts, kinds=POOL, positions="all", **material.options)
    )
    return selection.consistency(scores, rho=1.0, kinds=POOL, per="pool")
