// Reads one JSON object from stdin:
//   { chainId, privateKey, records: [{ type, message, signature }] }
// where type is an EIP-712 type text such as "Acknowledgement(bytes32 receiptHash,...)", and answers with what ethers makes
// of it: its own hashes, the signer it recovers from the signature, and its own signature with the private key.

import { SigningKey, TypedDataEncoder, Wallet, verifyTypedData } from "ethers";

const chunks = [];
for await (const chunk of process.stdin) chunks.push(chunk);
const { chainId, privateKey, records } = JSON.parse(Buffer.concat(chunks).toString("utf8"));

const domain = { name: "NGPU", version: "1", chainId };
const wallet = new Wallet(privateKey);

const answers = [];
for (const { type, message, signature } of records) {
  const [, name, members] = /^(\w+)\((.*)\)$/.exec(type);
  const types = {
    [name]: members.split(",").map((member) => {
      const [kind, field] = member.split(" ");
      return { name: field, type: kind };
    }),
  };
  answers.push({
    structHash: TypedDataEncoder.hashStruct(name, types, message),
    digest: TypedDataEncoder.hash(domain, types, message),
    signer: verifyTypedData(domain, types, message, signature),
    signature: await wallet.signTypedData(domain, types, message),
  });
}

process.stdout.write(
  JSON.stringify({
    address: wallet.address,
    publicKey: SigningKey.computePublicKey(privateKey, true),
    domainSeparator: TypedDataEncoder.hashDomain(domain),
    records: answers,
  }),
);
