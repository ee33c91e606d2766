"""The errors that users meet: one line, the offending value, what is allowed."""


class QBertError(ValueError):
    """Bad input to qbert. The command line prints it as one line and exits with code 2."""


class CheckpointError(QBertError):
    """A checkpoint broke a rule. Nothing of it has reached a kernel.

    Attributes:
        tensor: name of the tensor (or of the file or configuration entry) that broke the rule.
        rule: what must hold.
        value: what was found.
    """

    def __init__(self, tensor: str, rule: str, value: object) -> None:
        self.tensor, self.rule, self.value = tensor, rule, value
        super().__init__(f"checkpoint: {tensor}: {rule}, got {value}")


class MissingDependency(QBertError):
    """An optional package or tool is needed here; the message says how to get it."""
