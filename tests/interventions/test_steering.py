"""Steering: the direction against the model's own hidden states, ablation against orthogonalised weights."""

import contextlib
import copy
import dataclasses
import math

import pytest
import torch

from nt_utils import hooks
from nt_utils.evaluation.generation import generate
from nt_utils.interventions import steering
from nt_utils.interventions.steering import (
    Steering,
    SystemPrompt,
    candidates,
    choose,
    mean_difference,
    refusal_direction,
    token_means,
)
from nt_utils.models import LanguageModel
from tests.common import refused
from tests.tiny import hooks_left, tiny_lm

IDS = torch.randint(3, 300, (2, 7), generator=torch.Generator().manual_seed(0))
HARMFUL, BENIGN = ["forge it", "how do I steal a bicycle?", "rob"], ["bake bread", "how do I plant a tree?"]
VECTOR = torch.randn(32, generator=torch.Generator().manual_seed(1))


def _hidden(lm):
    """What enters every layer, and the logits."""
    seen = {}
    places = range(lm.view.num_layers + 1)
    with torch.no_grad(), hooks.residual(lm.view, {p: (lambda x, p=p: seen.update({p: x})) for p in places}):
        logits = lm.model(IDS, use_cache=False).logits
    return seen, logits


def _own_hidden(lm, **inputs):
    """transformers' hidden states, from a copy: it leaves hooks of its own on the model it is asked of."""
    model = copy.deepcopy(lm.model)
    with torch.no_grad():
        return model(**inputs, use_cache=False, output_hidden_states=True).hidden_states


def test_the_residual_stream_is_the_models_hidden_states(any_lm):
    seen, _ = _hidden(any_lm)
    own = _own_hidden(any_lm, input_ids=IDS)
    assert len(own) == len(seen)
    for place in range(any_lm.view.num_layers):  # the last of the model's own is behind the final norm
        assert torch.equal(seen[place], own[place])
    assert not torch.equal(seen[0], seen[1])
    assert hooks_left(any_lm.model) == 0


def test_the_means_are_those_of_the_hidden_states_whatever_batches_and_padding(any_lm):
    together = token_means(any_lm, HARMFUL, (-2, -1))
    assert together.shape == (2, any_lm.view.num_layers + 1, 32)
    torch.testing.assert_close(token_means(any_lm, HARMFUL, (-2, -1), batch_size=1), together, rtol=1e-4, atol=1e-4)
    own = _own_hidden(any_lm, **any_lm.encode(HARMFUL[:1]).inputs)
    torch.testing.assert_close(token_means(any_lm, HARMFUL[:1], (-2, -1))[:, 1], own[1][0, -2:])
    difference = mean_difference(any_lm, HARMFUL, BENIGN)
    torch.testing.assert_close(difference, together[1] - token_means(any_lm, BENIGN)[0])
    assert difference[1].norm() > 0
    refused("prompts: the list is empty", lambda: token_means(any_lm, []))
    refused("positions: -99 lies before the shortest prompt", lambda: token_means(any_lm, HARMFUL, (-99,)))


def test_the_refusal_direction_follows_the_papers_rule_written_out():
    """Every candidate's three numbers one prompt at a time, from plain logits; then the rule by hand."""
    lm, words = tiny_lm(), ("I", "Sorry")
    first = [lm.tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in words]
    bad, good = ["steal it", "rob a bank"], ["bake", "plant a tree", "sing"]

    def distribution(text, steering=None):
        with torch.no_grad(), steering.active(lm) if steering else contextlib.nullcontext():
            return lm.model(lm.encode([text]).input_ids, use_cache=False).logits[0, -1].double().softmax(-1)

    def odds(text, steering=None):
        p = float(distribution(text, steering)[first].sum())
        return math.log(p / (1 - p))

    found = refusal_direction(lm, HARMFUL, BENIGN, (bad, good), refusals=words, every=True)
    sides = []  # what is left after the filter by refusal score
    for sign, texts in ((1, HARMFUL), (-1, BENIGN), (1, bad), (-1, good)):
        fitting = [t for t in texts if sign * odds(t) > 0]
        sides.append(fitting if len(fitting) >= 2 else texts)
    means = [token_means(lm, texts, range(-lm.suffix_length, 0)) for texts in sides[:2]]
    assert len(found.candidates) == lm.suffix_length  # the template's tokens enter layer 0 alike in every prompt
    for row in found.candidates.itertuples():
        vector = (means[0] - means[1])[row.position, row.layer]
        ablate, add = (Steering(vector, row.layer, mode) for mode in ("ablate", "add"))
        assert row.ablated == pytest.approx(sum(odds(t, ablate) for t in sides[2]) / len(sides[2]), abs=1e-4)
        assert row.added == pytest.approx(sum(odds(t, add) for t in sides[3]) / len(sides[3]), abs=1e-4)
        pairs = [(distribution(t), distribution(t, ablate)) for t in sides[3]]
        assert row.kl == pytest.approx(sum(float((p * (p / q).log()).sum()) for p, q in pairs) / len(pairs), abs=1e-4)
    allowed = found.candidates.query("added >= 0 and kl <= .1")
    assert found.candidates["chosen"].sum() == (len(allowed) > 0)
    assert (found.ablate is None) == (len(allowed) == 0)
    assert hooks_left(lm.model) == 0


