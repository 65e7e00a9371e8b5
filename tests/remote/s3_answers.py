"""What an S3 server says: answers and refusals, and XML."""

from __future__ import annotations

import http
from collections.abc import Iterable
from dataclasses import dataclass, field
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from .s3_request import Request

NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"

_MESSAGES = {
    "NoSuchKey": (404, "The specified key does not exist."),
    "NoSuchBucket": (404, "The specified bucket does not exist"),
    "NoSuchUpload": (404, "The specified upload does not exist."),
    "InvalidPart": (400, "One or more of the specified parts could not be found."),
    "InvalidPartOrder": (400, "The list of parts was not in ascending order."),
    "EntityTooSmall": (400, "Your proposed upload is smaller than the minimum allowed object size."),
    "InvalidArgument": (400, "Part number must be an integer between 1 and 10000, inclusive"),
    "MalformedXML": (400, "The XML you provided was not well-formed."),
    "BadDigest": (400, "The checksum that you specified did not match what we received."),
    "InvalidAccessKeyId": (403, "The AWS Access Key Id you provided does not exist in our records."),
    "PreconditionFailed": (412, "At least one of the pre-conditions you specified did not hold"),
    "InvalidRange": (416, "The requested range is not satisfiable"),
    "BucketAlreadyOwnedByYou": (409, "You already own this bucket."),
    "NotImplemented": (501, "This store has no such action."),
}


class Refusal(Exception):
    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


@dataclass
class Answer:
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: str = ""  #: XML
    pieces: Iterable[memoryview] | None = None  #: of an object, whose length is in the headers

    @property
    def reason(self) -> str:
        return http.HTTPStatus(self.status).phrase

    def headers_to_send(self) -> dict[str, str]:
        about = {"Content-Type": "application/xml"} if self.body else {}
        if self.status not in {204, 304}:
            about["Content-Length"] = str(len(self.body.encode()))
        return {**about, **self.headers}


def refused(code: str, request: Request) -> Answer:
    status, message = _MESSAGES[code]
    text = f"<Code>{code}</Code><Message>{message}</Message><Resource>{escape(request.path)}</Resource>"
    return Answer(status, body=f'<?xml version="1.0" encoding="UTF-8"?><Error>{text}</Error>')


def xml(name: str, inner: str) -> Answer:
    return Answer(body=f'<?xml version="1.0" encoding="UTF-8"?><{name} xmlns="{NAMESPACE}">{inner}</{name}>')


def parsed(body: memoryview) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(bytes(body))
    except ElementTree.ParseError:
        raise Refusal("MalformedXML") from None
