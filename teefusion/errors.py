"""Every error a user of TeEFusion can meet, in one tree.

    TeEFusionError              exit code 1: something failed; the message says what to do
    ├── UsageError              exit code 2: the request itself is wrong; nothing was spent
    │   ├── SettingsError       a setting is unknown, of the wrong type or out of range
    │   ├── PromptError         a prompt source cannot be read or holds no usable prompt
    │   ├── TeacherError        the teacher is unknown, unreadable or of no supported family
    │   ├── StudentError        a folder is not a student this version can load
    │   └── PreflightError      a run would not go well, as it is asked for
    ├── StorageError            reading or writing failed (disk full, permission, no answer)
    │   └── NotFoundError       there is no such file or object
    ├── IntegrityError          stored data is not what its manifest says; never used
    ├── ScorerError             a scorer could not be loaded, or an image could not be scored
    ├── TrainingError           training cannot go on (non-finite loss, bad checkpoint)
    │   └── InterruptedRunError exit code 75: told to stop, and ready to be started again
    ├── ClusterError            Kubernetes or Kubeflow Pipelines cannot be reached, or refuses
    ├── TrackingError           the MLflow server cannot be reached or refuses
    ├── RegistryError           a version is not there, not to be trusted, or was moved by somebody else meanwhile
    └── PipelineError           a stage of the pipeline failed; its own message is above

Messages have three parts: what was found, where, and what to do.
"""


class TeEFusionError(Exception):
    """Base of all errors raised on purpose; ``exit_code`` is what the command line returns."""

    exit_code = 1


class UsageError(TeEFusionError):
    """The user's mistake: retrying without a change cannot help."""

    exit_code = 2


class SettingsError(UsageError):
    """A setting is unknown, of the wrong type or out of range."""


class PromptError(UsageError):
    """A prompt source cannot be read, or holds no usable prompt."""


class TeacherError(UsageError):
    """The teacher is unknown, unreadable, or of no supported family."""


class StudentError(UsageError):
    """A folder is not a student that this version can load."""


class PreflightError(UsageError):
    """A run would not go well, as it is asked for; all reasons are in the message."""


class StorageError(TeEFusionError):
    """Reading or writing failed."""


class NotFoundError(StorageError):
    """There is no such file or object."""


class IntegrityError(TeEFusionError):
    """Stored data is not what its manifest says; it is never used."""


class ScorerError(TeEFusionError):
    """A scorer could not be loaded, or an image could not be scored."""


class TrainingError(TeEFusionError):
    """Training cannot go on."""


class InterruptedRunError(TrainingError):
    """A run was told to stop (SIGTERM) and left a checkpoint; the exit code is EX_TEMPFAIL of sysexits.h."""

    exit_code = 75


class ClusterError(TeEFusionError):
    """Kubernetes or Kubeflow Pipelines cannot be reached, or refuses."""


class TrackingError(TeEFusionError):
    """The MLflow server cannot be reached, or refuses."""


class RegistryError(TeEFusionError):
    """A version is not there, is not to be trusted, or somebody else moved an alias at the same time."""


class NoVersionError(RegistryError):
    """There is no such model, version or alias in the registry."""


class PipelineError(TeEFusionError):
    """A stage of the pipeline failed."""
