"""TeEFusion: distil guided text-to-image teachers into students that need one forward a step.

Importing this package loads neither torch nor kfp; submodules import what they need.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from teefusion.student_pipelines import StudentPipeline

try:
    __version__ = version("teefusion")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"

__all__ = ["StudentPipeline", "__version__"]


def __getattr__(name: str) -> Any:
    """``StudentPipeline`` on first use, as it loads torch and diffusers."""
    if name == "StudentPipeline":
        from teefusion.student_pipelines import StudentPipeline

        return StudentPipeline
    raise AttributeError(f"module 'teefusion' has no attribute {name!r}")
