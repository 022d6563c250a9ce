"""A decoder of payloads, written from docs/payload_format.md and with nothing but Python's standard library.

It is slow and it is the second opinion on what a payload says: it shares no code with the package. ``decode(data, reference,
schema)`` returns plain dictionaries and lists. Floats come as the bits of their dtype (integers), so that nothing is lost on
the way.
"""

import hashlib
import math
import struct
import zlib

DTYPES = ["float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"]
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8, "int64": 8, "int32": 4, "int16": 2, "int8": 1}
DENSE, KNOWN, CHANGES, GAPS, PACKED_BITMAP, BITMAP = range(6)
RAW, PLANES, BFLOAT16, FLOAT16, INT8, INT4 = range(6)


class RefusedError(Exception):
    pass


def must(condition, what):
    if not condition:
        raise RefusedError(what)


class Bytes:
    def __init__(self, data):
        self.data, self.at = bytes(data), 0

    def left(self):
        return len(self.data) - self.at

    def take(self, count):
        must(count <= self.left(), "ran out of bytes")
        self.at += count
        return self.data[self.at - count : self.at]

    def byte(self):
        return self.take(1)[0]

    def rest(self):
        return self.take(self.left())

    def varint(self):
        number = 0
        for shift in range(0, 63, 7):
            byte = self.byte()
            number |= (byte & 127) << shift
            if byte < 128:
                return number
        raise RefusedError("varint too long")

    def text(self, count):
        try:
            return self.take(count).decode("utf-8")
        except UnicodeDecodeError:
            raise RefusedError("not UTF-8") from None

    def string(self):
        return self.text(self.varint())

    def identity(self):
        length = self.varint()
        return self.text(length - 1) if length else None


def inflate(packed, most):
    expander = zlib.decompressobj(-15)
    try:
        plain = expander.decompress(packed, most + 1)
    except zlib.error:
        raise RefusedError("not deflated") from None
    must(len(plain) <= most, "expands too far")
    must(expander.eof and not expander.unused_data, "stream does not end with its section")
    return plain


