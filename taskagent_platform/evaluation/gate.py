"""One gate as it was judged; apart from the report, because those who only read it need no evaluation."""

from pydantic import BaseModel, ConfigDict

LATENCY_GATE = "latency_p95_ms"
CHAMPION_GATE = "no_worse_than_champion"


class GateResult(BaseModel):
    """One gate as it was judged.

    Attributes:
        name: a metric's name, ``latency_p95_ms`` or ``no_worse_than_champion``.
        value: what was measured: a rate, milliseconds, or a difference of rates; None if it was not measured.
        target: the rate must be greater, the latency less, the difference not less.
        n: cases, calls or requests that were counted.
        interval: the 95 % interval of a rate (Wilson) or of a difference; None for milliseconds and for what was not
            measured.
        passed: whether it lets the model through.
        reason: why it does not, and by how much; empty if it does.
        note: what a reader should know of a gate that passed; mostly empty.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    value: float | None
    target: float
    n: int
    interval: tuple[float, float] | None
    passed: bool
    reason: str
    note: str = ""
