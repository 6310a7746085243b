"""A plan loads no weights, follows the config, says what is missing, and never shows a token."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml

from nt_utils import testbed
from nt_utils.errors import InputError
from nt_utils.files import project_root
from nt_utils.study import batch, plan
from nt_utils.study.batch import access
from nt_utils.study.parameters import TESTBEDS
from tests.tiny import CONFIGS, tiny_lm

ROOT = project_root()
#: Parameters as the model cards publish them, in billions.
PUBLISHED = {
    "llama-2-7b": 6.74,
    "llama-2-7b-chat": 6.74,
    "llama-3-8b": 8.03,
    "llama-3-8b-instruct": 8.03,
    "llama-3.1-8b-instruct": 8.03,
    "mistral-7b-v0.1": 7.24,
    "mistral-7b-instruct-v0.2": 7.24,
    "vicuna-13b-v1.5": 13.0,
    "qwen2.5-7b-instruct": 7.62,
    "qwen2.5-14b-instruct": 14.8,
    "qwen2.5-coder-0.5b-instruct": 0.63,  # as loaded: the file stores the output matrix apart
    "qwen2.5-coder-1.5b-instruct": 1.78,
    "smollm2-135m-instruct": 0.1345,
}


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network, nothing cached, no token."""
    monkeypatch.setattr("nt_utils.data.sources.hub_reachable", lambda address="": False)
    monkeypatch.setattr(access, "cached_file", lambda *_: None)
    monkeypatch.setattr(plan, "cached_file", lambda *_: None)
    for module in (access, plan):
        monkeypatch.setattr(module, "has_token", lambda: False)


def test_every_model_of_the_papers_has_its_published_size():
    found = {name: plan.sizes(name, batch.read(name, ROOT).facts["config"], "").count / 1e9 for name in PUBLISHED}
    assert found == pytest.approx(PUBLISHED, rel=0.005)
    studies_with_facts = {p.stem for p in (ROOT / "notebooks" / "params").glob("[!_]*.yaml")} - set(TESTBEDS)
    assert studies_with_facts == set(PUBLISHED)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_size_follows_the_config(family):
    model = tiny_lm(family).model
    config = json.loads(model.config.to_json_string(use_diff=False))
    linear = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    if family == "gpt2":  # its learned positions are a table of their own
        linear -= model.transformer.wpe.weight.numel()
    assert plan.sizes(family, config, "").count == linear


def test_the_plan_of_the_models_that_are_trained_here(offline):
    assert plan.TESTBEDS.keys() == TESTBEDS.keys()
    for name, words in plan.TESTBEDS.items():
        recipe = testbed.RECIPES[TESTBEDS[name]]
        model = testbed.new_model(recipe, testbed.make_tokenizer(recipe), 0)
        assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} million" in words
        assert f"model {name}: {words}" in str(plan.make_plan(name, [0], "quick", ROOT))
        assert plan.resources(batch.read(name, ROOT))["gpu"] == 0


def test_the_plan_of_a_gated_model_offline(offline, monkeypatch):
    text = str(plan.make_plan("llama-3.1-8b-instruct", [0, 1], "full", ROOT))
    assert "8.03 billion parameters, bfloat16, 15.0 GiB" in text
    assert "https://huggingface.co/meta-llama/Llama-3.1-8B-Instruct, then set the variable HF_TOKEN" in text
    assert "the parameter file (the hub cannot be reached" in text
    assert "circuit-breakers (harmful): 4994 prompts" in text
    assert "01_safety_neurons: 1200 prompts scored" in text
    with pytest.raises(InputError, match="gated: accept its licence at https://hugg"):
        access.check_access(batch.read("llama-3.1-8b-instruct", ROOT))
    monkeypatch.setattr(access, "has_token", lambda: True)
    access.check_access(batch.read("llama-3.1-8b-instruct", ROOT))


