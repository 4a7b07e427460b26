"""What went wrong with the Hub, in one line that says what to do."""

from collections.abc import Iterator

from huggingface_hub import constants, errors

_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def describe_hub_error(error: BaseException, repo_id: str, revision: str | None = None) -> str | None:
    """
    Say what a failed request to the Hub means and what to do about it.

    Args:
        error: what a client of the Hub raised; what it was raised from is looked at, too.
        repo_id (`str`): of the repository.
        revision (`str`, *optional*): that was asked for.

    Returns:
        One line; `None` if the error is not about the Hub.
    """
    chain = list(_causes(error))
    for cause in chain:
        match cause:
            case errors.HFValidationError():
                return f"{repo_id}: no such folder, and no id of a Hub repository (USER/NAME)."
            case errors.GatedRepoError():
                return f"{repo_id}: access has to be asked for at {constants.ENDPOINT}/{repo_id}."
            case errors.RepositoryNotFoundError():
                return f"{repo_id}: no such folder, and no such repository on the Hub. If it is private, {_LOG_IN}."
            case errors.RevisionNotFoundError():
                return f"{repo_id}: has no revision {revision!r}."
            case errors.RemoteEntryNotFoundError():
                return f"{repo_id}: has no file {_requested_file(cause)}; it may have been moved."
            case errors.HfHubHTTPError():
                return _describe_status(cause, repo_id)
    not_cached = any(isinstance(cause, _NOT_CACHED) for cause in chain)
    copy = ", and the cache has no copy" if not_cached else ""
    if any(isinstance(cause, errors.OfflineModeIsEnabled) for cause in chain) or (
        constants.HF_HUB_OFFLINE and not_cached
    ):
        return f"{repo_id}: the Hub is not asked while HF_HUB_OFFLINE is set{copy}."
    if not_cached or any(_is_about_network(cause) for cause in chain):
        return f"{repo_id}: the connection to {constants.ENDPOINT} failed{copy}: try again."
    return None


# What a busy or failing server answers, and not on account of what was asked.
_PASSING = (408, 429, 500, 502, 503, 504)
_NOT_CACHED = (errors.LocalEntryNotFoundError, errors.RevisionResolutionError)


def _describe_status(error: errors.HfHubHTTPError, repo_id: str) -> str:
    status = error.response.status_code
    if status == 401:
        return f"{repo_id}: the Hub asks for a valid token: {_LOG_IN}."
    if status == 403:
        return f"{repo_id}: the token has no right to do this: take one that has."
    if status == 412:
        return f"{repo_id}: somebody else pushed to it at the same time, and nothing of yours was: push again."
    said = " ".join((error.server_message or f"status {status}").split())
    passes = ": try again later." if status in _PASSING else ""
    return f"{repo_id}: the Hub at {constants.ENDPOINT} answered: {said.rstrip('.') if passes else said}{passes}"


def _requested_file(error: errors.HfHubHTTPError) -> str:
    return error.response.url.path.partition("/resolve/")[2].partition("/")[2] or "of this name"


def _is_about_network(error: BaseException) -> bool:
    # The client's HTTP library is its own affair, and its errors derive from no class of Python's.
    return isinstance(error, ConnectionError) or type(error).__module__.partition(".")[0] in ("httpx", "httpx2")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
