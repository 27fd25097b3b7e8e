"""The Task API: tasks, projects, calendar and reminders over HTTP, on the state that the agent works on."""
