import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from taskagent_platform.artifacts import read_manifest
from taskagent_platform.errors import PlatformError
from taskagent_platform.settings import Settings, load_settings
from taskagent_platform.training.fine_tune import fine_tune
from taskagent_platform.training.merge import TOLERANCE, merge
from taskagent_platform.training.template import render_text
from taskagent_platform_tests.training.conversations import TOOLS, example, user, write_jsonl

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def adapter(base_folder: Path, smoke: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    train = write_jsonl(folder / "train.jsonl", [example(number) for number in range(32)])
    held_out = write_jsonl(folder / "eval.jsonl", [example(100 + number) for number in range(6)])
    fine_tune(smoke, base_folder, train, held_out, folder / "lora_adapter", {"training_dataset": "abc123"})
    return folder / "lora_adapter"


def test_the_merged_model_answers_as_base_and_adapter(
    base_folder: Path, adapter: Path, smoke: Settings, tokenizer: Any, tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    manifest = merge(smoke, base_folder, adapter, tmp_path / "merged_model", {"lora_adapter": "x"})
    assert read_manifest(tmp_path / "merged_model", kind="merged_model", verify=True) == manifest
    details = manifest.details
    assert details["logit_difference"] <= details["logit_tolerance"] == TOLERANCE["float32"]
    assert details["argmax_agreement"] > 0.999
    assert details["probes"] == 6
    ids = torch.tensor([tokenizer.encode(render_text([user("lamps?")], TOOLS, tokenizer))])
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    with torch.no_grad():
        plain = base(ids).logits
        expected = PeftModel.from_pretrained(base, adapter)(ids).logits
        got = AutoModelForCausalLM.from_pretrained(tmp_path / "merged_model")(ids).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)
    assert (got - plain).abs().max() > 0.1


def test_the_folder_is_ready_for_a_server(base_folder: Path, adapter: Path, smoke: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "merged_model"
    merge(smoke, base_folder, adapter, folder, {})
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        if name.endswith("jinja"):
            assert (folder / name).read_text() == (base_folder / name).read_text()
        else:
            assert json.loads((folder / name).read_text()) == json.loads((base_folder / name).read_text()), name
    card = (folder / "README.md").read_text()
    for text in ("Licence of the base model: Apache-2.0", "abc123", "| rank | 32 |", "| evaluation loss | "):
        assert text in card
    assert yaml.safe_load(card.split("---\n")[1])["license_name"].startswith("Apache-2.0")


def test_half_precision_is_checked_with_its_own_tolerance(base_folder: Path, adapter: Path, tmp_path: Path) -> None:
    settings = load_settings(profile="smoke", serving={"dtype": "bfloat16"})
    details = merge(settings, base_folder, adapter, tmp_path / "merged_model", {}).details
    assert details["logit_tolerance"] == TOLERANCE["bfloat16"]
    assert 1e-5 < details["logit_difference"] <= TOLERANCE["bfloat16"]
    assert json.loads((tmp_path / "merged_model" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_model_that_answers_otherwise_is_not_published(
    base_folder: Path, adapter: Path, smoke: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TOLERANCE, "float32", 0.0)
    with pytest.raises(PlatformError, match="logits differ from base"):
        merge(smoke, base_folder, adapter, tmp_path / "merged_model", {})
    assert not (tmp_path / "merged_model").exists()
