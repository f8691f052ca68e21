"""Requests and answers under `/v1`, in OpenAI's shapes."""