def bits_of(data, count):
    must(len(data) == (count + 7) // 8, "wrong number of bits")
    bits = [byte >> 7 - i & 1 for byte in data for i in range(8)]
    must(not any(bits[count:]), "bits beyond the end")
    return bits[:count]


def gaps(data, count, universe):
    if count == 0:
        must(not data, "bytes without gaps")
        return []
    reader = Bytes(data)
    first = reader.byte()
    shift, unary = first & 127, first >> 7
    must(universe >> shift, "shift too large")
    planes = [bits_of(reader.take((count + 7) // 8), count) for _ in range(shift)]
    section, high, run = reader.rest(), [], 0
    if unary:
        last = -1
        for i in range(8 * len(section)):
            if section[i // 8] >> 7 - i % 8 & 1:
                high.append(run)
                last, run = i // 8, 0
            else:
                run += 1
        must(len(high) == count and last == len(section) - 1, "wrong number of gaps")
    else:
        for byte in inflate(section, count + (universe >> shift) // 255):
            run += byte
            if byte < 255:
                high.append(run)
                run = 0
        must(len(high) == count and run == 0, "wrong number of gaps")
    must(sum(high) <= universe >> shift, "reaches too far")
    members, before = [], -1
    for i, rest in enumerate(high):
        gap = rest << shift | sum(plane[i] << bit for bit, plane in enumerate(planes))
        before += gap + 1
        members.append(before)
    must(before < universe, "reaches too far")
    return members


def golomb(reader, count, divisor, universe):
    """Gaps between ascending numbers, bit by bit."""
    data = reader.data[reader.at :]
    at = 0

    def bit():
        nonlocal at
        must(at // 8 < len(data), "ran out of bits")
        at += 1
        return data[(at - 1) // 8] >> 7 - (at - 1) % 8 & 1

    width = (divisor - 1).bit_length()
    short = 2**width - divisor
    rests = [0] * count
    for place in range(width - 1):
        for i in range(count):
            rests[i] |= bit() << place
    if width:
        rests = [rest if rest < short else (rest << 1 | bit()) - short for rest in rests]
    total, found = 0, []
    for rest in rests:
        quotient = 0
        while not bit():
            quotient += 1
        total += quotient
        found.append(quotient * divisor + rest)
    must(total <= universe // divisor, "reaches too far")
    while at % 8:
        must(not bit(), "bits beyond the end")
    reader.take(at // 8)
    return found


def delimited_gaps(reader, count, universe):
    if count == 0:
        return []
    divisor = reader.varint()
    must(divisor <= universe, "divisor too large")
    if not divisor:
        return gaps(reader.take(reader.varint()), count, universe)
    members, before = [], -1
    for gap in golomb(reader, count, divisor, universe):
        before += gap + 1
        members.append(before)
    must(before < universe, "reaches too far")
    return members


def delimited_mask(coding, reader, size, count, held):
    if coding == GAPS:
        sparse = 2 * count <= size
        members = set(delimited_gaps(reader, count if sparse else size - count, size))
        return [int((i in members) == sparse) for i in range(size)]
    if coding == CHANGES:
        before = [i for i, bit in enumerate(held) if bit]
        dropped_count = reader.varint()
        must(dropped_count <= len(before), "drops too many")
        dropped = delimited_gaps(reader, dropped_count, len(before))
        added_count = count - (len(before) - dropped_count)
        must(0 <= added_count <= size - len(before), "adds too many")
        added = delimited_gaps(reader, added_count, size)
        return changed(held, before, dropped, added)
    length = reader.varint() if coding == PACKED_BITMAP else (size + 7) // 8
    return mask_of(coding, reader.take(length), size, count, held)


def changed(held, before, dropped, added):
    must(not any(held[i] for i in added), "adds what is there")
    bits = list(held)
    for rank in dropped:
        bits[before[rank]] = 0
    for i in added:
        bits[i] = 1
    return bits


def mask_of(coding, data, size, count, held):
    if coding == GAPS:
        sparse = 2 * count <= size
        members = set(gaps(data, count if sparse else size - count, size))
        bits = [int((i in members) == sparse) for i in range(size)]
    elif coding == CHANGES:
        before = [i for i, bit in enumerate(held) if bit]
        reader = Bytes(data)
        dropped_count = reader.varint()
        must(dropped_count <= len(before), "drops too many")
        dropped = gaps(reader.take(reader.varint()), dropped_count, len(before))
        added_count = count - (len(before) - dropped_count)
        must(0 <= added_count <= size - len(before), "adds too many")
        added = gaps(reader.rest(), added_count, size)
        bits = changed(held, before, dropped, added)
    else:
        bits = bits_of(inflate(data, (size + 7) // 8) if coding == PACKED_BITMAP else data, size)
    must(sum(bits) == count, "keeps another number")
    return bits


def little(data, width):
    return [int.from_bytes(data[i : i + width], "little") for i in range(0, len(data), width)]


def exact_bits(coding, data, count, dtype):
    """Elements as unsigned integers of their bits."""
    width = SIZES.get(dtype, 1)
    if coding == RAW:
        must(len(data) == count * width, "wrong number of value bytes")
        words = little(data, width)
        must(dtype != "bool" or all(word < 2 for word in words), "not a bool")
        return words
    must(dtype in ("float32", "float16", "bfloat16"), "no planes for this dtype")
    noise = (width - 1) * count
    must(len(data) >= noise, "mantissas missing")
    top = inflate(data[noise:], count)
    must(len(top) == count, "exponents missing")
    return joined(data[:noise], top, count, width)


def joined(noise, top, count, width):
    low = little(noise[: 2 * count], 2) if width == 4 else list(noise[:count])
    middle = list(noise[2 * count :]) if width == 4 else [0] * count
    words = []
    for i in range(count):
        word = low[i] | middle[i] << 16 | top[i] << 8 * (width - 1)
        words.append((word >> 1 | word << 8 * width - 1) & (1 << 8 * width) - 1)
    return words


def to_float(word, dtype):
    if dtype == "bfloat16":
        return struct.unpack("<f", struct.pack("<I", word << 16))[0]
    return struct.unpack(
        {"float16": "<e", "float32": "<f", "float64": "<d"}[dtype], word.to_bytes(SIZES[dtype], "little")
    )[0]


def to_bits(number, dtype):
    """The bits of a number that is a float32, rounded to the nearest, ties to even."""
    if dtype == "bfloat16":
        word = struct.unpack("<I", struct.pack("<f", number))[0]
        return word + 0x7FFF + (word >> 16 & 1) >> 16
    try:
        return int.from_bytes(struct.pack({"float16": "<e", "float32": "<f", "float64": "<d"}[dtype], number), "little")
    except OverflowError:
        raise RefusedError("not finite") from None


def scaled_integers(data, bits, count):
    reader = Bytes(data)
    block = reader.varint() or max(count, 1)
    scales = scales_of(reader, count, block)
    packed = reader.byte()
    must(packed < 2, "unknown packing")
    codes = reader.rest()
    if packed:
        codes = inflate(codes, count)
        must(len(codes) == count, "wrong number of codes")
    elif bits == 8:
        must(len(codes) == count, "wrong number of codes")
    else:
        must(len(codes) == (count + 1) // 2, "wrong number of codes")
        must(count % 2 == 0 or codes[-1] & 15 == 0, "half a byte too much")
        halves = [half for byte in codes for half in (byte >> 4, byte & 15)][:count]
        codes = bytes(half | 0xF0 if half > 7 else half for half in halves)
    return scaled(codes, scales, block, bits)


def scales_of(reader, count, block):
    scales = [to_float(word, "float32") for word in little(reader.take(4 * -(-count // block)), 4)]
    must(all(math.isfinite(scale) and scale >= 0 for scale in scales), "bad scale")
    return scales


def scaled(codes, scales, block, bits):
    numbers = [code - 256 if code > 127 else code for code in codes]
    must(all(abs(number) <= (127 if bits == 8 else 7) for number in numbers), "code out of range")
    values = []
    for i, number in enumerate(numbers):
        product = number * scales[i // block]
        try:
            values.append(struct.unpack("<f", struct.pack("<f", product))[0])
        except OverflowError:
            raise RefusedError("not finite") from None
    return values


def values_of(coding, data, count, dtype, infinities):
    if coding in (RAW, PLANES):
        words = exact_bits(coding, data, count, dtype)
    else:
        must("float" in dtype, "rounded integers")
        if coding in (BFLOAT16, FLOAT16):
            must(dtype in ("float32", "float64"), "rounded to no use")
            reader = Bytes(data)
            inner = reader.byte()
            must(inner in (RAW, PLANES), "rounded twice")
            short = "bfloat16" if coding == BFLOAT16 else "float16"
            numbers = [to_float(word, short) for word in exact_bits(inner, reader.rest(), count, short)]
        else:
            numbers = scaled_integers(data, 8 if coding == INT8 else 4, count)
        words = [to_bits(number, dtype) for number in numbers]
    return checked(words, dtype, infinities)


def checked(words, dtype, infinities):
    if "float" in dtype:
        for word in words:
            number = to_float(word, dtype)
            must(math.isfinite(number) or (infinities and math.isinf(number)), "not finite")
    return words


def mask_set_id(names, shapes, masks):
    digest = hashlib.blake2b(digest_size=16)
    for name in names:
        if masks[name] is None:
            digest.update(f"{name}:dense:".encode())
        else:
            bits = masks[name] + [0] * (-len(masks[name]) % 8)
            packed = bytes(
                sum(bit << 7 - i for i, bit in enumerate(bits[at : at + 8])) for at in range(0, len(bits), 8)
            )
            digest.update(f"{name}:{tuple(shapes[name])}:".encode() + packed)
    return digest.hexdigest()


def schema_fingerprint(schema):
    """What version 2 names a schema by: {"parameters": [[name, dtype, shape], ...], "buffers": [...]}."""

    def varint(number):
        return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)

    text = b""
    for part in ("parameters", "buffers"):
        text += varint(len(schema[part]))
        for name, dtype, shape in schema[part]:
            text += varint(len(name.encode())) + name.encode() + bytes([DTYPES.index(dtype)])
            text += varint(len(shape)) + b"".join(varint(size) for size in shape)
    return hashlib.blake2b(text, digest_size=4).digest()


def id_fingerprint(identity):
    return hashlib.blake2b(identity.encode(), digest_size=4).digest()


def fields(reader, widths):
    data = reader.take((sum(widths) + 7) // 8)
    bits = bits_of(data, sum(widths))
    numbers = []
    for width in widths:
        numbers.append(int("0" + "".join(map(str, bits[:width])), 2))
        bits = bits[width:]
    return numbers


def decode_by_schema(body, reference, schema):
    flags = body.varint()
    must(flags < 2**11, "unknown flags")
    delta, leans, held, travels, buffers, notes = (flags >> i & 1 for i in range(6))
    absent, rounding = flags >> 6 & 3, flags >> 8
    must(absent < 3 and rounding < 5, "unknown code")
    must(not held or (leans and not travels), "held by nobody")
    examples = body.varint()
    must(schema is not None and schema_fingerprint(schema) == body.take(4), "another model")
    if leans:
        must(reference is not None and id_fingerprint(reference["id"]) == body.take(4), "leans on other masks")
    travelling = body.take(4) if travels else None
    mask_id, metrics = 0, {}
    if notes:
        mask_id = body.varint()
        must(mask_id != 1 or leans, "id of nothing")
        if mask_id >= 3:
            mask_id = body.text(mask_id - 3)
        for _ in range(body.varint()):
            code = body.varint()
            must(code < 2, "unknown metric")
            name = "train_loss" if code else body.string()
            must(name not in metrics, "metric twice")
            metrics[name] = struct.unpack("<d", body.take(8))[0]
    block = body.varint() if rounding > 2 else 0

    parameters = schema["parameters"]
    masks_held = reference["masks"] if leans else {}
    if held:
        must([name for name, _, _ in parameters] == list(masks_held), "other parameters")
        codings = [DENSE if mask is None else KNOWN for mask in masks_held.values()]
        positions = Bytes(b"")
    else:
        positions = Bytes(body.take(body.varint()))
        codings = fields(positions, [3] * len(parameters))
        must(all(coding < 6 for coding in codings), "unknown code")
    for (name, _, shape), coding in zip(parameters, codings, strict=True):
        if coding in (KNOWN, CHANGES):
            must(masks_held.get(name) is not None, "no such mask")
            must(list(reference["shapes"][name]) == list(shape), "other shape")
    counted = [
        math.prod(shape)
        for (_, _, shape), coding in zip(parameters, codings, strict=True)
        if coding not in (DENSE, KNOWN)
    ]
    counts = fields(positions, [size.bit_length() for size in counted])
    must(all(count <= size for count, size in zip(counts, counted, strict=True)), "keeps more than there are")
    masks = {}
    for (name, _, shape), coding in zip(parameters, codings, strict=True):
        if coding in (DENSE, KNOWN):
            masks[name] = None if coding == DENSE else masks_held[name]
        else:
            size = math.prod(shape)
            masks[name] = delimited_mask(coding, positions, size, counts.pop(0), masks_held.get(name))
    must(not positions.left(), "positions go on")

    wanted = [(name, dtype, shape, masks[name], rounding, False) for name, dtype, shape in parameters]
    if buffers:
        wanted += [(name, dtype, shape, None, 0, True) for name, dtype, shape in schema["buffers"]]
    found, together = [], 0
    for _, dtype, shape, mask, lossy, _ in wanted:
        count = math.prod(shape) if mask is None else sum(mask)
        bits = (0, 16, 16, 8, 4)[lossy] if "float" in dtype else 0
        travelling_dtype = dtype
        if bits and bits < 8 * SIZES[dtype]:
            travelling_dtype = (None, "bfloat16", "float16", "int8 scaled", "int4 scaled")[lossy]
        if "scaled" in travelling_dtype:
            found.append((count, travelling_dtype, scales_of(body, count, block or max(count, 1)), True))
        elif travelling_dtype in ("float32", "float16", "bfloat16"):
            found.append((count, travelling_dtype, body.take(count * (SIZES[travelling_dtype] - 1)), True))
        else:
            data = body.take(count * SIZES.get(dtype, 1))
            found.append((count, dtype, exact_bits(RAW, data, count, dtype), False))
        together += count * found[-1][3]
    stream = body.rest()
    tops = Bytes(inflate(stream, together) if together else stream)
    must(tops.left() == together, "exponents missing")
    words = {}
    for (name, dtype, _, _, _, infinities), (count, travelling_dtype, part, has_tops) in zip(
        wanted, found, strict=True
    ):
        top = tops.take(count) if has_tops else b""
        if "scaled" in travelling_dtype:
            numbers = scaled(top, part, block or max(count, 1), 8 if travelling_dtype == "int8 scaled" else 4)
            part = [to_bits(number, dtype) for number in numbers]
        elif has_tops:
            part = joined(part, top, count, SIZES[travelling_dtype])
            if travelling_dtype != dtype:
                part = [to_bits(to_float(word, travelling_dtype), dtype) for word in part]
        words[name] = checked(part, dtype, infinities)

    shapes = {name: list(shape) for name, _, shape in parameters}
    own = mask_set_id(list(masks), shapes, masks)
    must(travelling is None or travelling == id_fingerprint(own), "other masks than declared")
    return {
        "kind": ("weights", "delta")[delta],
        "absent": ("unchanged", "zero", "unheld")[absent],
        "num_examples": examples,
        "mask_id": {0: None, 1: reference["id"] if leans else None, 2: own}.get(mask_id, mask_id),
        "metrics": metrics,
        "parameters": {
            name: {"dtype": dtype, "shape": list(shape), "mask": mask, "bits": words[name]}
            for name, dtype, shape, mask, _, infinities in wanted
            if not infinities
        },
        "buffers": {
            name: {"dtype": dtype, "shape": list(shape), "bits": words[name]}
            for name, dtype, shape, _, _, infinities in wanted
            if infinities
        },
        "masks id": own,
    }


def decode(data, reference=None, schema=None):
    """Read a payload.

    Args:
        data: Its bytes.
        reference: What the receiver holds: a dictionary of "id", "shapes" and "masks" (name -> list of bits, or None).
        schema: The receiver's model: lists of [name, dtype, shape] under "parameters" and "buffers".
    """
    must(len(data) >= 9, "too short")
    must(data[:4] == b"\x89FSP" and data[4] in (1, 2), "not a payload")
    must(zlib.crc32(data[:-4]) == struct.unpack("<I", data[-4:])[0], "wrong checksum")
    body = Bytes(data[5:-4])
    if data[4] == 2:
        return decode_by_schema(body, reference, schema)
    packed, size = struct.unpack("<II", body.take(8))
    must(size <= 2**22, "header too long")
    header = inflate(body.take(packed), size)
    must(len(header) == size, "header of another length")
    head = Bytes(header)
    kind, absent = head.byte(), head.byte()
    must(kind < 2 and absent < 3, "unknown kind")
    examples = head.varint()
    mask_id, travelling, leant_on = head.identity(), head.identity(), head.identity()
    named = head.byte()
    must(named < 2 and (named or leant_on is not None), "names missing")
    metrics = {}
    for _ in range(head.varint()):
        name = head.string()
        must(name not in metrics, "metric twice")
        metrics[name] = struct.unpack("<d", head.take(8))[0]
    if leant_on is not None:
        must(reference is not None, "nothing held")

    names, records = set(), ([], [])
    for part in (0, 1):
        for _ in range(head.varint()):
            record = {}
            if named or part:
                record["name"] = head.string()
                must(record["name"] not in names, "name twice")
                names.add(record["name"])
            dtype, record["positions"], record["values"] = head.byte(), head.byte(), head.byte()
            must(dtype < 10 and record["positions"] < 6 and record["values"] < 6, "unknown code")
            record["dtype"] = DTYPES[dtype]
            must(not part or record["positions"] == DENSE, "buffer with positions")
            must(record["positions"] not in (KNOWN, CHANGES) or leant_on is not None, "leans on nothing")
            if record["positions"] != KNOWN:
                dimensions = head.varint()
                must(dimensions <= 32, "too many dimensions")
                record["shape"] = [head.varint() for _ in range(dimensions)]
                must(math.prod(max(1, n) for n in record["shape"]) < 2**31, "too large")
                record["count"] = math.prod(record["shape"])
            record["position bytes"] = 0
            if record["positions"] not in (KNOWN, DENSE):
                count = head.varint()
                must(count <= record["count"], "keeps more than there are")
                record["count"], record["position bytes"] = count, head.varint()
            record["value bytes"] = head.varint()
            records[part].append(record)
    must(not head.left(), "header goes on")
    sections = sum(record["position bytes"] + record["value bytes"] for part in records for record in part)
    must(sections == body.left(), "sections of another length")

    if leant_on is not None:
        must(reference["id"] == leant_on, "leans on other masks")
        if not named:
            must(len(reference["masks"]) == len(records[0]), "other parameters")
            for record, name in zip(records[0], reference["masks"], strict=True):
                record["name"] = name
                must(name not in names, "name twice")
    update = {
        "kind": ("weights", "delta")[kind],
        "absent": ("zero", "unchanged", "unheld")[absent],
        "num_examples": examples,
        "mask_id": mask_id,
        "metrics": metrics,
        "parameters": {},
        "buffers": {},
    }
    for record in records[0]:
        section, name, mask = body.take(record["position bytes"]), record["name"], None
        if record["positions"] != DENSE:
            held = reference["masks"].get(name) if record["positions"] in (KNOWN, CHANGES) else None
            if record["positions"] in (KNOWN, CHANGES):
                must(held is not None, "no such mask")
            if record["positions"] == KNOWN:
                mask, record["shape"], record["count"] = held, list(reference["shapes"][name]), sum(held)
            else:
                if record["positions"] == CHANGES:
                    must(list(reference["shapes"][name]) == record["shape"], "other shape")
                mask = mask_of(record["positions"], section, math.prod(record["shape"]), record["count"], held)
        words = values_of(record["values"], body.take(record["value bytes"]), record["count"], record["dtype"], False)
        update["parameters"][name] = {
            "dtype": record["dtype"],
            "shape": record["shape"],
            "mask": mask,
            "bits": words,
        }
    for record in records[1]:
        words = values_of(record["values"], body.take(record["value bytes"]), record["count"], record["dtype"], True)
        update["buffers"][record["name"]] = {"dtype": record["dtype"], "shape": record["shape"], "bits": words}
    shapes = {name: part["shape"] for name, part in update["parameters"].items()}
    masks = {name: part["mask"] for name, part in update["parameters"].items()}
    update["masks id"] = mask_set_id(list(masks), shapes, masks)
    must(travelling is None or travelling == update["masks id"], "other masks than declared")
    return update
