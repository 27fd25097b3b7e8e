"""Serving: the vLLM server, deployments and the gateway in front of them."""