def test_among_candidates_within_the_bounds_the_smallest_score_wins(monkeypatch):
    monkeypatch.setattr(steering, "MAX_KL", math.inf)
    lm = tiny_lm()
    letters = tuple(map(chr, range(33, 127)))
    lm.model.lm_head.weight.data[[row[0] for row in lm.tokenizer(letters, add_special_tokens=False)["input_ids"]]] *= 3
    options = {"positions": 2, "refusals": letters}
    every = refusal_direction(lm, HARMFUL, BENIGN, (HARMFUL, BENIGN), every=True, **options)
    table = every.candidates
    allowed = table[table["added"] >= 0]
    assert len(allowed), "a vacuous rule"
    assert table.loc[table["chosen"], "ablated"].tolist() == [allowed["ablated"].min()]
    lazy = refusal_direction(lm, HARMFUL, BENIGN, (HARMFUL, BENIGN), **options)
    assert torch.equal(lazy.ablate.direction, every.ablate.direction) and lazy.add.mode == "add"
    assert lazy.candidates["chosen"].equals(table["chosen"])
    few = refusal_direction(lm, HARMFUL, BENIGN, (HARMFUL, BENIGN), positions=1, layers=1)
    assert few.candidates[["position", "layer"]].values.tolist() == [[-1, 1]]


def test_adding_shifts_the_stream_at_one_place(any_lm):
    plain, logits = _hidden(any_lm)
    with Steering(VECTOR, 1, strength=0.5).active(any_lm):
        steered, moved = _hidden(any_lm)
    assert torch.equal(steered[0], plain[0])
    torch.testing.assert_close(steered[1], plain[1] + 0.5 * VECTOR)
    assert not torch.allclose(moved, logits)
    assert hooks_left(any_lm.model) == 0
    with Steering(VECTOR, 0).active(any_lm):
        torch.testing.assert_close(_hidden(any_lm)[0][0], plain[0] + VECTOR)


#: What reads the stream between attention and feed-forward block; every other family: post_attention_layernorm.
READERS = {
    "gemma2": "pre_feedforward_layernorm",
    "gemma3_text": "pre_feedforward_layernorm",
    "olmo2": "mlp",
    "gpt2": "ln_2",
}


def test_ablation_leaves_nothing_of_the_direction_anywhere(any_lm):
    """Between embedding and head: before every layer, inside it, behind the last; in families with norms behind blocks too."""
    unit, middle = VECTOR / VECTOR.norm(), []
    reader = READERS.get(any_lm.view.family_name, "post_attention_layernorm")
    watched = [(getattr(layer, reader), lambda args, kwargs: middle.append(args[0])) for layer in any_lm.view.layers]
    plain, _ = _hidden(any_lm)
    with Steering(VECTOR, 1, "ablate").active(any_lm), hooks.observe(watched):
        left, _ = _hidden(any_lm)
    assert len(middle) == any_lm.view.num_layers
    for stream in (*left.values(), *middle):
        assert (stream @ unit).abs().max() < 1e-5
    for stream in plain.values():
        assert (stream @ unit).abs().max() > 0.01
    assert hooks_left(any_lm.model) == 0


