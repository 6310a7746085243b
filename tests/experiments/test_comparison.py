"""The tables of notebook 06: counted by hand on a toy space, and run for real on tiny models."""

import contextlib

import numpy as np
import pandas as pd
import pytest
import torch

from nt_utils.data.attacks import ATTACKS as WRAPPERS
from nt_utils.data.attacks import FULL_LENGTH, attacks
from nt_utils.data.records import Prompt, PromptSet
from nt_utils.definitions import REGISTRY, Definition, Material
from nt_utils.errors import InputError
from nt_utils.evaluation import metrics
from nt_utils.evaluation.suite import Suite, SuiteSet
from nt_utils.experiments import comparison, definitions
from nt_utils.experiments.bench import Bench, Measure
from nt_utils.experiments.defences import Defence
from nt_utils.experiments.definitions import Definitions, answered
from nt_utils.interventions import steering
from nt_utils.interventions.tuning import Only
from nt_utils.neurons import POOL, NeuronSet, NeuronSpace
from nt_utils.selection import Ranking
from nt_utils.study.parameters import DEFINITIONS
from tests.tiny import tiny_lm

SPACE = NeuronSpace(
    {"q": (4, 4), "k": (2, 2), "v": (2, 2), "o": (10, 10), "ffn": (30, 30)},
    {"q": 9, "k": 9, "v": 9, "o": 8, "ffn": 24},
    total_parameters=4000,
    architecture="toy",
)
UP = torch.arange(80).double()
ASR = Measure("direct", "asr", "direct ASR")
HARMFUL = PromptSet.of([f"How do I break thing {i}?" for i in range(8)], "bad", kind="harmful")
BENIGN = PromptSet.of([f"How do I mend thing {i}?" for i in range(8)], "good", kind="benign")
ATTACKS = attacks(seen=True, split="train")


def ranking(values):
    return Ranking(SPACE, POOL, values)


def toy():
    """Two definitions: one the same on every block, one that follows the first block it is given."""

    def moody(lm, material):
        return ranking(UP.roll(8 * (material.chosen or [0])[0]))

    registry = {
        "steady": Definition("steady", "toy", (), lambda lm, material: ranking(UP)),
        "moody": Definition("moody", "toy", (), moody),
    }
    return Definitions(None, Material(HARMFUL, blocks=4), registry)


@pytest.fixture(scope="module")
def found():
    return definitions.define(
        tiny_lm(), HARMFUL, BENIGN, base=tiny_lm(seed=1), attacks=ATTACKS, blocks=4, batch_size=4, max_new_tokens=3
    )


def test_every_definition_ranks_the_pool(found):
    assert tuple(found.names) == tuple(REGISTRY) == DEFINITIONS
    rankings = found.rankings()
    assert all(r.values.numel() == r.space.size(POOL) and torch.isfinite(r.values).all() for r in rankings.values())
    tops = {frozenset(r.top_share(0.1)) for r in rankings.values()}
    assert len(tops) == len(rankings)


def test_blocks_are_disjoint_and_change_the_scores(found):
    first, second = found.halves(1, seed=0)[0]
    for name in found.names:
        assert not torch.equal(first[name].values, second[name].values), name
        everything = found.ranking(name, range(4))
        torch.testing.assert_close(everything.values, found.ranking(name).values, rtol=1e-5, atol=1e-8)


def test_a_subset_equals_scoring_its_prompts_alone(found):
    rows = [1, 3, 5, 7]
    alone = definitions.define(
        tiny_lm(),
        HARMFUL[rows],
        BENIGN[rows],
        base=tiny_lm(seed=1),
        attacks=ATTACKS,
        blocks=2,
        batch_size=4,
        max_new_tokens=3,
    )
    for name in found.names:
        torch.testing.assert_close(
            found.ranking(name, [1, 3]).values, alone.ranking(name).values, rtol=1e-3, atol=1e-6, msg=name
        )


def test_what_is_missing_is_named():
    with pytest.raises(InputError, match="activation change: the material has no base, responses"):
        REGISTRY["activation change"](tiny_lm(), Material(answered(HARMFUL)))
    alone = definitions.define(tiny_lm(), HARMFUL, BENIGN, attacks=ATTACKS, blocks=2)
    assert set(alone.names) == set(REGISTRY) - {"activation change"}


