"""Which storage an address means: `s3://bucket/prefix`, or a folder."""

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from dice_core.storage import layout
from dice_core.storage.contract import Storage, StorageError
from dice_core.storage.folder import FolderStorage

# What would else become a folder called `s3:`.
_SLIP = re.compile(r"(?i:s3[an]?|file|gs|hf|https?)(?::(?!//)|//)|\w+:/(?!/)")


def open_storage(uri: str) -> Storage:
    """Return the storage at `s3://bucket/prefix`, at a folder's path, or at `file:///folder`.

    Makes no network call and creates nothing.

    Raises:
        StorageError: not such a URI.
    """
    if _SLIP.match(uri):
        raise StorageError(
            f"{uri!r}: neither an address nor a plain folder: write s3://bucket/prefix, file:///folder, or ./ before "
            "the name of a folder"
        )
    scheme = urlsplit(uri).scheme if "://" in uri else ""
    if scheme == "s3":
        try:
            bucket, prefix = layout.check_s3(uri, "storage")
        except ValueError as error:
            raise StorageError(str(error)) from None
        # boto3 takes half a second to import: commands that touch no S3 do not wait for it.
        from dice_core.storage.s3 import S3Storage

        return S3Storage(bucket, prefix)
    if scheme == "file":
        return FolderStorage(Path(unquote(urlsplit(uri).path)))
    if scheme or not uri:
        raise StorageError(f"{uri!r}: unknown kind of storage; allowed: s3://bucket/prefix, or the path of a folder")
    return FolderStorage(Path(uri))
