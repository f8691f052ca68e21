"""The whole service on one machine: broker, migrations, API, workers, watched by one supervisor.

`control` is what the command line calls; `supervisor` is the process that stays.
"""
