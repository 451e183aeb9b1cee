import os

from hypothesis import settings

# Compiling takes as long as it takes. On a build server a failure must be seen again by whoever
# looks for it, elsewhere new examples are worth more.
settings.register_profile("default", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("default")
