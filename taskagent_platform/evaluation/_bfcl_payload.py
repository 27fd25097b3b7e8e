"""Reads and judges BFCL's cases with BFCL's own code: `python _bfcl_payload.py REQUEST.json ANSWER.json`.

Run by :mod:`taskagent_platform.evaluation.bfcl` with the Python of BFCL's own environment; imports nothing of this
package.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

MODEL = "openai-compatible"
CRASH = "checker_crashed"


def _without_clients() -> None:
    """Keeps out the modules that import every vendor's client and the parsers of texts that hold code.

    The checker asks the first of them one thing: whether a dot in a function's name was sent as an underscore, as
    OpenAI's format wants it. Calls arrive as JSON here, so that nothing is left to parse.
    """
    stand_ins: dict[str, dict[str, Any]] = {
        "bfcl_eval.constants.model_config": {"MODEL_CONFIG_MAPPING": {MODEL: SimpleNamespace(underscore_to_dot=True)}},
        "bfcl_eval.model_handler.parser.java_parser": {"parse_java_function_call": None},
        "bfcl_eval.model_handler.parser.js_parser": {"parse_javascript_function_call": None},
    }
    for name, content in stand_ins.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        sys.modules[name] = module


def cases(categories: Iterable[str]) -> list[dict[str, Any]]:
    """Returns the cases of categories: messages, tools in OpenAI's format as BFCL sends them, and what is right."""
    from bfcl_eval.constants.enums import ModelStyle
    from bfcl_eval.constants.type_mappings import GORILLA_TO_OPENAPI
    from bfcl_eval.model_handler.utils import convert_to_tool
    from bfcl_eval.utils import load_dataset_entry

    found = []
    for category in categories:
        answers = _right_answers(category)
        found += [
            {
                "id": entry["id"],
                "category": category,
                "messages": entry["question"][0],
                "tools": convert_to_tool(entry["function"], GORILLA_TO_OPENAPI, ModelStyle.OPENAI_COMPLETIONS),
                "right": answers.get(entry["id"], []),
            }
            for entry in load_dataset_entry(category)
        ]
    return found


def check(answers: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Judges answers as BFCL's runner does: decode the calls, then ask the checker of the category."""
    from bfcl_eval.utils import is_relevance_or_irrelevance, load_dataset_entry

    functions: dict[str, dict[str, Any]] = {}
    right: dict[str, dict[str, Any]] = {}
    verdicts = []
    for answer in answers:
        category = answer["category"]
        if category not in functions:
            entries = load_dataset_entry(category, include_language_specific_hint=False)
            functions[category] = {entry["id"]: entry["function"] for entry in entries}
            right[category] = _right_answers(category)
        if is_relevance_or_irrelevance(category):
            verdicts.append(_check_relevance(category, answer["calls"]))
        else:
            known = functions[category][answer["id"]], right[category][answer["id"]]
            verdicts.append(_check_calls(category, answer["calls"], *known))
    return verdicts


def _right_answers(category: str) -> dict[str, Any]:
    from bfcl_eval.utils import is_relevance_or_irrelevance, load_dataset_entry, load_ground_truth_entry

    if is_relevance_or_irrelevance(category):
        return {}
    # As in BFCL's runner, the two lists belong together by place: some ids differ.
    entries = load_dataset_entry(category, include_language_specific_hint=False)
    answers = load_ground_truth_entry(category)
    return {entry["id"]: answer["ground_truth"] for entry, answer in zip(entries, answers, strict=True)}


def _check_relevance(category: str, calls: list[tuple[str, str]]) -> dict[str, Any]:
    from bfcl_eval.utils import is_empty_output

    try:
        called = not is_empty_output(_decoded(calls))
    except (ValueError, RecursionError):
        called = False
    if called != ("irrelevance" in category):
        return {"valid": True, "error_type": None, "error": ""}
    wrong = "irrelevance_error:decoder_success" if called else "relevance_error:decoder_failed"
    return {"valid": False, "error_type": wrong, "error": "A function was called." if called else "None was called."}


def _check_calls(category: str, calls: list[tuple[str, str]], functions: Any, right: Any) -> dict[str, Any]:
    from bfcl_eval.constants.enums import Language
    from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker
    from bfcl_eval.utils import is_function_calling_format_output, is_java, is_js

    try:
        decoded = _decoded(calls)
    except (ValueError, RecursionError) as error:
        return {"valid": False, "error_type": "ast_decoder:decoder_failed", "error": str(error)}
    if not is_function_calling_format_output(decoded):
        return {"valid": False, "error_type": "ast_decoder:decoder_wrong_output_format", "error": "No calls."}
    language = Language.JAVA if is_java(category) else Language.JAVASCRIPT if is_js(category) else Language.PYTHON
    try:
        result = ast_checker(functions, decoded, right, language, category, MODEL)
    except Exception as error:  # of BFCL's code, on values of types that it does not expect; reported as what it is
        return {"valid": False, "error_type": CRASH, "error": f"{type(error).__name__}: {error}"}
    error_type = None if result["valid"] else result.get("error_type", "")
    return {
        "valid": result["valid"],
        "error_type": error_type,
        "error": "" if result["valid"] else str(result.get("error")),
    }


def _decoded(calls: list[tuple[str, str]]) -> list[dict[str, Any]]:
    return [{name: json.loads(arguments)} for name, arguments in calls]


if __name__ == "__main__":
    _without_clients()
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    found = cases(request["given"]) if request["command"] == "cases" else check(request["given"])
    Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")
