"""Where settings come from, URLs with credentials, words for faults, the page of all settings."""
