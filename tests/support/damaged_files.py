"""Damaged files: deterministic mutations of whole ones, of their bytes and of the values in them."""

import json
import random
import struct

EVIL = (  # JSON in place of any value
    "null", "true", '"x"', '""', "[]", "{}", "[[]]", "[4]", "[null]", '{"x": 1}', "-1", "0", "0.5", "1000000000",
    "1" + "0" * 30, "1e308", "-1e999", "NaN", "Infinity", "7" * 999, "7" * 5000, "[" * 100_000, "[" * 200 + "]" * 200,
    '{"a":' * 70 + "1" + "}" * 70, '"\\ud83d"', '"\\u0000"', '"\\u001b]52;c;aGk=\\u0007"', '"../../../x"',
    '"~nosuchuser/x"',    '"javascript:alert(1)"', '"/dev/zero"', '"' + "a" * 300 + '"', '"' + "a" * 100_000 + '"',
    "[" + "1," * 50_000 + "1]",    '{"a": 1, "a": 2}', "1", "+1", "'x'", "",
)  # fmt: skip
PIECES = (
    b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\x80", b"\xed\xa0\x80", b'"', b"'", b"{", b"[", b"}", b"]", b",", b":",
    b"\n", b"\r", b"\t", b" ", b"-", b"- ", b": ", b"&a ", b"*a", b"<<: *a", b"!!int ''",
    b"!!python/object/apply:os.system [ls]", b"? ", b"%", b"#", b"--", b" --seed ", b" --num-videos 1000000000 ",
    b"--size 99999x99999", b"\x1b[2J", b"9" * 5000,
)  # fmt: skip
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {k: 1}\n" + "".join(
    f"{new}: &{new} {{<<: [{', '.join([f'*{old}'] * 9)}]}}\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
WHOLE = (  # in place of a whole file
    b"", b"[]", b"{}", b"null", b"3", b'"x"', b"\x00" * 5000, b"[" * 200_000, b"- " * 100_000, b'{"a":' * 100_000,
    b"9" * 100_000, b"\xff" * 1000, BOMB.encode(), MERGES.encode(), b"a: &a [*a]", b"&a " * 50_000, b"<" * 5000,
    "ok".encode("utf-16"), b"\n" * 100_000, b'"' * 50_001, b"x" * 1_000_000, b"{" + b'"a":1,' * 100_000 + b'"b":1}',
)  # fmt: skip


def of_bytes(rng: random.Random, data: bytes, most: int = 100_000) -> bytes:
    """Some of a file's bytes flipped, cut off, left out, put in, doubled or encoded anew, within the first `most`."""
    head, tail = bytearray(data[:most]), data[most:]
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        place = rng.randrange(len(head) + 1)
        kind = rng.randrange(8)
        if kind == 0 and place < len(head):
            head[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            return bytes(head[:place])
        elif kind == 2:
            del head[place : place + rng.randrange(1, 40)]
        elif kind == 3:
            head[place:place] = rng.choice(PIECES) * rng.choice((1, 1, 3))
        elif kind == 4:
            head[place:place] = head[: rng.randrange(200)]
        elif kind == 5:
            head[place:place] = rng.randbytes(rng.randrange(1, 20))
        elif kind == 6:
            return rng.choice(WHOLE)
        else:
            text = bytes(head).decode(errors="replace")
            return text.encode(rng.choice(("utf-16", "utf-16-le", "utf-32", "latin-1", "utf-8-sig")), "replace")
    return bytes(head) + tail


def of_json(rng: random.Random, text: str) -> bytes:
    """Valid JSON with one to three of its values, keys or entries exchanged, doubled or taken away."""
    content = json.loads(text)
    evil: dict[str, str] = {}
    for number in range(rng.choice((1, 1, 1, 3))):
        places = list(_places(content))
        if not places:
            break
        container, key = rng.choice(places)
        mark = f"@evil{number}@"
        kind = rng.randrange(6)
        if kind == 0 and isinstance(container, dict):
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            container[f'{key}": 1, "{key}'] = 1  # a name that appears twice, once the quotes are taken as such
            evil[json.dumps(f'{key}": 1, "{key}')] = f'"{key}": 1, "{key}"'
        elif kind == 2 and isinstance(container, list):
            del container[key]
        else:
            container[key] = mark
            evil[json.dumps(mark)] = rng.choice(EVIL)
    text = json.dumps(content)
    for mark, raw in evil.items():
        text = text.replace(mark, raw)
    return text.encode()


def _places(content):
    """Every container in a value with each of its keys."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in list(items):
        yield content, key
        yield from _places(value)


def of_lines(rng: random.Random, text: str) -> bytes:
    """Lines of JSON, one of them damaged, and perhaps all of them shuffled."""
    lines = [line.encode() for line in text.splitlines()]
    place = rng.randrange(len(lines))
    lines[place] = of_json(rng, lines[place].decode())
    if rng.randrange(4) == 0:
        rng.shuffle(lines)
    return b"\n".join(lines) + b"\n"


def of_safetensors(rng: random.Random, data: bytes) -> bytes:
    """A file with something wrong in its header, whose length is put right, or in that length."""
    (length,) = struct.unpack("<Q", data[:8])
    header, tensors = data[8 : 8 + length].decode(), data[8 + length :]
    kind = rng.randrange(10)
    if kind == 0:
        length = rng.choice((0, 1, length - 1, length + 1, 2**31, 2**63 - 1, 2**64 - 1, 100 * 2**20))
        return struct.pack("<Q", length) + header.encode() + tensors
    if kind == 1:
        return of_bytes(rng, data, 8 + length)
    changed = of_json(rng, header)
    if kind == 2:
        tensors = tensors[: rng.randrange(len(tensors))]
    return struct.pack("<Q", len(changed)) + changed + tensors


def damaged(kind: str, data: bytes, seed: str) -> bytes:
    """One damaged file of a kind: "text", "yaml", "json", "lines", "safetensors" or "binary"."""
    rng = random.Random(seed)
    if kind == "safetensors":
        return of_safetensors(rng, data)
    if kind in ("json", "lines") and rng.randrange(3):
        return of_json(rng, data.decode()) if kind == "json" else of_lines(rng, data.decode())
    return of_bytes(rng, data)
