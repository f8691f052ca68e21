"""What an operator may do to the database: one module for each noun of `python -m store`."""
