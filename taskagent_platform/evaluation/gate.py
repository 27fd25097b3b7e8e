"""One gate as it was judged; apart from the report, because those who only read it need no evaluation."""

from pydantic import BaseModel, ConfigDict


class GateResult(BaseModel):
    """One gate as it was judged.

    Attributes:
        name: a metric's name, or ``latency_p95_ms``.
        value: what was measured: a rate, or milliseconds; None if it was not measured.
        target: the rate must be greater, the latency less.
        n: cases, calls or requests that were counted.
        interval: the Wilson 95 % interval of a rate; None for milliseconds and for what was not measured.
        passed: whether it lets the model through.
        reason: why it does not, and by how much; empty if it does.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    value: float | None
    target: float
    n: int
    interval: tuple[float, float] | None
    passed: bool
    reason: str
