"""Requests and answers on the wire, one module a resource."""
