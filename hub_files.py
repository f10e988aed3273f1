"""A model's files from the Hub: waited for with a limit, tried again a few times, and one line that says why where they cannot be had."""
from __future__ import annotations

import functools
import re
import sys
import time
from pathlib import Path

from huggingface_hub import constants, get_session, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from manifests import UserError

PATIENCE = constants.HF_HUB_ETAG_TIMEOUT  # seconds without an answer after which a request is given up; the library's variable, 10 unless set
PAUSES = (1.0, 4.0)  # seconds before the second and the third attempt
FINAL = (GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError)  # what no further attempt changes


def hub_snapshot(asked: str, name: str, revision: str | None, patterns: list[str], mend: str) -> Path:
    """The local folder with the files of a Hub repository that match `patterns`, downloaded where they are not there yet.

    A hub that does not answer is asked three times; with HF_HUB_OFFLINE set nothing is asked for. Raises UserError, which begins with `asked`, with
    the cause and `mend`.
    """
    limit_waiting()
    wanted, pauses = f"{name}@{revision}" if revision else name, [] if constants.is_offline_mode() else list(PAUSES)
    while True:
        try:
            return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, etag_timeout=PATIENCE))
        except Exception as error:  # the library's own, its HTTP library's and the system's: why() tells them apart
            if isinstance(error, FINAL) or not pauses:
                raise UserError(f"{asked}: {wanted}: {why(error, revision)}; {mend}") from error
            pause = pauses.pop(0)
            print(f"{wanted}: {why(error, revision)}; trying again in {pause:g} s", file=sys.stderr)
        time.sleep(pause)


@functools.cache
def limit_waiting() -> None:
    """Give every request of the Hub's client that has no limit one: the library would wait for ever for some answers."""
    def limit(request):
        request.extensions["timeout"] = {name: PATIENCE if seconds is None else seconds for name, seconds in request.extensions["timeout"].items()}
    get_session().event_hooks["request"].append(limit)


def why(error: Exception, revision: str | None) -> str:
    """The cause as a reader can mend it."""
    if constants.is_offline_mode():
        return "not on this machine, and HF_HUB_OFFLINE is set, so the Hub was not asked"
    if isinstance(error, RevisionNotFoundError):
        return f"the Hub has no revision {revision} of it"
    if isinstance(error, GatedRepoError):
        return "the Hub gives it only to those who accepted its terms, and HF_TOKEN must say who asks"
    if isinstance(error, (RepositoryNotFoundError, HFValidationError)):
        return "the Hub has no such model, or none that this HF_TOKEN, or none, may read"
    cause = error.__cause__ or error
    return f"the Hub cannot be reached or does not answer ({type(cause).__name__})"


def check_blob(path: Path, sha: str) -> None:
    """UserError where a file has another SHA-256 than the one that the Hub's cache names large files by."""
    blob = path.resolve()
    if re.fullmatch("[0-9a-f]{64}", blob.name) and sha != blob.name:
        raise UserError(f"{path}: cut short or changed (its SHA-256 is not the one that the Hub has); remove {blob}, and it is downloaded again")
