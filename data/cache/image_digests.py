"""What is known of image files, stored so that the next start need not open them: digests, sizes, properties.

The content of an image determines its cache entry, and reading 100,000 images for their digests takes minutes. So
digests and header are stored in SQLite by the place of the image, its path and the part of that file. They hold while
length, modification times and inode of the file are the same. This only saves reading: a file that looks changed is
read again, and if its content is the same, so is its entry. The listings of tar shards are stored in the same way.

The price: a change of content that keeps length, both times and inode is not noticed. The ctime is included because
programs can reset the mtime (`cp -p`, `touch -d`, `rsync -t`), but not the ctime. A file that was changed within the
last seconds is not stored, since it might change again within the resolution of the clock; git does the same with its
index.

One process writes, in short transactions, with a rollback journal: a WAL needs memory that processes share, and so does
not work between machines. A database that is locked, damaged or read-only never stops a run: it reads the images again
and logs that once.
"""

import json
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from data.memory import in_parts
from data.sources.images import KNOWN_FILES, BadPicture, Header, Picture

VERSION = 4  # of the database: with another one all images are read again
JSON_VERSION = 3  # of the .json file that earlier versions wrote, which is imported
GRAIN = 2.0  # seconds; the resolution of the times of some file systems
BATCH = 10_000  # rows that are written in one transaction
QUERY = 500  # rows that are read in one query: SQLite may be built for 999 parameters
PATIENCE = 60.0  # seconds to wait while another process writes
TABLES = (
    "CREATE TABLE pictures (place BLOB PRIMARY KEY, stamp TEXT, digests BLOB, width INTEGER, height INTEGER, "
    "mode TEXT, animated INTEGER, transparent INTEGER) WITHOUT ROWID",
    "CREATE TABLE listings (place BLOB PRIMARY KEY, stamp TEXT, content TEXT)",
)
COLUMNS = {  # by their names: without one of them, the database is replaced
    "pictures": "place, stamp, digests, width, height, mode, animated, transparent",
    "listings": "place, stamp, content",
}
INSERT_PICTURE = "INSERT OR REPLACE INTO pictures VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
log = logging.getLogger(__name__)


class ImageDigest(NamedTuple):
    """What determines the cache entries of an image."""

    content: str  # digest of the encoded file
    size: tuple[int, int]  # (width, height) in pixels
    pixels: str  # digest that copies share whose files differ only in metadata


