// Exercises dstack's published JavaScript SDK against the agent whose sockets are
// named by DSTACK_SIMULATOR_ENDPOINT and TAPPD_SIMULATOR_ENDPOINT. Ends with the line
// "N passed, N failed" and status 1 if anything failed. Every method of the SDK is
// called.
import assert from 'node:assert/strict'
import http from 'node:http'
import { createHash, createPrivateKey, randomBytes, X509Certificate } from 'node:crypto'
import { secp256k1 } from '@noble/curves/secp256k1'
import { ed25519 } from '@noble/curves/ed25519'
import { keccak_256 } from '@noble/hashes/sha3'
import { DstackClient, TappdClient } from '@phala/dstack-sdk'

console.warn = () => {} // the SDK announces its endpoint and deprecations there

const dstackSocket = process.env.DSTACK_SIMULATOR_ENDPOINT
const tappdSocket = process.env.TAPPD_SIMULATOR_ENDPOINT
assert.ok(dstackSocket && tappdSocket, 'set DSTACK_SIMULATOR_ENDPOINT and TAPPD_SIMULATOR_ENDPOINT')

const dstack = new DstackClient()
const tappd = new TappdClient()
let passed = 0
let failed = 0

async function test(name, body) {
  const start = Date.now()
  try {
    const left = await body()
    if (left) {
      console.log(`left out  ${name}: ${left}`)
      return
    }
    passed++
    console.log(`ok        ${name} (${Date.now() - start} ms)`)
  } catch (error) {
    failed++
    console.log(`FAILED    ${name}: ${error.message}`)
  }
}

// The registers and the report data in a quote (TDX DCAP, version 4 layout).
const hex = (bytes) => Buffer.from(bytes).toString('hex')
const rtmrsOf = (quote) => [376, 424, 472, 520].map((at) => Buffer.from(quote, 'hex').subarray(at, at + 48).toString('hex'))
const reportDataOf = (quote) => Buffer.from(quote, 'hex').subarray(568, 632).toString('hex')

function checkQuote(result, reportData) {
  assert.equal(reportDataOf(result.quote), reportData)
  assert.deepEqual(result.replayRtmrs(), rtmrsOf(result.quote))
  for (const event of JSON.parse(result.event_log)) {
    assert.match(event.digest, /^[0-9a-f]{96}$/)
  }
}

// What the SDK hides: emitEvent resolves even when the agent refuses.
function refusal(path, body) {
  return new Promise((resolve, reject) => {
    const request = http.request({ socketPath: dstackSocket, path, method: 'POST', headers: { 'Content-Type': 'application/json' } }, (answer) => {
      let text = ''
      answer.on('data', (chunk) => { text += chunk })
      answer.on('end', () => resolve(answer.statusCode === 200 ? undefined : JSON.parse(text).error))
    })
    request.on('error', reject)
    request.end(JSON.stringify(body))
  })
}

await test('isReachable', async () => {
  assert.equal(await dstack.isReachable(), true)
  assert.equal(await tappd.isReachable(), true)
})

await test('version', async () => {
  const { version, rev } = await dstack.version()
  assert.match(version, /^\d+\.\d+\.\d+/)
  assert.ok(rev)
})

await test('info', async () => {
  const info = await dstack.info()
  for (const key of ['app_id', 'instance_id', 'device_id', 'compose_hash']) assert.match(info[key], /^[0-9a-f]+$/, key)
  for (const key of ['app_cert', 'app_name', 'key_provider_info', 'vm_config']) assert.equal(typeof info[key], 'string', key)
  for (const key of ['mrtd', 'rtmr0', 'rtmr1', 'rtmr2', 'rtmr3']) assert.match(info.tcb_info[key], /^[0-9a-f]{96}$/, key)
  for (const key of ['mr_aggregated', 'os_image_hash', 'compose_hash', 'device_id', 'app_compose']) assert.equal(typeof info.tcb_info[key], 'string', key)
  assert.ok(info.tcb_info.event_log.length > 0)
})

await test('getQuote and replayRtmrs', async () => {
  const result = await dstack.getQuote('test')
  checkQuote(result, Buffer.from('test').toString('hex').padEnd(128, '0'))
  assert.equal(result.report_data, reportDataOf(result.quote))
  assert.equal(typeof result.vm_config, 'string')
})

