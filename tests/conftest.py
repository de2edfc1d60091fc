"""``make test`` draws the same problems every time, so a red run is one's own doing; ``make check`` draws new ones."""

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True)