class Digests:
    """Digests and headers of images, stored in the database `file` if there is one.

    An image is stored if its `open` has an attribute `place` that is not None: the path of its file, and the part of
    that file. All others are read at each start. A file of the same name with the extension .json, which earlier
    versions wrote, is imported, and deleted when the database is written.

    Args:
        writes: Write what is new; of several processes one should.
    """

    def __init__(self, file: Path | None = None, writes: bool = True) -> None:
        self._file, self._writes = file, writes
        self._is_unusable = False  # damaged or of another version: to be replaced
        self._pictures, self._listings = list[tuple[Any, ...]](), list[tuple[Any, ...]]()  # rows to write
        self._last = "", ""  # path and stamp of the file that was asked for last: a shard has many images
        self._database: sqlite3.Connection | None = None
        self._imported: sqlite3.Connection | None = None
        self._database = None if file is None else self._open(file)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Context manager in which sources that are opened take from here what is known of their files."""
        token = KNOWN_FILES.set(self)
        try:
            yield
        finally:
            KNOWN_FILES.reset(token)

    def recall(self, pictures: Iterable[Picture]) -> None:
        """Give pictures their headers and digests if these are known and their files have not changed since."""
        asked = [
            (picture, where[0], _place(*where, picture.alpha))
            for picture in pictures
            if picture.digests is None and (where := _where(picture)) is not None
        ]
        rows = self._find("pictures", [place for *_, place in asked])
        for picture, path, place in asked:
            row = rows.get(place)
            if row is None or row[1] != self._stamp(path) or not _is_valid(*row[2:5]):
                continue
            if row[5] is not None:
                picture.remember(_header(*row[3:]), row[2])
                continue
            with suppress(BadPicture):  # imported from an earlier version, which kept no headers
                picture.remember(picture.header, row[2])
                self._pictures.append((place, row[1], row[2], *_columns(picture.header)))

    def look(self, picture: Picture) -> ImageDigest:
        """Return digests of the encoded content and (width, height). Raise BadPicture if it cannot be read.

        What a picture was given once, by `recall` or from its file, it keeps.
        """
        if picture.digests is None:
            self.recall([picture])
        if picture.digests is None:
            self._read(picture)
        return ImageDigest(content_digest(picture), picture.size, pixel_digest(picture))

    def _read(self, picture: Picture) -> None:
        """Read an image, and store what is found if its file is old enough and does not change meanwhile."""
        where = _where(picture)
        before = "" if where is None else settled_stamp(where[0])
        content = picture.digest()
        digests = bytes.fromhex(content + picture.pixel_digest(content))
        picture.remember(picture.header, digests)
        if where is not None and before and self._writes and settled_stamp(where[0]) == before:
            self._pictures.append((_place(*where, picture.alpha), before, digests, *_columns(picture.header)))
            if len(self._pictures) >= BATCH:
                self.save()

    def listing(self, path: str, read: Callable[[], Any]) -> Any:
        """Return a JSON value that describes a file: the stored one, or if there is none the result of `read`."""
        place, stamp = _place(path, "", False), settled_stamp(path)
        found = self._find("listings", [place]).get(place)
        if found is not None and stamp and found[1] == stamp:
            with suppress(ValueError, TypeError):
                return json.loads(found[2])
        content = read()
        if self._writes and stamp and settled_stamp(path) == stamp:
            self._listings.append((place, stamp, json.dumps(content, separators=(",", ":"))))
        return content

    # ------------------------------------------------------------------ the database

    def save(self) -> None:
        """Write what is new. Where that is not possible, a warning says so, once."""
        if self._file is None or not self._writes or not (self._pictures or self._listings):
            return
        try:
            if self._is_unusable:
                self._file.unlink(missing_ok=True)
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with closing(_connect(self._file, "rwc")) as database:
                database.execute("BEGIN IMMEDIATE")
                if _version(database) != VERSION:
                    _create_tables(database)
                    if self._imported is not None:
                        database.executemany(INSERT_PICTURE, self._imported.execute("SELECT * FROM pictures"))
                database.executemany(INSERT_PICTURE, self._pictures)
                database.executemany("INSERT OR REPLACE INTO listings VALUES (?, ?, ?)", self._listings)
                database.execute("COMMIT")
            self._file.with_suffix(".json").unlink(missing_ok=True)
            self._is_unusable = False
        except (sqlite3.Error, OSError) as error:
            log.warning("%s cannot be written (%s): what is new in it is read again next time", self._file, error)
            self._writes = False
        self._pictures, self._listings = [], []

    def forget_others(self, pictures: Iterable[Picture]) -> None:
        """Delete what is known of all other images. Where that is not possible, a warning says so."""
        self.save()
        if self._file is None or not self._file.exists():
            return
        places = ((where, picture.alpha) for picture in pictures if (where := _where(picture)) is not None)
        used = ((_place(path, each, alpha),) for (path, part), alpha in places for each in {part, ""})
        try:
            with closing(_connect(self._file, "rw")) as database:
                database.execute("CREATE TEMP TABLE used (place BLOB PRIMARY KEY) WITHOUT ROWID")
                database.execute("BEGIN IMMEDIATE")
                database.executemany("INSERT OR IGNORE INTO used VALUES (?)", used)
                for table in ("pictures", "listings"):
                    database.execute(f"DELETE FROM {table} WHERE place NOT IN (SELECT place FROM used)")
                database.execute("COMMIT")
        except sqlite3.Error as error:
            log.warning(
                "%s cannot be written (%s): it keeps what is known of images that are not used", self._file, error
            )

    def close(self) -> None:
        """Close the database. What is asked for afterwards is read from the files."""
        if self._database is not None:
            self._database.close()
        self._database = self._imported = None

    def __del__(self) -> None:
        # a connection is in a reference cycle, and would keep its lock until it is collected; at the end of the process
        # nothing but its own methods is left, so no `release`
        if self._database is not None:
            self._database.close()

    def _open(self, file: Path) -> sqlite3.Connection | None:
        """Return the database to read from, in memory for a .json file; None if there is neither."""
        if not file.exists():
            self._imported = _import_json(file.with_suffix(".json"))
            return self._imported
        try:
            database = _connect(file, "rw")  # which also repairs what a killed process left, and reads where it may not
            if _version(database) == VERSION:
                return database
            self._is_unusable = True
            database.close()
        except sqlite3.Error as error:
            self._give_up(error)
        return None

    def _find(self, table: str, places: Sequence[bytes]) -> dict[bytes, tuple[Any, ...]]:
        """Return the rows of a table by their places, without those that are not known or cannot be read.

        One query finds many: each one locks the database, which takes longer than finding a row.
        """
        found: dict[bytes, tuple[Any, ...]] = {}
        if self._database is None:
            return found
        try:
            for part in in_parts(places, QUERY):
                query = f"SELECT {COLUMNS[table]} FROM {table} WHERE place IN ({', '.join('?' * len(part))})"
                found.update((row[0], row) for row in self._database.execute(query, part))
        except sqlite3.Error as error:
            self._give_up(error)
        return found

    def _give_up(self, error: sqlite3.Error) -> None:
        log.warning("%s cannot be read (%s): all images are read again", self._file, error)
        without_tables = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_ERROR
        # damaged, not locked: write another
        self._is_unusable |= without_tables or not isinstance(error, sqlite3.OperationalError)
        self._database = None

    def _stamp(self, path: str) -> str:
        if self._last[0] != path:
            self._last = path, stamp_of(path)[0]
        return self._last[1]


def content_digest(picture: Picture) -> str:
    """Return the digest of an image's encoded content, as it was when `Digests.look` found it."""
    assert picture.digests is not None
    return picture.digests[:32].hex()


