"""The one entry of Dagster: the asset graphs of the domains that the settings name, and what the graphs share."""

import dagster as dg

from taskagent_platform.defs.alert_sensor import alert_sensor
from taskagent_platform.defs.check_sensor import check_sensor
from taskagent_platform.defs.domain import domain_definitions
from taskagent_platform.defs.platform import Platform
from taskagent_platform.defs.run_failure_sensor import run_failure_sensor
from taskagent_platform.defs.tracking import Tracking
from taskagent_platform.domains.registry import find_domain
from taskagent_platform.settings import settings

# Not every installed domain: "Materialize all" is to do what `make demo` does.
_names = dict.fromkeys((settings().domain, *settings().more_domains))

defs = dg.Definitions.merge(
    dg.Definitions(
        resources={"platform": Platform(), "tracking": Tracking(tracking_uri=settings().mlflow_uri)},
        # The heavy work is done by processes that the assets start. Steps in the run's own process share them: the
        # server that was evaluated belongs to the run until it is promoted, and the machine does one thing at a time.
        executor=dg.in_process_executor,
        sensors=[check_sensor(), run_failure_sensor(), alert_sensor()],
    ),
    *(domain_definitions(find_domain(name)) for name in _names),
)
