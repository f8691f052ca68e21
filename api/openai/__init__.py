"""The OpenAI-shaped facade under `/v1`: the official client works with `base_url` and a key."""
