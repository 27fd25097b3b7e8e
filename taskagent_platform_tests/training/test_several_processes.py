"""Several processes that share each step's batches train the adapter that one process trains."""

from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from taskagent_platform.artifacts import Manifest
from taskagent_platform.errors import PlatformError
from taskagent_platform.training.fine_tune import fine_tune
from taskagent_platform_tests.training.small_training import settings_with, write_data

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

TRAINING = {"epochs": 2, "gradient_accumulation": 2}


@pytest.fixture(scope="module")
def alone(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("alone")
    return folder, fine_tune(settings_with(**TRAINING), base_folder, *write_data(folder), folder / "lora_adapter", {})


def assert_same(folder: Path, manifest: Manifest, alone: tuple[Path, Manifest]) -> None:
    for kind in ("loss", "eval_loss", "grad_norm"):
        expected, got = (
            [(record["step"], record[kind]) for record in one.details["history"] if kind in record]
            for one in (alone[1], manifest)
        )
        assert len(got) > 2
        assert [step for step, _ in got] == [step for step, _ in expected]
        assert [value for _, value in got] == pytest.approx([value for _, value in expected], rel=1e-3), kind
    expected, got = (load_file(path / "lora_adapter" / "adapter_model.safetensors") for path in (alone[0], folder))
    for name, weights in expected.items():
        assert (got[name] - weights).abs().max() < 1e-3 + 1e-2 * weights.abs().max(), name


def test_two_processes_of_one_machine(
    base_folder: Path, data: tuple[Path, Path], tmp_path: Path, alone: tuple[Path, Manifest]
) -> None:
    """Killed in between, they end together and go on together."""
    folder, settings = tmp_path / "lora_adapter", settings_with(**TRAINING, processes=2)
    workers: list[psutil.Process] = []

    def kill(record: dict[str, Any]) -> None:
        if record.get("step") == 3 and "loss" in record:
            (launcher,) = psutil.Process().children()
            workers.extend(launcher.children())
            launcher.kill()

    with pytest.raises(PlatformError, match="was killed"):
        fine_tune(settings, base_folder, *data, folder, {}, kill)
    assert len(workers) == 2
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
    manifest = fine_tune(settings, base_folder, *data, folder, {})
    assert manifest.details["resumed_from"] == 2
    assert_same(tmp_path, manifest, alone)


def test_an_error_of_several_processes_is_one_sentence(
    base_folder: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    data[0].write_text("{\n")
    with pytest.raises(PlatformError, match=r"train\.jsonl, line 1: not JSON"):
        fine_tune(settings_with(**TRAINING, processes=2), base_folder, *data, tmp_path / "lora_adapter", {})
    assert not psutil.Process().children()


def test_two_machines_of_a_ray_cluster(
    base_folder: Path, data: tuple[Path, Path], tmp_path: Path, alone: tuple[Path, Manifest]
) -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        settings = settings_with(**TRAINING, processes=2, ray_address=cluster.address)
        manifest = fine_tune(settings, base_folder, *data, tmp_path / "lora_adapter", {})
        assert_same(tmp_path, manifest, alone)
        too_many = settings_with(gradient_accumulation=3, processes=3, ray_address=cluster.address)
        with pytest.raises(PlatformError, match="has only 2 processors"):
            fine_tune(too_many, base_folder, *data, tmp_path / "lora_adapter", {})
    finally:
        cluster.shutdown()
    with pytest.raises(PlatformError, match="No Ray cluster answers"):
        fine_tune(settings, base_folder, *data, tmp_path / "lora_adapter", {})
