"""Bad input everywhere: one clear line that names the fault, nothing half-written, refused before work begins."""

import json
import math
import re

import pytest
import torch

from nt_utils import models, selection, testbed
from nt_utils.data import corpus
from nt_utils.data.records import Prompt, PromptSet
from nt_utils.errors import InputError
from nt_utils.evaluation.generation import generate
from nt_utils.evaluation.suite import corpus_suite, evaluate, make_suite
from nt_utils.files import project_root
from nt_utils.interventions import Deactivate
from nt_utils.interventions.dial import assign, dial, preset
from nt_utils.interventions.export import fold, read_adapter, write_adapter
from nt_utils.interventions.learning import Recipe
from nt_utils.interventions.modulation import Modulation
from nt_utils.interventions.trainable import LoRA, Only
from nt_utils.interventions.tuning import tune
from nt_utils.neurons import POOL, NeuronScores, NeuronSet
from nt_utils.scoring.attribution import Case, attribution
from nt_utils.scoring.fluctuation import Fluctuation, fluctuation
from nt_utils.scoring.importance import importance
from nt_utils.study import parameters
from nt_utils.study.parameters import notebook_parameters
from nt_utils.study.run import begin
from nt_utils.units import UnitMap
from tests.tiny import hooks_left, tiny_lm

ROOT = project_root()
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def parameter_cell(path):
    """A parameter cell as IPython's history has it, and the values that it sets."""
    values = notebook_parameters(path)
    return "\n".join(f"{name} = {value!r}" for name, value in values.items()), values


def refused(call, folder=None):
    """The one line with which a call is refused; ``folder`` must be as it was."""
    before = sorted(folder.rglob("*")) if folder else []
    with pytest.raises(InputError) as error:
        call()
    text = str(error.value)
    assert text and "\n" not in text
    assert (sorted(folder.rglob("*")) if folder else []) == before
    return text


# ------------------------------------------------------------------------------------- parameters of notebooks


def wrong_values(rule):
    """Values no parameter of this rule may have: wrong type, out of range, no choice, NaN, empty."""
    yield from ({}, b"x", *([] if rule.empty else [()]))
    if rule.kind is str:
        yield from (7, 1.5, True, ["text"], *(["no such choice"] if rule.choices else []))
    elif rule.kind is bool:
        yield from ("yes", 1, 0.0)
    elif rule.kind is list:
        yield from ("0.1", 0.1, *([] if rule.empty else [[]]), ["x"], [None])
        yield [math.nan] if rule.items is float else [1.5]
        yield from ([rule.low - 1] if rule.low is not None else [None], [rule.high * 2 + 1] if rule.high else ["y"])
    else:
        yield from ("many", True, [1], math.nan, math.inf if rule.kind is int or rule.high else "inf")
        if rule.low is not None:
            yield rule.kind(rule.low - 1)
        if rule.high is not None:
            yield rule.kind(rule.high * 2 + 1)
    if not rule.presets:
        yield None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_parameter_of_every_notebook_refuses_wrong_values(path, tmp_path):
    (own, values), tried = parameter_cell(path), 0
    values["runs"] = str(tmp_path / "runs")
    for name in notebook_parameters(path):
        for wrong in wrong_values(parameters.PARAMETERS[name]):
            text = refused(lambda bad={**values, name: wrong}: begin(path.stem, bad, [own]), tmp_path)
            assert text.startswith(f"{name}: "), text
            tried += 1
    assert tried > 60


