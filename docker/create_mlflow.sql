-- Run once, when the volume is new: MLflow keeps its tables apart from Dagster's.
CREATE DATABASE mlflow;
