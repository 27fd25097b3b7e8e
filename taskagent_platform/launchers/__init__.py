"""Run launchers: where a run of Dagster is executed, and on which GPUs."""
