"""The embedded task: look facts up, compute with them, answer. See README.md beside this file."""
