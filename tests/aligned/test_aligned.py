"""The recipe that aligned SmolLM2-135M, its rows, its gate, and the adapter in the package (real weights: tests/real)."""

import math

import pandas
import pytest
import torch
import yaml
from safetensors import safe_open

from nt_utils import aligned
from nt_utils.aligned.__main__ import main
from nt_utils.data import corpus
from nt_utils.data.records import Prompt
from nt_utils.files import project_root, read_json
from nt_utils.interventions.export import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from nt_utils.interventions.trainable import LoRA
from nt_utils.interventions.tuning import tune
from nt_utils.models import box, load, located
from nt_utils.models.locate import ADAPTERS
from nt_utils.study.batch import access
from tests.common import saved
from tests.tiny import tiny_lm

FOLDER = ADAPTERS / aligned.NAME


def table(**values):
    """A gate's table that passes, but for the values given."""
    passing = {bar.name: (max(bar.low, 0.0) + bar.high) / 2 for bar in aligned.BARS}
    return pandas.DataFrame({"quantity": passing.keys(), "value": (passing | values).values()})


def test_rows_teach_both_sides_and_nothing_that_is_asked_later():
    harmful, benign = aligned.rows()
    assert len(harmful) > 500 and len(benign) > 1500
    assert all(p.refusal and not p.helpful for p in harmful) and all(p.helpful and not p.refusal for p in benign)
    taught = [p.text for p in (*harmful, *benign)]
    assert len(set(taught)) == len(taught)
    for kind in ("harmful", "benign", "borderline"):
        for split in ("dev", "test"):
            assert not set(taught) & set(corpus.corpus(kind, split).texts)


def test_the_gate_says_what_misses_its_bars():
    assert aligned.missed(table()) == []
    assert aligned.missed(table(**{"direct ASR": 0.06})) == ["direct ASR is 0.06 (wanted 0 to 0.05)"]
    assert len(aligned.missed(table(**{"over-refusal": 0.05, "perplexity, ratio to untouched": 1.2}))) == 2
    assert aligned.missed(table(**{"benign requests refused": math.nan})), "what was not measured passes no bar"


@pytest.fixture(scope="module")
def learnt():
    lm = tiny_lm()
    rows = [Prompt("What is it?", refusal="No, never.")] * 4
    return lm, tune(lm, LoRA(rank=2), harmful=rows, steps=4, learning_rate=0.01, progress=False).delta


def test_strength_scales_the_change_of_every_weight(learnt):
    lm, delta = learnt
    before = {name: p.detach().clone() for name, p in lm.model.named_parameters()}

    def change(some):
        with some.active(lm):
            return {name: lm.model.get_parameter(name) - before[name] for name in delta.parts}

    whole, half = change(delta), change(aligned.at_strength(delta, 0.5))
    assert min(change.abs().max() for change in whole.values()) > 1e-4
    for name, change_of_all in whole.items():
        assert torch.allclose(half[name], change_of_all / 2, atol=1e-6)
    assert aligned.at_strength(delta, 0.5).key != delta.key


def test_the_largest_strength_that_passes_is_taken(learnt, monkeypatch):
    lm, delta = learnt
    fails = {1.0, 0.9}
    strength_of = {aligned.at_strength(delta, s).key: s for s in aligned.STRENGTHS}
    monkeypatch.setattr(aligned, "answers", lambda lm, suite, delta=None: strength_of[delta.key] if delta else None)
    monkeypatch.setattr(aligned, "rates", lambda before, s: table(**({"direct ASR": 1.0} if s in fails else {})))
    strength, tried = aligned.choose_strength(lm, delta, None)
    assert strength == 0.8 and list(tried["strength"].unique()) == [1.0, 0.9, 0.8]
    fails |= set(aligned.STRENGTHS)
    assert aligned.choose_strength(lm, delta, None)[0] == 1.0


