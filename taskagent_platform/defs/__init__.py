"""The Dagster layer: assets, checks, resources, jobs and schedules around the stages, one module for each stage."""
