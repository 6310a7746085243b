"""Set difference of SNIP weight scores [Wei et al., ICML 2024, arXiv 2402.05162, section 3.3].

    I(w) = |w * dL/dw|,    L = the loss of the response;
    safety neurons = top q% on safety data minus top p% on utility data.

1. Score every weight on harmful prompts with their refusals, and on benign prompts with their answers.
2. A neuron's score is the mean over the weights that it owns.
3. Leave out the top p of the pool on utility data; rank the rest by its score on safety data.

**Ours**: neurons in place of single weights, compared over the whole pool, where the paper compares the weights of one
matrix row with each other; p is chosen on development prompts (``Material.utility_share``).
"""

from nt_utils import selection
from nt_utils.definitions import Material, definition
from nt_utils.models import LanguageModel
from nt_utils.neurons import NeuronScores
from nt_utils.scoring.saliency import saliency
from nt_utils.selection import Ranking


@definition("SNIP difference", paper="Wei et al. 2024", needs=("benign", "utility_share"))
def snip_difference(lm: LanguageModel, material: Material) -> Ranking:
    """First-order weight importance on harmful prompts, without what is useful on benign ones."""
    return difference(lm, material, "snip", material.utility_share["SNIP difference"])


def difference(lm: LanguageModel, material: Material, metric: str, share: float) -> Ranking:
    """The set difference by a weight score, "snip" or "wanda"; ``share``: of the pool, left out as useful."""

    def scores(side: str, response: str) -> NeuronScores:
        prompts = getattr(material, side)
        responses = prompts.column(response)
        return material.scores(
            f"{metric}, {side}", lambda: saliency(lm, prompts, responses, metric=metric, **material.options)
        )

    return selection.set_difference(scores("harmful", "refusal"), scores("benign", "helpful"), share)
