"""A client of a server's: asks the API, and says in one line what came of it.

What a server has answered once is waited for when it goes away: it is restarted, say, and its
searches go on. Whatever changes something is sent under a key of its own, so that what was lost on
the way is sent again without being done twice. Knows nothing of how answers are shown.
"""

import ipaddress
import os
import re
import shlex
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar
from urllib.parse import quote
from uuid import uuid4

import httpx2
from pydantic import TypeAdapter, ValidationError

import evomerge
from evomerge.cli.options import SERVER
from evomerge.cli.places import plain
from evomerge.errors import EvomergeError, InputError
from evomerge.job import Job, packaged
from evomerge.job.files import TASK
from evomerge.messages import one_line
from evomerge.report.history import History
from evomerge.report.population import Member, Page
from evomerge.service.exports import Export, File
from evomerge.service.logs import LogPart
from evomerge.service.overview import Asked, Overviews, Standing
from evomerge.store.feed import Pulse

T = TypeVar("T")
P = TypeVar("P", Overviews, Page)

TOKEN = "EVOMERGE_TOKEN"

_LIMITS = httpx2.Timeout(10.0, read=60.0)  # seconds; streams are never silent for so long
_PATIENCE = 600.0  # seconds that a server may be away
_PAUSE = 1.0  # seconds before it is asked again
_AWAY = frozenset({502, 503, 504})  # of the server itself, and of a proxy before it
_PAGE = 200  # of a list at once
_LISTED = (  # of each search
    "name",
    "state",
    "generations",
    "candidates",
    "shrunk",
    "created_at",
    "hours",
    "stop_reason",
)
_RANKED = (  # of each candidate
    "id",
    "generation",
    "slot",
    "label",
    "state",
    "fitness",
    "n",
    "violation",
    "scores",
    "recipe_sha",
)
_SECRET = re.compile(r"[!-~]+")
# Proxies of the environment know nothing of what listens on this machine.
_DIRECT = dict.fromkeys(("all://localhost", "all://127.0.0.1", "all://[::1]"))


