// Exercises dstack's published JavaScript SDK against the agent whose sockets are
// named by DSTACK_SIMULATOR_ENDPOINT and TAPPD_SIMULATOR_ENDPOINT. Ends with the line
// "N passed, N failed" and status 1 if anything failed. Only methods that need no key
// material are called.
import assert from 'node:assert/strict'
import http from 'node:http'
import { createHash, randomBytes } from 'node:crypto'
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

await test('ten calls at once', async () => {
  const results = await Promise.all(Array.from({ length: 10 }, (_, i) => dstack.getQuote(`call ${i}`)))
  results.forEach((result, i) => checkQuote(result, Buffer.from(`call ${i}`).toString('hex').padEnd(128, '0')))
})

console.log(`${passed} passed, ${failed} failed`)
process.exitCode = failed > 0 ? 1 : 0
