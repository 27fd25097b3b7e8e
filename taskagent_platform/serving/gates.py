"""The gates between a model and its deployment."""

from pydantic import BaseModel, ConfigDict


class GateResult(BaseModel):
    """One gate as it was judged.

    Attributes:
        name: the gate.
        value: what was measured: a rate, or milliseconds; None where it was not measured.
        target: what has to be exceeded (rates), or stayed under (milliseconds).
        n: cases or requests that it was measured on.
        interval: the Wilson 95 % interval of a rate; None for milliseconds.
        passed: whether the model may pass.
        reason: a sentence: by how much it passed or failed, or what is missing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    value: float | None
    target: float
    n: int
    interval: tuple[float, float] | None
    passed: bool
    reason: str
