"""Sends every run where it belongs: GPU work to the GPU side, the rest to the CPU side.

Configured in ``dagster.yaml``; each side takes exactly one route::

    run_launcher:
      module: taskagent_platform.launchers.gpu_run_launcher
      class: GpuRunLauncher
      config:
        gpu:
          local: {gpus: ["0", "1"], gpus_per_run: 1}
          # docker: {image: ..., gpus: 1, env_vars: [...], networks: [...], container_kwargs: {...}}
          # kubernetes: {job_image: ..., gpus: 1, node_selector: {...}, tolerations: [...], ...}
          # ray: {address: ..., gpus: 1, ...}
        cpu:
          local: {}

A run belongs to the GPU side if its tag ``taskagent/compute`` says so, else if it selects an asset of the pool ``gpu``.
The decision is written to the run's tag ``taskagent/route``; terminating, checking and resuming go by that tag. A run
without it was not sent here: somebody executes it in a process of his own, as ``taskagent demo`` does.
Whatever else a route is given goes to the launcher of dagster-docker, dagster-k8s or dagster-ray as it is.
"""

import signal
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple, Self

import yaml
from dagster import DagsterEvent, DagsterInstance, DagsterRun, Field, Noneable, Selector
from dagster import _check as check
from dagster._core.launcher.base import (
    CheckRunHealthResult,
    LaunchRunContext,
    ResumeRunContext,
    RunLauncher,
    WorkerStatus,
)
from dagster._core.run_coordinator import QueuedRunCoordinator
from dagster._serdes import ConfigurableClass, ConfigurableClassData

from taskagent_platform.errors import PlatformError
from taskagent_platform.launchers.local_run_launcher import LocalRunLauncher
from taskagent_platform.launchers.routes import COMPUTE_TAG, GPU_POOL, PROCESS_TAG, ROUTE_TAG
from taskagent_platform.launchers.run_worker import NoFreeGpuError, visible_gpus
from taskagent_platform.process_identity import marked_process

SIDES = ("gpu", "cpu")


class _Foreign(NamedTuple):
    """A launcher of another package, and the extra that brings it."""

    module: str
    launcher: str
    extra: str


_FOREIGN = {
    "docker": _Foreign("dagster_docker", "DockerRunLauncher", "docker"),
    "kubernetes": _Foreign("dagster_k8s", "K8sRunLauncher", "kubernetes"),
    "ray": _Foreign("dagster_ray", "RayRunLauncher", "ray"),
}
_GPU_TAINT = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
_LOCAL = {
    "gpus": Field(
        Noneable([str]),
        default_value=None,
        description="GPUs that may be leased, as CUDA_VISIBLE_DEVICES takes them; all that the driver lists if unset",
    ),
    "gpus_per_run": Field(int, default_value=1, description="how many a run of the GPU side takes"),
    "patience_s": Field(float, default_value=45.0, description="seconds that a terminated run has to end by itself"),
}
_ROUTES = {
    "local": Field(_LOCAL, is_required=False),
    # Dagster's own shorthand for a mapping that may hold anything.
    **{name: Field(dict, is_required=False) for name in _FOREIGN},
}