def test_one_command_trains_an_adapter_that_loads(tmp_path, capsys, monkeypatch):
    lm = tiny_lm()
    lm.model.config.max_position_embeddings = 2048  # its byte-like tokenizer makes long prompts
    base = saved(lm, tmp_path / "base")
    few = tuple(some[:4] for some in aligned.rows())
    monkeypatch.setattr(aligned, "BASE", str(base))
    monkeypatch.setattr(aligned, "RECIPE", {**aligned.RECIPE, "steps": 2, "batch_size": 4, "warmup": 0})
    monkeypatch.setattr(aligned, "rows", lambda: few)
    monkeypatch.setattr(aligned, "ANSWER_TOKENS", 2)
    monkeypatch.setattr(aligned, "SOURCES", dict.fromkeys(aligned.SOURCES, "testbed"))
    monkeypatch.chdir(tmp_path)
    name = aligned.NAME  # formerly the gate of the shipped adapter was measured, whose name this folder has
    status = main(["train", "--to", name, "--n", "2"])
    printed = capsys.readouterr().out
    assert "is taken" in printed and f"{name}, test prompts" in printed
    assert status == (0 if "gate passed" in printed else 1) and ("gate passed" in printed) != ("gate missed" in printed)
    made = load(str(tmp_path / name), dtype="float32")
    assert made.weights_fingerprint != load(str(base), dtype="float32").weights_fingerprint
    assert read_json(tmp_path / name / CONFIG_FILE)["r"] == aligned.LORA.rank


def test_an_existing_folder_is_refused_before_anything_is_loaded(tmp_path, capsys):
    assert main(["train", "--to", str(tmp_path)]) != 0
    assert "exists already" in capsys.readouterr().err


def test_prompts_that_cannot_be_had_are_named_before_anything_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("NT_DATA", raising=False)
    monkeypatch.setattr("nt_utils.models.load", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr(aligned, "SOURCES", {**aligned.SOURCES, "harmful": str(tmp_path / "none.csv:text")})
    assert main(["gate"]) != 0
    assert "none.csv" in capsys.readouterr().err


def test_the_adapter_changes_every_projection_of_a_model_in_the_box():
    config, study = (
        read_json(FOLDER / CONFIG_FILE),
        yaml.safe_load((project_root() / "notebooks/params/smollm2-135m-instruct.yaml").read_text()),
    )
    assert located(aligned.NAME) == str(FOLDER)
    assert config["base_model_name_or_path"] == aligned.BASE == study["model"] and aligned.BASE in box.table()
    assert access.boxed(aligned.NAME) == access.boxed(aligned.BASE) != {}
    assert access.boxed(str(FOLDER)) == {} and located(FOLDER) == str(FOLDER), "a path is the user's own"
    sizes = study["facts"]["config"]
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    grouped = hidden * sizes["num_key_value_heads"] // sizes["num_attention_heads"]
    shapes = {"q": (hidden, hidden), "k": (hidden, grouped), "v": (hidden, grouped), "o": (hidden, hidden)}
    wanted = {f"self_attn.{name}_proj": shape for name, shape in shapes.items()}
    wanted |= {"mlp.gate_proj": (hidden, inner), "mlp.up_proj": (hidden, inner), "mlp.down_proj": (inner, hidden)}
    with safe_open(FOLDER / WEIGHTS_FILE, "pt") as file:
        header = file.metadata()
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
    assert header["dtype"] == "torch.float32" and header["weights"]
    assert len(found) == 2 * len(wanted) * sizes["num_hidden_layers"]
    for layer in range(sizes["num_hidden_layers"]):
        for name, (read, written) in wanted.items():
            down, up = (found[f"{PREFIX}model.layers.{layer}.{name}.lora_{which}.weight"] for which in "AB")
            rank = aligned.LORA.rank
            assert (
                down.shape == (rank, read) and up.shape == (written, rank) and down.dtype == up.dtype == torch.float16
            )
            assert (up.float() @ down.float()).abs().max() > 0
    assert (FOLDER / WEIGHTS_FILE).stat().st_size <= 4e6
