from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from taskagent_platform.settings import Settings, load_settings
from taskagent_platform.training.base_model import prepare_base_model
from taskagent_platform_tests.training.small_training import write_data


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from a second thread, and threads that wait for each other cost others much."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("MKL_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TASKAGENT_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("TASKAGENT_PROFILE", "smoke")
        return load_settings()


@pytest.fixture(scope="session")
def base_folder(smoke: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base model."""
    folder = tmp_path_factory.mktemp("base") / "base_model"
    prepare_base_model(smoke, folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> tuple[Path, Path]:
    """Training and held-out examples."""
    return write_data(tmp_path)


@pytest.fixture(scope="session")
def tokenizer(base_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base_folder)
