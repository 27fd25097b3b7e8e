"""Delivers the alerts that wait. A tick that fails shows which address does not take them, and why."""

import dagster as dg

from taskagent_platform.alerts import addresses, outbox
from taskagent_platform.errors import PlatformError
from taskagent_platform.settings import Settings, load_settings, settings

NAME = "alert_delivery"
_INTERVAL_S = 60


def alert_sensor() -> dg.SensorDefinition:
    """Builds the sensor."""

    @dg.sensor(
        name=NAME,
        minimum_interval_seconds=_INTERVAL_S,
        default_status=status_at_first(settings()),
        description="Sends alerts to the addresses of the settings. A failed tick names an address that does not take "
        "them; they are kept and sent again.",
    )
    def deliver() -> dg.SkipReason:
        present = load_settings()
        sent, waiting, faults = outbox(present).deliver()
        if faults:
            raise PlatformError(" ".join(faults))
        if not addresses(present.alerts):
            return dg.SkipReason("No address is set: give alerts.urls or alerts.urls_file.")
        return dg.SkipReason(f"{sent} messages sent, {waiting} alerts wait.")

    return deliver


def status_at_first(settings: Settings) -> dg.DefaultSensorStatus:
    """Returns whether sensors that alert are on before somebody switches them: where there is somebody to alert."""
    known = bool(settings.alerts.urls or settings.alerts.urls_file)
    return dg.DefaultSensorStatus.RUNNING if known else dg.DefaultSensorStatus.STOPPED