await test('getQuote with 64 bytes', async () => {
  const data = randomBytes(64)
  checkQuote(await dstack.getQuote(data), data.toString('hex'))
})

await test('attest', async () => {
  const { attestation } = await dstack.attest('test')
  assert.match(attestation, /^(00|8[0-9a-f]|de|df)[0-9a-f]{2000,}$/)
})

await test('emitEvent', async () => {
  const name = `sdktest-${randomBytes(4).toString('hex')}`
  const why = await refusal('/EmitEvent', { event: `${name}-probe`, payload: '00' })
  if (why?.includes('not allowed')) return why
  assert.equal(why, undefined)
  await dstack.emitEvent(name, 'payload')
  const result = await dstack.getQuote('after the event')
  const last = JSON.parse(result.event_log).at(-1)
  assert.equal(last.event, name)
  assert.equal(last.event_payload, Buffer.from('payload').toString('hex'))
  assert.deepEqual(result.replayRtmrs(), rtmrsOf(result.quote))
})

await test('emitEvent refuses reserved names', async () => {
  assert.ok(await refusal('/EmitEvent', { event: 'app-id', payload: '00' }))
})

await test('tappd tdxQuote', async () => {
  const want = createHash('sha512').update('app-data:test').digest('hex')
  const result = await tappd.tdxQuote('test')
  checkQuote(result, want)
  assert.equal(result.hash_algorithm, 'sha512')
  assert.equal(result.prefix, 'app-data')
})

await test('tappd tdxQuote with each hash', async () => {
  for (const name of ['sha256', 'sha384', 'sha512', 'sha3-256', 'sha3-384', 'sha3-512']) {
    const want = createHash(name).update('app-data:test').digest('hex').padEnd(128, '0')
    checkQuote(await tappd.tdxQuote('test', name), want)
  }
  for (const name of ['keccak256', 'keccak384', 'keccak512']) {
    assert.equal((await tappd.tdxQuote('test', name)).hash_algorithm, name)
  }
})

await test('tappd tdxQuote raw', async () => {
  checkQuote(await tappd.tdxQuote('test', 'raw'), Buffer.from('test').toString('hex').padStart(128, '0'))
})

await test('errors reach the caller', async () => {
  await assert.rejects(tappd.tdxQuote('test', 'md5'), /invalid hash algorithm/)
})

// signedBy returns the key that made one signature of a chain, in hex.
function signedBy(text, signature) {
  assert.equal(signature.length, 65)
  return secp256k1.Signature.fromCompact(signature.slice(0, 64)).addRecoveryBit(signature[64]).recoverPublicKey(keccak_256(Buffer.from(text))).toHex(true)
}

await test('getKey', async () => {
  const result = await dstack.getKey('/my/path', 'test')
  assert.equal(result.key.length, 32)
  assert.equal(result.signature_chain.length, 2)
  const again = await dstack.getKey('/my/path', 'other')
  assert.equal(hex(again.key), hex(result.key))
  assert.notEqual(hex((await dstack.getKey('/my/other')).key), hex(result.key))
  // The same application key signs for every purpose.
  const publicKey = hex(secp256k1.getPublicKey(result.key))
  assert.equal(signedBy(`test:${publicKey}`, result.signature_chain[0]), signedBy(`other:${publicKey}`, again.signature_chain[0]))
})

await test('getKey with each algorithm', async () => {
  const first = await dstack.getKey('a', 'p', 'secp256k1')
  const alias = await dstack.getKey('a', 'p', 'k256')
  const edwards = await dstack.getKey('a', 'p', 'ed25519')
  assert.equal(hex(alias.key), hex(first.key))
  assert.equal(hex(edwards.key), hex(first.key))
  assert.equal(signedBy(`p:${hex(ed25519.getPublicKey(edwards.key))}`, edwards.signature_chain[0]),
    signedBy(`p:${hex(secp256k1.getPublicKey(first.key))}`, first.signature_chain[0]))
  await assert.rejects(dstack.getKey('a', 'p', 'rsa'))
})

// checkTLSKey holds a key and its chain together.
function checkTLSKey(result) {
  const chain = result.certificate_chain.map((pem) => new X509Certificate(pem))
  assert.equal(chain.length, 2)
  assert.ok(chain[0].checkPrivateKey(createPrivateKey(result.key)))
  assert.ok(chain[0].verify(chain[1].publicKey))
  assert.ok(result.asUint8Array(32).length === 32)
  return chain[0]
}

