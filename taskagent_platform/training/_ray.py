"""The training run on a Ray cluster: one worker for each process, on one machine or several.

Base model, dataset, checkpoints and adapter lie in folders that every machine sees under the same path.
"""

import socket
import threading
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, get_context
from ray.train.torch import TorchTrainer
from ray.util.queue import Queue

from taskagent_platform.errors import PlatformError
from taskagent_platform.training._payload import train_here
from taskagent_platform.training._process import OnLog, error_of, payload_variables, record_of


def train(spec: dict[str, Any], emit: OnLog) -> dict[str, Any]:
    """Trains as :func:`taskagent_platform.training.fine_tune.fine_tune` describes; returns the details."""
    address, processes = spec["ray_address"], spec["processes"]
    # Ray itself counts threads, by what a worker may use of its machine.
    variables = {name: value for name, value in payload_variables().items() if not name.endswith("_NUM_THREADS")}
    try:
        host, _, port = address.removeprefix("ray://").rpartition(":")
        if port.isdecimal():
            # Ray itself goes on asking a silent address for many minutes.
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, runtime_env={"env_vars": variables}, log_to_driver=False)
    except OSError as error:
        raise PlatformError(
            f"No Ray cluster answers at training.ray_address {address!r}; start one with `ray start`."
        ) from error
    resources = ray.cluster_resources()
    on_gpu = resources.get("GPU", 0) > 0
    there = int(resources.get("GPU" if on_gpu else "CPU", 0))
    if there < processes:
        raise PlatformError(
            f"training.processes is {processes}, but the Ray cluster at {address!r} has only {there} "
            f"{'GPUs' if on_gpu else 'processors'}."
        )
    records = Queue()
    received: dict[str, Any] = {}

    def pass_on() -> None:
        while (record := records.get()) is not None:
            if "result" in record or "error" in record:
                received.update(record)
            else:
                emit(record)

    reader = threading.Thread(target=pass_on, daemon=True)
    reader.start()
    trainer = TorchTrainer(
        _work,
        train_loop_config={"spec": {**spec, "ray_address": ""}, "records": records},
        scaling_config=ScalingConfig(num_workers=processes, use_gpu=on_gpu),
        run_config=RunConfig(
            storage_path=str(Path(spec["checkpoints"]).parent / "ray"), failure_config=FailureConfig(max_failures=0)
        ),
    )
    try:
        trainer.fit()
    except Exception as error:
        if "error" in received:
            raise error_of(received) from error
        raise
    finally:
        records.put(None)
        reader.join()
        ray.shutdown()
    details: dict[str, Any] = received["result"]
    return details


def _work(config: dict[str, Any]) -> None:
    """Runs in every worker; Ray has set its rank and joined the workers before."""
    records, first = config["records"], get_context().get_world_rank() == 0

    def emit(record: dict[str, Any]) -> None:
        if first:
            records.put(record)

    try:
        emit({"result": train_here(config["spec"], emit)})
    except PlatformError as error:
        records.put(record_of(error))
        raise
