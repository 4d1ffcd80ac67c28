"""What went wrong with S3, in words."""

from __future__ import annotations

from teefusion.errors import NotFoundError, StorageError
from teefusion.settings import StorageSettings

_CREDENTIALS = "TEEFUSION_S3_ACCESS_KEY_ID and TEEFUSION_S3_SECRET_ACCESS_KEY, or AWS's own variables"
_ADVICE = {
    "NoSuchBucket": "The bucket does not exist. Create it, or correct storage.uri",
    "AccessDenied": "Permission denied. These credentials need s3:GetObject, PutObject, DeleteObject and ListBucket",
    "InvalidAccessKeyId": f"The access key is unknown. Set {_CREDENTIALS}",
    "SignatureDoesNotMatch": f"The secret key is wrong. Set {_CREDENTIALS}",
    "ExpiredToken": f"The session token has expired. Renew it ({_CREDENTIALS})",
    "RequestTimeTooSkewed": "This machine's clock and the server's differ. Synchronise the clock (NTP)",
    "PermanentRedirect": "The bucket lies in another region. Set storage.region",
    "AuthorizationHeaderMalformed": "The bucket lies in another region. Set storage.region",
    "SlowDown": "The server asks for fewer requests. Run again later: what is published is kept",
}
_BY_STATUS = {403: "AccessDenied", 301: "PermanentRedirect", 503: "SlowDown"}
MISSING = frozenset({"NoSuchKey", "404", "NotFound"})


def s3_error(error: Exception, action: str, where: str, settings: StorageSettings) -> StorageError:
    """What went wrong, where, and what to do, of anything that boto3 raises."""
    from botocore.exceptions import (
        ClientError,
        ConnectionError,  # botocore's
        EndpointConnectionError,
        HTTPClientError,
        NoCredentialsError,
        PartialCredentialsError,
    )

    cause = error.__cause__ if isinstance(error.__cause__, ClientError) else error
    server = settings.endpoint_url or "AWS"
    if isinstance(cause, ClientError):
        code = str(cause.response["Error"].get("Code", ""))
        if code in MISSING:
            return NotFoundError(f"{where} is missing.")
        status = cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        advice = _ADVICE.get(code) or _ADVICE.get(_BY_STATUS.get(status, ""))
        message = str(cause.response["Error"].get("Message", "")).rstrip(".")
        text = advice or f"{server} answered {code or status}: {message}"
    elif isinstance(error, NoCredentialsError | PartialCredentialsError):
        text = f"There are no credentials. Set {_CREDENTIALS}"
    elif isinstance(error, EndpointConnectionError | ConnectionError | HTTPClientError | OSError):
        text = (
            f"{server} cannot be reached ({type(error).__name__}). Check storage.endpoint_url and the network, then "
            "run again: what is published is kept"
        )
    else:
        text = str(error).rstrip(".")
    return StorageError(f"Cannot {action} {where}: {text}.")
