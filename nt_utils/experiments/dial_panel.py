"""The dial as a panel of widgets: numbers of neurons, strength, a prompt; the two answers and the rates of the setting."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from nt_utils.errors import first_line
from nt_utils.evaluation.generation import generate
from nt_utils.evaluation.judges import phrase_verdict
from nt_utils.interventions import Intervention
from nt_utils.interventions.dial import PRESETS, dial
from nt_utils.interventions.modulation import Modulation

if TYPE_CHECKING:
    from nt_utils.experiments.modulation import Rankings
    from nt_utils.models import LanguageModel


def has_front_end() -> bool:
    """Whether somebody can move a slider: a Jupyter kernel whose client answers questions, as a browser does and a batch does
    not."""
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    return bool(getattr(getattr(get_ipython(), "kernel", None), "_allow_stdin", False))


@dataclass
class Dial:
    """What the panel shows, without the widgets.

    Args:
        ranked, learnt: rankings and the learnt alpha that :func:`nt_utils.interventions.dial.dial` takes;
        table: the sweep, for the rates of its settings; rival: an intervention whose answer stands beside (the refusal
        direction), or None; tokens: of an answer.
    """

    lm: LanguageModel
    ranked: Rankings
    learnt: Modulation
    table: pd.DataFrame
    rival: Intervention | None = None
    tokens: int = 60

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

    @property
    def presets(self) -> dict[str, dict[str, Any]]:
        """Named settings of the sweep: nothing turned, and the two of the method with the nearest numbers of neurons."""
        size, strength = self.ranked.safety.values.numel(), self.values("strength")[-1]

        def nearest(column: str, share: float) -> Any:
            return min(self.values(column), key=lambda n: abs(n - share * size))

        found = {"untouched": {"n_safety": 0, "n_utility": 0, "strength": strength}}
        for name, preset in PRESETS.items():
            n_safety, n_utility = nearest("n_safety", preset.safety_share), nearest("n_utility", preset.utility_share)
            found[name] = {"n_safety": n_safety, "n_utility": n_utility, "strength": strength}
        return found

    def rival_answer(self, prompt: str) -> str:
        """The answer under the rival intervention."""
        options: dict[str, Any] = {"max_new_tokens": self.tokens, "progress": False, "intervention": self.rival}
        return generate(self.lm, [prompt], **options)[0].text

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
        options: dict[str, Any] = {"max_new_tokens": self.tokens, "progress": False}
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


#: Colour of a verdict's badge.
BADGES = {"refusal": "#0072B2", "partial": "#56B4E9", "compliance": "#D55E00"}


def badge(title: str, answer: str) -> str:
    """A column's heading with the phrase judge's verdict on its answer, as HTML."""
    verdict = str(phrase_verdict(answer)) if answer.strip() else "no answer"
    colour = BADGES.get(verdict, "#7F7F7F")
    style = f"background:{colour};color:white;border-radius:4px;padding:1px 6px"
    return f"<b>{html.escape(title)}</b> <span style='{style}'>{html.escape(verdict)}</span>"


def panel(
    lm: LanguageModel,
    ranked: Rankings,
    learnt: Modulation,
    table: pd.DataFrame,
    prompts: Sequence[str],
    rival: Intervention | None = None,
) -> Any:
    """The widgets, with the most telling of the prompts; None, with one line that says why, where ipywidgets or a front
    end is missing.

    A request, the sliders, buttons for the presets, and the answers of the untouched model, of the modulated one and
    under the rival side by side, each with its verdict. Sliders act when they are let go.
    """
    try:
        import ipywidgets as widgets
    except ImportError:
        print("the dial needs ipywidgets; the figures above show its settings")
        return None
    if not has_front_end():
        print("no front end: the figures above show the dial's settings")
        return None
    model, label = Dial(lm, ranked, learnt, table, rival), {"style": {"description_width": "8em"}}
    names = {"n_safety": "safety neurons", "n_utility": "utility neurons", "strength": "strength"}
    sliders = {
        name: widgets.SelectionSlider(
            options=model.values(name),
            value=model.safest[name],
            description=words,
            continuous_update=False,
            layout={"width": "30em"},
            **label,
        )
        for name, words in names.items()
    }
    telling = model.telling(prompts)
    text = widgets.Text(value=telling, description="prompt", continuous_update=False, layout={"width": "48em"}, **label)
    columns = ["untouched", "modulated", *([rival.name] if rival is not None else [])]
    field = {"disabled": True, "rows": 5, "layout": {"width": "22em"}}
    heads, answers = [widgets.HTML() for _ in columns], [widgets.Textarea(**field) for _ in columns]
    rates, plain_rates = (widgets.Label(layout={"width": "66em"}) for _ in range(2))
    status, paused = widgets.Label(), list[bool]()

    def show(_=None) -> None:
        if paused:
            return
        status.value = "computing ..."
        setting = {name: slider.value for name, slider in sliders.items()}
        rates.value = "this setting: " + model.rates(**setting)
        plain_rates.value = "untouched: " + model.rates(0, 0, 0.0)
        try:
            found = ["" for _ in columns]
            if text.value.strip():
                found = list(model.answers(text.value, **setting))
                found += [model.rival_answer(text.value)] if rival is not None else []
            for head, area, name, answer in zip(heads, answers, columns, found, strict=True):
                head.value, area.value = badge(name, answer), answer
            status.value = ""
        except Exception as error:  # whatever went wrong belongs on the panel, not in a log that nobody sees
            status.value = f"{type(error).__name__}: {first_line(error)}"

    def turn(setting: dict[str, Any], prompt: str | None = None) -> None:
        paused.append(True)
        for name, value in setting.items():
            sliders[name].value = value
        text.value = text.value if prompt is None else prompt
        paused.clear()
        show()

    buttons = []
    for name, setting in {**model.presets, "reset": model.safest}.items():
        button = widgets.Button(description=name)
        button.on_click(lambda _, name=name, setting=setting: turn(setting, telling if name == "reset" else None))
        buttons.append(button)
    for control in (*sliders.values(), text):
        control.observe(show, names="value")
    show()
    side = [widgets.VBox([head, area]) for head, area in zip(heads, answers, strict=True)]
    return widgets.VBox(
        [text, *sliders.values(), widgets.HBox(buttons), rates, plain_rates, widgets.HBox(side), status]
    )
