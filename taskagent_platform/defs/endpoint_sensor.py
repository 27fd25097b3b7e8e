"""Watches a domain's endpoint every few minutes: health, canary requests, malformed calls, drift of the tool mix."""

import dagster as dg

from taskagent_platform.alerts import Alert, Severity, asset_link, outbox, what_serves
from taskagent_platform.defs.alert_sensor import status_at_first
from taskagent_platform.defs.keys import asset_key
from taskagent_platform.defs.vllm_endpoint import NAME as ENDPOINT
from taskagent_platform.domains.base import Domain
from taskagent_platform.settings import load_settings, settings


def endpoint_sensor(domain: Domain) -> dg.SensorDefinition:
    """Builds the sensor. What it finds is stored as an observation of the endpoint, whose page shows it over time."""
    key = asset_key(domain, ENDPOINT)

    @dg.sensor(
        name=f"{domain.name}__endpoint_watch",
        minimum_interval_seconds=settings().monitoring.interval_s,
        default_status=status_at_first(settings()),
        description="Asks the endpoint requests whose right tool is known, and looks at what agents called: alerts "
        "where it does not answer, calls wrong tools, makes malformed calls, or is used otherwise than it was taught.",
    )
    def watch() -> dg.SensorResult:
        # It brings an HTTP client with it, for which loading the definitions need not wait.
        from taskagent_platform.serving.watch import PROBLEM_KINDS, look, observed

        present = load_settings()
        found = look(present, domain)
        if found is None:
            return dg.SensorResult(skip_reason=f"Nothing of {domain.name} is deployed.")
        box, told = outbox(present), []
        problems = {problem.kind: problem for problem in found.problems}
        for kind in PROBLEM_KINDS:
            name = f"endpoint/{domain.name}/{kind}/{found.deployment.model_digest[:12]}"
            problem = problems.get(kind)
            if problem is None:
                # The next time is a new fault.
                box.over(name)
                continue
            facts = [
                ("What", problem.sentence),
                ("Model", found.deployment.model_digest),
                ("Serving", what_serves(present, domain.name) if kind != "down" else "Nothing answers."),
                ("Endpoint", asset_link(present, *key.path)),
            ]
            severity: Severity = "warning" if kind == "drift" else "failure"
            alert = Alert.now(name, f"{key.to_user_string()}: {_TITLES[kind]}", severity, facts)
            if box.put(alert):
                told.append(alert.title)
        said = " ".join(problem.sentence for problem in found.problems) or "The endpoint answers as it should."
        metadata = {name: value for name, value in observed(found).items() if value is not None}
        return dg.SensorResult(
            skip_reason=said + "".join(f" Alert: {title}." for title in told),
            asset_events=[dg.AssetObservation(asset_key=key, metadata=metadata)],
        )

    return watch


_TITLES = {
    "down": "the endpoint does not answer",
    "canary": "canary requests go wrong",
    "malformed": "too many malformed calls",
    "drift": "the use differs from the training",
}
