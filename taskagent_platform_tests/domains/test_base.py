import json
from enum import Enum
from typing import Literal, Optional

import pytest
from pydantic import BaseModel, Field

from taskagent_platform.domains.base import Tool
from taskagent_platform.errors import PlatformError


class Level(Enum):
    LOW = "low"
    HIGH = "high"


class Place(BaseModel):
    """Where something stands."""

    room: str
    level: Level | None = None
    shelf: int = 1


class Arguments(BaseModel):
    title: str
    level: Level = Field(Level.LOW, description="how soon")
    other: Level | None = None
    place: Place | None = None
    places: list[Place] = []


class Folder(BaseModel):
    name: str
    inner: Optional["Folder"] = None


class Search(BaseModel):
    text: str
    within: Folder


def test_what_arguments_refer_to_stands_in_their_schema() -> None:
    level = {"enum": ["low", "high"], "type": "string"}
    place = {
        "type": "object",
        "properties": {"room": {"type": "string"}, "level": level, "shelf": {"type": "integer"}},
        "required": ["room"],
        "additionalProperties": False,
        "description": "Where something stands.",
    }
    schema = Tool("put", "Puts.", Arguments).parameters()
    assert schema == {
        "type": "object",
        "properties": {
            "title": {"type": "string"},
            "level": {**level, "description": "how soon"},
            "other": level,
            "place": place,
            "places": {"type": "array", "items": place},
        },
        "required": ["title"],
        "additionalProperties": False,
    }
    assert "$" not in json.dumps(schema)


def test_a_choice_between_models_names_none_of_them() -> None:
    class Cat(BaseModel):
        kind: Literal["cat"]

    class Dog(BaseModel):
        kind: Literal["dog"]

    class Adopt(BaseModel):
        pet: Cat | Dog = Field(discriminator="kind")

    pet = Tool("adopt", "Adopts.", Adopt).parameters()["properties"]["pet"]
    assert [option["properties"]["kind"]["const"] for option in pet["oneOf"]] == ["cat", "dog"]
    assert set(pet) == {"oneOf"}


@pytest.mark.parametrize(("arguments", "field"), [(Search, r"within\.inner"), (Folder, "inner")])
def test_an_argument_that_may_hold_itself_is_named(arguments: type[BaseModel], field: str) -> None:
    with pytest.raises(PlatformError, match=rf"The argument {field} of the tool find may hold itself \(Folder\)"):
        Tool("find", "Finds.", arguments).parameters()
