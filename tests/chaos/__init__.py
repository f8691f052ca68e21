"""The real service under faults at random, seeded moments: `python -m tests.chaos`."""