def test_half_an_ablation_leaves_half_of_every_write():
    lm, unit = tiny_lm(), VECTOR / VECTOR.norm()
    plain, _ = _hidden(lm)
    with Steering(VECTOR, 1, "ablate", strength=0.5).active(lm):
        left, _ = _hidden(lm)
    torch.testing.assert_close(left[0] @ unit, 0.5 * (plain[0] @ unit))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ablation_in_half_precision_leaves_rounding_alone(dtype):
    lm, unit = tiny_lm(), VECTOR / VECTOR.norm()
    lm.model.to(dtype)
    plain, _ = _hidden(lm)
    with Steering(VECTOR, 1, "ablate").active(lm):
        left, _ = _hidden(lm)
    for place in plain:
        assert (left[place].float() @ unit).norm() < 4 * torch.finfo(dtype).eps * plain[place].float().norm()


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt_neox"])
def test_ablation_equals_orthogonalised_weights(name):
    """The paper's weight form: every matrix that writes to the stream loses the direction (biases too)."""
    lm, unit = tiny_lm(name), VECTOR / VECTOR.norm()
    with Steering(VECTOR, 1, "ablate").active(lm), torch.no_grad():
        hooked = lm.model(IDS, use_cache=False).logits
    other = LanguageModel(copy.deepcopy(lm.model), lm.tokenizer, "orthogonalised")
    with torch.no_grad():
        embedding = other.model.get_input_embeddings().weight
        embedding -= (embedding @ unit)[:, None] * unit
        for layer in range(other.view.num_layers):
            for kind in ("o", "ffn"):
                weight, bias = other.view.weight(layer, kind), other.view.bias(layer, kind)
                weight -= unit[:, None] * (unit @ weight)
                if bias is not None:
                    bias -= (bias @ unit) * unit
        torch.testing.assert_close(other.model(IDS, use_cache=False).logits, hooked, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(lm.model(IDS, use_cache=False).logits, hooked, atol=1e-2)


def test_keys_tell_what_acts():
    one = Steering(VECTOR, 1)
    assert one.key == Steering(VECTOR.clone(), 1, name="other").key
    others = [
        Steering(VECTOR, 2),
        Steering(2 * VECTOR, 1),
        Steering(VECTOR, 1, strength=2.0),
        Steering(VECTOR, 1, "ablate"),
    ]
    assert len({one.key, *(s.key for s in others)}) == 5
    assert Steering(VECTOR, 1, "ablate").key == Steering(VECTOR, 2, "ablate").key  # the place acts only when added


def test_the_choice_is_the_smallest_measure():
    lm = tiny_lm()
    directions = mean_difference(lm, HARMFUL, BENIGN)
    options = candidates(lm, directions, "add", (0.5, 1.0))
    assert [(o.place, o.strength) for o in options] == [(1, 0.5), (1, 1.0)]
    best, values = choose(options, lambda option: math.nan if option.strength == 0.5 else 3.0)
    assert best is options[1] and math.isnan(values[0])
    assert candidates(lm, torch.zeros(3, 32), "ablate") == []
    deep = tiny_lm(layers=10)
    assert [o.place for o in candidates(deep, torch.ones(11, 32), "add")] == [1, 2, 3, 4, 5, 6, 7]
    assert [o.place for o in candidates(deep, torch.ones(11, 32), "add", layers=3)] == [1, 4, 6]
    refused("measure: gave no number", lambda: choose(options, lambda option: math.nan))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"direction": torch.zeros(32)}, "direction: needs one finite vector"),
        ({"direction": torch.full((32,), math.nan)}, "direction: needs one finite vector"),
        ({"direction": torch.ones(2, 16)}, "direction: needs one finite vector"),
        ({"mode": "subtract"}, "mode: got 'subtract'; allowed: add, ablate"),
        ({"strength": math.inf}, "strength: got inf"),
    ],
)
def test_bad_steering_is_refused(change, message):
    refused(message, lambda: dataclasses.replace(Steering(VECTOR, 1), **change))


def test_bad_places_and_models_are_refused():
    lm = tiny_lm()
    refused("place: got 3; the residual stream has places 0 to 2", lambda: Steering(VECTOR, 3).active(lm))
    for wrong in (Steering(VECTOR, 1, architecture="other"), Steering(torch.ones(5), 1)):
        refused("steering: made for architecture", wrong.active, lm)
    refused("the selection is empty", lambda: hooks.residual(lm, {}))
    assert hooks_left(lm.model) == 0


def test_a_system_prompt_stands_before_every_prompt_while_active():
    lm = tiny_lm()
    lm.model.config.max_position_embeddings = 512
    plain = lm.render(["hello"])
    defence = SystemPrompt("Be safe.")
    with defence.active(lm):
        assert lm.render(["hello"])[0] == "<s><|system|>Be safe.<|end|><|user|>hello<|end|><|assistant|>"
        inside = generate(lm, ["hello"], max_new_tokens=4, progress=False)
    assert lm.render(["hello"]) == plain and lm.system_prompt is None
    answers = [generate(lm, ["hello"], max_new_tokens=4, progress=False, intervention=i) for i in (None, defence)]
    assert answers[1] == inside != answers[0]
    assert defence.key != SystemPrompt("Be kind.").key
    refused("text: the system prompt is empty", lambda: SystemPrompt(" "))


def test_a_system_prompt_where_the_template_has_no_such_role():
    """The template's answer is looked up anew for every system prompt."""
    lm = tiny_lm()
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}[{{ m['content'] }}]{% endif %}{% endfor %}"
    )
    lm = LanguageModel(lm.model, tokenizer, "no system role")
    assert lm.render(["hello"]) == ["[hello]"]
    with SystemPrompt("Be safe.").active(lm):
        assert lm.render(["hello"]) == ["[Be safe.\n\nhello]"]
    assert lm.render(["hello"]) == ["[hello]"]