def test_a_local_config_needs_no_network(offline, tmp_path):
    (tmp_path / "nt_utils").mkdir()
    (tmp_path / "notebooks" / "params").mkdir(parents=True)
    source = ROOT / "notebooks" / "01_safety_neurons.ipynb"
    (tmp_path / "notebooks" / source.name).write_bytes(source.read_bytes())
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(batch.read("qwen2.5-7b-instruct", ROOT).facts["config"]))
    (tmp_path / "prompts.csv").write_text("goal\none\ntwo\n")
    content = {
        "model": str(model),
        "dtype": "bfloat16",
        "harmful": f"{tmp_path}/prompts.csv:goal",
        "benign": "gone.csv:x",
    }
    (tmp_path / "notebooks" / "params" / "mine.yaml").write_text(yaml.safe_dump(content | {"second_language": ""}))
    found = plan.make_plan("mine", [0], "default", tmp_path)
    assert "about 7.6" in str(found)
    assert "prompts.csv:goal (harmful): 2 prompts, a local file" in str(found)
    assert any("gone.csv" in line for line in found.missing)
    (model / "config.json").write_text("{}")
    assert "no size" in str(plan.make_plan("mine", [0], "default", tmp_path))
    (model / "config.json").write_text('{"hidden_size": 8}')
    with pytest.raises(InputError, match="has no"):
        plan.make_plan("mine", [0], "default", tmp_path)


def test_a_larger_model_needs_more_of_everything():
    small, large = (plan.sizes(n, batch.read(n, ROOT).facts["config"], "") for n in ("llama-2-7b", "vicuna-13b-v1.5"))
    rate = plan.Rates(1e-15, 1e-12, 3.0, "")
    work = plan.Work(scored=200, answers=400, trained=50)
    assert plan.seconds_of(work, small, 256, "float16", rate) < plan.seconds_of(work, large, 256, "float16", rate)
    assert plan.memory_of(work, small, 256, "float16", 8) < plan.memory_of(work, large, 256, "float16", 8)
    tuned = plan.Work(tuned=50)
    extra = plan.memory_of(tuned, small, 256, "float16", 8) - plan.memory_of(work, small, 256, "float16", 8)
    assert extra == pytest.approx(16 * small.count, rel=0.01)
    whole = [plan.resources(batch.read(n, ROOT), "04_ssah_alignment")["gpu"] for n in ("testbed", "llama-2-7b")]
    assert whole == [0, 2]
    needs = [plan.resources(batch.read(n, ROOT)) for n in ("testbed", "llama-2-7b", "qwen2.5-14b-instruct")]
    assert [n["gpu"] for n in needs] == [0, 1, 1]
    assert needs[0]["mem_mb"] < needs[1]["mem_mb"] < needs[2]["mem_mb"]


def test_rates_are_the_measured_ones_where_there_are_any(tmp_path):
    assert plan.rates(tmp_path, on_gpu=True).source.startswith("assumed")
    (tmp_path / "runs").mkdir()
    row = {"device": "GPU", "date": "2026-01-01", "tokens_per_second": 1000.0, "exact_over_forward": 2.0}
    (tmp_path / "runs" / "bench_gpu.json").write_text(json.dumps([row]))
    found = plan.rates(tmp_path, on_gpu=True)
    assert "measured on GPU" in found.source
    assert found.scoring == 2.0


