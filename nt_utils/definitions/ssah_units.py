"""Safety-critical units [SSAH: Li & Kim, ICLR 2026, section 3].

    I_D(j) = Var_D(x_j) * ||W[:, j]||^2,    x_j = the channel's activation over the tokens of data set D, W = its reading weights,

I_S on safety data, I_U on utility data; a safety-critical unit (SCU) has a high I_S and a low I_U.

1. Take the statistics of every channel over all tokens of harmful prompts with refusals, and of benign ones with answers.
2. Divide each score by its mean over the (layer, kind).
3. Rank by the contrast of the two (:class:`nt_utils.selection.UnitScores`).

**Ours**: channels are ranked one by one, so that the pool is the common one; notebook 03 ranks whole attention heads.
"""

from nt_utils import selection
from nt_utils.definitions import Material, definition
from nt_utils.models import LanguageModel
from nt_utils.neurons import POOL
from nt_utils.scoring.fluctuation import Fluctuation, fluctuation
from nt_utils.selection import Ranking


@definition("SCU", paper="SSAH", needs=("benign",))
def safety_critical_units(lm: LanguageModel, material: Material) -> Ranking:
    """Contrast of the channels' normalised scores on safety and on utility data."""

    def statistics(side: str, response: str) -> Fluctuation:
        def of_block(block: int) -> Fluctuation:
            rows = getattr(material, side)[block :: material.blocks]
            return fluctuation(lm, [p.text for p in rows], [getattr(p, response) for p in rows], **material.options)

        return material.merged(f"fluctuation, {side}", of_block)

    units = selection.unit_scores(statistics("harmful", "refusal"), statistics("benign", "helpful"), heads=False)
    return Ranking(lm.view.space, POOL, units.difference, "SCU")
