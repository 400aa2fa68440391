"""Property tests are not timed example by example: on a busy machine a single one can take seconds."""

from hypothesis import settings

settings.register_profile("law", deadline=None)
settings.load_profile("law")
