"""The weights that come with the package: whole, exactly what the index says, and never mixed up with others."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from nt_utils import testbed
from nt_utils.files import project_root
from nt_utils.testbed import __main__ as command
from nt_utils.testbed import training
from tests.common import refused

SEEDS = [int(seed) for seed in testbed.shipped()["seeds"]]
MICRO = training.RECIPES["micro"]


@pytest.fixture(scope="module")
def micro():
    """Tokenizer and models of the micro recipe."""
    tokenizer = training.make_tokenizer(MICRO)
    return tokenizer, training.train(MICRO, tokenizer, 0, False)


@pytest.fixture
def package(tmp_path, monkeypatch, micro):
    """A package whose default recipe is the micro one, with that testbed shipped; returns its weights folder."""
    monkeypatch.setattr(testbed, "WEIGHTS", tmp_path / "weights")
    monkeypatch.setitem(testbed.RECIPES, "default", MICRO)
    monkeypatch.setattr(testbed, "_gate", lambda models, tokenizer: {"measured": False, "passed": None, "missed": []})
    monkeypatch.setenv("NT_CACHE", str(tmp_path / "cache"))
    testbed.shipped.cache_clear()
    testbed._tokenizer.cache_clear()
    tokenizer, models = micro
    monkeypatch.setattr(testbed, "train", lambda *a: copy.deepcopy(models))
    testbed.ship(0, dict(zip(testbed.STAGES, models, strict=True)), tokenizer, 1.0)
    yield tmp_path / "weights"
    testbed.shipped.cache_clear()
    testbed._tokenizer.cache_clear()


def stored(made, stage):
    return load_file(made.folder / stage / "model.safetensors")


def test_five_seeds_are_shipped_and_stay_below_30_megabytes():
    assert {0, 1, 2, 3, 4} <= set(SEEDS)
    assert sum(path.stat().st_size for path in testbed.WEIGHTS.rglob("*") if path.is_file()) < 30e6
    package_data = (project_root() / "pyproject.toml").read_text()
    assert '"**/*.safetensors"' in package_data and '"**/*.json"' in package_data


@pytest.mark.parametrize("seed", SEEDS)
def test_every_shipped_seed_is_whole_and_of_todays_recipe(seed, tmp_path, monkeypatch):
    monkeypatch.setattr(testbed, "train", lambda *a: pytest.fail("trained"))
    with pytest.MonkeyPatch.context() as quiet:
        quiet.setattr(testbed.warnings, "warn", lambda *a, **k: None)  # a seed that misses its gate says so
        made = testbed.build(seed, cache=tmp_path, progress=False)
    assert made.origin == "shipped" and made.gate["measured"]
    assert made.fingerprint == testbed.shipped()["seeds"][str(seed)]["fingerprint"]
    base, aligned = stored(made, "unaligned"), stored(made, "aligned")
    changed = {name for name in base if not torch.equal(base[name], aligned[name])}
    assert changed and all(".mlp." in name for name in changed)
    for weight in [*base.values(), *aligned.values()]:
        assert weight.dtype == torch.float32 and torch.equal(weight, weight.half().float())


def test_what_is_unpacked_equals_what_was_trained_and_rounded(package):
    shipped, trained = testbed.build(0), testbed.build(0, retrain=True)
    assert (shipped.origin, trained.origin) == ("shipped", "trained") and shipped.folder != trained.folder
    assert shipped.fingerprint == trained.fingerprint
    for stage in testbed.STAGES:
        first, second = stored(shipped, stage), stored(trained, stage)
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_another_model_has_another_fingerprint(package):
    models = testbed._unpack(0, testbed.shipped()["seeds"]["0"])
    before = testbed.fingerprint(models)
    with torch.no_grad():
        models["aligned"].model.norm.weight[3] += 2**-10
    assert testbed.fingerprint(models) != before


@pytest.mark.parametrize("damage", ["changed", "missing", "tokenizer", "recipe"])
def test_damaged_or_outdated_weights_get_one_line_that_says_how_to_retrain(package, damage, monkeypatch):
    if damage == "changed":
        file = package / "seed-0.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    elif damage == "missing":
        (package / "seed-0.safetensors").unlink()
    elif damage == "tokenizer":
        (package / "tokenizer" / "tokenizer.json").write_text("{}")
    else:
        monkeypatch.setattr(training, "VERSION", training.VERSION + 1)
    refused("python -m nt_utils.testbed train --seed 0", testbed.build, 0)
    retrained = testbed.build(0, retrain=True, progress=False)
    with pytest.warns(UserWarning, match="trained here"):  # from now on there is one to go on with
        assert testbed.build(0) == retrained


def test_training_anew_gives_no_earlier_result(package, micro, monkeypatch):
    """Formerly "train anew" gave back what an earlier call had trained, whatever the code or the libraries were by then."""
    first, models = testbed.build(0, retrain=True, progress=False), copy.deepcopy(micro[1])
    with torch.no_grad():
        models[1].model.norm.weight[3] += 2**-10
    monkeypatch.setattr(testbed, "train", lambda *a: models)
    assert testbed.build(0, retrain=True, progress=False).fingerprint != first.fingerprint


def test_a_damaged_index_is_refused_and_no_other_testbed_taken(package):
    (package / "index.json").write_text("{")
    testbed.shipped.cache_clear()
    refused("index.json cannot be read", testbed.build, 0)


def test_a_damaged_copy_in_the_cache_is_made_again_from_the_package(package):
    made = testbed.build(0)
    (made.aligned / "model.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="damaged"):
        again = testbed.build(0)
    assert again == made and len(stored(again, "aligned")) > 0


def test_a_cache_from_another_release_of_the_package_is_not_taken_for_this_one(package):
    made = testbed.build(0)
    index = json.loads((package / "index.json").read_text())
    shutil.copytree(made.folder, made.folder.with_name("shipped-seed0-0123456789abcdef"))
    index["seeds"]["0"]["fingerprint"] = "0123456789abcdef"
    (package / "index.json").write_text(json.dumps(index))
    testbed.shipped.cache_clear()
    with pytest.warns(UserWarning, match="damaged"):
        refused("fingerprint", testbed.build, 0)


def test_train_says_how_it_compares_with_the_shipped_one(package, capsys):
    assert command.main(["train", "--seed", "0"]) == 0
    shown = capsys.readouterr().out
    assert "fingerprint" in shown and "model: " in shown


def test_gates_are_shown_with_fingerprints(capsys):
    assert command.main(["gates"]) == 0
    shown = capsys.readouterr().out
    for seed in SEEDS:
        assert f"seed {seed}: fingerprint {testbed.shipped()['seeds'][str(seed)]['fingerprint']}" in shown
