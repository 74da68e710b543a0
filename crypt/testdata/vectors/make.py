"""Writes format1.txt, and with "shared" format1-shared.txt, from docs/FORMAT.md alone, with Python's cryptography
package: an independent check that the Go code does what the document says.

    python3 make.py > format1.txt
    python3 make.py shared > format1-shared.txt
"""
import hashlib
import hmac
import struct
import sys

from cryptography.hazmat.primitives.ciphers.aead import AESGCM


def crc32c(data):
    crc = 0xFFFFFFFF
    for b in data:
        crc ^= b
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def expand(prk, info, n):
    out, t, i = b"", b"", 1
    while len(out) < n:
        t = hmac.new(prk, t + info + bytes([i]), hashlib.sha256).digest()
        out, i = out + t, i + 1
    return out[:n]


data_key = bytes(range(0x60, 0x80))
volume_id, file_id = bytes(range(16)), bytes(range(16, 32))
shared = sys.argv[1:] == ["shared"]
bound = b"KMSF" + bytes([1, 1, 1 if shared else 0, 0, 12, 1]) + struct.pack("<H", 1) + volume_id + file_id
held = data_key  # what a copy holds
if shared:
    ikm = hmac.new(file_id[:14] + bytes(2), held, hashlib.sha256).digest()
    data_key = expand(ikm, bytes([8]) + b"file-key" + bytes([len(bound)]) + bound, 32)
prk = hmac.new(file_id, data_key, hashlib.sha256).digest()


def key(label, extra=b"", n=32):
    return expand(prk, bytes([len(label)]) + label + bytes([len(bound)]) + bound + extra, n)


commitment = key(b"commit")
name = (bytes([1, 0, 9]) + b"us-east-1" + (111122223333).to_bytes(5, "big")
        + bytes.fromhex("1234abcd12ab34cd56ef1234567890ab"))
blob = b"wrapped"
header = bound + commitment + bytes([1, 1, len(name)]) + name + struct.pack("<H", len(blob)) + blob + bytes(3)
header += struct.pack("<H", len(header) + 6)
header += struct.pack("<I", crc32c(header))
mark = hmac.new(key(b"sparse"), bound + commitment, hashlib.sha256).digest()


def record(block, plain, epoch):
    e = struct.pack("<I", epoch)
    nonce = hashlib.sha256(b"nonce %d" % block).digest()[:12]
    return e + nonce + AESGCM(key(b"block", e)).encrypt(nonce, plain, struct.pack("<Q", block))


plain = b"".join(hashlib.sha256(b"%d" % i).digest() for i in range(260))[:8222]
stored = record(0, plain[:4096], 7) + record(1, plain[4096:8192], 0xFFFFFFFF) + record(2, plain[8192:], 7)
for k, v in (("data-key", held), ("header", header), ("sparse", mark), ("stored", stored), ("plain", plain)):
    print(k + ": " + v.hex())
