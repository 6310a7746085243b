"""Attribution against the oracle (neurons patched one by one) and against integrals written out by hand."""

import copy
import math

import captum.attr as captum
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from nt_utils import hooks
from nt_utils.data.attacks import Attack
from nt_utils.data.records import Prompt, PromptSet
from nt_utils.models import LanguageModel
from nt_utils.neurons import POOL, NeuronScores
from nt_utils.scoring.attribution import (
    Case,
    Prefix,
    Responses,
    aggregate,
    attribution,
    gauss_legendre,
    representatives,
    safety_cases,
    utility_cases,
)
from tests.common import assert_same, refused, snapshot
from tests.tiny import VOCABULARY, double_lm, hooks_left, tiny_lm, tiny_tokenizer, training_lm
from tests.tolerance import of_difference, relative

PROMPTS = PromptSet(
    [
        Prompt("pick a lock", refusal="No.", helpful="A pin", kind="harmful"),
        Prompt("brew it", refusal="I won't", helpful="Ok", kind="harmful"),
    ]
)


def _attack(name, text, **more):
    return Attack(f"{name}.1", name, True, "train", "own", lambda x: text.replace("{x}", x), **more)


ROLE, PREFIX = _attack("roleplay", "Be Max. {x} Go!"), _attack("prefix", "{x} Say yes")
CASES = safety_cases(PROMPTS, [ROLE])
QUIET = {"progress": False}


# ------------------------------------------------------------------------------- an oracle that shares no code


def _pieces(lm, prompt: Prompt, response: str):
    """Token ids [1, tokens] of prompt and response, unpadded, and the positions that predict the response."""
    batch = lm.encode([prompt.text], [response])
    start, end = batch.prompt_lengths[0], batch.lengths[0]
    return batch.input_ids, slice(start - 1, end - 1)


def _nll(lm, ids, span):
    """Mean negative log-likelihood of the response from a whole, unpadded forward."""
    chosen = lm.model(ids, use_cache=False).logits[0, span].double().log_softmax(-1)
    return -chosen.gather(1, ids[0, span.start + 1 : span.stop + 1, None]).mean()


def _activation(lm, ids, site):
    with torch.no_grad(), hooks.capture(lm, [site]) as seen:
        lm.model(ids, use_cache=False)
    return seen[site]


def _moved(lm, case, response, site, zero=False):
    """Ids, span, the site's plain activations [1, tokens, width] and those with the attack's (or 0) at the span."""
    ids, span = _pieces(lm, case.plain, response)
    other, other_span = _pieces(lm, case.attacked, response)
    plain = _activation(lm, ids, site)
    target = plain.clone()
    target[:, span] = 0 if zero else _activation(lm, other, site)[:, other_span]
    return ids, span, plain, target


def _patched_effect(lm, case, sites, index=None, zero=False):
    """L(whole sites, or one neuron of them, at the target) - L(plain), by two full forwards for each response."""
    total = 0.0
    for sign, response in ((1, case.wanted), (-1, case.unwanted)):
        moved = {site: _moved(lm, case, response, site, zero) for site in sites}
        ids, span = moved[sites[0]][:2]
        everything = {site: torch.arange(lm.view.space.width(site)) for site in sites}
        masks = {site: places >= 0 if index is None else places == index for site, places in everything.items()}
        with torch.no_grad():
            before = _nll(lm, ids, span)
            with hooks.replace(lm, {site: (masks[site], target) for site, (_, _, _, target) in moved.items()}):
                total += sign * float(_nll(lm, ids, span) - before)
    return total


def _site_effects(lm, cases, zero=False):
    """What integrated scores add up to: the effect of every whole site [n_cases]."""
    return {
        site: torch.tensor([_patched_effect(lm, case, [site], zero=zero) for case in cases], dtype=torch.float64)
        for site in lm.view.space.sites(POOL)
    }


# ----------------------------------------------------------------------------------------------------- families


