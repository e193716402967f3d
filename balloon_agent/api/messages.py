"""What is said on the control socket: the schema of requests and answers. Each is one line of JSON.

``balloonctl schema`` prints it as JSON Schema.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from .snapshot import Snapshot

LONGEST_WAIT = 3600.0
SMALLEST_CELL = 1 << 21
Seconds = Annotated[float, msgspec.Meta(ge=0, le=LONGEST_WAIT, description="how long to wait at most")]


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="op"):
    """One line from a client. What does not change anything any client may ask that may connect."""


class Status(Request, frozen=True, tag="status"):
    """The latest snapshot; with ``show``, as text for people or as indented JSON."""

    show: Literal["words", "json"] | None = None


class Wait(Request, frozen=True, tag="wait"):
    """The snapshot in which the balloon has come to rest."""

    timeout: Seconds


class Next(Request, frozen=True, tag="next"):
    """The first snapshot with a number above ``after``."""

    after: int
    timeout: Seconds


class Statistics(Request, frozen=True, tag="stats"):
    """What the guest's kernel counts, by the names that the specification has for it."""


class Map(Request, frozen=True, tag="map"):
    """How much of each piece of guest-physical memory is in the balloon: an error if that is in more than 65536 of them."""

    cell_bytes: Annotated[int, msgspec.Meta(ge=SMALLEST_CELL, multiple_of=SMALLEST_CELL, le=1 << 50)]


class Change(Request, frozen=True):
    """What root, and whoever root has allowed it, may ask."""


class Set(Change, frozen=True, tag="set"):
    """Stay at ``size`` bytes, whatever the host asks."""

    size: Annotated[int, msgspec.Meta(ge=0, multiple_of=4096, le=1 << 62)]


class Follow(Change, frozen=True, tag="follow"):
    """Follow the host's target again."""


class Hold(Change, frozen=True, tag="hold"):
    """Stay at the size of this moment, whatever the host asks."""


AnyRequest = Status | Wait | Next | Statistics | Map | Set | Follow | Hold


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line to a client: if ``ok``, what it asked for; else the error in words."""

    ok: bool
    text: str | None = None
    status: Snapshot | None = None
    stats: dict[str, int] | None = None
    map: dict[str, list[tuple[int, int]]] | None = None
    error: str | None = None


_decoder = msgspec.json.Decoder(AnyRequest)
_encoder = msgspec.json.Encoder()


def decode(line: bytes) -> AnyRequest:
    """A request. ValueError, in one line, for anything else."""
    request: AnyRequest = _decoder.decode(line)
    return request


def encode(answer: Answer) -> bytes:
    """One line, with its end."""
    return _encoder.encode(answer) + b"\n"


class MapWriter:
    """An encoded answer with a map, written cell by cell: as lists it would take ten times the memory."""

    def __init__(self) -> None:
        self._sources: dict[str, bytearray] = {}
        self.cells = 0

    def add(self, source: str, number: int, size: int) -> None:
        """The next cell of this source."""
        text = self._sources.setdefault(source, bytearray())
        text += b",[%d,%d]" % (number, size) if text else b"[%d,%d]" % (number, size)
        self.cells += 1

    def line(self) -> bytes:
        """One line, with its end: what ``encode`` makes of ``Answer(ok=True, map=…)``."""
        sources = (msgspec.json.encode(source) + b":[" + text + b"]" for source, text in self._sources.items())
        return b'{"ok":true,"map":{' + b",".join(sources) + b"}}\n"


def schema() -> dict[str, Any]:
    """JSON Schema of both."""
    (request, answer), components = msgspec.json.schema_components([AnyRequest, Answer], ref_template="#/$defs/{name}")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "balloon-agent control socket: one line of JSON each way",
        "properties": {"request": request, "answer": answer},
        "$defs": components,
    }
