"""Exercises dstack's published Python SDK.

The agent's sockets are named by DSTACK_SIMULATOR_ENDPOINT and TAPPD_SIMULATOR_ENDPOINT.
Ends with the line "N passed, N failed" and status 1 if anything failed. Every method of
the SDK's clients is called, of the synchronous and of the asynchronous ones.
"""

import asyncio
import hashlib
import inspect
import json
import ssl
import sys
import tempfile
import warnings

import httpx
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from dstack_sdk import AsyncDstackClient, AsyncTappdClient, DstackClient, TappdClient

warnings.simplefilter("ignore", DeprecationWarning)
called = {cls: set() for cls in (DstackClient, AsyncDstackClient, TappdClient, AsyncTappdClient)}
passed = failed = 0


class Recorded:
    """A client that notes which of its methods are called, and awaits what must be."""

    def __init__(self, client):
        self.client = client

    def __getattr__(self, name):
        called[type(self.client)].add(name)
        method = getattr(self.client, name)

        async def call(*args, **kwargs):
            result = method(*args, **kwargs)
            return await result if inspect.isawaitable(result) else result

        return call


async def test(name, body):
    global passed, failed
    try:
        await body()
        passed += 1
        print(f"ok        {name}")
    except Exception as error:  # a test's failure, whatever it is
        failed += 1
        print(f"FAILED    {name}: {type(error).__name__}: {error}")


async def refused(call, kind, words=""):
    """Demand that awaiting call raises an error of this kind with these words."""
    try:
        await call
    except kind as error:
        text = error.response.text if isinstance(error, httpx.HTTPStatusError) else str(error)
        assert words in text, f"{text!r} lacks {words!r}"
        return
    raise AssertionError(f"no {kind.__name__} with {words!r}")


def registers(quote):
    """The RTMRs of a quote (TDX DCAP, version 4 layout)."""
    return {i: quote[376 + 48 * i : 424 + 48 * i].hex() for i in range(4)}


def check_quote(result, report_data):
    quote = result.decode_quote()
    assert quote[568:632] == report_data
    assert result.replay_rtmrs() == registers(quote)
    assert all(len(e.digest) == 96 for e in result.decode_event_log())


def check_tls_key(result):
    """Python's own TLS takes key and chain, and they belong together."""
    key = load_pem_private_key(result.key.encode(), None)
    chain = [x509.load_pem_x509_certificate(text.encode()) for text in result.certificate_chain]
    assert len(chain) == 2 and chain[0].public_key() == key.public_key()
    chain[0].verify_directly_issued_by(chain[1])
    with tempfile.NamedTemporaryFile("w") as f:
        f.write(result.key + "\n" + "\n".join(result.certificate_chain))
        f.flush()
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(f.name)
    return chain[0]


