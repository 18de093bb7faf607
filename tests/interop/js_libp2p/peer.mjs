// A js-libp2p peer, driven over standard input and output, a JSON line each way:
//   in:  {"address": multiaddr of the Python host, "key": "Ed25519" | "secp256k1", "echo": protocol}
//   out: {"address": its own multiaddr}                     once it listens
//        with "daemon": true the host is an ngpu-node, which has no echo
//   out: {"ping_ms", "identify", "protocols", ...} or {"error"}   when it is done with the host
// It goes on answering the echo protocol until its standard input ends.
import { createHash, randomBytes } from 'node:crypto'
import { request } from 'node:http'
import { createInterface } from 'node:readline'
import { generateKeyPair } from '@libp2p/crypto/keys'
import { http } from '@libp2p/http'
import { identify } from '@libp2p/identify'
import { noise } from '@libp2p/noise'
import { ping } from '@libp2p/ping'
import { tcp } from '@libp2p/tcp'
import { yamux } from '@libp2p/yamux'
import { multiaddr } from '@multiformats/multiaddr'
import { createLibp2p } from 'libp2p'

const say = (value) => process.stdout.write(JSON.stringify(value) + '\n')
const sha256 = (bytes) => createHash('sha256').update(bytes).digest('hex')

async function readAll (stream) {
  const chunks = []
  for await (const chunk of stream) chunks.push(Buffer.from(chunk.subarray()))
  return Buffer.concat(chunks)
}

async function send (stream, bytes) {
  for (let at = 0; at < bytes.length; at += 60000) {
    if (!stream.send(bytes.subarray(at, at + 60000))) await stream.onDrain()
  }
  await stream.close()
}

const get = (agent, path) => new Promise((resolve, reject) => {
  request({ agent, host: 'peer.example', path }, (answer) => {
    readAll(answer).then((body) => resolve(body.toString()), reject)
  }).on('error', reject).end()
})

async function main (job) {
  const node = await createLibp2p({
    privateKey: await generateKeyPair(job.key),
    addresses: { listen: ['/ip4/127.0.0.1/tcp/0'] },
    transports: [tcp()],
    connectionEncrypters: [noise()],
    streamMuxers: [yamux()],
    connectionGater: { denyDialMultiaddr: () => false }, // js-libp2p does not dial loopback unless told
    services: { identify: identify(), ping: ping(), http: http() }
  })
  await node.handle(job.echo, async (stream) => {
    await send(stream, await readAll(stream))
  })
  say({ address: node.getMultiaddrs()[0].toString() })

  const host = multiaddr(job.address)
  const connection = await node.dial(host)
  const result = { peer: connection.remotePeer.toString() }
  result.ping_ms = await node.services.ping.ping(host)
  const identified = await node.services.identify.identify(connection)
  result.identify = { protocols: identified.protocols, addresses: identified.listenAddrs.map(String) }

  const at = (path) => multiaddr(`${job.address}/http-path/${encodeURIComponent(path)}`)
  if (job.daemon) { // an ngpu-node as it comes: what it mounts, and its refusal of a call without an order
    const result_of = async (answer) => ({
      status: answer.status, refused: answer.headers.get('ngpu-refused'), body: await answer.json()
    })
    result.protocols = await node.services.http.getSupportedProtocols(host)
    result.lost = await result_of(await node.services.http.fetch(at('nowhere')))
    result.ordered = await result_of(
      await node.services.http.fetch(at('ngpu/v1/workspaces/1/ports/8080/'), { method: 'POST', body: 'x' }))
    return say(result)
  }

  const blob = randomBytes(1_000_000)
  const stream = await connection.newStream(job.echo)
  const [echoed] = await Promise.all([readAll(stream), send(stream, blob)])
  result.echo_is_whole = sha256(echoed) === sha256(blob)

  // HTTP with js-libp2p's own client: fetch (a stream each; it drops the query), then a pool of kept streams.
  result.protocols = await node.services.http.getSupportedProtocols(host)
  const hello = await node.services.http.fetch(at('hello/a%20b'))
  result.hello = { status: hello.status, type: hello.headers.get('content-type'), body: await hello.text() }
  const mounted = await node.services.http.fetchProtocol(host, '/test/mounted')
  result.mounted = { status: mounted.status, body: await mounted.text() }
  const missing = await node.services.http.fetch(at('missing'))
  result.missing = missing.status
  const posted = await node.services.http.fetch(at('digest'), { method: 'POST', body: blob })
  result.posted = { status: posted.status, matches: (await posted.json()).sha256 === sha256(blob) }
  const drip = await node.services.http.fetch(at('drip'))
  result.dripped = (await drip.text()).split('\n').filter(Boolean)
  const many = await Promise.all(Array.from({ length: 50 }, async (_, n) => {
    const answer = await node.services.http.fetch(at(`hello/${n}`))
    return await answer.text() === `hello ${n}`
  }))
  result.many = many.filter(Boolean).length

  const agent = node.services.http.agent(host, { keepAlive: true })
  result.kept = []
  for (let n = 0; n < 5; n++) result.kept.push(await get(agent, `/stream-number?${n}`))
  agent.destroy()
  say(result)
}

const lines = createInterface({ input: process.stdin })
lines.once('line', (line) => {
  main(JSON.parse(line)).catch((error) => say({ error: String(error.stack ?? error) }))
})
lines.once('close', () => process.exit(0))
