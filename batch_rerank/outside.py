"""What comes from outside, where it meets people: places that no job may have, and texts as they are shown, without
secrets and without the characters that a terminal obeys."""

import re
from collections.abc import Iterator

PROTOCOLS = ("file", "local", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf")
"""Where files may be: disks, and stores of objects, most of which need a package of their own. None that asks any host
or opens what is inside another file."""

_PASSWORD = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://[^/@\s:]*:[^@]*@")
_USER = re.compile(r"//(?:[^/@\s:]*:[^\s'\"]*|[^/@\s]+)@")
_SIGNATURE = re.compile(r"(?i)\b((?:x-amz-[a-z-]+|x-goog-[a-z-]+|sig|signature|token|sas_token)=)[^&\s'\"]+")
_PROTOCOL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*(?=://)")
_CHAINED = re.compile(r"^[A-Za-z][A-Za-z0-9+.\-]*::.*://|::[A-Za-z][A-Za-z0-9+.\-]*://")

MOST_HIDDEN = 1000
"""Values of storage options that are looked at."""

WORDS = frozenset({"auto", "path", "virtual", "standard", "legacy", "adaptive", "true", "false", "s3v4"})
"""Values of storage options that are no secrets and words of ours."""

_hidden: set[str] = set()
_pattern: re.Pattern[str] | None = None


def problem_of(place: str) -> str:
    """Why no job may have a place: what is wrong with it and what was expected, without the place; empty if nothing."""
    if not place or "\0" in place:
        return f"found {place!r}; expected a path or a URL"
    if _PASSWORD.match(place):
        return (
            "found a URL with a password in it (not shown); expected one without: credentials come from the "
            "environment or from storage_options"
        )
    if _CHAINED.search(place):
        return f"found {place[:200]!r}, a chain of places; expected one place"
    protocol = protocol_of(place)
    if protocol not in PROTOCOLS:
        return f"found {place[:200]!r}; expected a local path, s3://, gs://, abfs:// or hf://"
    return ""


def protocol_of(place: str) -> str:
    """The protocol of a path or URL; "file" where there is none."""
    match = _PROTOCOL.match(place)
    return match[0] if match else "file"


def hide(options: object) -> None:
    """From now on no value of these storage options is shown by this process, wherever it stands in a message."""
    global _pattern  # of a process, as its log is: what is secret for one job is so for all
    found = {value for value in _leaves(options) if value.casefold() not in WORDS} - _hidden
    if found:
        _hidden.update(found)
        values = "|".join(re.escape(value) for value in sorted(_hidden, key=len, reverse=True))
        _pattern = re.compile(rf"(?<![0-9A-Za-z])(?:{values})(?![0-9A-Za-z])")


def _leaves(options: object) -> Iterator[str]:
    """The values of mappings and lists that are long enough to be told from other words."""
    waiting, seen = [options], 0
    while waiting and seen < MOST_HIDDEN:
        one = waiting.pop()
        seen += 1
        if isinstance(one, dict):
            waiting.extend(one.values())
        elif isinstance(one, list | tuple):
            waiting.extend(one[:MOST_HIDDEN])
        elif isinstance(one, str):
            yield from (part for part in (one, *one.splitlines()) if len(part) >= 3)
        elif isinstance(one, int) and not isinstance(one, bool) and 10**5 <= abs(one) < 10**100:
            yield str(one)


def without_users(text: str) -> str:
    """A text without the user and the password of any URL in it."""
    return _USER.sub("//***@", text)


def without_secrets(text: str) -> str:
    """A message without users and signatures of URLs, and without any value that is hidden."""
    text = _SIGNATURE.sub(r"\1***", without_users(text))
    return _pattern.sub("***", text) if _pattern else text


def shown(text: object) -> str:
    """A text on its way to a terminal: lines stay lines, and no other sign of it does more than to be seen."""
    return "".join(sign if sign.isprintable() or sign in "\n\t" else "�" for sign in str(text))


def shown_id(name: object) -> str:
    """An id, or another name from outside, in one line."""
    return "".join(sign if sign.isprintable() else "�" for sign in str(name))