def test_own_prompts_are_attacked_in_full_length():
    embedded = HARMFUL.map(lambda p: p.replace(source="testbed"))
    assert definitions.study_attacks(embedded) == ATTACKS
    assert {a.name for a in definitions.study_attacks(HARMFUL)} == {n for n in FULL_LENGTH if WRAPPERS[n].seen}


def test_few_prompts_are_cut_into_fewer_blocks():
    few = definitions.define(tiny_lm(), HARMFUL.take(3), BENIGN, attacks=ATTACKS, batch_size=4, max_new_tokens=3)
    assert few.material.blocks == 3
    (first, second), _ = few.halves(2, seed=0)
    assert set(first) == set(few.names) and first["contrast"].top(9) != second["contrast"].top(9)
    with pytest.raises(InputError, match="1 prompts cannot be cut into halves; give at least 2 of each kind"):
        definitions.define(tiny_lm(), HARMFUL.take(1), BENIGN, attacks=ATTACKS)


def test_agreement_of_toys():
    halves = [(toy().rankings([0]), toy().rankings([1])), (toy().rankings([2]), toy().rankings([3]))]
    table = comparison.agreement_table(toy(), halves, [0.1]).set_index(["a", "b"])
    assert table.loc[("steady", "steady"), "jaccard"] == 1
    assert table.loc[("steady", "steady"), "spearman"] == pytest.approx(1)
    assert table.loc[("moody", "moody"), "jaccard"] == 0
    # steady's top 8 are 72..79; moody's on block 0 are the same, on blocks 1, 2, 3 others: one of four pairs agrees.
    assert table.loc[("steady", "moody"), "jaccard"] == pytest.approx(0.25)
    assert table.loc[("steady", "moody"), "all"] == 1
    summary = comparison.summary_table(table.reset_index()).set_index("which")["value"]
    assert summary["one definition, other prompts"] == pytest.approx(0.5)
    assert summary["two definitions"] == pytest.approx(0.25)
    over = comparison.agreement_interval(halves, 0.1, 40)
    assert over.n == 40
    assert over.low < over.value < over.high


def test_sites_count_the_set():
    table = comparison.site_table({"up": ranking(UP), "down": ranking(-UP)}, 0.1)
    up = table[table["definition"] == "up"].set_index(["layer", "kind"])
    assert up.loc[(1, "o"), "count"] == 8
    assert up["count"].sum() == 8
    assert up["spearman"].tolist() == pytest.approx([-1.0] * 4)


def test_half_counts_interpolate_in_the_logarithm():
    curve = pd.DataFrame(
        {"rule": [*"aaabbb"], "share": [0.01, 0.1, 1] * 2, "metric": "m", "value": [0, 0.4, 0.6, 0, 0, 0.4]}
    )
    half = comparison.half_counts(curve.assign(neurons=[1, 10, 100] * 2), "m").set_index("definition")["neurons"]
    assert half["a"] == pytest.approx(10 * 10**0.5)
    assert np.isnan(half["b"])


def test_hits_against_single_neurons():
    table = comparison.hit_table({"same": ranking(UP), "other": ranking(-UP)}, ranking(UP), 0.1).set_index("definition")
    assert table.loc["same", "value"] == 1
    assert table.loc["other", "value"] == 0
    assert (table["n"] == 8).all()
    assert (table["low"] <= table["value"]).all()


@pytest.fixture(scope="module")
def bench():
    suite = Suite((SuiteSet("direct", HARMFUL[:4], ("asr", "refusal")),), "tiny", max_new_tokens=2)
    return Bench(tiny_lm(), suite, [ASR])


def test_effects_of_sets_and_controls(found, bench):
    few = {name: found.rankings()[name] for name in ("contrast", "SCU")}
    chosen = comparison.choose(few, 0.05, draws=2, seed=0)
    table = comparison.effect_table(bench, chosen, lambda n: comparison.amplify(n, 2.0), intervention="amplified")
    assert table["definition"].tolist() == ["untouched", "contrast", "contrast", "SCU", "SCU"]
    assert table["set"].tolist() == ["chosen", "chosen", "random", "chosen", "random"]
    excess = comparison.excess_table(bench, chosen, ASR)
    assert excess["n"].tolist() == [4, 4]


