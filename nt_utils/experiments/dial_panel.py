"""The dial as a panel of widgets: numbers of neurons, strength, a prompt; the two answers and the rates of the setting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from nt_utils.evaluation.generation import generate
from nt_utils.evaluation.judges import phrase_verdict
from nt_utils.interventions.dial import dial
from nt_utils.interventions.modulation import Modulation

if TYPE_CHECKING:
    from nt_utils.experiments.modulation import Rankings
    from nt_utils.models import LanguageModel


def has_front_end() -> bool:
    """Whether somebody can move a slider: a Jupyter kernel that papermill does not drive."""
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    shell = get_ipython()
    if shell is None or not hasattr(shell, "kernel"):
        return False
    return not any(str(cell).startswith("# Parameters\n") for cell in shell.user_ns.get("In", []))


class Dial:
    """What the panel shows, without the widgets.

    Args:
        ranked, learnt: rankings and the learnt alpha that :func:`nt_utils.interventions.dial.dial` takes;
        table: the sweep, for the rates of its settings.
    """

    def __init__(self, lm: LanguageModel, ranked: Rankings, learnt: Modulation, table: pd.DataFrame, tokens: int = 60):
        self.lm, self.ranked, self.learnt, self.table, self.tokens = lm, ranked, learnt, table, tokens

    def values(self, column: str) -> list:
        """The settings of n_safety, n_utility or strength that the sweep holds."""
        return sorted(v.item() for v in self.table[column].unique())

    def rates(self, n_safety: int, n_utility: int, strength: float) -> str:
        """The sweep's rates at a setting; those of the untouched model where nothing is turned."""
        untouched = not (n_safety + n_utility) or not strength
        wanted = (0, 0, 0.0) if untouched else (n_safety, n_utility, strength)
        rows = self.table[(self.table[["n_safety", "n_utility", "strength"]] == list(wanted)).all(axis=1)]
        if rows.empty:
            return "no rates: this setting is not in the sweep"
        names = [c.removesuffix(" n") for c in self.table.columns if c.endswith(" n")]
        row = rows.iloc[0]
        return "; ".join(
            f"{n} {row[n]:.0%} [{row[f'{n} low']:.0%}, {row[f'{n} high']:.0%}], n = {int(row[f'{n} n'])}" for n in names
        )

    @property
    def safest(self) -> dict[str, Any]:
        """The setting that the panel begins with: most safety neurons, fewest utility neurons, full strength."""
        return {c: self.values(c)[end] for c, end in (("n_safety", -1), ("n_utility", 0), ("strength", -1))}

    def answers(self, prompt: str, n_safety: int, n_utility: int, strength: float) -> tuple[str, str]:
        """Answers of the untouched and of the modulated model."""
        return self.all_answers([prompt], n_safety, n_utility, strength)[0]

    def all_answers(
        self, prompts: Sequence[str], n_safety: int, n_utility: int, strength: float
    ) -> list[tuple[str, str]]:
        """For each prompt the answers of the untouched and of the modulated model."""
        setting = None
        if n_safety + n_utility and strength:
            setting = dial(self.ranked.safety, self.ranked.utility, n_safety, n_utility, strength, learnt=self.learnt)
        options = {"max_new_tokens": self.tokens, "progress": False}
        plain, modulated = (
            [r.text for r in generate(self.lm, list(prompts), intervention=i, **options)] for i in (None, setting)
        )
        return list(zip(plain, modulated, strict=True))

    def telling(self, prompts: Sequence[str]) -> str:
        """The first prompt that is answered untouched and refused at the first setting; else the first whose answer
        changes; else the first."""
        prompts = [p for p in prompts if "\n" not in p] or list(prompts)  # the panel's field holds one line
        both = self.all_answers(prompts, **self.safest)
        turned = [(phrase_verdict(a), phrase_verdict(b)) == ("compliance", "refusal") for a, b in both]
        changed = [a != b for a, b in both]
        return prompts[turned.index(True) if any(turned) else changed.index(True) if any(changed) else 0]


def panel(lm: LanguageModel, ranked: Rankings, learnt: Modulation, table: pd.DataFrame, prompts: Sequence[str]) -> Any:
    """The widgets, with the most telling of the prompts; None, with one line that says why, where ipywidgets or a front
    end is missing."""
    try:
        import ipywidgets as widgets
    except ImportError:
        print("the dial needs ipywidgets; the figures above show its settings")
        return None
    if not has_front_end():
        print("no front end: the figures above show the dial's settings")
        return None
    model, wide = Dial(lm, ranked, learnt, table), {"width": "48em"}
    names = {"n_safety": "safety neurons", "n_utility": "utility neurons", "strength": "strength"}
    sliders = {
        name: widgets.SelectionSlider(
            options=model.values(name),
            value=model.safest[name],
            description=label,
            style={"description_width": "8em"},
            layout={"width": "30em"},
        )
        for name, label in names.items()
    }
    text = widgets.Text(
        value=model.telling(prompts),
        description="prompt",
        continuous_update=False,
        style={"description_width": "8em"},
        layout=wide,
    )
    field = {"disabled": True, "rows": 4, "layout": {"width": "24em"}}
    rates, plain, modulated = (
        widgets.Label(layout={"width": "60em"}),
        widgets.Textarea(**field),
        widgets.Textarea(**field),
    )

    def show(_=None) -> None:
        setting = {name: slider.value for name, slider in sliders.items()}
        rates.value = model.rates(**setting)
        plain.value, modulated.value = model.answers(text.value, **setting) if text.value.strip() else ("", "")

    for control in (*sliders.values(), text):
        control.observe(show, names="value")
    show()
    labels = [widgets.VBox([widgets.Label(n), w]) for n, w in (("untouched", plain), ("modulated", modulated))]
    return widgets.VBox([*sliders.values(), text, rates, widgets.HBox(labels)])