class GpuRunLauncher(RunLauncher[Any], ConfigurableClass):
    """Routes runs to one launcher for GPU work and another for the rest.

    Args:
        gpu: the GPU side: one route and its configuration.
        cpu: the CPU side, likewise.
        inst_data: what it was configured with.

    Raises:
        PlatformError: a route's package is not installed; names the extra that brings it.
    """

    def __init__(
        self,
        gpu: Mapping[str, Any] | None = None,
        cpu: Mapping[str, Any] | None = None,
        inst_data: ConfigurableClassData | None = None,
    ) -> None:
        self._inst_data = inst_data
        self._routes = {"gpu": _route(gpu or {"local": {}}), "cpu": _route(cpu or {"local": {}})}
        self._made: dict[str, RunLauncher[Any]] = {}
        super().__init__()  # type: ignore[no-untyped-call]

    @property
    def inst_data(self) -> ConfigurableClassData | None:
        return self._inst_data

    @classmethod
    def config_type(cls) -> Any:
        one_of = Selector(_ROUTES)  # type: ignore[no-untyped-call]
        return {side: Field(one_of, default_value={"local": {}}) for side in SIDES}

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData, config_value: Mapping[str, Any]) -> Self:
        return cls(gpu=config_value["gpu"], cpu=config_value["cpu"], inst_data=inst_data)

    def register_instance(self, instance: DagsterInstance) -> None:
        super().register_instance(instance)
        for launcher in self._made.values():
            launcher.register_instance(instance)

    def delegate(self, side: str) -> RunLauncher[Any]:
        """Returns the launcher of a side. It is made when it is first needed: some ask their cluster at once."""
        if side not in self._made:
            route, config = self._routes[side]
            launcher = _build(route, config, with_gpu=side == "gpu")
            if self.has_instance:
                launcher.register_instance(self._instance)
            self._made[side] = launcher
        return self._made[side]

    def side_of(self, run: DagsterRun) -> str:
        """Returns the side that a run belongs to.

        Raises:
            PlatformError: its tag names no side, or asks for a GPU where there is none.
        """
        said = run.tags.get(COMPUTE_TAG)
        if said is not None and said not in SIDES:
            raise PlatformError(f"The run's tag {COMPUTE_TAG} is {said!r}; it takes gpu or cpu.")
        pools = run.run_op_concurrency.all_pools if run.run_op_concurrency else None
        side = said or ("gpu" if GPU_POOL in (pools or ()) else "cpu")
        launcher = self.delegate(side)
        if side == "gpu" and isinstance(launcher, LocalRunLauncher) and not launcher.gpus:
            if said is not None:
                raise PlatformError(
                    f"The run asks for a GPU (tag {COMPUTE_TAG}), and this machine has none that can be leased; list "
                    "them under the launcher's gpu.local.gpus, or choose another route for the GPU side."
                )
            # The profiles without a GPU do the same work on the processor.
            return "cpu"
        return side

    def launch_run(self, context: LaunchRunContext) -> None:
        run = context.dagster_run
        side = self.side_of(run)
        launcher = self.delegate(side)
        self._instance.add_run_tags(run.run_id, {ROUTE_TAG: f"{side}:{self._routes[side][0]}"})
        tagged = check.not_none(self._instance.get_run_by_id(run.run_id))
        try:
            launcher.launch_run(context._replace(dagster_run=tagged))
        except NoFreeGpuError as busy:
            self._queue_again(tagged, busy)

    def terminate(self, run_id: str) -> bool:
        run = self._instance.get_run_by_id(run_id)
        if run is None or run.is_finished:
            return False
        process = None if ROUTE_TAG in run.tags else marked_process(run.tags.get(PROCESS_TAG, ""))
        if process is not None:
            self._instance.report_run_canceling(run)
            # As Ctrl-C would; whoever started it ends what is left of it.
            process.send_signal(signal.SIGINT)
            return True
        # Some launchers return None where their cluster refuses.
        return bool(self._delegate_of(run).terminate(run_id))

    @property
    def supports_check_run_worker_health(self) -> bool:
        return all(self.delegate(side).supports_check_run_worker_health for side in SIDES)

    def check_run_worker_health(self, run: DagsterRun) -> CheckRunHealthResult:
        return self._delegate_of(run).check_run_worker_health(run) if ROUTE_TAG in run.tags else self._own_health(run)

    def get_run_worker_debug_info(self, run: DagsterRun, include_container_logs: bool | None = True) -> str | None:
        return self._delegate_of(run).get_run_worker_debug_info(run, include_container_logs)

    @property
    def supports_resume_run(self) -> bool:
        return all(self.delegate(side).supports_resume_run for side in SIDES)

    def resume_run(self, context: ResumeRunContext) -> None:
        self._delegate_of(context.dagster_run).resume_run(context)

    def dispose(self) -> None:
        for launcher in self._made.values():
            launcher.dispose()

    def _own_health(self, run: DagsterRun) -> CheckRunHealthResult:
        """Returns how a run is that was not sent here. One whose process is gone has failed: nobody waits for it."""
        mark = run.tags.get(PROCESS_TAG)
        if mark is None or marked_process(mark) is not None:
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        known = self._instance.get_run_by_id(run.run_id)
        if known is not None and known.is_finished:
            return CheckRunHealthResult(WorkerStatus.SUCCESS)
        gone = "The process of this run ended without finishing it."
        # Said at once: a run that only counts as unhealthy would be resumed.
        self._instance.report_run_failed(run, gone)
        return CheckRunHealthResult(WorkerStatus.FAILED, gone)

    def _delegate_of(self, run: DagsterRun) -> RunLauncher[Any]:
        """Returns the launcher that was given a run; for one that never came so far, the one that it would get."""
        side = run.tags.get(ROUTE_TAG, "").partition(":")[0]
        return self.delegate(side if side in SIDES else self.side_of(run))

    def _queue_again(self, run: DagsterRun, busy: NoFreeGpuError) -> None:
        """Puts a run back into the queue, whose daemon offers it again.

        The pool's limit keeps runs in the queue before they come here. This is for what it cannot know of: runs that
        take several GPUs, and workers that an earlier daemon started.
        """
        if not isinstance(self._instance.run_coordinator, QueuedRunCoordinator):
            raise PlatformError(f"{busy} There is no run queue to wait in; remove run_coordinator from dagster.yaml.")
        self._instance.report_engine_event(f"Waits in the queue: {busy}", run, cls=self.__class__)
        self._instance.report_dagster_event(DagsterEvent.job_enqueue(run), run_id=run.run_id)


