"""Scores of lm-evaluation-harness on a task of our own, against our own log-likelihoods."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from jinja2 import TemplateError
from typer.testing import CliRunner

from qatscale.cli.app import app
from qatscale.config.recipe import load_run_config
from qatscale.engine.checkpoints.reader import CheckpointReader, find_checkpoint
from qatscale.engine.checkpoints.training_state import load_checkpointed_model
from qatscale.errors import UserError
from qatscale.inference.generate import open_transformers
from qatscale.inference.harness import open_tasks, run_harness
from qatscale.train.validation import open_view

QUESTIONS = [
    {"text": "import", "choices": [" os", " zebra", " the"], "answer": 0},
    {"text": "return self.", "choices": ["value", "qqq"], "answer": 0},
    {"text": "for i in", "choices": [" range(10):", " def"], "answer": 1},
    {"text": "class Foo", "choices": [":", " of", " xyz"], "answer": 0},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
num_fewshot: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    pytest.importorskip("lm_eval", reason="the extra `harness` is not installed")
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for name, file in (("completions", folder / "questions.jsonl"), ("lost", folder / "nowhere.jsonl")):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, file=file))
    return folder


def answers(run: Path, view: str) -> list[int]:
    """The likeliest choice of each question by our own forward pass."""
    reader = CheckpointReader(find_checkpoint(str(run)))
    model, _ = load_checkpointed_model(reader, load_run_config(run / "recipe.yaml"), torch.device("cpu"))
    encode = open_transformers(str(run)).encode
    chosen = []
    with open_view(model, view), torch.no_grad():
        for question in QUESTIONS:
            likelihoods = []
            for choice in question["choices"]:  # type: ignore[attr-defined]
                ids = encode(f"{question['text']}{choice}")
                begin = len(encode(str(question["text"])))
                scores = model(torch.tensor([ids]))[0].log_softmax(-1)
                likelihoods.append(sum(float(scores[i - 1, ids[i]]) for i in range(begin, len(ids))))
            chosen.append(max(range(len(likelihoods)), key=likelihoods.__getitem__))
    return chosen


def test_accuracy_is_that_of_our_own_likelihoods(
    run: Path, tasks: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tasks)
    options = ["--harness", "completions", "--tasks-folder", str(tasks), "--json"]
    done = CliRunner().invoke(app, ["evaluate", str(run), *options], catch_exceptions=False)
    assert done.exit_code == 0
    (score,) = json.loads(done.stdout[done.stdout.index("{") :])["scores"]
    right = [
        chosen == question["answer"] for chosen, question in zip(answers(run, "quantized"), QUESTIONS, strict=True)
    ]
    assert (score["task"], score["metric"], score["questions"], score["shots"]) == ("completions", "acc", 4, 0)
    assert score["value"] == sum(right) / len(right)
    assert "fatal" not in capfd.readouterr().err, "of git, outside of a repository"


def test_an_export_is_judged_and_a_part_says_so(run: Path, tasks: Path, tmp_path: Path) -> None:
    from qatscale.engine.checkpoints.training_state import read_checkpoint
    from qatscale.tracking.convert import write_hugging_face

    write_hugging_face(read_checkpoint(str(run)), tmp_path / "hf")
    options = ["--harness", "completions", "--tasks-folder", str(tasks), "--limit", "2"]
    done = CliRunner().invoke(app, ["evaluate", str(tmp_path / "hf"), *options], catch_exceptions=False)
    assert done.exit_code == 0
    assert "first 2 questions" in done.stdout
    right = [chosen == question["answer"] for chosen, question in zip(answers(run, "fp"), QUESTIONS, strict=True)][:2]
    assert f"{sum(right) / 2:.4f}" in done.stdout


def test_what_cannot_be_judged_is_told(run: Path, tasks: Path) -> None:
    with pytest.raises(UserError, match="--tasks-folder"):
        open_tasks(["completions"], tasks / "nowhere")
    with pytest.raises(UserError, match="completions"):
        open_tasks(["completion"], tasks)
    for name, (line, _) in BROKEN.items():
        text = TASK.format(name=name, file=tasks / "questions.jsonl")
        (tasks / f"{name}.yaml").write_text(f"{text}{line}\n")
    manager, model = open_tasks(["lost"], tasks), open_transformers(str(run))
    with pytest.raises(UserError, match="dataset"):
        run_harness(model, ["lost"], manager)
    for name, (_, reason) in BROKEN.items():
        with pytest.raises(UserError, match=reason):
            run_harness(model, [name], manager)


BROKEN = {
    "broken_function": ("process_docs: text", "'str' object is not callable"),
    "broken_split": ("test_split: nope", "a task cannot be run: KeyError: 'nope'"),
    "broken_metrics": ("metric_list: 7", "'int' object is not iterable"),
    "broken_template": ('doc_to_text: "{{ text * 10000000000 }}"', "unsafe"),
}
"""A line that breaks a task, and what is said of it."""


CODE = {
    "a function": "process_docs: !function evil.run",
    "a function of an importable module": "doc_to_text: !function os.getcwd",
    "a function in a list": "metric_list: [{metric: !function evil.run}]",
    "a function of a group": "aggregate_metric_list: [{metric: own, aggregation: !function evil.run}]",
    "a class": "class: !function evil.run",
    "an included function": "include: [{outside}]",
    "a metric's folder": "metric_list: [&m {{metric: {evil}}}]",
    "a metric's folder, merged": "metric_list: [{{<<: {{metric: {evil}}}}}]",
    "a metric of another library": "metric_list: [{metric: acc, hf_evaluate: yes}]",
}


@pytest.mark.parametrize("kind", CODE)
def test_python_code_in_a_folder_of_tasks_is_refused(kind: str, tasks: Path, tmp_path: Path) -> None:
    (tasks / "evil.py").write_text("import pathlib\npathlib.Path(__file__).with_suffix('.ran').touch()\nrun = len\n")
    (outside := tmp_path / "outside.yml").write_text("process_docs: !function tasks/evil.run\n")
    line = CODE[kind]
    if "{{" in line or "{outside}" in line:
        line = line.format(outside=outside, evil=tasks / "evil.py")
    (tasks / "hostile.yaml").write_text(f"task: hostile\ndataset_path: json\n{line}\n")
    with pytest.raises(UserError, match="never executes"):
        open_tasks(["hostile"], tasks)
    assert not (tasks / "evil.ran").exists()


def test_a_template_reaches_no_python(tasks: Path) -> None:
    open_tasks(["completions"], tasks)
    from lm_eval.utils import apply_template

    assert apply_template("{{ text | regex_replace('b', 'c') }}", {"text": "ab"}) == "ac"
    for text in (
        "''.__class__.__mro__[1].__subclasses__()",
        "lipsum.__globals__['os'].getcwd()",
        "''['__cl' ~ 'ass__']()",
        "'x' * 10**10",
        "9**9**9",
    ):
        with pytest.raises(TemplateError):
            apply_template(f"{{{{ {text} }}}}", {})


def test_settings_of_the_other_kind_of_evaluation_are_refused(run: Path) -> None:
    for wrong in (["--harness", "completions", "--ptq", "4"], ["--limit", "4"]):
        with pytest.raises(UserError, match=wrong[-2]):
            CliRunner().invoke(app, ["evaluate", str(run), *wrong], catch_exceptions=False)
