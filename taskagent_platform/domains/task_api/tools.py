"""The eight tools of the Task API and their arguments."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from taskagent_platform.domains.base import Tool

Priority = Literal["low", "medium", "high"]
Status = Literal["open", "completed"]
# The patterns reach the server inside the tools' schemas, where they constrain what can be generated.
Date = Annotated[str, Field(pattern=r"^\d{4}-[01]\d-[0-3]\d$")]
Minute = Annotated[str, Field(pattern=r"^\d{4}-[01]\d-[0-3]\dT[0-2]\d:[0-5]\d$")]


class _Arguments(BaseModel):
    model_config = ConfigDict(extra="forbid")


class CreateTask(_Arguments):
    title: str
    priority: Priority | None = None
    due_date: Date | None = None
    tags: list[str] | None = None
    project_id: str | None = None


class ListTasks(_Arguments):
    status: Status | None = None
    priority: Priority | None = None
    due_before: Date | None = None
    tags: list[str] | None = None
    project_id: str | None = None


class UpdateTask(_Arguments):
    task_id: str
    title: str | None = None
    priority: Priority | None = None
    due_date: Date | None = None
    tags: list[str] | None = None


class CompleteTask(_Arguments):
    task_id: str


class DeleteTask(_Arguments):
    task_id: str


class CreateProject(_Arguments):
    name: str
    description: str | None = None


class GetCalendar(_Arguments):
    start_date: Date
    end_date: Date | None = None


class CreateReminder(_Arguments):
    task_id: str
    remind_at: Minute


TOOLS = (
    Tool("create_task", "add a task", CreateTask),
    Tool("list_tasks", "show tasks; due_before includes that day", ListTasks),
    Tool("update_task", "change a task", UpdateTask),
    Tool("complete_task", "mark a task done", CompleteTask),
    Tool("delete_task", "remove a task for good", DeleteTask, destructive=True),
    Tool("create_project", "start a project, returns project_id", CreateProject),
    Tool("get_calendar", "show events and meetings", GetCalendar),
    Tool("create_reminder", "remind the user of a task", CreateReminder),
)