async def dstack(label, client):
    c = Recorded(client)

    async def get_key():
        one, two, other = await c.get_key("/a", "p"), await c.get_key("/a", "q"), await c.get_key()
        assert len(one.decode_key()) == 32 and one.key == two.key != other.key
        chain = one.decode_signature_chain()
        assert len(chain) == 2 and len(chain[0]) == 65 and one.signature_chain[0] != two.signature_chain[0]
        assert (await c.get_key("/a", "p", "ed25519")).key == one.key
        assert (await c.get_key("/a", "p", "k256")).signature_chain == one.signature_chain
        await refused(c.get_key("/a", "p", "rsa"), httpx.HTTPStatusError, "Unsupported algorithm")

    async def get_quote():
        check_quote(await c.get_quote("test"), b"test".ljust(64, b"\0"))
        full = await c.get_quote(bytes(range(64)))
        check_quote(full, bytes(range(64)))
        assert full.report_data == bytes(range(64)).hex() and json.loads(full.vm_config) is not None
        await refused(c.get_quote(b""), ValueError)
        await refused(c.get_quote(b"x" * 65), ValueError)

    async def attest():
        assert (await c.attest("test")).decode_attestation()[0] == 0
        await refused(c.attest(""), ValueError)

    async def info():
        i = await c.info()
        assert len(i.app_id) == 40 and len(i.instance_id) == 40
        assert i.compose_hash == hashlib.sha256(i.tcb_info.app_compose.encode()).hexdigest() == i.tcb_info.compose_hash
        assert i.tcb_info.event_log and json.loads(i.key_provider_info)["name"] == "none"

    async def emit_event():
        await c.emit_event(f"python-{label}", "payload")
        q = await c.get_quote("after")
        check_quote(q, b"after".ljust(64, b"\0"))
        assert [e.event_payload for e in q.decode_event_log() if e.event == f"python-{label}"][-1:] == [b"payload".hex()]
        await refused(c.emit_event("", "x"), ValueError)
        await refused(c.emit_event("app-id", "x"), httpx.HTTPStatusError, "reserved")

    async def get_tls_key():
        one = await c.get_tls_key("Zähler", ["localhost", "10.0.0.1"], True, True, True, not_before=1000, not_after=4000000000, with_app_info=True)
        leaf = check_tls_key(one)
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert leaf.subject.rfc4514_string() == "CN=Zähler" and names.get_values_for_type(x509.DNSName) == ["localhost"]
        assert leaf.not_valid_before_utc.timestamp() == 1000 and leaf.not_valid_after_utc.timestamp() == 4000000000
        oids = {e.oid.dotted_string for e in leaf.extensions}
        assert {f"1.3.6.1.4.1.62397.1.{n}" for n in (1, 2, 4, 8, 9)} <= oids
        two = await c.get_tls_key()
        check_tls_key(two)
        assert two.key != one.key and len(one.as_uint8array()) == 138 and len(one.as_uint8array(32)) == 32
        await refused(c.get_tls_key(not_before=2, not_after=1), httpx.HTTPStatusError, "not_before must be earlier than not_after")

    async def sign_and_verify():
        for algorithm in ("ed25519", "secp256k1", "secp256k1_prehashed"):
            data = hashlib.sha256(algorithm.encode()).digest()
            s = await c.sign(algorithm, data)
            assert len(s.decode_signature()) == 64 and len(s.decode_signature_chain()) == 3
            assert (await c.verify(algorithm, data, s.decode_signature(), s.decode_public_key())).valid
            assert not (await c.verify(algorithm, bytes(32), s.decode_signature(), s.decode_public_key())).valid
        await refused(c.sign("secp256k1_prehashed", b"short"), ValueError, "32-byte digest")
        await refused(c.sign("rsa", b"x"), httpx.HTTPStatusError, "Unsupported algorithm")

    async def version():
        v = await c.version()
        assert v.version and v.rev

    async def is_reachable():
        assert await c.is_reachable()

    for body in (get_key, get_quote, attest, info, emit_event, get_tls_key, sign_and_verify, version, is_reachable):
        await test(f"{label} {body.__name__}", body)


async def tappd(label, client):
    c = Recorded(client)

    async def derive_key():
        one, two, other = await c.derive_key("/a"), await c.derive_key("/a", "s", ["localhost"]), await c.derive_key("/b")
        assert one.key == two.key != other.key
        check_tls_key(one)

    async def tdx_quote():
        hashed = await c.tdx_quote("test", "sha512")
        assert hashed.decode_quote()[568:632] == hashlib.sha512(b"app-data:test").digest()
        assert hashed.replay_rtmrs() == registers(hashed.decode_quote())
        raw = await c.tdx_quote(b"x", "raw")  # the SDK pads on the left
        assert raw.decode_quote()[568:632] == b"x".rjust(64, b"\0")
        await refused(c.tdx_quote("test", "md5"), httpx.HTTPStatusError, "invalid hash algorithm")

    async def info():
        assert len((await c.info()).app_id) == 40

    for body in (derive_key, tdx_quote, info):
        await test(f"{label} {body.__name__}", body)


async def connections():
    """A client that keeps its connection, over more requests than one."""
    c = DstackClient()
    with c:
        for _ in range(3):
            assert c.info().app_id
    async with AsyncDstackClient() as c:
        for _ in range(3):
            assert (await c.info()).app_id


async def all_called():
    """Every public method of every client was called; Tappd's inherit those of dstack."""
    for cls, names in called.items():
        own = cls.__dict__ if "Tappd" in cls.__name__ else dir(cls)
        public = {n for n in own if not n.startswith("_") and callable(getattr(cls, n))}
        assert public <= names, f"{cls.__name__}: {sorted(public - names)} were not called"


async def main():
    await dstack("sync", DstackClient())
    await dstack("async", AsyncDstackClient())
    await tappd("tappd sync", TappdClient())
    await tappd("tappd async", AsyncTappdClient())
    await test("kept connections", connections)
    await test("every method", all_called)
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0)


asyncio.run(main())