class Remote:
    """One server. Every method raises InputError where there is none, where it refuses what it is
    asked for, or whoever asks; EvomergeError where it fails."""

    def __init__(self, address: str, tell: Callable[[str], None]) -> None:
        """address: http(s)://HOST[:PORT][/PATH]; tell: hears that it is waited for, and
        where the token could be read on the way. Raises InputError for an address or a token that
        is none."""
        self.url = _checked(address)
        self._tell = tell
        self._token = os.environ.get(TOKEN, "").strip()
        if self._token and not _SECRET.fullmatch(self._token):
            raise InputError(f"{TOKEN}: it is no token: copy what `evomerge token create` printed")
        headers = {"User-Agent": f"evomerge/{evomerge.__version__}"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
            if not _is_safe(httpx2.URL(self.url)):
                tell(f"{TOKEN} is sent to {self.url} without TLS: it can be read on the way: https")
        # Redirections are not followed: a token is for one server.
        self._client = httpx2.Client(
            base_url=self.url, headers=headers, timeout=_LIMITS, mounts=_DIRECT
        )
        self._has_answered = False

    def __enter__(self) -> "Remote":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def submit(self, job: Job) -> Asked:
        """Put a search into the queue, its paths as they are here."""
        document = portable(job)
        try:
            return self._told(Asked, "POST", "/searches", {"job": document})
        except InputError as error:
            if any(path in str(error) for path in _paths(document)):
                raise InputError(f"{error} (paths are looked up where the server runs)") from None
            raise

    @property
    def option(self) -> str:
        """What commands need to come here; empty where the environment says so already."""
        given = os.environ.get(SERVER, "")
        return "" if given.rstrip("/") == self.url else f" --server {shlex.quote(self.url)}"

    def steer(self, name: str, what: Literal["pause", "stop"]) -> Standing:
        """See Place."""
        return self._told(Standing, "POST", f"{_search(name)}/{what}", {})

    def resume(self, name: str, overrides: Sequence[str]) -> Standing:
        """Have a search gone on with, see search.resume."""
        body = {"overrides": list(overrides)}
        return self._told(Standing, "POST", f"{_search(name)}/resume", body)

    def ls(self) -> list[dict[str, Any]]:
        """See Place; those in the queue included, the oldest first."""
        rows = [
            {key: getattr(one, key) for key in _LISTED}
            for page in self._pages(Overviews, "/searches", {})
            for one in page.items
        ]
        return rows[::-1]

    def top(self, name: str, count: int | None) -> list[dict[str, Any]]:
        """See Place."""
        members: list[Member] = []
        limit = {} if count is None else {"limit": str(min(count, _PAGE))}
        for page in self._pages(Page, f"{_search(name)}/candidates", limit):
            members += page.items
            if count is not None and len(members) >= count:
                break
        return [
            {key: getattr(one, key) for key in _RANKED}
            | {
                "objectives": None if one.objectives is None else list(one.objectives.values()),
                "gpu_seconds": one.seconds,
            }
            for one in members[:count]
        ]

    def standing(self, name: str) -> Standing:
        """See Place."""
        return self._told(Standing, "GET", _search(name))

    def show(self, name: str) -> dict[str, Any] | None:
        """See Place."""
        found: dict[str, Any] | None = self._asked("GET", _search(name)).get("summary")
        return found

    def history(self, name: str) -> History:
        """See Place."""
        return self._told(History, "GET", f"{_search(name)}/history")

    def log(self, name: str, after: int | None) -> tuple[list[str], int]:
        """What the processes say that work on a search, see Place."""
        path, query = f"{_search(name)}/log", {"offset": str(after or 0)}
        part = self._told(LogPart, "GET", path, query=query)
        return part.text.splitlines(), part.next

    def winner(self, name: str) -> int:
        """The id of a search's winner. Raises InputError before there is one."""
        found = self.show(name)
        if found is None or found["best_parent"] is None:
            raise InputError(
                f"search '{name}' is {self.standing(name).state} and has no winner yet: wait for "
                "it, or name a candidate with --candidate"
            )
        return int(found["best"]["candidate"])

    def recipe(self, name: str, candidate: int) -> str:
        """A candidate's, as YAML."""
        found = self._asked("GET", f"{_search(name)}/candidates/{candidate}")
        if (state := found["member"]["state"]) != "scored":
            raise InputError(f"candidate {candidate} is {state}: take another")
        return str(found["recipe"])

    def exports(self, name: str) -> list[Export]:
        """Of a search, and pushes, the latest first."""
        return self._told(list[Export], "GET", _exports(name))

    def export(self, name: str, id: int) -> Export:
        """How an export stands."""
        return self._told(Export, "GET", f"{_exports(name)}/{id}")

    def submit_export(self, name: str, candidate: int) -> Export:
        """Have a candidate exported, which opens its search's test split unless it was before."""
        return self._told(Export, "POST", _exports(name), {"candidate": candidate, "unseal": True})

    def files(self, name: str, id: int) -> list[File]:
        """What a finished export has written."""
        return self._told(list[File], "GET", f"{_exports(name)}/{id}/files")

    def fetch(self, name: str, id: int, file: File, sink: BinaryIO) -> Generator[int]:
        """Write a file of an export to an empty sink, and say whenever there are more bytes how
        many there are; what a connection breaks off is gone on with. Raises EvomergeError too for
        a file that is not as large as it was said to be, OSError of the sink."""
        path = f"/api/v1{_exports(name)}/{id}/files/{quote(file.name)}"
        since, reached, tag = None, 0, ""
        while True:
            headers = {"Accept-Encoding": "identity"}  # whose bytes can be counted
            if tag and reached:
                headers |= {"Range": f"bytes={reached}-", "If-Range": tag}
            try:
                with self._client.stream("GET", path, headers=headers) as response:
                    if self._is_served(response):
                        tag = response.headers.get("etag", "")
                        yield from self._copied(response, file, sink)
                        return
                    trouble = _message(response) or response.reason_phrase
            except httpx2.TransportError as error:
                trouble = self._away(error, since)
            except httpx2.HTTPError as error:
                raise EvomergeError(f"server {self.url}: {one_line(error)}") from None
            if sink.tell() > reached:  # a line that breaks now and then is no server that is away
                since = None
            reached = sink.tell()
            if reached == file.size:  # it broke off behind the last byte
                return
            since = self._wait(since, trouble)

    def _copied(self, response: httpx2.Response, file: File, sink: BinaryIO) -> Generator[int]:
        """The whole of a file, or the rest of it that a sink lacks. Raises EvomergeError."""
        if response.status_code != httpx2.codes.PARTIAL_CONTENT:
            sink.seek(0)
            sink.truncate()
        at = sink.tell()
        for chunk in response.iter_bytes():
            at += len(chunk)
            if at > file.size:  # nor is a disk filled with it
                break
            sink.write(chunk)
            yield at
        if at != file.size:
            raise EvomergeError(
                f"server {self.url}: its file '{plain(file.name)}' is not of the {file.size:,} "
                "bytes that it lists: export again"
            )

    def pulses(self, name: str) -> Generator[Pulse]:
        """See Place."""
        since = None
        while True:
            trouble = "it has closed the connection"
            try:
                with self._client.sse(f"/api/v1{_search(name)}/events") as events:
                    if self._is_served(events.response):
                        since = None
                        for event in events:
                            if event.event == "state":
                                yield self._read(Pulse, event.json())
                    else:
                        trouble = events.response.reason_phrase
            except httpx2.TransportError as error:
                trouble = self._away(error, since)
            since = self._wait(since, trouble)

    def _pages(self, kind: type[P], path: str, query: Mapping[str, str]) -> Iterator[P]:
        """A list, part by part."""
        cursor: dict[str, str] = {}
        while True:
            page = self._told(kind, "GET", path, query={"limit": str(_PAGE), **query, **cursor})
            yield page
            if page.next is None:
                return
            cursor = {"cursor": page.next}

    def _told(
        self,
        kind: type[T],
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        query: Mapping[str, str] | None = None,
    ) -> T:
        return self._read(kind, self._asked(method, path, body, query))

    def _asked(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        query: Mapping[str, str] | None = None,
    ) -> Any:
        """The document that a request is answered with."""
        headers = {"Idempotency-Key": uuid4().hex} if method == "POST" else {}
        since = None
        while True:
            try:
                response = self._client.request(
                    method, f"/api/v1{path}", json=body, params=query, headers=headers
                )
                if self._is_served(response):
                    return response.json()
                trouble = _message(response) or response.reason_phrase
            except httpx2.TransportError as error:
                trouble = self._away(error, since)
            except (httpx2.HTTPError, ValueError) as error:
                raise EvomergeError(f"server {self.url}: {one_line(error)}") from None
            since = self._wait(since, trouble)

    def _away(self, error: httpx2.TransportError, since: float | None) -> str:
        """Why there is no answer; since: when it was first missed. Raises InputError where nobody
        has ever listened."""
        reason = one_line(error) or "no answer in time"
        if isinstance(error, httpx2.UnsupportedProtocol | httpx2.ProxyError):
            raise InputError(f"server {self.url}: {reason}: correct --server") from None
        was_there = self._has_answered or since is not None
        if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout) and not was_there:
            raise InputError(
                f"no server answers at {self.url} ({reason}): start one there with: evomerge "
                "serve, or correct --server"
            ) from None
        return reason

    def _wait(self, since: float | None, trouble: str) -> float:
        """Before the next try; gives when the first one was. Raises EvomergeError in the end."""
        now = time.monotonic()
        if since is None:
            self._tell(f"server {self.url} is waited for: {trouble}")
            since = now
        elif now - since > _PATIENCE:
            raise EvomergeError(
                f"server {self.url} is away for {_PATIENCE / 60:.0f} minutes: {trouble}: nothing "
                "is lost there; try again later"
            )
        time.sleep(_PAUSE)
        return since

    def _is_served(self, response: httpx2.Response) -> bool:
        """Whether a response has what was asked for; not, of a server that is to be waited for.
        Raises for all others."""
        status = response.status_code
        if response.is_success:
            self._has_answered = True
            return True
        response.read()
        if status in _AWAY and self._has_answered:
            return False
        if response.is_redirect:
            there = plain(response.headers.get("location", "elsewhere"))
            raise InputError(f"server {self.url} redirects to {there}: give its own address")
        if (message := _message(response)) is None:
            raise InputError(
                f"{self.url} answers '{status} {response.reason_phrase}': no evomerge serves "
                "there: correct --server"
            )
        if status == 401 and not self._token:
            raise InputError(
                f"server {self.url} wants a token: set {TOKEN}; where it runs, one is made with: "
                "evomerge token create NAME"
            )
        if status in (401, 403) and self._token:
            message = f"{message} ({TOKEN})"
        kind = EvomergeError if status >= 500 else InputError
        raise kind(f"server {self.url}: {message}")

    def _read(self, kind: type[T], document: object) -> T:
        try:
            # As JSON has it: lists for tuples.
            return TypeAdapter(kind).validate_python(document)
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"]))
            raise EvomergeError(
                f"server {self.url}: its answer is not understood ({where}): it needs the version "
                f"of this evomerge, {evomerge.__version__}"
            ) from None


