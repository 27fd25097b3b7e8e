import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from taskagent_platform.artifacts import read_manifest
from taskagent_platform.errors import PlatformError
from taskagent_platform.settings import Settings, load_settings
from taskagent_platform.training.base_model import prepare_base_model, published_model
from taskagent_platform.training.template import CALL_TOKENS, CHATML, WORD_START, chat_template
from taskagent_platform_tests.serving.fake_server import serve


def test_the_folder_is_ready_for_a_server(base_folder: Path, tokenizer: Any) -> None:
    manifest = read_manifest(base_folder, kind="base_model", verify=True)
    assert manifest.details["architecture"] == "LlamaForCausalLM"
    assert manifest.details["licence"].startswith("Apache-2.0")
    assert (base_folder / "chat_template.jinja").read_text() == tokenizer.chat_template
    assert tokenizer.chat_template == chat_template(CHATML, WORD_START)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token not in (None, "<|im_end|>")
    generation = json.loads((base_folder / "generation_config.json").read_text())
    config = json.loads((base_folder / "config.json").read_text())
    assert generation["eos_token_id"] == config["eos_token_id"] == tokenizer.eos_token_id
    assert "quantization_config" not in config
    assert list(base_folder.glob("*.safetensors"))


def test_the_tiny_model_depends_on_the_seed_alone(base_folder: Path, smoke: Settings, tmp_path: Path) -> None:
    again = prepare_base_model(smoke, tmp_path / "again")
    assert again.digest == read_manifest(base_folder).digest


def test_smollm2_gets_tokens_that_mean_what_their_parts_mean_and_stands_beside_as_published(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = tmp_path / "base_model"
    prepare_base_model(load_settings(profile="cpu"), made)
    folders = (made, published_model(made))
    assert len({read_manifest(folder, kind="base_model", verify=True).digest for folder in folders}) == 2
    tokenizer, plain = (AutoTokenizer.from_pretrained(folder) for folder in folders)
    own, published = (AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings() for folder in folders)
    assert own.num_embeddings == len(tokenizer) == len(plain) + len(CALL_TOKENS)
    assert torch.equal(own.weight[: len(plain)], published.weight)
    assert plain.chat_template == chat_template(CHATML)
    assert tokenizer.chat_template == chat_template(CHATML, WORD_START)
    for token in CALL_TOKENS:
        [new] = tokenizer.encode(token, add_special_tokens=False)
        parts = published.weight[plain.encode(token, add_special_tokens=False)].detach()
        assert len(parts) > 1
        added = own.weight[new].detach()
        assert torch.nn.functional.cosine_similarity(added, parts.mean(0), dim=0) > 0.999
        assert added.norm().item() == pytest.approx(parts.norm(dim=-1).mean().item(), rel=1e-5)


def test_a_model_without_added_tokens_is_compared_with_as_it_is(base_folder: Path) -> None:
    assert published_model(base_folder) == base_folder


@pytest.mark.parametrize(
    ("source", "message"),
    [("nobody/has-this-model", "base model nobody/has-this-model"), ("FOLDER", "holds no model")],
)
def test_a_missing_model_is_one_sentence(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TASKAGENT_HOME", str(tmp_path))
    (tmp_path / "empty").mkdir()
    source = str(tmp_path / "empty") if source == "FOLDER" else source
    settings = load_settings(profile="smoke", base_model={"source": source})
    with pytest.raises(PlatformError, match=message) as caught:
        prepare_base_model(settings, tmp_path / "base_model")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "base_model").exists()


@pytest.mark.parametrize(
    ("status", "code", "sentence"),
    [
        (403, "GatedRepo", "The base model some/model is gated: accept its licence on the hub and set HF_TOKEN."),
        (401, "RepoNotFound", "The hub knows no model some/model (or HF_TOKEN may not see it)"),
    ],
)
def test_a_model_that_the_hub_does_not_give_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, code: str, sentence: str
) -> None:
    async def refuse(request: Request) -> Response:
        return Response(status_code=status, headers={"X-Error-Code": code, "X-Error-Message": "not for you"})

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve(Starlette(routes=[Route("/{path:path}", refuse, methods=["GET", "HEAD"])])) as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        settings = load_settings(profile="smoke", base_model={"source": "some/model"})
        with pytest.raises(PlatformError, match=re.escape(sentence)) as caught:
            prepare_base_model(settings, tmp_path / "base_model")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "base_model").exists()


def test_weights_are_loaded_in_a_process_of_their_own(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from taskagent_platform.settings import load_settings\n"
        "from taskagent_platform.training.base_model import prepare_base_model\n"
        "prepare_base_model(load_settings(profile='smoke'), Path(sys.argv[1]))\n"
        "print('torch' in sys.modules)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "base_model")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "False\n", done.stderr


def test_a_local_folder_is_taken_as_it_is(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKAGENT_HOME", str(tmp_path))
    settings = load_settings(profile="smoke", base_model={"source": str(base_folder)})
    manifest = prepare_base_model(settings, tmp_path / "base_model")
    assert manifest.files["model.safetensors"] == read_manifest(base_folder).files["model.safetensors"]


def test_a_quantized_model_is_refused_before_its_weights_are_read(tmp_path: Path, smoke: Settings) -> None:
    source = tmp_path / "model-bnb-4bit"
    source.mkdir()
    config = {"model_type": "llama", "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (source / "config.json").write_text(json.dumps(config))
    settings = load_settings(profile="smoke", base_model={"source": str(source)})
    with pytest.raises(PlatformError, match=r"model-bnb-4bit is quantized, .*load_in_4bit quantizes that one"):
        prepare_base_model(settings, tmp_path / "base_model")


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: llama3.2\n---\n# A model\n", "llama3.2"),
        ("---\nlicense: other\nlicense_name: lamp-1.0\n---\n", "lamp-1.0"),
        ("# A card that names none\n", "see the base model's own card"),
        (None, "see the base model's own card"),
    ],
)
def test_the_licence_is_the_one_that_the_models_own_card_names(
    card: str | None, licence: str, base_folder: Path, tmp_path: Path
) -> None:
    source = tmp_path / "model"
    shutil.copytree(base_folder, source)
    if card is not None:
        (source / "README.md").write_text(card)
    settings = load_settings(profile="smoke", base_model={"source": str(source)})
    assert prepare_base_model(settings, tmp_path / "base_model").details["licence"] == licence


@pytest.mark.slow
def test_smollm2_speaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKAGENT_HOME", str(tmp_path))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prepare_base_model(load_settings(profile="cpu"), tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=16)
    assert "Paris" in tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
