"""The two ways in which a run can end badly. Everything else is a bug and shows a traceback."""


class UserError(ValueError):
    """Something the user can put right. Its text is one plain sentence that names the file, row or
    key and says what would be right. The CLI prints it and exits with status 2."""


class StageError(RuntimeError):
    """A stage failed although its input was fine. The CLI prints it and exits with status 1."""
