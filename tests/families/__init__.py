"""Every family of models end to end, on tiny random folders that look as a user has them."""