await test('getTlsKey', async () => {
  const result = await dstack.getTlsKey({ subject: 'sdktest', altNames: ['a.example', '127.0.0.1'], usageServerAuth: true, usageClientAuth: true })
  const leaf = checkTLSKey(result)
  assert.equal(leaf.subject, 'CN=sdktest')
  assert.equal(leaf.subjectAltName, 'DNS:a.example, IP Address:127.0.0.1')
  assert.deepEqual(leaf.keyUsage, ['1.3.6.1.5.5.7.3.1', '1.3.6.1.5.5.7.3.2'])
  assert.notEqual((await dstack.getTlsKey()).key, result.key)
})

await test('getTlsKey with evidence, dates and application info', async () => {
  const leaf = checkTLSKey(await dstack.getTlsKey({ usageRaTls: true, notBefore: 1600000000, notAfter: 4000000000, withAppInfo: true }))
  assert.equal(new Date(leaf.validFrom).getTime(), 1600000000000)
  assert.equal(new Date(leaf.validTo).getTime(), 4000000000000)
  const der = leaf.raw.toString('hex')
  for (const last of ['01', '02', '04', '08', '09']) {
    assert.ok(der.includes('060a2b0601040183e73d01' + last), `extension .${Number(last)} is missing`)
  }
  const bound = createHash('sha512').update('ratls-cert:').update(leaf.publicKey.export({ type: 'spki', format: 'der' })).digest('hex')
  assert.ok(der.includes(bound), 'no quote of this key')
})

await test('sign and verify', async () => {
  const digest = createHash('sha256').update('data').digest()
  for (const [algorithm, data] of [['ed25519', 'data'], ['secp256k1', 'data'], ['secp256k1_prehashed', digest]]) {
    const signed = await dstack.sign(algorithm, data)
    assert.equal(signed.signature_chain.length, 3)
    assert.equal(hex(signed.signature_chain[0]), hex(signed.signature))
    assert.equal((await dstack.verify(algorithm, data, signed.signature, signed.public_key)).valid, true)
    assert.equal((await dstack.verify(algorithm, createHash('sha256').update('other').digest(), signed.signature, signed.public_key)).valid, false)
    const ok = algorithm === 'ed25519' ? ed25519.verify(signed.signature, Buffer.from('data'), signed.public_key) : secp256k1.verify(signed.signature, digest, signed.public_key)
    assert.ok(ok, `${algorithm}: another library refuses the signature`)
  }
  assert.match(await refusal('/Sign', { algorithm: 'secp256k1_prehashed', data: '00' }), /^Pre-hashed signing requires a 32-byte digest, but received 1 bytes$/)
  await assert.rejects(dstack.sign('rsa', 'data'))
})

await test('the application certificate in info', async () => {
  for (let i = 0; i < 50; i++) {
    const { app_cert } = await dstack.info()
    if (app_cert) {
      const leaf = new X509Certificate(app_cert)
      assert.equal(leaf.subject, 'CN=demo-cert')
      assert.deepEqual(leaf.keyUsage, ['1.3.6.1.5.5.7.3.2'])
      return
    }
    await new Promise((resolve) => setTimeout(resolve, 100))
  }
  if (process.env.SDKTEST_NO_CERTIFICATE) return 'this server makes none'
  assert.fail('app_cert is empty after five seconds')
})

await test('tappd deriveKey', async () => {
  const first = await tappd.deriveKey('/', 'sdktest', ['a.example'])
  const leaf = checkTLSKey(first)
  assert.equal(leaf.subjectAltName, 'DNS:a.example')
  assert.equal((await tappd.deriveKey('/', 'other')).key, first.key)
  assert.notEqual((await tappd.deriveKey('/other')).key, first.key)
})

await test('deriveKey and tdxQuote of DstackClient are refused by the SDK', async () => {
  await assert.rejects(dstack.deriveKey('/'))
  await assert.rejects(dstack.tdxQuote('test', 'sha256'))
})

await test('ten calls at once', async () => {
  const results = await Promise.all(Array.from({ length: 10 }, (_, i) => dstack.getQuote(`call ${i}`)))
  results.forEach((result, i) => checkQuote(result, Buffer.from(`call ${i}`).toString('hex').padEnd(128, '0')))
})

console.log(`${passed} passed, ${failed} failed`)
process.exitCode = failed > 0 ? 1 : 0
