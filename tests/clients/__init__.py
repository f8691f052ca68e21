"""Clients from PyPI and npm against the embedded service: `make clients`."""
