"""Attack-aware attribution [NT: Pan et al., NeuronTune, arXiv 2508.09473, stage 1].

    value(N) = sum over attacked requests of (a_N(attacked) - a_N(plain)) * dL/da_N,    L = the loss of the safe response,

a_N = the neuron's activation where the response's tokens are predicted: how a neuron's move under attack hurts the refusal.

1. Wrap each harmful prompt (by default the first 24) in representatives of the study's attack classes.
2. Read every activation on the plain and on the attacked prompt, and the gradient of L at the plain one.
3. Multiply move and gradient, average over the prompts of a class, then over the classes.

**Ours**: first order (attribution patching) in place of the paper's integrated gradients, L minus the loss of complying
(:mod:`nt_utils.scoring.attribution` has both and says how far they agree).
"""

from nt_utils import selection
from nt_utils.definitions import Material, definition
from nt_utils.models import LanguageModel
from nt_utils.scoring.attribution import attribution, safety_cases
from nt_utils.selection import Ranking


@definition("attribution", paper="NT", needs=("attacks",))
def attack_aware(lm: LanguageModel, material: Material) -> Ranking:
    """First-order effect of each neuron's move under attack on the loss of refusing."""
    prompts = material.harmful[: material.attacked_prompts]
    cases = safety_cases(prompts, material.attacks, material.per_class)
    scores = material.scores(
        "attribution", lambda: attribution(lm, cases, method="patching", **material.options), period=len(prompts)
    )
    return selection.attributed(scores)