def test_the_command_loads_no_torch_and_shows_no_token():
    code = "import sys; from nt_utils.study import plan; assert plan.main(['--studies', 'testbed llama-2-7b']) == 0; assert 'torch' not in sys.modules"
    token = "hf_" + "planted" * 4
    environment = {"HF_TOKEN": token, "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert token not in done.stdout + done.stderr
    assert "a token is there" in done.stdout
    assert plan.main(["--studies", "nope"]) == 1


def test_the_readmes_estimate_is_the_plans(offline, monkeypatch, tmp_path):
    assumed = plan.rates(tmp_path, on_gpu=True)  # a folder where no bench has been
    monkeypatch.setattr(plan, "rates", lambda *_, **__: assumed)
    lines = str(plan.make_plan("llama-2-7b-chat", [0], "default", ROOT)).splitlines()
    last = next(line for line in lines if "largest" in line)
    peak, hours = re.search(r"largest (\d+ GiB).*about (.*?) a run", last).groups()
    rest = max(int(re.search(r": (\d+) GiB", line)[1]) for line in lines if re.match(r"  0[01235]_", line))
    answers = sum(int(n) for n in re.findall(r"(\d+) answers", "\n".join(lines)))
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    for part in (
        f"take {peak}",
        f"{rest} GiB free",
        f"about {hours} a seed",
        f"{round(answers, -3) // 1000} thousand answers",
        "250 TFLOP/s",
    ):
        assert part in text, part
    assert "without an estimate" not in last


def test_the_work_of_the_last_notebooks_counted_by_hand():
    """Small numbers, so that every term can be told."""
    model = plan.Model("m", 1e9, 0, 0, layers=10, pool=500, where="")
    fine = SimpleNamespace(
        harmful_share=0.1,
        base_model="b",
        n_test=10,
        n_dev=4,
        sweep_rates=[1, 2],
        sweep_steps=[5, 10],
        tune_batch=8,
        align_rates=[1],
        align_steps=3,
        align_draws=1,
        n_detect=20,
    )
    work = plan.WORK["04_ssah_alignment"](fine, model)
    # 2 sets x 6 arms x 2 rates x 2 steps, each set's and the model's start; 4 ways of aligning on both splits, and its start
    assert work.answers == 20 * (48 + 2 + 1) + 4 * (8 + 20) + 20
    assert work.tuned == 5 * 4 * 10 * 8 + 3 * 16  # five arms train weights on 2 sets at 2 rates; one way of aligning
    assert work.trained == 4 * 10 * 8 + 3 * 3 * 16
    assert work.full_tuning
    alpha = SimpleNamespace(
        attacks="role-play,persona,prefill",
        borderline="x",
        n_test=10,
        n_detect=20,
        unseen_classes=1,
        layer_factors=[1],
        steering_strengths=[1, 2],
        learnt_draws=1,
        dial_shares=[0, 1],
        dial_strengths=[1],
        iterations=10,
        n_attribution=2,
        attribution_steps=3,
    )
    work = plan.WORK["05_neurontune"](alpha, model)
    dev = 6 * 4  # direct, four seen classes and benign prompts, every fifth of 20
    # 8 arms on 60 prompts, 17 choices, 8 rounds of unseen attacks, over-refusal and utility, adaptation, own answers
    assert work.answers == 8 * 60 + 17 * dev + 8 * 40 + 3 * 10 * 4 + 20
    assert work.gradients == pytest.approx(9.59 * 10 * 5 * 12 + 2 * 3 * 6)
    assert not work.full_tuning


def test_the_last_notebook_needs_more_with_every_choice():
    model = plan.sizes("m", batch.read("llama-2-7b", ROOT).facts["config"], "")
    [run] = batch.variants("llama-2-7b-chat", [0], "default", ROOT)
    p = vars(plan.filled("06_comparison", run, "default", ROOT))
    rate = plan.Rates(1e-15, 1e-12, 3.0, "")

    def seconds(**changes):
        return plan.seconds_of(
            plan.WORK["06_comparison"](SimpleNamespace(**p | changes), model), model, 64, "float16", rate
        )

    for changes in (
        {"compared": p["compared"][:1]},
        {"compared_further": p["compared_further"][:1]},
        {"defended": p["defended"][:2]},
        {"control_draws": 1},
        {"effort_steps": 1},
        {"new_task": ""},
        {"base_model": ""},
        {"iterations": 1},
        {"n_compare": 8},
        {"n_detect": 16},
        {"borderline": ""},
        {"dose": [0.01]},
        {"strengths": [1.0]},
    ):
        assert seconds(**changes) < seconds(), changes
    assert seconds(exact_prompts=1) > 1.1 * seconds()


def test_training_costs_what_the_bench_measured(tmp_path):
    model = plan.sizes("m", batch.read("llama-2-7b", ROOT).facts["config"], "")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "bench.json").write_text(json.dumps({"sn_step_over_full_step": 0.5}))
    rate = plan.rates(tmp_path, on_gpu=True)
    full, neurons, gradient = (
        plan.seconds_of(plan.Work(**{what: 100}), model, 64, "float16", rate)
        for what in ("tuned", "trained", "gradients")
    )
    forward = plan.seconds_of(plan.Work(forwards=200), model, 64, "float16", rate)  # a row has a prompt and a response
    assert [full / forward, neurons / full, gradient / forward] == pytest.approx([3, 0.5, 2])
    assert plan.rates(tmp_path / "none", on_gpu=True).neurons == plan.NEURON_STEP
