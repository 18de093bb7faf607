// A js-libp2p peer that uses a relay of an NGPU host, driven over standard input and output, a JSON line each way:
//   in:  {"relay", "target"}      multiaddrs: the relay, and a peer behind it (with /p2p-circuit)
//   out: {"address", "peer"}      where this one is reached through the relay, once it has a place there
//   out: {"reached", "relayed", "pings"}  when it has dialled the target through the relay and pinged it
// It goes on until its standard input ends.
import { createInterface } from 'node:readline'
import { circuitRelayTransport } from '@libp2p/circuit-relay-v2'
import { identify } from '@libp2p/identify'
import { noise } from '@libp2p/noise'
import { ping } from '@libp2p/ping'
import { tcp } from '@libp2p/tcp'
import { yamux } from '@libp2p/yamux'
import { multiaddr } from '@multiformats/multiaddr'
import { createLibp2p } from 'libp2p'

const say = (value) => process.stdout.write(JSON.stringify(value) + '\n')
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms))

async function main (job) {
  const node = await createLibp2p({
    addresses: { listen: [`${job.relay}/p2p-circuit`] },
    transports: [tcp(), circuitRelayTransport()],
    connectionEncrypters: [noise()],
    streamMuxers: [yamux()],
    connectionGater: { denyDialMultiaddr: () => false },
    services: {
      identify: identify({ runOnLimitedConnection: true }),
      ping: ping({ runOnLimitedConnection: true })
    }
  })
  const own = () => node.getMultiaddrs().map(String).find((text) => text.includes('/p2p-circuit'))
  while (own() === undefined) await sleep(20)
  say({ address: own(), peer: node.peerId.toString() })
  const connection = await node.dial(multiaddr(job.target))
  const pings = []
  for (let count = 0; count < 3; count++) pings.push(await node.services.ping.ping(connection.remotePeer))
  say({ reached: connection.remotePeer.toString(), relayed: connection.limits !== undefined, pings })
}

const lines = createInterface({ input: process.stdin })
lines.once('line', (line) => {
  main(JSON.parse(line)).catch((error) => say({ error: String(error.stack ?? error) }))
})
lines.once('close', () => process.exit(0))
