"""The metrics of an evaluation: their names, what people call them, and the lists of cases that they rest on."""

from collections.abc import Mapping
from typing import Literal

from taskagent_platform.evaluation.suite import ListName

MetricName = Literal["tool_selection", "argument_extraction", "json_validity", "multi_tool", "abstention"]
METRIC_TITLES: Mapping[MetricName, str] = {
    "tool_selection": "Tool selection",
    "argument_extraction": "Argument extraction",
    "json_validity": "JSON validity",
    "multi_tool": "Multi-tool completion",
    "abstention": "Abstention",
}
METRIC_OF_LIST: Mapping[ListName, MetricName] = {
    "tool_selection": "tool_selection",
    "argument_extraction": "argument_extraction",
    "multi_tool_chains": "multi_tool",
    "abstention": "abstention",
}
