"""Set difference of Wanda weight scores [Wei et al., ICML 2024, arXiv 2402.05162, section 3.3].

    I(w_ij) = |w_ij| * ||x_j||_2,    x_j = the input channel over the response's tokens;
    safety neurons = top q% on safety data minus top p% on utility data.

1. Score every weight on harmful prompts with their refusals, and on benign prompts with their answers.
2. A neuron's score is the mean over the weights that it owns.
3. Leave out the top p of the pool on utility data; rank the rest by its score on safety data.

**Ours**: neurons in place of single weights, compared over the whole pool, where the paper compares the weights of one
matrix row with each other; norms of inputs are taken prompt by prompt and the scores averaged; p is chosen on
development prompts (``Material.utility_share``).
"""

from nt_utils.definitions import Material, definition
from nt_utils.definitions.wei_snip import difference
from nt_utils.models import LanguageModel
from nt_utils.selection import Ranking


@definition("Wanda difference", paper="Wei et al. 2024", needs=("benign", "utility_share"))
def wanda_difference(lm: LanguageModel, material: Material) -> Ranking:
    """Weight times input norm on harmful prompts, without what is useful on benign ones."""
    return difference(lm, material, "wanda", material.utility_share["Wanda difference"])
