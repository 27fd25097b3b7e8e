"""Evaluation: suites, client, scoring, statistics and the report that gates a deployment."""
