"""What can go wrong, in words the user can act on, and the exit code it ends with."""


class SlagenError(Exception):
    """A failure with a message that says what was given, what works and what to type."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class UsageError(SlagenError):
    """A setting that cannot work, alone or with the others."""

    exit_code = 2


class EnvironmentProblem(SlagenError):
    """This machine lacks a device, a package or a driver, or does not reach the hub."""

    exit_code = 4


class WeightsError(SlagenError):
    """Weights, data sets or videos that are broken, or do not fit the model or the settings."""

    exit_code = 5


class GateError(SlagenError):
    """The work was done, and shows what should not be: a replay that differs, a kernel over a card's limit."""

    exit_code = 6
