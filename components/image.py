"""The image every component runs in."""

import os

from teefusion import __version__

# The local runner wants "python" in the name, and warns otherwise.
RUNTIME_IMAGE = os.environ.get("TEEFUSION_IMAGE", f"teefusion/python-runtime:{__version__}")
