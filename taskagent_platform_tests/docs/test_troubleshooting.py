"""docs/troubleshooting.md names every message that the code raises, and none that it does not."""

import ast
import re
from functools import cache
from pathlib import Path

from taskagent_platform.settings import PROJECT_ROOT

PAGE = PROJECT_ROOT / "docs" / "troubleshooting.md"
SOURCES = (*sorted((PROJECT_ROOT / "taskagent_platform").rglob("*.py")), PROJECT_ROOT / "requirements" / "make_env.py")
ROOTS = {"PlatformError", "SetupError", "DeliveryError"}
GAP = "…"


def text_of(node: ast.expr) -> str:
    """Returns what a string expression says, with a gap for what is only known when it runs."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return GAP


def one_line(text: str) -> str:
    """Returns a text as a cell of a table can hold it."""
    return " ".join(text.replace("`", "").split())


def says_something(text: str) -> bool:
    """Whether a message has words of its own; one without hands on another's."""
    return re.search(r"[A-Za-z]{2}", text) is not None


@cache
def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text()) for path in SOURCES}


@cache
def raised() -> dict[str, str]:
    """Returns the messages of errors for users, by the place that makes them."""
    nodes = [(path, node) for path, tree in trees().items() for node in ast.walk(tree)]
    errors = set(ROOTS)
    classes = [node for _, node in nodes if isinstance(node, ast.ClassDef)]
    # A class may stand before the one it is derived from.
    for _ in range(3):
        errors |= {node.name for node in classes if any(ast.unparse(base) in errors for base in node.bases)}
    # A class that writes its message itself is found where it does.
    writers = {node.name for node in classes if node.name in errors and "super().__init__(" in ast.unparse(node)}
    written = [node for of_class in classes if of_class.name in writers for node in ast.walk(of_class)]
    found = {}
    for path, node in nodes:
        if isinstance(node, ast.Call) and node.args:
            name = ast.unparse(node.func)
            if name in errors - writers or (name == "super().__init__" and node in written):
                found[f"{path.relative_to(PROJECT_ROOT)}:{node.lineno}"] = text_of(node.args[0])
    return {place: one_line(text) for place, text in found.items() if says_something(text)}


@cache
def texts() -> tuple[str, ...]:
    """Returns every text of the sources: some messages are made elsewhere than where they are raised."""
    strings = [
        text_of(node)
        for tree in trees().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr | ast.BinOp)
        or (isinstance(node, ast.Constant) and isinstance(node.value, str))
    ]
    return tuple(map(one_line, strings))


@cache
def entries() -> tuple[str, ...]:
    rows = re.findall(r"^\| `([^`]+)` \| (.+) \|$", PAGE.read_text(), flags=re.MULTILINE)
    assert all(says_something(entry) or GAP in entry for entry, _ in rows)
    return tuple(entry for entry, _ in rows)


def is_of(message: str, entry: str) -> bool:
    pattern = ".*".join(re.escape(part) for part in entry.split(GAP))
    return re.fullmatch(pattern, message) is not None


def test_every_message_that_is_raised_has_its_cure():
    assert len(raised()) > 100
    missing = {place: text for place, text in raised().items() if not any(is_of(text, entry) for entry in entries())}
    assert missing == {}


def test_every_entry_is_of_a_message_that_there_is():
    stale = [
        entry
        for entry in entries()
        if not any(is_of(text, entry) for text in raised().values()) and not any(is_of(text, entry) for text in texts())
    ]
    assert stale == []