def _route(side: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    ((name, config),) = side.items()
    foreign = _FOREIGN.get(name)
    if foreign is not None and find_spec(foreign.module) is None:
        raise PlatformError(
            f"The run launcher's route {name} needs the package {foreign.module}: install taskagent-platform with the "
            f"extra {foreign.extra!r}, or choose another route in dagster.yaml."
        )
    return name, dict(config or {})


def _build(route: str, config: dict[str, Any], *, with_gpu: bool) -> RunLauncher[Any]:
    if route == "local":
        found = config.get("gpus")
        gpus = visible_gpus() if found is None else tuple(found)
        patience = config.get("patience_s", 45.0)
        # The CPU side knows the GPUs, too: to hide them from its runs.
        return LocalRunLauncher(gpus, config.get("gpus_per_run", 1) if with_gpu else 0, patience_s=patience)
    foreign = _FOREIGN[route]
    settings = _GPU_CONFIGURATION[route](config) if with_gpu else config
    if route == "ray":
        settings = {"ray": settings}
    data = ConfigurableClassData(foreign.module, foreign.launcher, yaml.safe_dump(settings))
    return check.not_none(data.rehydrate(as_type=RunLauncher))  # type: ignore[type-abstract]


def docker_configuration(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns DockerRunLauncher's configuration with the GPUs as a device request.

    Args:
        config: ``gpus`` is a number, ``all``, or a list of device ids; 1 if it is not given.
    """
    rest = dict(config)
    gpus = rest.pop("gpus", 1)
    request: dict[str, Any] = {"Driver": "nvidia", "Capabilities": [["gpu"]]}
    if isinstance(gpus, list):
        request["DeviceIDs"] = [str(gpu) for gpu in gpus]
    else:
        request["Count"] = -1 if gpus == "all" else int(gpus)
    arguments = dict(rest.get("container_kwargs") or {})
    arguments["device_requests"] = [*arguments.get("device_requests", []), request]
    return {**rest, "container_kwargs": arguments}


def kubernetes_configuration(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns K8sRunLauncher's configuration with the GPUs as a limit, and pods that may go to GPU nodes.

    Args:
        config: ``gpus`` (1 if it is not given), ``gpu_resource`` (``nvidia.com/gpu``), ``node_selector``,
            ``tolerations`` (of the taint that GPU nodes usually have).
    """
    rest = dict(config)
    resource, gpus = rest.pop("gpu_resource", "nvidia.com/gpu"), str(rest.pop("gpus", 1))
    selector, tolerations = rest.pop("node_selector", None), rest.pop("tolerations", [_GPU_TAINT])
    resources = dict(rest.get("resources") or {})
    resources["limits"] = {**resources.get("limits", {}), resource: gpus}
    run_config = dict(rest.get("run_k8s_config") or {})
    pod = dict(run_config.get("pod_spec_config") or {})
    pod["tolerations"] = [*pod.get("tolerations", []), *tolerations]
    if selector:
        pod["node_selector"] = {**pod.get("node_selector", {}), **selector}
    return {**rest, "resources": resources, "run_k8s_config": {**run_config, "pod_spec_config": pod}}


def ray_configuration(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns RayRunLauncher's configuration with the GPUs that a run's entry point reserves."""
    rest = dict(config)
    gpus = rest.pop("gpus", 1)
    return {**rest, "num_gpus": gpus}


_GPU_CONFIGURATION = {
    "docker": docker_configuration,
    "kubernetes": kubernetes_configuration,
    "ray": ray_configuration,
}
