# The study as a graph: one papermill process a notebook, model and seed. `make study` runs it on this machine;
# snakemake --config studies=testbed seeds=0,1,2 preset=default runs it wherever Snakemake does.
import functools
import json
import shlex
import sys
from pathlib import Path

from nt_utils.study import batch, plan
from nt_utils.files import study_name

ROOT = Path(workflow.basedir)
STUDIES = str(config.get("studies", "testbed")).replace(",", " ").split()
SEEDS = batch.parse_seeds(str(config.get("seeds", "0")))
PRESET = config.get("preset", "default")
FILES = {study: batch.read(study, ROOT) for study in STUDIES}
RUNS = {v.folder: v for study in STUDIES for v in batch.variants(study, SEEDS, PRESET, ROOT)}
SWEPT = {study_name(study, study, PRESET): study for study in STUDIES if FILES[study].sweep}
COMPARED = [folder for folder, run in RUNS.items() if set(batch.LAST) & set(run.notebooks)]
COMPARED = [f for f in COMPARED if FILES[RUNS[f].study].has_model]  # notebooks without a model leave no claims
if not workflow.remote_exec:  # a job of a cluster reads this file anew, and would decide anew where the hub does not answer
    for run in RUNS.values():
        batch.note_settings(run, PRESET, ROOT)


wildcard_constraints:
    seed=r"\d+",
    notebook=r"\d\d_\w+",


rule all:
    input:
        [output for run in RUNS.values() for output in run.outputs()],
        expand("runs/{folder}/sweep.csv", folder=SWEPT),
        expand("runs/{folder}/comparison/claims.csv", folder=COMPARED),


def model_of(wildcards):
    """A testbed whose weights are not shipped is trained before its notebooks start."""
    trains = FILES[RUNS[wildcards.folder].study].trains(int(wildcards.seed))
    return [f"runs/{wildcards.folder}/seed-{wildcards.seed}/.testbed"] if trains else []


def others(wildcards):
    """What a comparison compares: the other notebooks of its seed. A quick one runs beside them, for time, and shows what
    is there by then."""
    if wildcards.notebook not in batch.LAST or PRESET == "quick":
        return []
    names = [n for n in RUNS[wildcards.folder].notebooks if n not in batch.LAST]
    return expand("runs/{folder}/seed-{seed}/{name}.ipynb", name=names, **wildcards)


def point(wildcards):
    run = RUNS[wildcards.folder]
    changes = [f"--set {shlex.quote(f'{k}={json.dumps(v)}')}" for k, v in run.changes.items()]
    return " ".join([f"--study {shlex.quote(run.study)} --name {shlex.quote(run.name)}", *changes])


@functools.cache
def share(folder, notebook):
    """Threads, memory, GPUs and minutes of a notebook. make study shares this machine, and says how much memory is free;
    a cluster is asked for what the model's size needs."""
    run = RUNS[folder]
    file, all_cores = FILES[run.study], workflow.cores or 8
    found = plan.resources(file, notebook) | {"threads": 1 if file.is_small else all_cores}
    if "mem_mb" in config:
        found |= plan.beside(file, run, notebook, PRESET, all_cores, int(config["mem_mb"]), ROOT)
    return found


def needs(name):
    return lambda wildcards: share(wildcards.folder, wildcards.notebook)[name]


rule testbed:
    output:
        touch("runs/{folder}/seed-{seed}/.testbed"),
    params:
        model=lambda w: FILES[RUNS[w.folder].study].model,
    threads: 2
    resources:
        mem_mb=4000,
        runtime=60,
    shell:
        "{sys.executable:q} -m nt_utils.study.batch testbed --seed {wildcards.seed} --model {params.model:q}"


rule notebook:
    input:
        model_of,
        others,
        source="notebooks/{notebook}.ipynb",
        settings="runs/{folder}/seed-{seed}/.settings/{notebook}.json",
    output:
        "runs/{folder}/seed-{seed}/{notebook}.ipynb",
    params:
        point=point,
    threads: needs("threads")
    resources:
        gpu=needs("gpu"),
        mem_mb=needs("mem_mb"),
        runtime=needs("runtime"),
    shell:
        "OMP_NUM_THREADS={threads} {sys.executable:q} -m nt_utils.study.batch run {wildcards.notebook:q} {params.point}"
        " --seed {wildcards.seed} --preset {PRESET:q} --output {output:q} --settings {input.settings:q}"


rule seeds:
    input:
        lambda w: RUNS[w.folder].outputs(),
    output:
        "runs/{folder}/comparison/claims.csv",
    params:
        seeds=",".join(map(str, SEEDS)),
    shell:
        "{sys.executable:q} -m nt_utils.study.seeds --folder {wildcards.folder:q} --seeds {params.seeds}"


rule sweep:
    input:
        lambda w: [o for run in RUNS.values() if run.study == SWEPT[w.folder] for o in run.outputs()],
    output:
        "runs/{folder}/sweep.csv",
    params:
        study=lambda w: SWEPT[w.folder],
        seeds=",".join(map(str, SEEDS)),
    resources:
        mem_mb=2000,
        runtime=10,
    shell:
        "{sys.executable:q} -m nt_utils.study.batch collect --study {params.study:q} --seeds {params.seeds} --preset {PRESET:q}"
