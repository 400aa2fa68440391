"""Task definitions of lm-evaluation-harness that come from elsewhere: data and templates, whose Python code is refused.

The harness imports what `!function` names, and what `metric` finds in the `evaluate` library. It renders templates in
an environment from which Python can be reached.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qatscale.config.places import expand_user
from qatscale.config.yaml_text import children, compose
from qatscale.errors import UserError

_FIX = "Write it as a Jinja template, or give an export of the run to lm_eval itself."


def check_tasks(folder: Path) -> None:
    """UserError where a task of the folder, or a file it includes, would execute Python code."""
    from lm_eval import tasks
    from lm_eval.api import metrics  # noqa: F401 - registers the harness's own
    from lm_eval.api.registry import metric_registry

    own, seen = Path(tasks.__file__).parent.resolve(), set()

    def check(path: Path) -> None:
        path = expand_user(path).resolve()
        if path in seen or path.is_relative_to(own):
            return
        seen.add(path)
        document = compose(path, "--tasks-folder")
        for node, named in _nodes(document):
            metric, elsewhere = named.get("metric"), named.get("hf_evaluate")
            code = None
            if node.tag == "!function":
                code = f"!function {node.value}"
            elif metric is not None and metric.tag != "!function" and str(metric.value) not in metric_registry:
                code = f"metric {metric.value}, which is none of the harness"
            elif elsewhere is not None and elsewhere.value.lower() not in ("false", "no", "off"):
                code = "hf_evaluate"
            if code:
                problem = f"names Python code ({code}), which qatscale never executes."
                raise UserError("--tasks-folder", f"{path}, line {node.start_mark.line + 1}", problem, _FIX)
        for name, _, value in children(document):
            if name == "include":
                for part in [part for _, _, part in children(value)] or [value]:
                    check(path.parent / part.value)

    for path in sorted(folder.glob("**/*.yaml")):
        check(path)


def render_in_sandbox() -> None:
    """Templates of the harness's tasks see their document and nothing of Python."""
    from jinja2.sandbox import SandboxedEnvironment, SecurityError
    from lm_eval import utils

    class Sandbox(SandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            """SecurityError for `'x' * 10**10` and `9**9**9`, which would fill the memory."""
            numbers = isinstance(left, float | int) and isinstance(right, float | int)
            if not numbers or (operator == "**" and max(abs(left), abs(right)) > 1000):
                raise SecurityError(f"{operator} of more than small numbers is unsafe")
            return super().call_binop(context, operator, left, right)

    sandbox = Sandbox(undefined=utils.env.undefined, keep_trailing_newline=True)
    sandbox.filters.update(utils.env.filters)
    utils.env = sandbox


def _nodes(node: Any, aggregated: bool = False) -> Iterator[tuple[Any, dict[str | int, Any]]]:
    """Each node, with its values by name. The metrics that a group aggregates are those of its tasks: without names."""
    parts = children(node)
    yield node, {} if aggregated else {name: value for name, _, value in parts}
    for name, _, value in parts:
        yield from _nodes(value, aggregated or name == "aggregate_metric_list")
