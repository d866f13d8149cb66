"""S3 (or a server that speaks it) as storage, through boto3; contract.py says what each method promises.

Endpoint, region and credentials come from the standard AWS variables and files. A server that is away for a while is
waited for (outages.py); where AWS_MAX_ATTEMPTS is set, boto3 makes that many tries instead. Faults become one line
each.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import boto3
from boto3.s3.transfer import TransferConfig, create_transfer_manager
from botocore import exceptions as boto_errors
from botocore.config import Config
from botocore.parsers import ResponseParserError
from s3transfer.exceptions import RetriesExceededError
from s3transfer.subscribers import BaseSubscriber
from s3transfer.utils import S3_RETRYABLE_DOWNLOAD_ERRORS

from dice_core.progress import Progress, Throttle, without_password
from dice_core.storage import layout
from dice_core.storage.contract import (
    ConflictError,
    MissingObjectError,
    NoAccessError,
    StorageError,
    StoredObject,
    check_key,
    check_prefix,
    local_error,
    manifests_first,
)
from dice_core.storage.disk_space import full_disk_is_named
from dice_core.storage.outages import Outages, StorePatience, waiting_ends_with_interrupt
from dice_core.storage.s3_answers import NotS3Error, refuse_other_answers
from dice_core.storage.waits import Waits

# urllib3 gives the sending of a part as long as the connecting: a busy server takes nothing for seconds.
_CONNECT_SECONDS = 15
# Each stream that breaks in the middle is asked for anew, and that request waits for its server.
_NUM_STREAMS = 10
# Several transfers of 10 threads each share one client.
_NUM_CONNECTIONS = 40
_MIB, _MB = 1024 * 1024, 10**6


class _Connection(NamedTuple):
    """A client, and what is known of its server."""

    client: Any
    outages: Outages
    waits: Waits


_clients: dict[tuple[Any, ...], _Connection] = {}
_clients_lock = threading.Lock()


class S3Storage:
    """A prefix of a bucket. See storage.Storage for what the methods do."""

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        part_bytes: int = 16 * _MIB,
        num_threads: int = 10,
        keys_per_request: int = 1000,
        patience: StorePatience | None = None,
    ) -> None:
        """Take the place; no network call.

        Args:
            bucket: its name.
            prefix: what all keys start with; a "/" is put between.
            part_bytes: larger files travel in parts of this size (grown for files over 10,000 parts).
            num_threads: parts in flight for one file.
            keys_per_request: listed or deleted; 1000 is the most that S3 takes.
            patience: with a server that is away; None: that of stages.
        """
        self._patience = patience or StorePatience()
        self._bucket, self._keys_per_request = bucket, keys_per_request
        self._prefix = prefix.strip("/") + "/" if prefix.strip("/") else ""
        self.uri = f"s3://{bucket}/{self._prefix}".rstrip("/")
        self._transfer = TransferConfig(
            multipart_threshold=part_bytes,
            multipart_chunksize=part_bytes,
            max_concurrency=num_threads,
            num_download_attempts=_NUM_STREAMS,
            # Not AWS's client in C, which boto3 may choose: it neither waits for a server that is away nor refuses an
            # answer that is not S3's (tests/benchmarks/README.md has what was measured).
            preferred_transfer_client="classic",
        )

    def list(self, prefix: str = "") -> list[StoredObject]:
        """See Storage."""
        wanted = self._prefix + check_prefix(self.uri, prefix)
        found = []
        with self._explained(prefix):
            pages = self._client.get_paginator("list_objects_v2")
            size = {"PageSize": self._keys_per_request}
            for page in pages.paginate(Bucket=self._bucket, Prefix=wanted, PaginationConfig=size):
                for item in page.get("Contents", ()):
                    # Consoles make an empty object for a folder; it is no file.
                    if not item["Key"].endswith("/"):
                        found.append(StoredObject(item["Key"].removeprefix(self._prefix), item["Size"]))
        return sorted(found, key=lambda item: item.key)

    def read_bytes(self, key: str) -> bytes:
        """See Storage."""
        return self._read(key)[0]

    def write_bytes(self, key: str, data: bytes) -> None:
        """See Storage."""
        with self._explained(key):
            self._client.put_object(Bucket=self._bucket, Key=self._key(key), Body=data)

    def read_versioned(self, key: str) -> tuple[bytes, str] | None:
        """See Storage. The version is the ETag."""
        try:
            return self._read(key)
        except MissingObjectError:
            return None

    def write_if_version(self, key: str, data: bytes, version: str | None) -> None:
        """See Storage."""
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
        with self._explained(key):
            try:
                self._client.put_object(Bucket=self._bucket, Key=self._key(key), Body=data, **condition)
            except boto_errors.ClientError as error:
                if not _is_conflict(error):
                    raise
                if _was_repeated(error) and self._holds(key, data):
                    # The first try had succeeded, and its answer was lost.
                    return
                raise ConflictError(
                    f"{self._name(key)}: changed by somebody else since it was read; read it again"
                ) from None

    def upload(self, path: Path, key: str) -> None:
        """See Storage. Parts go up in parallel; an interrupted upload leaves no object."""
        if not path.is_file():
            raise StorageError(f"{path}: no such file to upload to {self._name(key)}")
        with self._explained(key):
            try:
                self._upload(path, key)
            except boto_errors.ClientError as error:
                if error.response.get("Error", {}).get("Code") != "NoSuchUpload":
                    raise
                # It was completed and the answer lost, or the server that came back does not know it any more.
                self._upload(path, key)

    def download(self, key: str, path: Path) -> None:
        """See Storage. Ranges come down in parallel to a temporary name beside the path."""
        with self._explained(key):
            path.parent.mkdir(parents=True, exist_ok=True)
            transfers = create_transfer_manager(self._client, self._transfer)
            with full_disk_is_named(path.parent), transfers, waiting_ends_with_interrupt():
                told = [_ToldTransfer(f"download {self._name(key)}", self._patience.tell_after)]
                transfers.download(self._bucket, self._key(key), str(path), subscribers=told).result()

    def delete(self, prefix: str) -> int:
        """See Storage."""
        keys = manifests_first([found.key for found in self.list(prefix)])
        manifests = [key for key in keys if key.rpartition("/")[2] == layout.MANIFEST]
        # A request deletes in no promised order: the manifests get requests of their own.
        for group in (manifests, keys[len(manifests) :]):
            for start in range(0, len(group), self._keys_per_request):
                self._delete_batch(group[start : start + self._keys_per_request])
        return len(keys)

    def delete_unfinished(self, min_age_seconds: float) -> int:
        """See Storage. These are multipart uploads that were neither completed nor aborted."""
        newest, num_aborted = datetime.now(UTC) - timedelta(seconds=min_age_seconds), 0
        with self._explained(""):
            pages = self._client.get_paginator("list_multipart_uploads")
            for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix):
                for found in page.get("Uploads", ()):
                    if found["Initiated"] <= newest:
                        place = {"Bucket": self._bucket, "Key": found["Key"], "UploadId": found["UploadId"]}
                        self._client.abort_multipart_upload(**place)
                        num_aborted += 1
        return num_aborted

    def _delete_batch(self, keys: Sequence[str]) -> None:
        objects = [{"Key": self._key(key)} for key in keys]
        with self._explained(keys[0]):
            answer = self._client.delete_objects(Bucket=self._bucket, Delete={"Objects": objects, "Quiet": True})
        for failed in answer.get("Errors", ()):
            raise _refused(f"s3://{self._bucket}/{failed['Key']}", self._bucket, "DeleteObjects", failed)

    def _upload(self, path: Path, key: str) -> None:
        with create_transfer_manager(self._client, self._transfer) as transfers, waiting_ends_with_interrupt():
            told = [_ToldTransfer(f"upload {self._name(key)}", self._patience.tell_after)]
            transfers.upload(str(path), self._bucket, self._key(key), subscribers=told).result()

    def _read(self, key: str) -> tuple[bytes, str]:
        with self._explained(key):
            for num_broken in range(1, _NUM_STREAMS + 1):
                answer = self._client.get_object(Bucket=self._bucket, Key=self._key(key))
                try:
                    with self._connection.waits.awaiting(f"the rest of GET {self._name(key)}"):
                        return answer["Body"].read(), answer["ETag"]
                except S3_RETRYABLE_DOWNLOAD_ERRORS:
                    if num_broken == _NUM_STREAMS:
                        raise
        raise AssertionError("unreachable")

    def _holds(self, key: str, data: bytes) -> bool:
        found = self.read_versioned(key)
        return found is not None and found[0] == data

    @property
    def _connection(self) -> _Connection:
        return _connection(self._patience)

    @property
    def _client(self) -> Any:
        return self._connection.client

    def _key(self, key: str) -> str:
        return self._prefix + check_key(self.uri, key)

    def _name(self, key: str) -> str:
        return layout.join(self.uri, key) if key else self.uri

    @contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        """Turn boto3's errors into one line that says what to do."""
        try:
            yield
        except boto_errors.ClientError as error:
            raise self._explain_refusal(error, key) from None
        except (NotS3Error, ResponseParserError) as error:
            raise _speaks_no_s3(self._name(key), error) from None
        except (boto_errors.BotoCoreError, boto_errors.HTTPClientError) as error:
            raise self._unreachable(key, error) from None
        except RetriesExceededError as error:
            raise self._unreachable(key, error.last_exception) from None
        except OSError as error:
            raise local_error(error, self._name(key)) from None

    def _unreachable(self, key: str, error: Exception) -> StorageError:
        waited = self._connection.outages.seconds_waited_for
        if isinstance(error, boto_errors.ReadTimeoutError):
            return _unanswered(self._name(key), waited or self._patience.answer)
        return _unreachable(self._name(key), error, waited)

    def _explain_refusal(self, error: boto_errors.ClientError, key: str) -> StorageError:
        status = {"Status": error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", "")}
        details = {**error.response.get("Error", {}), **status}
        # The answer to a HEAD request has no body and so no reason; listing the bucket finds out whether it is the
        # key, the bucket or the credentials.
        if details.get("Code") in ("403", "404"):
            details = _failure_of(lambda: self._client.list_objects_v2(Bucket=self._bucket, MaxKeys=1)) or details
        return _refused(self._name(key), self._bucket, error.operation_name, details)


class _ToldTransfer(BaseSubscriber):  # type: ignore[misc]
    """Counts the megabytes of a file that is long under way."""

    def __init__(self, what: str, tell_after: float) -> None:
        self._progress = Progress(what, "MB", tells_end=False, throttle=Throttle(tell_after))
        self._lock, self._num_bytes = threading.Lock(), 0

    def on_progress(self, future: Any, bytes_transferred: int, **_: Any) -> None:
        """Take what a part has moved; negative where it begins anew."""
        with self._lock:
            self._num_bytes += bytes_transferred
            self._progress(self._num_bytes // _MB, (future.meta.size or 0) // _MB)


def _connection(patience: StorePatience) -> _Connection:
    """Return the client for the AWS variables as they are now; made once for each set of them and each process."""
    # Connections do not survive a fork, hence the process id.
    identity = (
        os.getpid(),
        patience,
        *sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")),
    )
    with _clients_lock:
        if identity not in _clients:
            _clients[identity] = _connect(patience)
        return _clients[identity]


def _connect(patience: StorePatience) -> _Connection:
    endpoint, outages = _endpoint(), Outages(_server(), patience)
    retries: dict[str, Any] = {"mode": "standard"}
    if "AWS_MAX_ATTEMPTS" not in os.environ:
        retries["total_max_attempts"] = 1
    config = Config(
        connect_timeout=_CONNECT_SECONDS,
        read_timeout=patience.answer,
        retries=retries,
        max_pool_connections=_NUM_CONNECTIONS,
        tcp_keepalive=True,
        # Readers compare SHA-256; with the server's checksums every download would begin with a HEAD request.
        response_checksum_validation="when_required",
        # Servers of one's own seldom have a DNS name for each bucket.
        s3={"addressing_style": "path"} if endpoint else None,
    )
    # boto3 itself reads AWS_DEFAULT_REGION only.
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or ("us-east-1" if endpoint else None)
    try:
        client = boto3.session.Session().client("s3", region_name=region, endpoint_url=endpoint, config=config)
    except ValueError as error:
        raise StorageError(f"AWS_ENDPOINT_URL: {error}; write it as http://host:port or https://host") from None
    if "AWS_MAX_ATTEMPTS" not in os.environ:
        outages.watch(client)
    # The order in which they see an answer: a wait is over before its answer is refused.
    (waits := Waits(_server(), patience.tell_after)).watch(client)
    refuse_other_answers(client)
    return _Connection(client, outages, waits)


def _endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def _server() -> str:
    return without_password(_endpoint() or "AWS")


def _is_conflict(error: boto_errors.ClientError) -> bool:
    # 412 lost the condition; 409 met another writer at work; 404 had no object to match (AWS; SeaweedFS says 412).
    code = error.response.get("Error", {}).get("Code")
    return code in ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey", "412")


def _was_repeated(error: boto_errors.ClientError) -> bool:
    return bool(error.response.get("ResponseMetadata", {}).get("RetryAttempts"))


def _failure_of(call: Callable[[], Any]) -> dict[str, str] | None:
    try:
        call()
    except boto_errors.ClientError as error:
        return dict(error.response.get("Error", {}))
    except (boto_errors.BotoCoreError, boto_errors.HTTPClientError):
        # It is away now: what it has answered before is what is known.
        return None
    return None


def _refused(where: str, bucket: str, operation: str, details: dict[str, Any]) -> StorageError:
    """Return one line for a request that the server answered with a refusal."""
    code, server = str(details.get("Code", "")), _server()
    if code in ("NoSuchKey", "404"):
        return MissingObjectError(f"{where}: no such object")
    causes = {
        "NoSuchBucket": f"bucket {bucket!r} does not exist at {server}: create it, or correct the URI",
        "InvalidAccessKeyId": f"{server} does not know this AWS_ACCESS_KEY_ID: correct it",
        "SignatureDoesNotMatch": f"AWS_SECRET_ACCESS_KEY does not fit AWS_ACCESS_KEY_ID at {server}: correct it",
        "ExpiredToken": "the credentials have expired: renew them (AWS_SESSION_TOKEN)",
        "RequestTimeTooSkewed": f"the clock of this machine and that of {server} differ too much: set it",
        "AuthorizationHeaderMalformed": f"wrong region for this bucket: set AWS_REGION ({_one_line(details)})",
        "PermanentRedirect": f"bucket {bucket!r} is in another region: set AWS_REGION",
    }
    if code in ("AccessDenied", "AllAccessDisabled", "403"):
        remedy = f"grant it for bucket {bucket!r}, or use others"
        return NoAccessError(f"{where}: {server} denies {operation} with these credentials: {remedy}")
    return StorageError(f"{where}: {causes.get(code) or _unexplained(server, operation, code, details)}")


def _unexplained(server: str, operation: str, code: str, details: dict[str, Any]) -> str:
    status = str(details.get("Status", ""))
    answer = " ".join(filter(None, [status, code if code != status else "", _one_line(details)]))
    remedy = ": its own log says why; try again when it is well" if status.startswith("5") else ""
    return f"{server} answers {operation} with {answer}{remedy}"


def _speaks_no_s3(where: str, error: Exception) -> StorageError:
    what = str(error) if isinstance(error, NotS3Error) else "its XML cannot be read"
    return StorageError(
        f"{where}: {_server()} answers, but not as S3 does: {what}: check AWS_ENDPOINT_URL (a web page, a console or a "
        "proxy is at another port or host than S3)"
    )


def _unanswered(where: str, seconds: float) -> StorageError:
    return StorageError(
        f"{where}: {_server()} takes connections and has answered nothing for {seconds:.0f} s: check AWS_ENDPOINT_URL, "
        "and the server"
    )


def _unreachable(where: str, error: Exception, seconds: float) -> StorageError:
    """Return one line for a request that got no answer for so many seconds, or could not be made."""
    server = _server()
    if isinstance(error, boto_errors.NoCredentialsError):
        return NoAccessError(f"{where}: no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if isinstance(error, boto_errors.PartialCredentialsError):
        return StorageError(f"{where}: incomplete credentials: {_one_line(error)}")
    if isinstance(error, boto_errors.SSLError):
        return StorageError(f"{where}: {server} shows a certificate that is not trusted: set AWS_CA_BUNDLE")
    if isinstance(error, boto_errors.ConnectionError | boto_errors.HTTPClientError):
        waited = f" for {seconds:.0f} s" if seconds else ""
        return StorageError(
            f"{where}: cannot reach {server}{waited}: check AWS_ENDPOINT_URL, the network, and the server"
        )
    return StorageError(f"{where}: {_one_line(error)}")


def _one_line(fault: Exception | dict[str, Any]) -> str:
    text = fault.get("Message", "") if isinstance(fault, dict) else str(fault)
    return " ".join(str(text).split())
