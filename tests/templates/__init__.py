"""Labels under chat templates that others published: `python -m tests.templates`."""