def portable(job: Job) -> dict[str, Any]:
    """A job for another process: complete, tasks that ship with evomerge by their names, without
    a store, of which a server has its own."""
    document = job.document()
    del document["store"]
    shipped = packaged("fitness").resolve()
    for entry in document["tasks"]:
        path = Path(entry["task"])
        if path.is_relative_to(shipped):
            name = path.relative_to(shipped)
            entry["task"] = str(name.parent if name.name == TASK else name)
    return document


def _paths(document: Mapping[str, Any]) -> Iterator[str]:
    """The paths of this machine in a job."""
    parents = [*document["parents"].values(), document.get("base") or {}]
    models = (half for parent in parents for half in (parent.get("model") or "").split("+"))
    for name in (*models, *(entry["task"] for entry in document["tasks"])):
        if os.path.isabs(name):
            yield name


def _search(name: str) -> str:
    return f"/searches/{quote(name, safe='')}"


def _exports(name: str) -> str:
    return f"{_search(name)}/exports"


def _message(response: httpx2.Response) -> str | None:
    """What a server says of a problem; None of what is no evomerge."""
    try:
        return plain(str(response.json()["error"]["message"]))
    except (ValueError, KeyError, TypeError):
        return None


def _is_safe(url: httpx2.URL) -> bool:
    """Whether nobody on the way reads what is sent there."""
    if url.scheme == "https" or url.host == "localhost":
        return True
    try:
        return ipaddress.ip_address(url.host).is_loopback
    except ValueError:
        return False


def _checked(address: str) -> str:
    """An address without the last slash. Raises InputError."""
    try:
        url = httpx2.URL(address)
    except httpx2.InvalidURL as error:
        raise InputError(f"--server '{address}': {one_line(error)}") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise InputError(f"--server '{address}': give its address, such as http://127.0.0.1:8765")
    if url.userinfo:
        raise InputError(f"--server: no name or password belongs into it: set {TOKEN} instead")
    return address.rstrip("/")
