"""lm-evaluation-harness tasks on the model object at hand, with an intervention active.

Needs the extra `benchmarks` (pip install "nt-utils[benchmarks]"). Tasks are the harness's own names or local task files
(YAML, in a folder given as `task_folder`).
"""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nt_utils.data.records import PromptSet
from nt_utils.data.sources import quiet
from nt_utils.errors import InputError, optional_package
from nt_utils.evaluation.metrics import wilson

if TYPE_CHECKING:
    import pandas

    from nt_utils.models import LanguageModel

COLUMNS = ("task", "metric", "value", "low", "high", "n", "fewshot", "intervention", "model")
_HARNESS = ("lm_eval", "lm-eval", "evaluate")
NORMAL = 1.96  # half of a 95% interval in standard errors
RATES = ("acc", "acc_norm", "exact_match")  # means of 0 and 1: Wilson; other means take the harness's standard error


def run_benchmarks(
    lm: LanguageModel,
    tasks: Sequence[str],
    *,
    intervention: Any = None,
    task_folder: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    apply_chat_template: bool = False,
    seed: int = 0,
) -> pandas.DataFrame:
    """One row a task and metric: value with its 95% interval and n. Raises InputError for an unknown task.

    intervention          an object with .name and .active(lm), active during the whole run
    apply_chat_template   ask through the model's chat template (the harness's default is plain text)
    """
    import pandas

    if not tasks or isinstance(tasks, str):
        raise InputError("tasks must be a list with at least one name")
    if task_folder is not None and not Path(task_folder).is_dir():
        raise InputError(f"task_folder: there is no folder {task_folder}")
    missing = 'benchmarks need lm-evaluation-harness: pip install "nt-utils[benchmarks]"'
    harness, *_ = (
        optional_package(name, missing) for name in ("lm_eval", "lm_eval.models.huggingface", "lm_eval.tasks")
    )
    with quiet(*_HARNESS):  # its warnings about plain choices stay out of notebooks
        manager = _manager(harness, tasks, task_folder)
        model = harness.models.huggingface.HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=batch_size)
        with intervention.active(lm) if intervention is not None else contextlib.nullcontext():
            found = harness.simple_evaluate(
                model=model,
                tasks=list(tasks),
                task_manager=manager,
                limit=limit,
                num_fewshot=num_fewshot,
                apply_chat_template=apply_chat_template,
                log_samples=False,
                bootstrap_iters=0,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
    name = "none" if intervention is None else intervention.name
    lines = [line for task, values in found["results"].items() for line in _lines(task, values, found)]
    table = pandas.DataFrame([(*line, name, lm.label) for line in lines], columns=list(COLUMNS))
    return table.sort_values(["task", "metric"], ignore_index=True)


TASK_FILE = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
target_delimiter: "{delimiter}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def write_choice_task(
    prompts: PromptSet, folder: str | Path, name: str, *, choices: int = 4, seed: int = 0, delimiter: str = ""
) -> Path:
    """A local task file of multiple choice from prompts with known answers; returns the folder for `task_folder`.

    The wrong choices are the answers of other prompts of the same `task`. `delimiter` stands between question and answer:
    none where a chat template separates them. Raises InputError where a task has fewer different answers than choices.
    """
    rng, rows = random.Random(seed), []
    for prompt in prompts:
        others = sorted({p.helpful for p in prompts if p.task == prompt.task and p.helpful} - {prompt.helpful})
        if not prompt.helpful or len(others) < choices - 1:
            raise InputError(f"prompts: task {prompt.task!r} has no {choices} different known answers to choose from")
        options = [prompt.helpful, *rng.sample(others, choices - 1)]
        rng.shuffle(options)
        rows.append({"question": prompt.text, "choices": options, "answer": options.index(prompt.helpful)})
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = (folder / f"{name}.jsonl").resolve()
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    text = TASK_FILE.format(name=name, data=json.dumps(str(data)), delimiter=delimiter)
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


def _lines(task: str, values: dict[str, Any], found: dict[str, Any]) -> Iterator[tuple]:
    n = int(found.get("n-samples", {}).get(task, {}).get("effective", 0))
    for key, value in values.items():
        metric, _, kind = key.partition(",")
        if not isinstance(value, (int, float)) or metric.endswith("_stderr") or metric in ("alias", "sample_len"):
            continue
        label = metric if kind in ("none", "") else f"{metric} ({kind})"
        yield (
            task,
            label,
            *_interval(metric, float(value), values.get(f"{metric}_stderr,{kind}"), n),
            found.get("n-shot", {}).get(task, 0),
        )


def _interval(metric: str, value: float, error: Any, n: int) -> tuple[float, float, float, int]:
    if metric in RATES and n and abs(value * n - round(value * n)) < 1e-6:
        return (*wilson(round(value * n), n)[:3], n)
    if isinstance(error, (int, float)) and not math.isnan(error):
        half = NORMAL * error
        return value, value - half, value + half, n
    return value, math.nan, math.nan, n


def _manager(harness: Any, tasks: Sequence[str], task_folder: str | Path | None) -> Any:
    """The harness's index of tasks; its own 13,000 files (20 s) are read only when the folder does not hold the tasks."""
    if task_folder is not None:
        manager = harness.tasks.TaskManager(include_path=str(task_folder), include_defaults=False)
        if set(tasks) <= set(manager.all_tasks):
            return manager
    manager = harness.tasks.TaskManager(include_path=str(task_folder) if task_folder else None)
    known = manager.all_tasks
    if unknown := [task for task in tasks if task not in known]:
        near = ", ".join(difflib.get_close_matches(unknown[0], known, n=5, cutoff=0.4) or sorted(known)[:5])
        raise InputError(f"unknown task {unknown[0]!r}: the harness has {len(known)} tasks, the nearest are {near}")
    return manager
