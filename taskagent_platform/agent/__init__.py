"""The agent: a served model, the domain's tools, approvals and an audit log, on the OpenAI Agents SDK."""