def test_what_has_no_neurons_stands_beside_the_sets(found, bench):
    lm = bench.lm
    chosen = comparison.choose({"contrast": found.rankings()["contrast"]}, 0.05, draws=2, seed=0)
    direction = torch.randn(lm.view.hidden_size, generator=torch.Generator().manual_seed(0))
    options = {f"place {s.place}": s for s in steering.candidates(lm, direction.expand(3, -1), "ablate")}
    table = comparison.effect_table(bench, chosen.alone, lambda n: n, others=options, intervention="zeroed")
    assert table["set"].tolist() == ["chosen", "chosen", *["no neurons"] * len(options)]
    assert table["definition"].tolist()[2:] == list(options)


class Rates:
    """A bench whose two measures are given."""

    def rates(self, action, **labels):
        return [
            {**labels, "metric": m, "value": v, "low": 0, "high": 1, "n": 9} for m, v in zip("ab", action, strict=True)
        ]


def test_the_strongest_attack_keeps_the_model_useful():
    best, table = comparison.strongest(Rates(), {"weak": (0.1, 1.0), "breaks it": (0.9, 0.0), "good": (0.8, 0.9)})
    assert best == "good"
    assert table[table["chosen"]]["option"].unique().tolist() == ["good"]
    assert len(table) == 6
    with pytest.raises(InputError, match="nothing to choose from"):
        comparison.strongest(Rates(), {})


def test_left_out_names_what_is_missing():
    assert comparison.left_out(["a", "b", "c"], ["b"], "sets") == "sets: 1 of 3, without a, c"
    assert comparison.left_out(["a", "b"], ["b", "a"], "sets") == "sets: all 2"


def test_training_is_done_once_and_touches_only_the_set(found, bench):
    lm, effort = bench.lm, comparison.Effort(0.01, 2, batch_size=4)
    before = lm.weights_fingerprint
    neurons = found.rankings()["contrast"].top(3)
    pairs = definitions.answered(HARMFUL), definitions.answered(BENIGN)
    act = comparison.training(lm, "output", *pairs, effort)
    assert act(neurons) is act(neurons)
    assert act(neurons).key == comparison.trained(lm, Only(neurons, sides="output"), *pairs, effort).key
    with act(neurons).active(lm):
        assert lm.weights_fingerprint != before
    assert lm.weights_fingerprint == before
    frozen = comparison.freezing(lm, pairs[1], effort)
    whole, part = frozen(None), frozen(neurons)
    assert part.size < whole.size


def test_single_effects_by_exact_patching_and_by_gradient_agree():
    lm = tiny_lm()
    exact, estimate = (definitions.single_effects(lm, HARMFUL[:2], exact=e) for e in (True, False))
    assert comparison.spearman(exact, estimate) > 0.8
    neurons = exact.top(1)
    assert isinstance(neurons, NeuronSet)


def test_two_data_sets_are_compared_half_by_half():
    def halves(*orders):
        return [tuple({"d": Ranking(SPACE, POOL, torch.tensor(o).double())} for o in orders)]

    size = SPACE.size(POOL)
    up, down = list(range(size)), list(range(size, 0, -1))
    found = comparison.across_data(halves(up, up), halves(up, down), 0.1)
    assert found["d"].value == pytest.approx(0.5) and found["d"].n == 2


def test_an_attacker_who_looks_again_detects_in_the_defended_model(monkeypatch, lm):
    """The scores are taken while the defence acts, and the found neurons are zeroed on top of it."""
    seen = []

    class Defended:
        key, name = "defended", "defended"

        @contextlib.contextmanager
        def active(self, _):
            seen.append("in")
            yield
            seen.append("out")

    def fake(lm, texts, **_):
        seen.append("score")
        return texts

    chosen = {2: NeuronSet.from_flat(lm.view.space, [0], POOL), 5: NeuronSet.from_flat(lm.view.space, [1], POOL)}

    def contrast(*_):
        found = chosen[2 if "in" not in seen else 5]
        return type("R", (), {"top_share": lambda self, share: found})()

    monkeypatch.setattr(comparison, "importance", fake)
    monkeypatch.setattr(comparison.selection, "contrast", contrast)
    compared, changed = [], []
    fakes = {
        "excess": lambda self, a, b, m: compared.append((a, b)),
        "change": lambda self, a, m: changed.append(a),
    }
    bench = type("B", (), fakes)()
    prompts = PromptSet([Prompt(text="x")], "p")
    made = [Defence("none"), Defence("tuned", Defended())]
    found = comparison.looking_again(lm, bench, made, prompts, prompts, 0.1, None, None)
    assert {name: list(parts) for name, parts in found.items()} == {"tuned": ["asr", "utility"]}
    assert changed == [made[1].action], "the defence's own price, without the attack"
    assert seen == ["score", "score", "in", "score", "score", "out"]
    (action, (undefended,)) = compared[0]
    assert action.first.key == "defended" and action.second.neurons == chosen[5] and undefended.neurons == chosen[2]