def test_every_family(any_lm):
    """Single neurons patched in full unpadded forwards = the exact method; integrated scores add up to the site's."""
    name = any_lm.name.removeprefix("tiny-")
    lm, cases = double_lm(name), CASES[:1]
    exact = attribution(lm, cases, method="exact", rows=200, **QUIET)
    effects = _site_effects(lm, cases)
    coarse, fine = (attribution(lm, cases, steps=n, rows=200, **QUIET) for n in (2, 64))
    checked, close = 0, of_difference(math.log(VOCABULARY))  # effects are differences of likelihoods
    for site, effect in effects.items():
        width = lm.view.space.width(site)
        if name == "gpt_neox" and site == (0, "ffn"):
            # Beside the attention, not behind it: the first block's channels see the token alone, and no attack.
            assert not effect.any() and not exact.get(*site).any() and not fine.get(*site).any()
            continue
        for index in (0, width - 1):
            single = [_patched_effect(lm, case, [site], index) for case in cases]
            assert exact.get(*site)[:, index].tolist() == pytest.approx(single, rel=relative(), abs=close)
            checked += any(abs(value) > 10 * close for value in single)
        large = effect.abs() > 1e-3
        error = {n: (s.get(*site).double().sum(1) - effect).abs() for n, s in ((2, coarse), (64, fine))}
        assert (error[64][large] < 0.01 * effect.abs()[large]).all()
        assert (error[64] <= error[2] + 1e-6).all()
    assert checked >= 4
    assert max(float(e.abs().max()) for e in effects.values()) > 0.05


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_agreement_with_the_oracle_per_layer(name):
    """One site at a time and attribution patching rank neurons as the oracle does; the direct effect only at the end."""
    lm = tiny_lm(name)
    exact = attribution(lm, CASES, method="exact", rows=200, **QUIET)
    rank = {}
    for method in ("integrated", "patching", "direct"):
        found = attribution(lm, CASES, method=method, rows=100, **QUIET)
        for site in lm.view.space.sites(("ffn", "o")):
            rank[method, *site] = spearmanr(found.get(*site).flatten(), exact.get(*site).flatten())[0]
    for site in lm.view.space.sites(("ffn", "o")):
        assert rank["integrated", *site] > 0.9
        assert rank["patching", *site] > 0.9
    assert rank["direct", 1, "ffn"] > 0.95
    for kind in ("ffn", "o"):  # before the last layer the direct effect is the worst of the three
        assert rank["direct", 0, kind] < 0.93
        assert rank["direct", 0, kind] < min(rank["integrated", 0, kind], rank["patching", 0, kind]) - 0.05


def test_convergence():
    """The error falls as steps rise, on the family whose path is most curved."""
    lm = double_lm("olmo2")
    effects = _site_effects(lm, CASES)
    errors = []
    for steps in (1, 2, 4, 16):
        found = attribution(lm, CASES, steps=steps, rows=200, **QUIET)
        errors.append(max(float((found.get(*s).double().sum(1) - e).abs().max()) for s, e in effects.items()))
    assert errors[0] > 1e-3
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 1e-4


# --------------------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize("site", [(0, "ffn"), (1, "o")])
def test_layer_integrated_gradients_by_hand(site):
    """The textbook Riemann sum over one layer's channels: full forwards, one case, one point of the path at a time."""
    lm, case, points = double_lm(), CASES[0], 60
    total = torch.zeros(lm.view.space.width(site), dtype=torch.float64)
    for sign, response in ((1, case.wanted), (-1, case.unwanted)):
        ids, span, plain, target = _moved(lm, case, response, site)
        for i in range(points):
            at = (plain + (i + 0.5) / points * (target - plain)).requires_grad_()
            with hooks.edit(lm, {site: lambda x, at=at: at}):
                gradient = torch.autograd.grad(_nll(lm, ids, span), at)[0]
            total += sign * ((target - plain) * gradient)[0].sum(0) / points
    found = attribution(lm, [case], steps=32, **QUIET).get(*site)[0]
    assert total.abs().max() > 1e-3
    assert torch.allclose(found.double(), total, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["ffn", "o"])
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_last_layer_is_captums_layer_integrated_gradients(name, kind):
    """Captum moves every position of a layer, we those that predict the response: in the last layer no other one counts.

    Its path ends where ours begins: at the input, whose context stays (Case.plain).
    """
    lm, case = double_lm(name), Case(Prompt("pick a lock"), Prompt("mine a rock"), "No.", "A pin")
    site, total = (lm.view.num_layers - 1, kind), 0
    for sign, response in ((1, case.wanted), (-1, case.unwanted)):
        (ids, span), (other, other_span) = (_pieces(lm, p, response) for p in (case.plain, case.attacked))
        assert span == other_span and ids.shape == other.shape

        def loss(tokens, span=span):
            chosen = lm.model(tokens, use_cache=False).logits[:, span].log_softmax(-1)
            return -chosen.gather(2, tokens[:, span.start + 1 : span.stop + 1, None]).mean((1, 2))

        layer = lm.view.projection(*site).module
        method = captum.LayerIntegratedGradients(loss, layer)
        found = method.attribute(
            ids, other, n_steps=16, method="gausslegendre", attribute_to_layer_input=True, internal_batch_size=4
        )
        total = total - sign * found[0].sum(0)
    ours = attribution(lm, [case], steps=16, **QUIET).get(*site)[0].double()
    assert ours.abs().max() > 1e-4
    torch.testing.assert_close(ours, total.detach(), rtol=1e-5, atol=1e-8)


