"""The error a user can mend: what went wrong, and how to put it right."""


class UserError(Exception):
    """One line saying what is wrong and where, one line saying how to mend it.

    The command line prints both and no traceback. Both parts are the exception's `args`, so that it survives pickling
    on its way back from a Ray worker.
    """

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what, fix)

    @property
    def what(self) -> str:
        """What is wrong, naming the value, file or place."""
        return str(self.args[0])

    @property
    def fix(self) -> str:
        """What to do about it."""
        return str(self.args[1])

    def __str__(self) -> str:
        return self.what


def user_error_in(error: BaseException) -> UserError | None:
    """The `UserError` behind `error`, however often Ray, a task or a retry wrapped it; None where there is none."""
    seen: set[int] = set()
    queue: list[BaseException | None] = [error]
    while queue:
        current = queue.pop(0)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, UserError):
            return current
        queue += [current.__cause__, current.__context__, getattr(current, "cause", None)]
        failures = getattr(current, "worker_failures", None)  # Ray Train: {rank: exception}
        if isinstance(failures, dict):
            queue += list(failures.values())
    return None