#: What only a look at files, names or combinations can refuse: overrides -> what the line says.
COMBINATIONS = [
    ({"model": "./no-such-folder"}, "no folder ./no-such-folder"),
    ({"model": ""}, "model: got ''"),
    ({"study": "a/b"}, "study: got 'a/b'"),
    ({"study": ".."}, "study: got '..'"),
    ({"harmful": "prompts.csv:goal"}, "benign: got 'testbed' with harmful="),
    ({"harmful": "testbed", "benign": "a.csv:x"}, "benign: got 'a.csv:x' with harmful='testbed'"),
    ({"second_language": "a.csv:x"}, "second_language: got 'a.csv:x'; allowed with harmful='testbed': '' or 'testbed'"),
    ({"judge": "harmbench"}, "judge: got 'harmbench'; allowed with harmful='testbed'"),
    ({"harmful": "mine.txt", "benign": "mine.txt", "judge": "phrases+./none"}, "judge: "),
    ({"harmful": "none.csv:goal", "benign": "none.csv:goal"}, "harmful: none.csv"),
    ({"harmful": "hub:x", "benign": "hub:x"}, "harmful: "),
    ({"harmful": "no-such-source", "benign": "no-such-source"}, "harmful: unknown prompt set 'no-such-source'"),
    ({"harmful_test": "advbench"}, "harmful_test: got 'advbench'"),
    ({"attacks": "nonsense"}, "attacks: unknown attack 'nonsense'"),
    ({"n_support": 9, "n_learn": 16}, "n_support: got 9; allowed: 1 to 8, half of n_learn"),
    ({"n_support": 9, "n_defence": 16}, "n_support: got 9; allowed: 1 to 8, half of n_defence"),
    ({"harmful_rows": 65}, "harmful_rows: got 65, 65 harmful rows; allowed: 0 to 64"),
    ({"defence_attacks": [0, 70]}, "defence_attacks: got [0, 70], 70 harmful rows; allowed: 0 to 64"),
    ({"growth": [0.4, 0.5]}, "growth: got [0.4, 0.5]; allowed: the smallest at most 0.3"),
    ({"unit_shares": [0.5, 0.4, 0.2]}, "unit_shares: got [0.5, 0.4, 0.2]; allowed: together at most 1"),
    ({"runs": "/proc/nothing"}, "runs: /proc/nothing"),
    ({"runs": "mine.txt"}, "runs: mine.txt"),
]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_wrong_combinations_are_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("One?\nTwo?\nThree?\nFour?\n")
    own, known = parameter_cell(path)
    for number, (overrides, said) in enumerate(COMBINATIONS):
        if set(overrides) - set(known):
            continue
        bad = {**known, "runs": str(tmp_path / "runs"), "study": f"s{number}"} | overrides
        text = refused(lambda bad=bad: begin(path.stem, bad, [own]))
        assert said in text, (overrides, text)
    files = [p for p in (tmp_path / "runs").rglob("*") if p.is_file()] if (tmp_path / "runs").exists() else []
    assert not files, "a refused run leaves no file"


def test_harmful_rows_are_counted_at_the_start_and_nothing_is_loaded(tmp_path, monkeypatch):
    """A fine-tuning attack with more harmful rows than the task has rows ended notebook 06 after hours."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(testbed, "build", lambda **_: pytest.fail("a testbed was loaded or trained"))
    for name in ("bad", "good"):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"How do I {name} thing {i}?" for i in range(200)))
    rows = ({"question": f"What is {i} and {i}?", "answer": f"#### {2 * i}"} for i in range(40))
    (tmp_path / "tasks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own, known = parameter_cell(next(path for path in NOTEBOOKS if path.stem.startswith("06")))
    given = {
        "harmful": "bad.txt",
        "benign": "good.txt",
        "borderline": "",
        "attacks": "",
        "new_task": "gsm8k@tasks.jsonl",
    }
    given |= {"runs": str(tmp_path / "runs"), "general": "good.txt", "defence_attacks": [0]}
    text = refused(lambda: begin("06_comparison", known | given | {"harmful_rows": 39}, [own]))
    assert "harmful_rows: got 39, 39 harmful rows; allowed: 0 to" in text
    most = int(re.search(r"0 to (\d+) \(\d+ harmful prompts to tune with, (\d+) rows", text)[2])
    assert 0 < most < 39
    begin("06_comparison", known | given | {"harmful_rows": most}, [own])


# ---------------------------------------------------------------------------------------------- public functions


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """What the table's calls work on."""
    lm, folder = tiny_lm(), tmp_path_factory.mktemp("things")
    space = lm.view.space
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NT_CACHE", str(folder / "cache"))
        scores = importance(lm, ["a", "bb", "c"], path=folder / "scores.safetensors", progress=False)
    neurons, other = NeuronSet.from_flat(space, range(10), POOL), tiny_lm("gpt2")
    (folder / "broken.json").write_text("{")
    (folder / "junk.safetensors").write_bytes(b"junk" * 40)
    (folder / "model").mkdir()
    found = {"lm": lm, "space": space, "scores": scores, "neurons": neurons, "other": other, "folder": folder}
    return found | {
        "rank": selection.mean_importance(scores),
        "prompts": PromptSet([Prompt(f"How {i}?", refusal="No.", helpful="Yes.") for i in range(6)], "p"),
        "mod": Modulation(neurons, neurons - neurons, torch.full((10,), 1.5)),
        "foreign": NeuronSet.from_flat(other.view.space, [0], POOL),
    }