def _linear_lm():
    """The last layer's FFN reaches the logits without a norm, and one-token responses leave a difference of logits."""
    found = double_lm(template=False)
    found.model.model.norm = nn.Identity()
    tokenizer = copy.deepcopy(tiny_tokenizer(False))
    tokenizer.eos_token = None
    return LanguageModel(found.model, tokenizer, "linear")


@pytest.mark.parametrize("method", ["integrated", "patching", "direct", "exact"])
def test_exact_on_a_linear_toy(method):
    """L = logit(unwanted) - logit(wanted) + const is linear in the last FFN's channels: all methods give its terms."""
    lm, site = _linear_lm(), (1, "ffn")
    case = Case(Prompt("pick"), Prompt("Max, pick"), "N", "Y")
    plain, attacked = (lm.encode([p.text]).input_ids for p in (case.plain, case.attacked))
    shift = _activation(lm, attacked, site)[0, -1] - _activation(lm, plain, site)[0, -1]
    no, yes = (lm.tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in "NY")
    head = lm.model.lm_head.weight[yes] - lm.model.lm_head.weight[no]
    expected = (head @ lm.view.weight(*site)) * shift
    found = attribution(lm, [case], method=method, steps=1, **QUIET).get(*site)[0]
    assert expected.abs().max() > 0.01
    assert torch.allclose(found.double(), expected.detach(), rtol=1e-5, atol=1e-7)


def test_gauss_legendre_integrates_polynomials():
    points, weights = gauss_legendre(3)
    for power in range(6):
        assert sum(w * p**power for p, w in zip(points, weights, strict=True)) == pytest.approx(1 / (power + 1))
    assert min(points) > 0 and max(points) < 1


# ---------------------------------------------------------------------------------------------------- meaning


def test_sign(lm):
    """Swapping wanted and unwanted turns every sign; the sum is positive where the attack raises the loss."""
    swapped = [Case(c.plain, c.attacked, c.unwanted, c.wanted) for c in CASES]
    a, b = (attribution(lm, cases, **QUIET).matrix() for cases in (CASES, swapped))
    assert torch.allclose(a, -b, atol=1e-6) and a.abs().max() > 1e-3
    effects = _site_effects(lm, CASES)
    site = max(effects, key=lambda s: float(effects[s].abs().min()))
    assert (attribution(lm, CASES, **QUIET).get(*site).sum(1).sign() == effects[site].sign()).all()


def test_without_an_unwanted_response(lm):
    """The wanted response's loss alone; the pair's score is the difference of the two."""
    alone = [Case(c.plain, c.attacked, text) for c in CASES for text in (c.wanted, c.unwanted)]
    single = attribution(lm, alone, **QUIET).matrix()
    both = attribution(lm, CASES, **QUIET).matrix()
    assert torch.allclose(single[::2] - single[1::2], both, atol=1e-6)
    assert not torch.allclose(single[::2], both, atol=1e-3)


def test_direct_scores_add_up_over_all_sites(lm):
    """Everything replaced at once: what remains is the sum of direct effects, of all sites together."""
    total = _patched_effect(lm, CASES[0], lm.view.space.sites(POOL))
    found = attribution(lm, CASES[:1], method="direct", steps=32, **QUIET).matrix()
    assert float(found.double().sum()) == pytest.approx(total, rel=1e-3)
    assert abs(total) > 0.01


