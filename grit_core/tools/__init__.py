"""Functions that an answer may call: their definitions, the form of calls, and their grammar."""
