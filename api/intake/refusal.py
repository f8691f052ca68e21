"""What the judge of an upload says no with: a code of `api.errors` and words, and nothing heavy."""


class Refused(Exception):
    """The upload is not taken."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code, self.detail = code, detail