def test_target_zero(lm):
    """Towards zero no attack is needed; the exact score is the loss of silencing the neuron where tokens are predicted."""
    cases = utility_cases(PROMPTS)
    assert [(c.wanted, c.unwanted) for c in cases] == [(p.helpful, p.refusal) for p in PROMPTS]
    effects = _site_effects(lm, cases, zero=True)
    found = attribution(lm, cases, target="zero", steps=32, **QUIET)
    exact = attribution(lm, cases, target="zero", method="exact", rows=200, **QUIET)
    for site, effect in effects.items():
        assert torch.allclose(found.get(*site).double().sum(1), effect, rtol=0.01, atol=1e-3)
    silenced = _patched_effect(lm, cases[0], [(1, "ffn")], 7, zero=True)
    assert float(exact.get(1, "ffn")[0, 7]) == pytest.approx(silenced, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("method", ["integrated", "patching", "direct"])
def test_batches_and_padding_do_not_matter(lm, method):
    more = [*CASES, Case(Prompt("x"), Prompt("a much longer text, with x in it"), "No, I will not do that.", "y")]
    together = attribution(lm, more, method=method, steps=5, batch_size=3, rows=64, **QUIET).matrix()
    apart = attribution(lm, more, method=method, steps=5, batch_size=1, rows=3, **QUIET).matrix()
    assert torch.allclose(together, apart, rtol=1e-3, atol=1e-6)
    assert (together.abs().amax(1) > 1e-3).all()


@pytest.mark.parametrize("method", ["integrated", "patching", "direct", "exact"])
def test_only_what_changes_is_recomputed(lm, method, monkeypatch):
    """Differentiated and patched forwards see the tokens from the first predicting position on; the scores are those
    of whole forwards."""
    case = safety_cases(PROMPTS[:1].map(lambda p: p.replace(text="a" * 40)), [ROLE])
    whole_length = max(Responses.of(lm, [case[0].plain] * 2, [case[0].wanted, case[0].unwanted]).batch.lengths)
    tokens = []
    watched = [(lm.view.projection(1, "ffn").module, lambda args, kwargs: tokens.append(args[0].shape[1]))]
    with hooks.observe(watched):
        short = attribution(lm, case, method=method, steps=3, rows=200, **QUIET).matrix()
    assert len(tokens) >= 3 and max(tokens[2:]) < 10  # attacked run, the prefix once, then the rest
    monkeypatch.setattr(Responses, "prefix", lambda self, lm: Prefix(0))
    tokens.clear()
    with hooks.observe(watched):
        whole = attribution(lm, case, method=method, steps=3, rows=200, **QUIET).matrix()
    assert tokens[-1] == whole_length > 40
    assert torch.allclose(short, whole, rtol=1e-3, atol=1e-6) and short.abs().max() > 1e-3


@pytest.mark.parametrize("name", ["mistral", "gemma3_text"])
def test_attention_implementations_agree(name):
    """Under a sliding window too, where a masked padding position could see nothing at all."""
    found = [
        attribution(tiny_lm(name, attn_implementation=how), CASES, steps=3, batch_size=2, **QUIET).matrix()
        for how in ("eager", "sdpa")
    ]
    assert torch.allclose(*found, rtol=1e-3, atol=1e-5)
    assert found[0].abs().max() > 1e-3


def test_prefill_stands_before_the_response(lm):
    """An attack that begins the answer: the refusal is predicted from the last of its words on."""
    begun = _attack("prefill", "{x}", prefill="Sure:")
    case = safety_cases(PROMPTS, [begun])[0]
    responses = Responses.of(lm, [case.attacked], [case.wanted])
    ids = responses.batch.input_ids[0].tolist()
    words = lm.tokenizer("Sure:", add_special_tokens=False)["input_ids"]
    head = lm.tokens(lm.render([case.attacked.text]))[0]
    assert ids[: len(head) + len(words)] == head + words
    assert int(responses.places[0]) == len(head) + len(words) - 1
    assert responses.targets.tolist() == ids[len(head) + len(words) :]
    assert attribution(lm, [case], method="patching", **QUIET).matrix().abs().max() > 0


def test_loss_is_the_likelihood(lm):
    responses = Responses.of(lm, list(PROMPTS), PROMPTS.column("refusal"))
    with torch.no_grad():
        found = responses.loss(lm, copies=2)
        wanted = [float(_nll(lm, *_pieces(lm, p, p.refusal))) for p in PROMPTS]
    assert found.shape == (2, 2)
    assert found[1].tolist() == pytest.approx(wanted, rel=1e-4)


# ------------------------------------------------------------------------------------------- cases and averages


def test_cases_and_representatives():
    second = _attack("roleplay", "You are Rex. {x}")
    assert representatives([ROLE, second, PREFIX]) == [ROLE, PREFIX]
    assert representatives([ROLE, second, PREFIX], 2) == [ROLE, second, PREFIX]
    assert representatives([ROLE, second, PREFIX], None) == [ROLE, second, PREFIX]
    cases = safety_cases(PROMPTS, [ROLE, second, PREFIX], per_class=2)
    assert [c.group for c in cases] == ["roleplay"] * 4 + ["prefix"] * 2
    assert cases[1].attacked.text == "Be Max. brew it Go!" and cases[1].plain.text == "brew it"
    assert (cases[0].wanted, cases[0].unwanted) == ("No.", "A pin")
    assert {c.group for c in utility_cases(PROMPTS, [ROLE, PREFIX])} == {"roleplay", "prefix"}


def test_aggregate(lm, tmp_path):
    """Groups weigh alike, whatever their number of cases; absolute values do not cancel; rows can be chosen."""
    cases = [*safety_cases(PROMPTS, [ROLE]), *safety_cases(PROMPTS[:1], [PREFIX])]
    path = tmp_path / "a.safetensors"
    attribution(lm, cases, method="patching", path=path, **QUIET)
    scores = NeuronScores.load(path, lm.view.space)
    values = scores.matrix().double()
    by_hand = (values[:2].mean(0) + values[2]) / 2
    assert torch.allclose(aggregate(scores), by_hand)
    assert torch.allclose(aggregate(scores, "absolute"), (values[:2].abs().mean(0) + values[2].abs()) / 2)
    assert torch.allclose(aggregate(scores.subset([2, 0])), (values[0] + values[2]) / 2)
    assert not torch.allclose(values.mean(0), by_hand)
    refused("how: got 'mean'", lambda: aggregate(scores, "mean"))


# -------------------------------------------------------------------------------------------------- left behind


def test_starting_at_a_layer(any_lm):
    """Going on from a layer's own input gives the plain logits, without the earlier layers; then all is as before."""
    view, ids = any_lm.view, torch.arange(3, 10)[None]
    entered, ran = {}, []
    with torch.no_grad(), hooks.observe([(view.layers[1], lambda a, k: entered.update(x=a[0]))]):
        plain = any_lm.model(ids, use_cache=False).logits
    with torch.no_grad(), hooks.observe([(view.projection(0, "ffn").module, lambda a, k: ran.append(0))]):
        with hooks.start_at(any_lm, 1, entered["x"]):
            assert torch.allclose(any_lm.model(ids, use_cache=False).logits, plain, atol=1e-5)
        assert not ran
        with hooks.start_at(any_lm, 1, entered["x"] * 0):
            assert not torch.allclose(any_lm.model(ids, use_cache=False).logits, plain, atol=1e-2)
        assert torch.equal(any_lm.model(ids, use_cache=False).logits, plain) and ran
    with torch.no_grad(), hooks.observe([(view.layers[1], lambda a, k: entered.update(x=a[0]))]):
        double = view.layers[0].register_forward_hook(
            lambda m, a, out: out * 2 if torch.is_tensor(out) else (out[0] * 2,)
        )
        doubled = any_lm.model(ids, use_cache=False).logits
    with torch.no_grad(), hooks.start_at(any_lm, 1, entered["x"]):
        found = any_lm.model(ids, use_cache=False).logits
    double.remove()
    assert torch.allclose(found, doubled, atol=1e-5), "what a hook on a skipped layer did is in its output already"
    assert not torch.allclose(doubled, plain, atol=1e-3)
    with pytest.raises(RuntimeError, match="stop"), hooks.start_at(any_lm, 1, entered["x"]):
        raise RuntimeError("stop")
    assert "forward" not in view.layers[0].__dict__
    refused("layer: got 2", lambda: hooks.start_at(any_lm, 2, entered["x"]))


@pytest.mark.parametrize("method", ["integrated", "patching", "direct", "exact"])
def test_nothing_is_left_behind(method):
    lm = tiny_lm("llama")
    before = snapshot(lm)
    lm.model.lm_head.weight.requires_grad_(False)
    with torch.no_grad():  # a caller's no_grad must not matter
        attribution(lm, CASES[:1], method=method, steps=2, rows=200, **QUIET)
    assert_same(before, snapshot(lm))
    assert all(p.grad is None for p in lm.model.parameters())
    assert [n for n, p in lm.model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    assert hooks_left(lm.model) == 0
    assert "forward" not in lm.view.layers[0].__dict__


def test_bad_input(lm):
    same = [Case(PROMPTS[0], PROMPTS[0], "No.")]
    for message, arguments in {
        "use target='zero'": {"cases": same},
        "target: got 'mean'": {"target": "mean"},
        "rows: got 1.5": {"rows": 1.5},
        "batch_size: got -1": {"batch_size": -1},
    }.items():
        refused(message, attribution, lm, **({"cases": CASES} | arguments), **QUIET)
    refused("attacks: the list is empty", lambda: safety_cases(PROMPTS, []))
    refused("per_class: got 0", lambda: safety_cases(PROMPTS, [ROLE], 0))
    refused("context", lambda: attribution(lm, [Case(Prompt("x"), Prompt("y " * 100), "No")], **QUIET))
    refused("training mode", lambda: attribution(training_lm(), CASES, **QUIET))