def test_suffixes_are_sought_against_every_defended_model(monkeypatch):
    """Each with its own suffixes, found with the defence at work and answered with it; nothing is left behind."""
    lm = tiny_lm()
    defended = comparison.amplify(NeuronSet.from_flat(lm.view.space, list(range(40)), POOL), 3.0)
    bench = Bench(lm, Suite((SuiteSet("direct", HARMFUL, ("asr",)),), max_new_tokens=2), [ASR])
    asked, sought = [], []
    evaluated, attack = Bench.rate, comparison.gcg_attack

    def rate(self, measure, action):
        asked.append((self.suite["direct"].prompts.texts, action))
        return evaluated(self, measure, action)

    def gcg(lm, prompts, **options):
        sought.append(attack(lm, prompts, **options))
        return sought[-1]

    monkeypatch.setattr(Bench, "rate", rate)
    monkeypatch.setattr(comparison, "gcg_attack", gcg)
    made = [Defence("none"), Defence("louder", defended), Defence("frozen"), Defence("broken", diverged=True)]
    found = comparison.suffix_table(bench, made, ASR, n=2, steps=2, width=8, seed=0)
    rows = [(name, suffix) for name in ("none", "louder") for suffix in ("none", "random", "GCG")]
    assert list(zip(found["defence"], found["suffix"], strict=True)) == rows and set(found["n"]) == {2}
    (plain, _, first), (same, _, second) = (
        [texts for texts, action in asked if action is which] for which in (None, defended)
    )
    assert plain == same and [first, second] == [s.texts for s in sought] and first != second
    assert all(text.startswith(request) for request, text in zip(plain, first, strict=True))


def test_neurons_and_a_direction_that_do_nothing_are_not_compared():
    nothing, much = metrics.Interval(0.0, -0.05, 0.05, 8), metrics.Interval(0.6, 0.5, 0.7, 8)
    answers = iter([nothing, much, nothing])
    bench = type("B", (), {"jailbroken": lambda self, *_: next(answers)})()
    asked = {"asr": ASR, "useful": ASR}
    said = comparison.against_direction(bench, None, "ablate", **asked)
    assert "does not jailbreak" in said
    assert comparison.against_direction(bench, None, "ablate", **asked) is nothing
    assert "no candidate" in comparison.against_direction(bench, None, None, **asked)


def test_a_definition_agrees_with_itself_on_the_same_prompts():
    halves = [(toy().rankings([0]), toy().rankings([0]))]
    found = comparison.across_data(halves, halves, 0.1)
    assert found and all(one.value == 1 for one in found.values())


def test_a_claim_row_without_a_measurement_says_why():
    found = metrics.Interval(0.2, 0.1, 0.3, 8)
    rows = {"X2": ["contrast", "SCU"], "X4": ["SN-Tune", "LoRA"]}
    looked = {"SN-Tune": {"asr": found, "utility": found}}
    said = {f[:3]: f.found for f in comparison.findings(found, "no direction", {"contrast": found}, looked, rows)}
    measured = {key for key, what in said.items() if what is found}
    assert measured == {
        ("X1", "", "jaccard"),
        ("X2", "contrast", "jaccard"),
        ("X4", "SN-Tune", "asr"),
        ("X4", "SN-Tune", "utility"),
    }
    reasons = {key: what for key, what in said.items() if key not in measured}
    assert len(reasons) == 4 and "direction" in reasons["X3", "", "jailbroken"]
    assert "left out of the run" in reasons["X4", "LoRA", "asr"] and "second set" in reasons["X2", "SCU", "jaccard"]