def pixel_digest(picture: Picture) -> str:
    """Return, likewise, the digest that copies share whose files differ only in metadata."""
    assert picture.digests is not None
    return picture.digests[32:].hex()


def stamp_of(path: str) -> tuple[str, float]:
    """Return values that change with a file, and the time of its last change; nothing if it cannot be found."""
    try:
        status = os.stat(path)
    except OSError:
        return "", 0.0
    changes = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"
    return changes, max(status.st_mtime, status.st_ctime)


def settled_stamp(path: str) -> str:
    """Return the stamp of a file that a change from now on would alter; nothing for one that changed just now."""
    stamp, changed = stamp_of(path)
    return stamp if time.time() - changed > GRAIN else ""


@lru_cache(maxsize=64)
def _absolute(folder: str) -> str:
    return os.path.abspath(folder)


def _where(picture: Picture) -> tuple[str, str] | None:
    where: tuple[str, str] | None = getattr(picture.open, "place", None)
    return where


def _place(path: str, part: str, alpha: bool) -> bytes:
    """Return the key of an image. Images of one folder have neighboring keys, which makes finding them faster."""
    folder, _, name = path.rpartition("/")
    return os.fsencode(f"{_absolute(folder or '.')}/{name}\0{part}\0{'alpha' * alpha}")


def _columns(header: Header) -> tuple[int, int, str, int, int]:
    return *header.size, header.mode, int(header.animated), int(header.transparent)


@lru_cache(maxsize=4096)  # most images of a dataset share few headers, and so these objects
def _header(width: int, height: int, mode: str, animated: int, transparent: int) -> Header:
    return Header((width, height), mode, bool(animated), bool(transparent))


def _is_valid(digests: Any, width: Any, height: Any) -> bool:
    sides = isinstance(width, int) and isinstance(height, int) and width > 0 and height > 0
    return sides and isinstance(digests, bytes) and len(digests) == 64


def _connect(file: Path, mode: str) -> sqlite3.Connection:
    uri = f"{file.absolute().as_uri()}?mode={mode}"
    # any thread may run the garbage collector, which closes it
    return sqlite3.connect(uri, uri=True, timeout=PATIENCE, isolation_level=None, check_same_thread=False)


def _version(database: sqlite3.Connection) -> int:
    return int(database.execute("PRAGMA user_version").fetchone()[0])


def _create_tables(database: sqlite3.Connection) -> None:
    for name in ("pictures", "listings"):
        database.execute(f"DROP TABLE IF EXISTS {name}")
    for statement in TABLES:
        database.execute(statement)
    database.execute(f"PRAGMA user_version = {VERSION}")


def _import_json(file: Path) -> sqlite3.Connection | None:
    """Return what an earlier version stored, as a database in memory; None if there is nothing."""
    try:
        content = json.loads(file.read_bytes())
        known = content["pictures"] if content["version"] == JSON_VERSION else {}
        rows = []
        for name, entry in known.items():
            stamp, picture, pixels, width, height = entry
            path, part, alpha = json.loads(name)
            digests = bytes.fromhex(picture + pixels)
            rows.append((_place(path, part, alpha), stamp, digests, width, height, None, None, None))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s cannot be read (%s): all images are read again", file, error)
        return None
    database = sqlite3.connect(":memory:", isolation_level=None)
    _create_tables(database)
    database.executemany(INSERT_PICTURE, rows)
    return database