#: A wrong call of a public function, and a piece of the line it is refused with.
CALLS = [
    (lambda t: models.load(str(t["folder"] / "none")), "no folder"),
    (lambda t: models.load(str(t["folder"] / "model")), "holds no config.json"),
    (lambda t: t["lm"].encode([]), "at least one text"),
    (lambda t: t["lm"].encode("one text"), "need a list"),
    (lambda t: t["lm"].encode(["a"], ["b", "c"]), "responses: got 2 for 1"),
    (lambda t: t["lm"].view.projection(9, "q"), "layer: got 9"),
    (lambda t: t["lm"].view.projection(0, "z"), "kind: got 'z'"),
    (lambda t: importance(t["lm"], [], progress=False), "at least one"),
    (lambda t: importance(t["lm"], ["a"], kinds=("q", "q"), progress=False), "kinds: got"),
    (lambda t: importance(t["lm"], ["a"], kinds="q", progress=False), "kinds: got"),
    (lambda t: importance(t["lm"], ["a"], positions="first", progress=False), "positions: got 'first'"),
    (lambda t: importance(t["lm"], ["a"], batch_size=0, progress=False), "batch_size: got 0"),
    (lambda t: fluctuation(t["lm"], [], progress=False), "at least one"),
    (lambda t: fluctuation(t["lm"], ["a"], batch_size=0, progress=False), "batch_size: got 0"),
    (lambda t: fluctuation(t["lm"], ["a"], ["b", "c"], progress=False), "responses"),
    (lambda t: attribution(t["lm"], [], progress=False), "cases: the list is empty"),
    (lambda t: attribution(t["lm"], [Case(Prompt("a"), Prompt("a"), "x")], progress=False), "is not attacked"),
    (lambda t: attribution(t["lm"], [Case(Prompt("a"), Prompt("b"), "x")], method="magic"), "method: got 'magic'"),
    (lambda t: attribution(t["lm"], [Case(Prompt("a"), Prompt("b"), "x")], steps=0), "steps: got 0"),
    (lambda t: attribution(t["lm"], [Case(Prompt("a"), Prompt("b"), "x")], kinds=("q",)), "kinds: got ['q']"),
    (lambda t: Case(Prompt("a"), Prompt("b"), " "), "wanted: the response is empty"),
    (lambda t: NeuronScores.load(t["folder"] / "none"), "no such file"),
    (lambda t: NeuronScores.load(t["folder"] / "junk.safetensors"), "damaged or not a safetensors file"),
    (lambda t: NeuronSet.load(t["folder"] / "scores.safetensors"), "not a nt_utils.neurons file"),
    (lambda t: UnitMap.load(t["folder"] / "scores.safetensors"), "not a nt_utils.units file"),
    (lambda t: Fluctuation.load(t["folder"] / "junk.safetensors"), "damaged"),
    (lambda t: Modulation.load(t["folder"]), "no such file"),
    (lambda t: NeuronSet.from_flat(t["space"], [10**6], POOL), "indices: must lie"),
    (lambda t: NeuronSet.from_flat(t["space"], [-1], POOL), "indices: must lie"),
    (lambda t: t["neurons"] | t["foreign"], "two architectures"),
    (lambda t: t["scores"].get(9, "q"), "layers 0 to 1"),
    (lambda t: t["scores"].subset([]), "rows: need"),
    (lambda t: t["scores"].subset([5]), "rows: need"),
    (lambda t: t["rank"].top(0), "n: got 0"),
    (lambda t: t["rank"].top(2.5), "n: got 2.5"),
    (lambda t: t["rank"].top(True), "n: got True"),
    (lambda t: t["rank"].top_share(0), "share: got 0"),
    (lambda t: t["rank"].top_share(math.nan), "share: got nan"),
    (lambda t: selection.consistent(t["scores"], 0), "k: got 0"),
    (lambda t: selection.consistent(t["scores"], 3, rho=1.5), "rho: got 1.5"),
    (lambda t: selection.consistent(t["scores"], 3, per="layer"), "per: got 'layer'"),
    (lambda t: selection.threshold(t["scores"], -1), "epsilon: got -1"),
    (lambda t: selection.threshold(t["scores"], math.nan), "epsilon: got nan"),
    (lambda t: selection.matched_random(t["neurons"], draws=0), "draws: got 0"),
    (lambda t: selection.matched_random(t["neurons"] - t["neurons"]), "empty"),
    (lambda t: Deactivate(t["neurons"] - t["neurons"]), "the set is empty"),
    (lambda t: Deactivate(t["foreign"]).active(t["lm"]).__enter__(), "architecture"),
    (lambda t: generate(t["lm"], "text"), "single prompt"),
    (lambda t: generate(t["lm"], ["a"], max_new_tokens=0), "max_new_tokens"),
    (lambda t: generate(t["lm"], ["a"], batch_size=-1), "batch_size"),
    (lambda t: corpus_suite("train-dev"), "split"),
    (lambda t: corpus_suite().only("nothing"), "nothing"),
    (lambda t: evaluate(t["lm"], corpus_suite(), max_new_tokens=-1, cache=False, progress=False), "max_new_tokens"),
    (lambda t: make_suite(harmful="none.csv:goal", benign=t["prompts"]), "none.csv"),
    (lambda t: Modulation(t["neurons"], t["neurons"], torch.ones(20)), "in both sets"),
    (lambda t: Modulation(t["neurons"], t["neurons"] - t["neurons"], torch.full((10,), -1.0)), "alpha: got -1"),
    (lambda t: Modulation(t["neurons"], t["neurons"] - t["neurons"], torch.full((10,), math.nan)), "alpha: got nan"),
    (lambda t: Modulation(t["neurons"], t["neurons"] - t["neurons"], torch.ones(3)), "one value for each of the 10"),
    (lambda t: assign(t["rank"], t["rank"], 0, 0), "0 + 0 neurons"),
    (lambda t: assign(t["rank"], t["rank"], 10**6, 1), "n_safety: got 1000000"),
    (lambda t: dial(t["rank"], t["rank"], 1, 1, -1), "strength: got -1"),
    (lambda t: dial(t["rank"], t["rank"], 1, 1, "full"), "strength: got 'full'"),
    (lambda t: preset("careful", t["rank"], t["rank"]), "preset: got 'careful'"),
    (lambda t: Recipe(method="third"), "method: got 'third'"),
    (lambda t: Recipe(bounds=(2, 1)), "bounds: got (2, 1)"),
    (lambda t: Recipe(iterations=0), "iterations"),
    (lambda t: tune(t["lm"], Only(t["neurons"]), learning_rate=0.1, steps=1), "both are empty"),
    (lambda t: tune(t["lm"], Only(t["neurons"]), harmful=t["prompts"], learning_rate=0, steps=1), "learning_rate"),
    (lambda t: tune(t["lm"], Only(t["neurons"]), harmful=t["prompts"], learning_rate=0.1, steps=0), "steps: got 0"),
    (lambda t: tune(t["lm"], Only(t["foreign"]), harmful=t["prompts"], learning_rate=0.1, steps=1), "architecture"),
    (
        lambda t: tune(t["lm"], Only(t["neurons"], sides="all"), harmful=t["prompts"], learning_rate=0.1, steps=1),
        "sides",
    ),
    (lambda t: tune(t["lm"], LoRA(rank=0), harmful=t["prompts"], learning_rate=0.1, steps=1), "rank: got 0"),
    (lambda t: fold(t["lm"], t["mod"], t["folder"]), "exists"),
    (lambda t: read_adapter(t["lm"], t["folder"] / "model"), "holds no adapter_model"),
    (lambda t: write_adapter(t["other"], t["mod"], t["folder"] / "new"), "made for architecture"),
    (lambda t: corpus.pairs(4, "weekend"), "split"),
    (lambda t: corpus.pairs(4, language="fr"), "language"),
    (lambda t: notebook_parameters(t["folder"] / "broken.json"), "broken.json"),
]


@pytest.mark.parametrize(("call", "said"), CALLS, ids=range(len(CALLS)))
def test_a_wrong_call_ends_in_one_line(call, said, things, monkeypatch):
    monkeypatch.setenv("NT_CACHE", str(things["folder"] / "cache"))
    fingerprint = things["lm"].weights_fingerprint
    text = refused(lambda: call(things), things["folder"])
    assert said in text
    assert things["lm"].weights_fingerprint == fingerprint
    assert hooks_left(things["lm"].model) == 0
