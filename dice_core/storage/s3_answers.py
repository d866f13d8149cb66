"""Answers that no S3 server gives: of a web page, a console or a proxy at the address that was taken for S3's.

botocore takes them for empty listings, missing objects and successful writes. outages.py knows which faults pass.
"""

from http.client import MULTIPLE_CHOICES, responses
from typing import Any

from dice_core.progress import without_password

# 501 says that the server will never do it.
PASSING_STATUS = {429, 500, 502, 503, 504}
# By this name before botocore's own handler, which makes a 500 of a 200 that is no XML.
BEFORE_PARSE = "before-parse.*"
_WITH_ETAG = {"GetObject", "HeadObject", "PutObject", "UploadPart"}
# What the XML of an answer is called. A deletion is asked for after a listing, and may be answered by nothing.
_ROOTS = {
    "ListObjectsV2": b"ListBucketResult",
    "ListMultipartUploads": b"ListMultipartUploadsResult",
    "CreateMultipartUpload": b"InitiateMultipartUploadResult",
    "CompleteMultipartUpload": b"CompleteMultipartUploadResult",
}
_REFUSAL = b"<Error"
# Of S3's own the answer is XML or says the bucket's region. Others come from a proxy that wants https, or a login.
_REDIRECTS, _REGION = {301, 302, 303, 307, 308}, "x-amz-bucket-region"


class NotS3Error(Exception):
    """A server's answer is none of S3's. The message says what it is instead."""


def refuse_other_answers(client: Any) -> None:
    """Have a client raise NotS3Error from now on where a server speaks no S3."""
    client.meta.events.register(BEFORE_PARSE, _check, unique_id="dice-answers")


def _check(*, operation_model: Any, response_dict: Any, **_: Any) -> None:
    status, headers, operation = response_dict["status_code"], response_dict["headers"], operation_model.name
    body = response_dict["body"]
    if not is_of_s3(operation, status, headers, body if isinstance(body, bytes) else b""):
        phrase = responses.get(status, "")
        kind = headers.get("Content-Type", "").partition(";")[0] or "of no content type"
        goal = headers.get("Location", "")
        elsewhere = f", which leads to {without_password(goal)}" if goal else ""
        raise NotS3Error(f"{status} {phrase}".rstrip() + f", {kind}, to {operation}{elsewhere}")


def is_of_s3(operation: str, status: int, headers: Any, body: bytes) -> bool:
    """Return whether an S3 server may have answered so. A gateway before it may answer what passes as it likes.

    Args:
        operation: S3's name of the request.
        status: of HTTP.
        headers: of the answer, found in any case.
        body: empty where it is a stream.
    """
    if status in PASSING_STATUS:
        return True
    if status < MULTIPLE_CHOICES:
        if operation in _WITH_ETAG:
            return "ETag" in headers
        return _REFUSAL in body or _ROOTS.get(operation, b"") in body
    if status in _REDIRECTS and _REGION not in headers and _REFUSAL not in body:
        # botocore would ask the same again and again, for the bucket's region.
        return False
    # The refusal of a HEAD request has no body, and some servers send none with others.
    return _REFUSAL in body or (not body and "html" not in headers.get("Content-Type", ""))
