"""One command that finds out whether a device does what the service needs: `make check-device`.

Each check is a sentence that holds or does not. A check runs in a process of its own, so that one
that crashes, hangs or breaks the device does not end the others. Needs no network: the models are
tiny, random and made on the spot.
"""
