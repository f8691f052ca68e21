"""Uploaded files become datasets: opened with suspicion, checked row by row, stored in one form."""
