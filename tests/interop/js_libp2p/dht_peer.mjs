// A js-libp2p peer with its own kad-dht on an NGPU network, driven over standard input and output, a JSON line each way:
//   in:  {"address", "protocol", "chainId", "capability": hex key, "provide": hex key}
//   out: {"address", "peer"}                        once it is connected and its routing table has the host
//   out: {"providers", "record", "sequence"} or {"error"}
//   out: {"provided": true}                         when it has announced itself under the key to provide
// It goes on as a DHT server until its standard input ends.
import { createInterface } from 'node:readline'
import { identify } from '@libp2p/identify'
import { kadDHT, passthroughMapper } from '@libp2p/kad-dht'
import { noise } from '@libp2p/noise'
import { ping } from '@libp2p/ping'
import { tcp } from '@libp2p/tcp'
import { yamux } from '@libp2p/yamux'
import { decode } from '@msgpack/msgpack'
import { multiaddr } from '@multiformats/multiaddr'
import { secp256k1 } from '@noble/curves/secp256k1.js'
import { keccak_256 as keccak } from '@noble/hashes/sha3.js'
import { createLibp2p } from 'libp2p'
import { CID } from 'multiformats/cid'
import * as Digest from 'multiformats/hashes/digest'

const RAW = 0x55
const say = (value) => process.stdout.write(JSON.stringify(value) + '\n')
const hex = (bytes) => Buffer.from(bytes).toString('hex')
const cidOf = (text) => CID.createV1(RAW, Digest.decode(Buffer.from(text, 'hex')))
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms))

// The rules of docs/protocol.md, once more: signature | msgpack, over 19 "NGPU node record:" | chainId | keccak(payload).
function checkedRecord (chainId, key, value) {
  const [signature, payload] = [value.subarray(0, 65), value.subarray(65)]
  const chain = Buffer.alloc(32)
  chain.writeBigUInt64BE(BigInt(chainId), 24)
  const digest = keccak(Buffer.concat([Buffer.from('\x19NGPU node record:', 'latin1'), chain, keccak(payload)]))
  const recovered = Buffer.concat([Buffer.from([signature[64] - 27]), signature.subarray(0, 64)])
  const compressed = secp256k1.recoverPublicKey(recovered, digest, { prehash: false })
  const point = secp256k1.Point.fromBytes(compressed).toBytes(false)
  const signer = hex(keccak(point.subarray(1)).subarray(12))
  const owner = Buffer.from(key).toString().split('/')[3].slice(2).toLowerCase()
  const record = decode(payload)
  if (signer !== owner || hex(record.node) !== owner) throw new Error('not signed by the owner of its key')
  if (record.expires_at_ms <= Date.now()) throw new Error('expired')
  return record
}

async function main (job) {
  const check = (key, value) => checkedRecord(job.chainId, key, value)
  const node = await createLibp2p({
    addresses: { listen: ['/ip4/127.0.0.1/tcp/0'] },
    transports: [tcp()],
    connectionEncrypters: [noise()],
    streamMuxers: [yamux()],
    connectionGater: { denyDialMultiaddr: () => false },
    services: {
      identify: identify(),
      ping: ping(),
      dht: kadDHT({
        protocol: job.protocol,
        clientMode: false,
        peerInfoMapper: passthroughMapper,
        validators: { ngpu: async (key, value) => { check(key, value) } },
        selectors: {
          ngpu: (key, values) => {
            const sequences = values.map((value) => check(key, value).sequence)
            return sequences.indexOf(Math.max(...sequences))
          }
        }
      })
    }
  })
  await node.dial(multiaddr(job.address))
  while (node.services.dht.routingTable.size === 0) await sleep(20)
  say({ address: node.getMultiaddrs()[0].toString(), peer: node.peerId.toString() })

  const providers = []
  for await (const provider of node.contentRouting.findProviders(cidOf(job.capability))) {
    if (!providers.includes(provider.id.toString())) providers.push(provider.id.toString())
  }
  const key = Buffer.from(job.recordKey)
  const value = await node.contentRouting.get(key)
  const record = check(key, value)
  const gpus = (record.gpus ?? []).map((gpu) => gpu.model) // what is at its default is left out
  const addresses = record.addresses ?? []
  say({ providers, record: { peerId: record.peer_id, gpus, addresses }, sequence: record.sequence })
  // A key of a namespace nobody validates; its own validator would refuse it, the hosts must by themselves.
  node.services.dht.validators.ngpu = async () => {}
  await node.contentRouting.put(Buffer.from('/ngpu/other/thing'), value).catch(() => {})
  await node.contentRouting.provide(cidOf(job.provide))
  say({ provided: true })
}

const lines = createInterface({ input: process.stdin })
lines.once('line', (line) => {
  main(JSON.parse(line)).catch((error) => say({ error: String(error.stack ?? error) }))
})
lines.once('close', () => process.exit(0))
