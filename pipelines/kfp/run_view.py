"""What a run looks like now: asks KFP, then the cluster, then the run's own folder, each for what it alone knows.

KFP is asked for the run as a whole. Its workflow tells the states of tasks; where it is gone or may not be read, KFP's
copy of it does, and for what that leaves open the results in S3. Prints nothing but what could not be asked.
"""

import sys
import time
from dataclasses import dataclass, field
from typing import Any

from dice_core.launch.kubernetes import KubernetesApi, KubernetesError
from dice_core.storage import layout
from dice_core.storage.address import open_storage
from dice_core.storage.contract import StorageError
from dice_core.storage.failures import StageFailure, failures_among
from pipelines.cluster.config import CONFIG_MAP
from pipelines.cluster.jobs import own_name, parameters_of
from pipelines.cluster.pods import last_line, stage_pods, task_path, waiting_pods
from pipelines.cluster.workflow import Workflow, has_workflow_of_any, workflow_of
from pipelines.kfp.api import KfpApi, KfpError
from pipelines.kfp.stage_states import Results, stage_states, tell_more
from pipelines.kfp.task_graph import GraphTask, graph_tasks
from pipelines.kfp.task_states import STOPPED, RunFacts, TaskState, kfp_states, run_facts, workflow_states

LOST = "lost"
"""A run whose workflow has gone while KFP takes it for one under way."""


@dataclass(frozen=True)
class RunView:
    """A run at one moment."""

    run: Any
    """As KFP has it."""
    facts: RunFacts
    is_lost: bool
    tasks: tuple[TaskState, ...]
    """Stage by stage; a task of several stages as a whole where it is not known which of them is at work."""
    graph: tuple[GraphTask, ...]
    """Empty where the compiled pipeline is not known."""
    sources: tuple[str, ...] = ()
    """What the states are from, where it is not the workflow alone."""

    @property
    def state(self) -> str:
        """What to call the state of the run as a whole."""
        return LOST if self.is_lost else self.facts.label

    @property
    def is_over(self) -> bool:
        """Whether nothing more happens in it."""
        return self.is_lost or self.facts.is_final


@dataclass
class Observer:
    """Looks at a run again and again; what could not be asked is told once."""

    api: KfpApi
    namespace: str
    context: str
    run_id: str
    _graph: list[GraphTask] | None = None
    _cluster: KubernetesApi | None = None
    _told: set[str] = field(default_factory=set)

    def look(self) -> RunView:
        """Return the run as it is now.

        Raises:
            KfpError: KFP does not answer.
        """
        run = self.api.run(self.run_id)
        graph = self._tasks(run)
        facts, now = run_facts(run), time.time()
        workflow, has_none = self._workflow()
        sources = []
        if workflow and workflow.nodes is not None:
            states = workflow_states(graph, workflow, facts, now)
        else:
            states = kfp_states(graph, run, facts, now)
            sources.append("KFP's answer, which ends where a workflow grows past 1 MiB")
        results = self._results(run) if tell_more(states, graph) else None
        told = stage_states(states, graph, results)
        sources += ["the results in S3"] if sources and told != stage_states(states, graph) else []
        is_lost = has_none and not facts.is_final and self._is_its_cluster(run)
        return RunView(run, facts, is_lost, tuple(told), tuple(graph), tuple(sources))

    def waiting(self) -> list[tuple[str, str]]:
        """Return which pods do not run yet, and why."""
        try:
            return waiting_pods(self._kubernetes(), self.run_id)
        except KubernetesError as error:
            self._tell(f"{error}; why tasks wait is not shown")
            return []

    def progress(self, view: RunView) -> list[tuple[str, str]]:
        """Return (label of the task, the last line that its stage wrote) for tasks at work."""
        try:
            pods = [pod for pod in stage_pods(self._kubernetes(), self.run_id) if pod["status"]["phase"] == "Running"]
            labels = {task.path: task.label for task in view.graph}
            found = [(labels.get(task_path(pod), ""), last_line(self._kubernetes(), pod)) for pod in pods]
        except KubernetesError as error:
            self._tell(f"{error}; what running tasks say is not shown")
            return []
        return [(label, line) for label, line in found if label and line]

    def _tasks(self, run: Any) -> list[GraphTask]:
        """Return the tasks of the compiled pipeline; none where KFP has it no more."""
        if self._graph is None:
            try:
                self._graph = graph_tasks(self.api.pipeline_spec(run))
            except KfpError as error:
                self._tell(f"{error}; tasks are shown under KFP's names")
                return []
        return self._graph

    def _kubernetes(self) -> KubernetesApi:
        if self._cluster is None:
            self._cluster = KubernetesApi(self.namespace, context=self.context)
        return self._cluster

    def _workflow(self) -> tuple[Workflow | None, bool]:
        """Return the workflow, and whether the cluster has answered that there is none."""
        try:
            found = workflow_of(self._kubernetes(), self.run_id)
        except KubernetesError as error:
            self._tell(f"{error}; the states are those that KFP knows")
            return None, False
        return found, found is None

    def _is_its_cluster(self, run: Any) -> bool:
        """Return whether the cluster that has no workflow of a run is the one that it ran in: a context may be wrong.

        It is where KFP knows a run that has a workflow there, or where the suite keeps its data at the run's root.
        """
        cluster, root = self._kubernetes(), str(parameters_of(run).get("root", ""))
        try:
            if has_workflow_of_any(cluster, [str(known.run_id) for known in self.api.runs()]):
                return True
            deployed = (cluster.named("configmaps", CONFIG_MAP) or {}).get("data") or {}
        except KubernetesError as error:
            self._tell(f"{error}; whether the run is lost is not known")
            return False
        if root and deployed.get("DICE_ROOT", "").rstrip("/") == root:
            return True
        self._tell(
            f"{cluster.host}: namespace {self.namespace} has no workflow of this run: is it the run's cluster? "
            "CONTEXT= names another"
        )
        return False

    def _results(self, run: Any) -> Results | None:
        """Return what a run's folder tells; None where that is not known.

        Costs a listing and a request for each failure: it is asked again at every look.
        """
        root, name = str(parameters_of(run).get("root", "")), own_name(run)
        if not (root and name):
            return None
        try:
            run_uri = layout.run(root, name)
            keys = [found.key for found in open_storage(run_uri).list()]
            reasons = {failure.place: _reason(failure) for failure in failures_among(run_uri, keys)}
        except (StorageError, ValueError) as error:
            self._tell(f"{error}; what the run has left there is not shown")
            return None
        end = f"/{layout.MANIFEST}"
        return Results({key.removesuffix(end) for key in keys if key.endswith(end)}, reasons)

    def _tell(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            print(f"pipelines: {line}", file=sys.stderr)


def _reason(failure: StageFailure) -> str:
    return f"{failure.reason} ({failure.where})" if failure.where else failure.reason


def exit_code(view: RunView) -> int:
    """Return the exit code of a command that shows a run: 1 if it failed, was stopped, or is lost."""
    return int(view.state in ("FAILED", STOPPED, LOST, "CANCELED"))
